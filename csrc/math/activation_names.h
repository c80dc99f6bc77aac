// The names of the activations, and the step from a run-time value to a compile-time one.
#pragma once

namespace biasloss {

// OP(name) for every activation, in the order of their numbers, which are those of biasloss_ext/ops/maps.py.
#define BIASLOSS_ACTIVATIONS(OP) \
  OP(identity)                   \
  OP(relu)                       \
  OP(relu6)                      \
  OP(hardswish)                  \
  OP(silu)                       \
  OP(hardsigmoid)                \
  OP(sigmoid)                    \
  OP(gelu)                       \
  OP(gelu_tanh)

enum class Activation : int {
#define BIASLOSS_ENUMERATOR(name) name,
  BIASLOSS_ACTIVATIONS(BIASLOSS_ENUMERATOR)
#undef BIASLOSS_ENUMERATOR
};

// Calls f with the activation as a compile-time constant: f(ActivationConstant<a>()).
template <Activation a>
struct ActivationConstant {
  static constexpr Activation value = a;
};

template <class F>
auto with_activation(Activation activation, F&& f) {
  switch (activation) {
#define BIASLOSS_CASE(name) \
  case Activation::name:    \
    return f(ActivationConstant<Activation::name>());
    BIASLOSS_ACTIVATIONS(BIASLOSS_CASE)
#undef BIASLOSS_CASE
  }
  return f(ActivationConstant<Activation::identity>());
}

}  // namespace biasloss

// The names of the activations, and the step from a run-time value to a compile-time one.
#pragma once

namespace biasloss {

// The numbers are those of biasloss_ext/ops/maps.py.
enum class Activation : int { identity, relu, relu6, hardswish, silu, hardsigmoid, sigmoid, gelu, gelu_tanh };

// Calls f with the activation as a compile-time constant: f(ActivationConstant<a>()).
template <Activation a>
struct ActivationConstant {
  static constexpr Activation value = a;
};

template <class F>
auto with_activation(Activation activation, F&& f) {
  switch (activation) {
    case Activation::relu:
      return f(ActivationConstant<Activation::relu>());
    case Activation::relu6:
      return f(ActivationConstant<Activation::relu6>());
    case Activation::hardswish:
      return f(ActivationConstant<Activation::hardswish>());
    case Activation::silu:
      return f(ActivationConstant<Activation::silu>());
    case Activation::hardsigmoid:
      return f(ActivationConstant<Activation::hardsigmoid>());
    case Activation::sigmoid:
      return f(ActivationConstant<Activation::sigmoid>());
    case Activation::gelu:
      return f(ActivationConstant<Activation::gelu>());
    case Activation::gelu_tanh:
      return f(ActivationConstant<Activation::gelu_tanh>());
    default:
      return f(ActivationConstant<Activation::identity>());
  }
}

}  // namespace biasloss

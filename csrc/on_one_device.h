// A guard in front of every op: its tensors lie on one device. A kernel that is handed a pointer to another device's
// memory reads what it must not, and on a GPU takes the process's context with it.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/DeviceType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "op_types.h"

namespace biasloss {

// Text as a template argument.
template <size_t size>
struct Text {
  char characters[size];
  constexpr Text(const char (&text)[size]) { std::copy_n(text, size, characters); }
  constexpr std::string_view view() const { return {characters, size - 1}; }
};

// Words stand one space apart.
constexpr size_t count_words(std::string_view text) {
  return text.empty() ? 0 : 1 + static_cast<size_t>(std::count(text.begin(), text.end(), ' '));
}

inline std::string word_of(std::string_view text, size_t index) {
  for (; index > 0; --index) text.remove_prefix(text.find(' ') + 1);
  return std::string(text.substr(0, text.find(' ')));
}

inline std::string device_name(const Tensor& t) {
  switch (t.device().type()) {
    case torch::headeronly::DeviceType::CPU:
      return "cpu";
    case torch::headeronly::DeviceType::CUDA:
      return "cuda:" + std::to_string(t.get_device_index());
    case torch::headeronly::DeviceType::Meta:
      return "meta";
    default:
      return "a device of type " + std::to_string(static_cast<int>(t.device().type()));
  }
}

// Compares the devices of an op's tensors with the first one's, as they are shown to it one by one.
class DeviceComparison {
 public:
  DeviceComparison(std::string_view op, std::string_view names) : op_(op), names_(names) {}

  void show(const Tensor& t) {
    if (first_ == nullptr) {
      first_ = &t;
      first_index_ = shown_;
      on_cpu_ = t.is_cpu();
    } else if (on_cpu_ ? !t.is_cpu() : t.device() != first_->device()) {
      refuse(t);
    }
    ++shown_;
  }

  void show(const OptionalTensor& t) {
    if (t.has_value())
      show(*t);
    else
      ++shown_;
  }

  void show(const std::vector<Tensor>& list) {
    for (const Tensor& t : list) {
      show(t);
      --shown_;  // a list has one name
    }
    ++shown_;
  }

  template <class T>
  void show(const T&) {}

 private:
  [[noreturn]] void refuse(const Tensor& t) const {
    STD_TORCH_CHECK(false, op_, ": expected all tensors on one device, got ", word_of(names_, first_index_), " on ",
                    device_name(*first_), " and ", word_of(names_, shown_), " on ", device_name(t));
    std::abort();  // the check above has thrown
  }

  std::string_view op_, names_;
  const Tensor* first_ = nullptr;
  size_t first_index_ = 0, shown_ = 0;
  bool on_cpu_ = false;
};

template <class T>
constexpr bool kIsTensor =
    std::is_same_v<T, Tensor> || std::is_same_v<T, OptionalTensor> || std::is_same_v<T, std::vector<Tensor>>;

// `names`: of the tensors among the arguments, optional ones included, in their order.
template <Text op, Text names, auto function>
struct OnOneDevice;

template <Text op, Text names, class Result, class... Arguments, Result (*function)(Arguments...)>
struct OnOneDevice<op, names, function> {
  static_assert(count_words(names.view()) == (size_t(kIsTensor<Arguments>) + ...), "name every tensor of the op");

  static Result call(Arguments... arguments) {
    DeviceComparison comparison(op.view(), names.view());
    (comparison.show(arguments), ...);
    return function(std::move(arguments)...);
  }
};

}  // namespace biasloss

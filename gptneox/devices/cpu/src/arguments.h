// SPDX-License-Identifier: Apache-2.0
// Arguments from Python: dispatch on dtype, checks of shape.
#pragma once

#include <ATen/ATen.h>

#include <optional>

#include "tile.h"

namespace gptneox {

// Call `body` with a zero of the C++ type of `type`: float, Half or BFloat16. Raises TypeError.
template <typename Body>
void with_type(at::ScalarType type, Body&& body) {
  switch (type) {
    case at::kFloat:
      return body(float{});
    case at::kHalf:
      return body(c10::Half{});
    case at::kBFloat16:
      return body(c10::BFloat16{});
    default:
      TORCH_CHECK_TYPE(
          false, "dtype ", type, " is not served; float32, float16 or bfloat16 is expected");
  }
}

// As `with_type` for the dtype of a cache or of a weight, which may also be int8_t. Raises TypeError.
template <typename Body>
void with_stored_type(at::ScalarType type, Body&& body) {
  if (type == at::kChar) {
    return body(int8_t{});
  }
  with_type(type, body);
}

// As `with_stored_type` for packed weights, which may also be Int4. Raises TypeError.
template <typename Body>
void with_weight_type(at::ScalarType type, Body&& body) {
  if (type == at::kByte) {
    return body(Int4{});
  }
  with_stored_type(type, body);
}

// x [any, width] as contiguous fp32. Raises ValueError.
inline at::Tensor check_rows(const at::Tensor& x, int64_t width, const char* name) {
  TORCH_CHECK_VALUE(
      x.dim() == 2 && x.size(1) == width, name, " has shape ", x.sizes(), "; [any, ", width,
      "] is expected");
  return x.to(at::kFloat).contiguous();
}

// The data of a bias [features], fp32; null without a bias. Raises ValueError.
inline const float* bias_of(const std::optional<at::Tensor>& bias, int64_t features) {
  if (!bias) {
    return nullptr;
  }
  TORCH_CHECK_VALUE(
      bias->dim() == 1 && bias->numel() == features && bias->is_contiguous(), "bias has shape ",
      bias->sizes(), "; [", features, "] without gaps is expected");
  return bias->const_data_ptr<float>();
}

} // namespace gptneox

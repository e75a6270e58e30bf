// SPDX-License-Identifier: Apache-2.0
// A linear layer with packed weights.
#pragma once

#include <ATen/ATen.h>

#include <memory>
#include <optional>

#include "arguments.h"
#include "packing.h"
#include "product.h"
#include "rows.h"

namespace gptneox {

// x [T, K] of any float type; returns act(x W.T + bias), fp32 [T, F]. `activation` is a value of
// Activation. Raises ValueError.
inline at::Tensor linear(
    const at::Tensor& x,
    const std::shared_ptr<Packed>& weight,
    const std::optional<at::Tensor>& bias,
    int activation) {
  const at::Tensor rows = check_rows(x, weight->depth, "x");
  at::Tensor y = at::empty({rows.size(0), weight->features}, rows.options());
  if (rows.size(0) == 0) {
    return y;
  }
  with_weight_type(weight->panels.scalar_type(), [&](auto zero) {
    using F = Format<decltype(zero)>;
    auto& blocks = scratch<F>(0);
    fill_blocks(blocks, rows, form_for<F>(*weight, rows.size(0)));
    Output<F> out;
    out.terms = {{weight.get(), &blocks}};
    out.bias = bias_of(bias, weight->features);
    out.activation = static_cast<Activation>(activation);
    out.y = y.data_ptr<float>();
    multiply<F>({out});
  });
  return y;
}

} // namespace gptneox

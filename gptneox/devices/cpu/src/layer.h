// SPDX-License-Identifier: Apache-2.0
// A decoder layer in two calls, one before and one after attention.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "arguments.h"
#include "memory.h"
#include "norm.h"
#include "packing.h"
#include "product.h"
#include "rows.h"
#include "team.h"

namespace gptneox {

// A decoder layer with parallel residual: x + attention(LN1(x)) + mlp(LN2(x)).
// C is the hidden size, W the width of attention and F that of the MLP, on this rank.
struct Layer {
  Norm norms[2];
  std::shared_ptr<Packed> qkv, up, dense, down;
  std::optional<at::Tensor> qkv_bias, up_bias, out_bias; // fp32
  float eps;
  Activation activation;

  void check() const {
    const int64_t width = qkv->depth;
    bool fits = up->depth == width && dense->features == width && down->features == width;
    for (const Norm& norm : norms) {
      fits = fits && norm.scale.numel() == width && norm.shift.numel() == width;
    }
    for (const auto& weight : {up, dense, down}) {
      fits = fits && weight->panels.scalar_type() == qkv->panels.scalar_type();
    }
    TORCH_CHECK_VALUE(fits, "the weights of a layer differ in width or dtype");
  }

  // Both products of `back` add up in one tile, so both use the same kernels.
  template <typename F>
  bool back_is_blocked(int64_t rows) const {
    return is_blocked<F>(rows, std::min(dense->depth, down->depth));
  }

  // Before attention: x fp32 [T, C] to qkv fp32 [T, 3W] and the activated MLP, in row blocks of
  // [T, F] as int32 [num_scalars], for `back`. The next call reuses the memory of both once the
  // caller has dropped them.
  std::pair<at::Tensor, at::Tensor> front(const at::Tensor& x) const {
    const at::Tensor rows = check_rows(x, qkv->depth, "x");
    const int64_t count = rows.size(0), width = rows.size(1);
    at::Tensor y = workspace(0, {count, qkv->features}, at::kFloat);
    at::Tensor mlp;
    with_weight_type(qkv->panels.scalar_type(), [&](auto zero) {
      using F = Format<decltype(zero)>;
      RowBlocks<F>* blocks[2] = {&scratch<F>(0), &scratch<F>(1)};
      for (auto* each : blocks) {
        each->resize(count, width, is_blocked<F>(count, width));
      }
      const float* data = rows.const_data_ptr<float>();
      for_ranges(blocks[0]->num_blocks(), 1, [&](int64_t begin, int64_t end) {
        const int64_t height = blocks[0]->height;
        std::vector<float> normed(height * width);
        std::vector<Moments> row_moments(height);
        for (int64_t b = begin; b < end; ++b) {
          const int num_rows = blocks[0]->rows_of(b);
          const float* from = data + b * height * width;
          for (int i = 0; i < 2; ++i) {
            for (int r = 0; r < num_rows; ++r) {
              if (i == 0) {
                row_moments[r] = moments(from + r * width, width, eps);
              }
              normalise(from + r * width, norms[i], row_moments[r], normed.data() + r * width);
            }
            blocks[i]->fill(b, normed.data(), width, width);
          }
        }
      });
      Output<F> first, second;
      first.terms = {{qkv.get(), blocks[0]}};
      first.bias = bias_of(qkv_bias, qkv->features);
      first.y = y.data_ptr<float>();
      second.terms = {{up.get(), blocks[1]}};
      second.bias = bias_of(up_bias, up->features);
      second.activation = activation;
      using Scalar = typename F::Scalar;
      static_assert(sizeof(Scalar) == sizeof(int32_t));
      mlp = workspace(
          1, {RowBlocks<F>::num_scalars(count, up->features, back_is_blocked<F>(count))}, at::kInt);
      if (round_up(up->features, kCols) < round_up(up->features, kDepth)) {
        mlp.zero_(); // the panels end before the padded K of the next product
      }
      RowBlocks<F> packed;
      packed.bind(
          reinterpret_cast<Scalar*>(mlp.data_ptr<int32_t>()), count, up->features,
          back_is_blocked<F>(count));
      second.packed = &packed;
      multiply<F>({first, second});
    });
    return {y, mlp};
  }

  // After attention: attended [T, W] and the `mlp` of `front` to fp32 [T, C]. With `residual` the
  // result is added to it in place; without, this is the partial sum of a rank.
  at::Tensor back(
      const at::Tensor& attended,
      const at::Tensor& mlp,
      const std::optional<at::Tensor>& residual) const {
    const at::Tensor a = check_rows(attended, dense->depth, "attended");
    at::Tensor y = residual ? *residual : at::empty({a.size(0), dense->features}, a.options());
    TORCH_CHECK_VALUE(
        y.dim() == 2 && y.is_contiguous() && y.scalar_type() == at::kFloat &&
            y.size(0) == a.size(0) && y.size(1) == dense->features,
        "residual has shape ", y.sizes(), "; a contiguous float32 [", a.size(0), ", ",
        dense->features, "] is expected");
    with_weight_type(dense->panels.scalar_type(), [&](auto zero) {
      using F = Format<decltype(zero)>;
      auto& first = scratch<F>(0);
      fill_blocks(first, a, back_is_blocked<F>(a.size(0)));
      TORCH_CHECK_VALUE(
          mlp.scalar_type() == at::kInt && mlp.is_contiguous() &&
              mlp.numel() ==
                  RowBlocks<F>::num_scalars(a.size(0), down->depth, first.blocked),
          "mlp is not what `front` returned for the ", a.size(0), " rows of attended");
      RowBlocks<F> second;
      second.bind(
          reinterpret_cast<typename F::Scalar*>(mlp.data_ptr<int32_t>()), a.size(0), down->depth,
          first.blocked);
      Output<F> out;
      out.terms = {{dense.get(), &first}, {down.get(), &second}};
      out.bias = bias_of(out_bias, dense->features);
      out.y = y.data_ptr<float>();
      out.residual = residual ? out.y : nullptr;
      multiply<F>({out});
    });
    return y;
  }
};

} // namespace gptneox

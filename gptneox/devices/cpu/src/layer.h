// SPDX-License-Identifier: Apache-2.0
// Decoder layers in two calls, one before and one after attention.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "arguments.h"
#include "integers.h"
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
  std::optional<at::Tensor> qkv_bias, up_bias, out_bias; // fp32
  float eps;
  Activation activation;

  virtual ~Layer() = default;

  // Before attention: x fp32 [T, C] to qkv fp32 [T, 3W] and the activated MLP, in a form of its own
  // for `back`. The next call reuses the memory of both once the caller has dropped them.
  virtual std::pair<at::Tensor, at::Tensor> front(const at::Tensor& x) const = 0;

  // After attention: attended [T, W] and the `mlp` of `front` to fp32 [T, C]. With `residual` the
  // result is added to it in place; without, this is the partial sum of a rank.
  virtual at::Tensor back(
      const at::Tensor& attended,
      const at::Tensor& mlp,
      const std::optional<at::Tensor>& residual) const = 0;

 protected:
  // Raises ValueError unless matrices [3W, C], [F, C], [C, W] and [C, F] belong together.
  template <typename Weight>
  void check_widths(
      const Weight& qkv, const Weight& up, const Weight& dense, const Weight& down) const {
    const int64_t width = qkv.depth;
    bool fits = up.depth == width && dense.features == width && down.features == width;
    for (const Norm& norm : norms) {
      fits = fits && norm.scale.numel() == width && norm.shift.numel() == width;
    }
    TORCH_CHECK_VALUE(fits, "the weights of a layer differ in width");
  }

  // Where `back` writes [rows, width]. Raises ValueError.
  static at::Tensor output_of(
      const std::optional<at::Tensor>& residual, int64_t rows, int64_t width) {
    at::Tensor y = residual ? *residual : at::empty({rows, width}, at::kFloat);
    TORCH_CHECK_VALUE(
        y.dim() == 2 && y.is_contiguous() && y.scalar_type() == at::kFloat && y.size(0) == rows &&
            y.size(1) == width,
        "residual has shape ", y.sizes(), "; a contiguous float32 [", rows, ", ", width,
        "] is expected");
    return y;
  }
};

// A layer whose products take activations as floats.
struct FloatLayer : Layer {
  std::shared_ptr<Packed> qkv, up, dense, down;

  // Raises ValueError where the weights do not belong together.
  void prepare() {
    check_widths(*qkv, *up, *dense, *down);
    bool fits = true, in_digits = true;
    for (const auto& weight : {qkv, up, dense, down}) {
      fits = fits && weight->panels.scalar_type() == qkv->panels.scalar_type() &&
          weight->rounds == qkv->rounds;
      in_digits = in_digits && weight->takes_digits;
    }
    TORCH_CHECK_VALUE(fits, "the weights of a layer differ in dtype");
    // All of them share the form of their inputs. The panels are the same for either.
    for (const auto& weight : {qkv, up, dense, down}) {
      weight->takes_digits = in_digits;
    }
  }

  // Both products of `back` add up in one tile, so both use the same kernels.
  template <typename F>
  RowForm back_form(int64_t rows) const {
    return form_for<F>(dense->depth < down->depth ? *dense : *down, rows);
  }

  // The MLP comes in row blocks of [T, F], as int32 [num_scalars].
  std::pair<at::Tensor, at::Tensor> front(const at::Tensor& x) const override {
    const at::Tensor rows = check_rows(x, qkv->depth, "x");
    const int64_t count = rows.size(0), width = rows.size(1);
    at::Tensor y = workspace(0, {count, qkv->features}, at::kFloat);
    at::Tensor mlp;
    with_weight_type(qkv->panels.scalar_type(), [&](auto zero) {
      using F = Format<decltype(zero)>;
      RowBlocks<F>* blocks[2] = {&scratch<F>(0), &scratch<F>(1)};
      for (auto* each : blocks) {
        each->resize(count, width, form_for<F>(*qkv, count));
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
          1, {RowBlocks<F>::num_scalars(count, up->features, back_form<F>(count))}, at::kInt);
      if (round_up(up->features, kCols) < round_up(up->features, kDepth)) {
        mlp.zero_(); // the panels end before the padded K of the next product
      }
      RowBlocks<F> packed;
      packed.bind(
          reinterpret_cast<Scalar*>(mlp.data_ptr<int32_t>()), count, up->features,
          back_form<F>(count));
      second.packed = &packed;
      multiply<F>({first, second});
    });
    return {y, mlp};
  }

  at::Tensor back(
      const at::Tensor& attended,
      const at::Tensor& mlp,
      const std::optional<at::Tensor>& residual) const override {
    const at::Tensor a = check_rows(attended, dense->depth, "attended");
    at::Tensor y = output_of(residual, a.size(0), dense->features);
    with_weight_type(dense->panels.scalar_type(), [&](auto zero) {
      using F = Format<decltype(zero)>;
      auto& first = scratch<F>(0);
      fill_blocks(first, a, back_form<F>(a.size(0)));
      TORCH_CHECK_VALUE(
          mlp.scalar_type() == at::kInt && mlp.is_contiguous() &&
              mlp.numel() ==
                  RowBlocks<F>::num_scalars(a.size(0), down->depth, first.form),
          "mlp is not what `front` returned for the ", a.size(0), " rows of attended");
      RowBlocks<F> second;
      second.bind(
          reinterpret_cast<typename F::Scalar*>(mlp.data_ptr<int32_t>()), a.size(0), down->depth,
          first.form);
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

// A layer whose products take activations as integers, of as many digits as each weight asks for.
struct IntegerLayer : Layer {
  std::shared_ptr<PackedIntegers> qkv, up, dense, down;
  bool shares_inputs = false; // qkv and up read the same integers

  // As for FloatLayer.
  void prepare() {
    check_widths(*qkv, *up, *dense, *down);
    shares_inputs = qkv->reads_as(*up) && at::equal(norms[0].scale, norms[1].scale) &&
        at::equal(norms[0].shift, norms[1].shift);
  }

  // The MLP comes as fp32 [T, F].
  std::pair<at::Tensor, at::Tensor> front(const at::Tensor& x) const override {
    const at::Tensor rows = check_rows(x, qkv->depth, "x");
    const int64_t count = rows.size(0), width = rows.size(1);
    at::Tensor y = workspace(0, {count, qkv->features}, at::kFloat);
    at::Tensor mlp = workspace(1, {count, up->features}, at::kFloat);
    const PackedIntegers* weights[2] = {qkv.get(), up.get()};
    IntegerRows* inputs[2] = {&scratch_integers(0), &scratch_integers(shares_inputs ? 0 : 1)};
    const int distinct = shares_inputs ? 1 : 2;
    for (int i = 0; i < distinct; ++i) {
      inputs[i]->resize(count, *weights[i]);
    }
    const float* data = rows.const_data_ptr<float>();
    for_ranges(count, 4, [&](int64_t begin, int64_t end) {
      std::vector<float> normed(width);
      for (int64_t r = begin; r < end; ++r) {
        const float* from = data + r * width;
        const Moments row_moments = moments(from, width, eps);
        for (int i = 0; i < distinct; ++i) {
          normalise(from, norms[i], row_moments, normed.data());
          inputs[i]->write(r, normed.data(), *weights[i]);
        }
      }
    });
    multiply_integers({
        {.terms = {{qkv.get(), inputs[0]}},
         .bias = bias_of(qkv_bias, qkv->features),
         .activation = Activation::kNone,
         .y = y.data_ptr<float>()},
        {.terms = {{up.get(), inputs[1]}},
         .bias = bias_of(up_bias, up->features),
         .activation = activation,
         .y = mlp.data_ptr<float>()},
    });
    return {y, mlp};
  }

  at::Tensor back(
      const at::Tensor& attended,
      const at::Tensor& mlp,
      const std::optional<at::Tensor>& residual) const override {
    const at::Tensor a = check_rows(attended, dense->depth, "attended");
    const at::Tensor b = check_rows(mlp, down->depth, "mlp");
    TORCH_CHECK_VALUE(
        a.size(0) == b.size(0), "mlp has ", b.size(0), " rows; ", a.size(0), " are expected");
    at::Tensor y = output_of(residual, a.size(0), dense->features);
    fill_integers(scratch_integers(0), a, *dense);
    fill_integers(scratch_integers(1), b, *down);
    multiply_integers({
        {.terms = {{dense.get(), &scratch_integers(0)}, {down.get(), &scratch_integers(1)}},
         .bias = bias_of(out_bias, dense->features),
         .activation = Activation::kNone,
         .y = y.data_ptr<float>(),
         .residual = residual ? y.data_ptr<float>() : nullptr},
    });
    return y;
  }
};

} // namespace gptneox

// SPDX-License-Identifier: Apache-2.0
// Packing of weight matrices into panels.
//
// The panel layout. A panel holds kCols output features of a matrix [F, K], and all of its K, so
// that a product reads it from front to back: [K / kPerLane][kCols][kPerLane]. K is padded with
// zeros to a multiple of kDepth, the last panel with features of zeros. Prefill attention puts its
// keys and values into the same layout.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <memory>
#include <optional>

#include "arguments.h"
#include "memory.h"
#include "tile.h"

namespace gptneox {

// A weight matrix [F, K] in panels.
struct Packed {
  at::Tensor panels; // [ceil(F / kCols), padded K, kCols], dtype of the weight; or see int4.h
  at::Tensor scales; // of int8 weights, fp32 [ceil(F / kCols) * kCols], zeros behind F
  at::Tensor zeros; // of weights of four bits
  int64_t group = 0; // likewise, values of K with one scale
  bool rounds = false; // products of many rows may round weights and activations to bf16
  bool takes_digits = false; // of few rows, take activations in digits; see int4.h
  int64_t features = 0;
  int64_t depth = 0; // K, unpadded

  int64_t padded() const {
    return panels.size(1);
  }
  int64_t num_panels() const {
    return panels.size(0);
  }
};

// weight [F, K], contiguous, to panels `out`.
template <typename W>
void pack_into(const at::Tensor& weight, const at::Tensor& out) {
  using F = Format<W>;
  const W* from = weight.const_data_ptr<W>();
  W* to = out.data_ptr<W>();
  const int64_t features = weight.size(0), depth = weight.size(1), padded = out.size(1);
  at::parallel_for(0, out.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      W* p = to + panel * padded * kCols;
      // kDepth values of K at a time: the lines being written stay in the first-level cache.
      for (int64_t k0 = 0; k0 < padded; k0 += kDepth) {
        for (int64_t j = 0; j < kCols; ++j) {
          const int64_t row = panel * kCols + j;
          const W* source = from + row * depth;
          for (int64_t k = k0; k < k0 + kDepth; ++k) {
            const W value = row < features && k < depth ? source[k] : W(0);
            p[k / F::kPerLane * F::kPerLane * kCols + j * F::kPerLane + k % F::kPerLane] = value;
          }
        }
      }
    }
  });
}

// weight [F, K] of float32, float16 or bfloat16; or of int8 with fp32 scales [F], which stand for
// scale[f] * weight[f, k]. Raises ValueError, TypeError.
inline std::shared_ptr<Packed> pack(
    const at::Tensor& weight, const std::optional<at::Tensor>& scales) {
  TORCH_CHECK_VALUE(weight.dim() == 2, "weight has ", weight.dim(), " dimensions; 2 are expected");
  TORCH_CHECK_VALUE(
      scales.has_value() == (weight.scalar_type() == at::kChar),
      "int8 weights have scales, and no others");
  auto packed = std::make_shared<Packed>();
  packed->features = weight.size(0);
  packed->depth = weight.size(1);
  const at::Tensor source = weight.contiguous();
  with_stored_type(weight.scalar_type(), [&](auto zero) {
    packed->panels = allocate(
        {(packed->features + kCols - 1) / kCols, round_up(packed->depth, kDepth), kCols},
        weight.scalar_type());
    pack_into<decltype(zero)>(source, packed->panels);
  });
  if (scales) {
    TORCH_CHECK_VALUE(
        scales->dim() == 1 && scales->numel() == packed->features, "scales have shape ",
        scales->sizes(), "; [", packed->features, "] is expected");
    packed->scales = at::zeros({packed->num_panels() * kCols}, at::kFloat);
    packed->scales.narrow(0, 0, packed->features).copy_(*scales);
  }
  return packed;
}

} // namespace gptneox

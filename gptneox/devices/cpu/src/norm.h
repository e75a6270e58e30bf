// SPDX-License-Identifier: Apache-2.0
// LayerNorm with statistics in fp32.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>

#include "arguments.h"
#include "tile.h"

namespace gptneox {

// Moments of a row, which is normalised to (x - mean - rest) * rstd. `rest` is the rounding error
// of the mean; it compensates cancellation when abs(mean) >> std.
struct Moments {
  float mean, rest, rstd;
};

// Two passes over x [n]: the mean, then the variance around it.
inline Moments moments(const float* x, int64_t n, float eps) {
  const auto add = [](Vec& a, Vec& b) { return a + b; };
  Vec total(0.f);
  int64_t i = 0;
  for (; i + kVec <= n; i += kVec) {
    total = total + Vec::loadu(x + i);
  }
  float sum = at::vec::vec_reduce_all<float>(add, total);
  for (; i < n; ++i) {
    sum += x[i];
  }
  const float count = static_cast<float>(n), mean = sum / count;
  Vec offsets(0.f), squares(0.f);
  for (i = 0; i + kVec <= n; i += kVec) {
    const Vec d = Vec::loadu(x + i) - Vec(mean);
    offsets = offsets + d;
    squares = at::vec::fmadd(d, d, squares);
  }
  float offset = at::vec::vec_reduce_all<float>(add, offsets);
  float square = at::vec::vec_reduce_all<float>(add, squares);
  for (; i < n; ++i) {
    offset += x[i] - mean;
    square += (x[i] - mean) * (x[i] - mean);
  }
  const float rest = offset / count;
  const float variance = std::max(0.f, square / count - rest * rest);
  return {mean, rest, 1.f / std::sqrt(variance + eps)};
}

struct Norm {
  at::Tensor scale, shift; // fp32 [C]
};

// x [C] to y [C].
inline void normalise(const float* x, const Norm& norm, const Moments& m, float* y) {
  const int64_t n = norm.scale.numel();
  const float* scale = norm.scale.const_data_ptr<float>();
  const float* shift = norm.shift.const_data_ptr<float>();
  for (int64_t i = 0; i < n; ++i) {
    y[i] = (x[i] - m.mean - m.rest) * m.rstd * scale[i] + shift[i];
  }
}

// x [T, C] of any float type; returns fp32. Raises ValueError.
inline at::Tensor layer_norm(
    const at::Tensor& x, const at::Tensor& scale, const at::Tensor& shift, double eps) {
  const at::Tensor rows = check_rows(x, scale.numel(), "x");
  const Norm norm{scale.to(at::kFloat).contiguous(), shift.to(at::kFloat).contiguous()};
  TORCH_CHECK_VALUE(
      shift.numel() == scale.numel(), "shift has ", shift.numel(), " values; ", scale.numel(),
      " are expected");
  at::Tensor y = at::empty_like(rows);
  const int64_t width = std::max<int64_t>(1, rows.size(1));
  at::parallel_for(0, rows.size(0), std::max<int64_t>(1, 16384 / width), [&](int64_t b, int64_t e) {
    for (int64_t r = b; r < e; ++r) {
      const float* row = rows.const_data_ptr<float>() + r * width;
      float* out = y.data_ptr<float>() + r * width;
      normalise(row, norm, moments(row, width, static_cast<float>(eps)), out);
    }
  });
  return y;
}

} // namespace gptneox

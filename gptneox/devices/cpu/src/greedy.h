// SPDX-License-Identifier: Apache-2.0
// Greedy sampling.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cmath>

#include "tile.h"

namespace gptneox {

// Argmax of each row of logits fp32 [S, V], the first of equal values. Returns int64 [S + 1]:
// element S is 1 if every row has a finite sum, else 0. Raises ValueError.
inline at::Tensor greedy(const at::Tensor& logits) {
  TORCH_CHECK_VALUE(
      logits.dim() == 2 && logits.size(1) > 0 && logits.scalar_type() == at::kFloat,
      "logits have shape ", logits.sizes(), " and dtype ", logits.scalar_type(),
      "; float32 [S, V] is expected");
  const at::Tensor x = logits.stride(1) == 1 ? logits : logits.contiguous();
  const int64_t rows = x.size(0), width = x.size(1), stride = x.stride(0);
  const float* data = x.const_data_ptr<float>();
  at::Tensor out = at::empty({rows + 1}, at::TensorOptions().dtype(at::kLong));
  int64_t* ids = out.data_ptr<int64_t>();
  std::atomic<bool> finite{true};
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float* row = data + r * stride;
      Vec largest(kMinusInfinity), sum(0.f);
      int64_t i = 0;
      for (; i + kVec <= width; i += kVec) {
        const Vec v = Vec::loadu(row + i);
        largest = at::vec::maximum(largest, v);
        sum = sum + v;
      }
      float top = at::vec::vec_reduce_all<float>(
          [](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, largest);
      float total = at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, sum);
      for (; i < width; ++i) {
        top = std::max(top, row[i]);
        total += row[i];
      }
      if (!std::isfinite(total)) {
        finite.store(false, std::memory_order_relaxed);
      }
      ids[r] = std::find(row, row + width, top) - row;
      if (ids[r] == width) {
        ids[r] = 0; // a row with NaN: the flag reports it
      }
    }
  });
  ids[rows] = finite.load() ? 1 : 0;
  return out;
}

} // namespace gptneox

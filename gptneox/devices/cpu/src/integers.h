// SPDX-License-Identifier: Apache-2.0
// Products of integers: weights of eight bits and activations that are rounded to eight bits. Sums
// are exact, in int32. Activations are kept as unsigned bytes, value + 128, the form that dot
// products take (vpdpbusd, AMX); each output starts at minus 128 times the sum of its weights.
//
// Few rows go through a tile of dot products, which reads weights as fast as memory gives them; many
// go through oneDNN's brgemm. Both read the same panels, [K / 4][kCols][4]. AVX2's vpmaddubsw adds
// pairs of products in saturating int16: it is not used, plain C++ is exact.
#pragma once

#include <ATen/ATen.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <vector>

#include "arguments.h"
#include "blocked.h"
#include "product.h"
#include "team.h"
#include "tile.h"

namespace gptneox {

// With more inputs, 255 * 128 * K does not fit int32.
constexpr int64_t kMaxIntegerDepth = 65535;
// Rows of the tile of dot products, and from how many rows on brgemm is used; `kNever` where it
// refuses this processor.
constexpr int kDotRows = 8;
inline int64_t integers_blocked_from = kNever;

// Weights of eight bits whose activations become integers.
struct PackedIntegers {
  at::Tensor panels; // int8 [panels, K / 4, kCols, 4], K padded with zeros to kDepth
  at::Tensor scales; // fp32 [panels * kCols]
  at::Tensor start; // int32 [panels * kCols], less 128 times the sum of the weights
  int64_t features, depth;
  bool is_static = false; // activations become integers by `input_scale` and `input_offset`
  float input_scale = 1, input_offset = 0;

  int64_t num_panels() const {
    return panels.size(0);
  }
  int64_t padded() const {
    return panels.size(1) * 4;
  }
  const int8_t* panel(int64_t index) const {
    return panels.const_data_ptr<int8_t>() + index * padded() * kCols;
  }
};

// weight int8 [F, K]; scales fp32 [F]; start int32 [F] or none. With an input scale, activations x
// become round(x / scale + offset); without, each row finds its own. Raises ValueError.
inline std::shared_ptr<PackedIntegers> pack_integers(
    const at::Tensor& weight,
    const at::Tensor& scales,
    const std::optional<at::Tensor>& start,
    const std::optional<double>& input_scale,
    int64_t input_offset) {
  TORCH_CHECK_VALUE(
      weight.dim() == 2 && weight.scalar_type() == at::kChar, "int8 [F, K] is expected");
  auto packed = std::make_shared<PackedIntegers>();
  packed->features = weight.size(0);
  packed->depth = weight.size(1);
  TORCH_CHECK_VALUE(
      packed->depth <= kMaxIntegerDepth, "a weight has ", packed->depth, " inputs; at most ",
      kMaxIntegerDepth, " add up in 32 bits");
  TORCH_CHECK_VALUE(
      scales.dim() == 1 && scales.numel() == packed->features, "scales have shape ",
      scales.sizes(), "; [", packed->features, "] is expected");
  TORCH_CHECK_VALUE(
      !start || (start->dim() == 1 && start->numel() == packed->features), "start has shape ",
      start ? start->sizes() : at::IntArrayRef{}, "; [", packed->features, "] is expected");
  const int64_t panels = (packed->features + kCols - 1) / kCols;
  const int64_t padded = round_up(packed->depth, kDepth), depth = packed->depth;
  packed->panels = allocate({panels, padded / 4, kCols, 4}, at::kChar);
  packed->scales = at::zeros({panels * kCols}, at::kFloat);
  packed->scales.narrow(0, 0, packed->features).copy_(scales);
  packed->start = at::zeros({panels * kCols}, at::kInt);
  if (start) {
    packed->start.narrow(0, 0, packed->features).copy_(*start);
  }
  if (input_scale) {
    packed->is_static = true;
    packed->input_scale = static_cast<float>(*input_scale);
    packed->input_offset = static_cast<float>(input_offset);
  }
  const at::Tensor source = weight.contiguous();
  const int8_t* from = source.const_data_ptr<int8_t>();
  int8_t* to = packed->panels.data_ptr<int8_t>();
  int32_t* begins = packed->start.data_ptr<int32_t>();
  at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      int8_t* out = to + p * padded * kCols;
      for (int64_t j = 0; j < kCols; ++j) {
        const int64_t row = p * kCols + j;
        int32_t sum = 0;
        for (int64_t k = 0; k < padded; ++k) {
          const int8_t value = row < packed->features && k < depth ? from[row * depth + k] : 0;
          out[(k / 4 * kCols + j) * 4 + k % 4] = value;
          sum += value;
        }
        begins[row] -= 128 * sum;
      }
    }
  });
  return packed;
}

// Activations [T, K] as bytes, value + 128, rows `stride` apart; `steps` [T] is what one means.
struct IntegerRows {
  int64_t rows = 0, stride = 0;
  std::vector<uint8_t> values;
  std::vector<float> steps;

  const uint8_t* row(int64_t index) const {
    return values.data() + index * stride;
  }
};

// round(x / scale + offset) of a row x [count], clamped, plus 128. Padding is 0: its weights are.
inline void to_bytes(const float* x, int64_t count, float scale, float offset, uint8_t* out) {
  alignas(64) float wide[kVec];
  const Vec divisor(scale), added(offset), low(-128.f), high(127.f);
  for (int64_t k = 0; k < count; k += kVec) {
    const int width = static_cast<int>(std::min<int64_t>(kVec, count - k));
    const Vec exact = Vec::loadu(x + k, width) / divisor + added;
    at::vec::clamp(exact.round(), low, high).store(wide);
    for (int i = 0; i < width; ++i) {
      out[k + i] = static_cast<uint8_t>(static_cast<int>(wide[i]) + 128);
    }
  }
}

// x fp32 [T, K] to integers. A row with a value that is not finite becomes zeros, with a step of
// NaN.
inline void fill_integers(IntegerRows& out, const at::Tensor& x, const PackedIntegers& weight) {
  const int64_t depth = x.size(1);
  out.rows = x.size(0);
  out.stride = weight.padded() + 64;
  out.values.resize(std::max<size_t>(out.values.size(), out.rows * out.stride));
  out.steps.resize(std::max<size_t>(out.steps.size(), out.rows));
  const float* data = x.const_data_ptr<float>();
  for_ranges(out.rows, 4, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float* from = data + r * depth;
      uint8_t* to = out.values.data() + r * out.stride;
      Vec largest(0.f);
      int64_t k = 0;
      for (; k + kVec <= depth; k += kVec) {
        largest = at::vec::maximum(largest, Vec::loadu(from + k).abs());
      }
      if (k < depth) {
        largest = at::vec::maximum(largest, Vec::loadu(from + k, depth - k).abs());
      }
      alignas(64) float values[kVec];
      largest.store(values);
      float top = 0;
      for (const float value : values) {
        top = value > top || std::isnan(value) ? value : top;
        if (std::isnan(top)) {
          break;
        }
      }
      if (!std::isfinite(top)) {
        std::memset(to, 128, out.stride);
        out.steps[r] = std::numeric_limits<float>::quiet_NaN();
        continue;
      }
      float scale = weight.is_static ? weight.input_scale : top / 127.f;
      if (!(scale >= std::numeric_limits<float>::min())) {
        scale = 1.f; // the row is zeros, or so small that it becomes zeros
      }
      to_bytes(from, depth, scale, weight.input_offset, to);
      std::memset(to + depth, 0, out.stride - depth);
      out.steps[r] = weight.is_static ? 1.f : scale;
    }
  });
}

// c [R][kCols] = x * panel, R rows of x `stride` bytes apart, over K padded to kDepth.
template <int R>
inline void dot_tile(
    const int8_t* panel, const uint8_t* x, int64_t stride, int64_t padded, int32_t* c) {
#if GPTNEOX_INT8_DOT
  constexpr int kChains = R == 1 ? 4 : R <= 4 ? 2 : 1;
  static_assert(kDepth % (4 * kChains) == 0 && kCols == 32);
  __m512i sum[kChains][R][2];
#pragma GCC unroll 4
  for (int u = 0; u < kChains; ++u) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      sum[u][r][0] = sum[u][r][1] = _mm512_setzero_si512();
    }
  }
  for (int64_t k = 0; k < padded; k += 4 * kChains) {
#pragma GCC unroll 4
    for (int u = 0; u < kChains; ++u) {
      const int8_t* p = panel + (k + 4 * u) * kCols;
      __builtin_prefetch(p + 4096, 0, 2);
      __builtin_prefetch(p + 4096 + 64, 0, 2);
      const __m512i first = _mm512_loadu_si512(p), second = _mm512_loadu_si512(p + 64);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        int32_t four;
        std::memcpy(&four, x + r * stride + k + 4 * u, 4);
        const __m512i a = _mm512_set1_epi32(four);
        sum[u][r][0] = _mm512_dpbusd_epi32(sum[u][r][0], a, first);
        sum[u][r][1] = _mm512_dpbusd_epi32(sum[u][r][1], a, second);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      __m512i total = sum[0][r][j];
#pragma GCC unroll 4
      for (int u = 1; u < kChains; ++u) {
        total = _mm512_add_epi32(total, sum[u][r][j]);
      }
      _mm512_storeu_si512(c + r * kCols + j * 16, total);
    }
  }
#else
  for (int r = 0; r < R; ++r) {
    int32_t sums[kCols] = {};
    for (int64_t k = 0; k < padded; k += 4) {
      const uint8_t* a = x + r * stride + k;
      const int8_t* p = panel + k * kCols;
      for (int j = 0; j < kCols; ++j) {
        for (int i = 0; i < 4; ++i) {
          sums[j] += static_cast<int32_t>(a[i]) * p[4 * j + i];
        }
      }
    }
    std::memcpy(c + r * kCols, sums, sizeof(sums));
  }
#endif
}

// `dot_tile` for a number of rows that is only known at run time.
inline void run_dot_tile(
    int64_t rows, const int8_t* panel, const uint8_t* x, int64_t stride, int64_t padded,
    int32_t* c) {
  switch (rows) {
#define GPTNEOX_DOT_ROWS(R)                        \
  case R:                                          \
    dot_tile<R>(panel, x, stride, padded, c);      \
    break;
    GPTNEOX_DOT_ROWS(1)
    GPTNEOX_DOT_ROWS(2)
    GPTNEOX_DOT_ROWS(3)
    GPTNEOX_DOT_ROWS(4)
    GPTNEOX_DOT_ROWS(5)
    GPTNEOX_DOT_ROWS(6)
    GPTNEOX_DOT_ROWS(7)
    GPTNEOX_DOT_ROWS(8)
#undef GPTNEOX_DOT_ROWS
  }
}

// Columns of one panel of the output, rows [first, first + rows), from the sums c [rows][kCols].
struct IntegerOutput {
  const PackedIntegers* weight;
  const IntegerRows* x;
  const float* bias; // [features], or null
  Activation activation;
  float* y; // [T, features]

  void finish(int64_t panel, int64_t first, int64_t rows, int32_t* c) const {
    const int64_t column = panel * kCols, features = weight->features;
    const int64_t width = std::min<int64_t>(kCols, features - column);
    const float* scales = weight->scales.const_data_ptr<float>() + column;
    const int32_t* start = weight->start.const_data_ptr<int32_t>() + column;
    alignas(64) float tile[kCols];
    for (int64_t r = 0; r < rows; ++r, c += kCols) {
      for (int j = 0; j < kCols; ++j) {
        tile[j] = static_cast<float>(c[j] + start[j]) * scales[j];
      }
      const Vec step(x->steps[first + r]);
      for (int j = 0; j < kCols; j += kVec) {
        (Vec::loadu(tile + j) * step).store(tile + j);
      }
      apply(activation, bias ? bias + column : nullptr, width, 1, tile);
      std::memcpy(y + (first + r) * features + column, tile, width * sizeof(float));
    }
  }
};

// All panels of an output, few rows at a time: every panel is read from memory once.
inline void multiply_few(const IntegerOutput& out) {
  const PackedIntegers& weight = *out.weight;
  WorkQueue queue(weight.num_panels(), 16);
  on_all_threads([&] {
    alignas(64) int32_t c[kDotRows * kCols];
    int64_t begin, end;
    while (queue.take(begin, end)) {
      for (int64_t p = begin; p < end; ++p) {
        for (int64_t first = 0; first < out.x->rows; first += kDotRows) {
          const int64_t rows = std::min<int64_t>(kDotRows, out.x->rows - first);
          run_dot_tile(
              rows, weight.panel(p), out.x->row(first), out.x->stride, weight.padded(), c);
          out.finish(p, first, rows, c);
        }
      }
    }
  });
}

// c [rows][kCols] (+)= x * panel over `depth` of K, by brgemm, in a few fixed heights: it compiles a
// kernel for every number of rows.
inline void block_integers(
    int64_t rows, const uint8_t* x, int64_t stride, const int8_t* panel, int64_t depth, int32_t* c,
    bool accumulate) {
  MatrixUnitScope::mark_used();
  for (int64_t height = 256; rows > 0; height /= 2) {
    const int64_t m = height < kBlockedRows ? rows : height;
    for (; rows > 0 && rows >= m; rows -= m) {
      at::native::cpublas::brgemm(
          m, kCols, depth, stride, kCols, kCols, accumulate, x,
          reinterpret_cast<const signed char*>(panel), c, true);
      x += m * stride;
      c += m * kCols;
    }
  }
}

// All panels of an output by brgemm, in sweeps of rows and chunks of K that stay in the
// second-level cache while several panels are multiplied.
inline void multiply_blocked(const IntegerOutput& out) {
  const PackedIntegers& weight = *out.weight;
  const int64_t padded = weight.padded(), all = out.x->rows;
  const int64_t sweep = std::min(all, kBlockedSweep), sweeps = (all + sweep - 1) / sweep;
  const int64_t resident = kResidentBytes / sweep / 64 * 64;
  const int64_t chunk = std::clamp<int64_t>(resident, 512, 4 * kChunk);
  WorkQueue queue(weight.num_panels() * sweeps, kBlockedPanels);
  on_all_threads([&] {
    static thread_local std::vector<int32_t> sums;
    sums.resize(std::max<size_t>(sums.size(), sweep * kBlockedPanels * kCols));
    int64_t begin, end;
    while (queue.take(begin, end)) {
      for (int64_t i = begin, count = 1; i < end; i += count) {
        const int64_t panel = i % weight.num_panels(), first = i / weight.num_panels() * sweep;
        count = std::min(end - i, weight.num_panels() - panel);
        const int64_t rows = std::min(sweep, all - first);
        for (int64_t k = 0; k < padded; k += chunk) {
          const int64_t depth = std::min(chunk, padded - k);
          for (int64_t p = 0; p < count; ++p) {
            block_integers(
                rows, out.x->row(first) + k, out.x->stride, weight.panel(panel + p) + k * kCols,
                depth, sums.data() + p * rows * kCols, k > 0);
          }
        }
        for (int64_t p = 0; p < count; ++p) {
          out.finish(panel + p, first, rows, sums.data() + p * rows * kCols);
        }
      }
    }
  });
}

// x [T, K] of any float type; returns act(x W.T + bias), fp32 [T, F], by integers. `activation` is
// a value of Activation. Raises ValueError.
inline at::Tensor linear_integers(
    const at::Tensor& x,
    const std::shared_ptr<PackedIntegers>& weight,
    const std::optional<at::Tensor>& bias,
    int activation) {
  const at::Tensor rows = check_rows(x, weight->depth, "x");
  at::Tensor y = at::empty({rows.size(0), weight->features}, rows.options());
  if (y.numel() == 0) {
    return y;
  }
  static thread_local IntegerRows integers;
  IntegerRows& filled = integers;
  fill_integers(filled, rows, *weight);
  const IntegerOutput out{
      weight.get(), &filled, bias_of(bias, weight->features), static_cast<Activation>(activation),
      y.data_ptr<float>()};
  if (filled.rows >= integers_blocked_from) {
    multiply_blocked(out);
  } else {
    multiply_few(out);
  }
  return y;
}

} // namespace gptneox

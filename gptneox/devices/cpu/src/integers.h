// SPDX-License-Identifier: Apache-2.0
// Products of integers: weights of eight bits, and activations that become integers of one, two or
// three bytes (W8A8; W8A16). Sums are exact, in int32.
//
// An activation is step * q, with q + 2^(8 n - 1) written in n digits of base 256, the highest
// first. Each digit is a row of unsigned bytes, the form that dot products take (vpdpbusd, AMX): a
// product knows rows of digits only, and their sums are put together as those of a number. The
// first digit is 128 too large, so its sums begin at minus 128 times the sum of the weights. Two
// digits err by 1.5e-5 of a row's largest value, three by 6e-8.
//
// Few rows go through a tile of dot products, which reads weights as fast as memory gives them; many
// go through oneDNN's brgemm. Both read the same panels, [K / 4][kCols][4]. AVX2's vpmaddubsw adds
// pairs of products in saturating int16: it is not used, plain C++ is exact.
#pragma once

#include <ATen/ATen.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <array>
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
constexpr int kMaxDigits = 3;
// Rows of digits of the tile of dot products, and from how many on brgemm is used; `kNever` where
// it refuses this processor.
constexpr int kDotRows = 8;
inline int64_t integers_blocked_from = kNever;

// Weights of eight bits whose activations become integers.
struct PackedIntegers {
  at::Tensor panels; // int8 [panels, K / 4, kCols, 4], K padded with zeros to kDepth
  at::Tensor scales; // fp32 [panels * kCols]
  at::Tensor start; // int32 [panels * kCols], less 128 times the sum of the weights
  int64_t features, depth;
  int digits = 1; // of an activation
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
  // Whether activations become the same integers for both.
  bool reads_as(const PackedIntegers& other) const {
    return depth == other.depth && digits == other.digits && is_static == other.is_static &&
        input_scale == other.input_scale && input_offset == other.input_offset;
  }
};

// weight int8 [F, K]; scales fp32 [F]; start int32 [F] or none. With an input scale, activations x
// become round(x / scale + offset), of one digit; without, each row finds its own scale, for 1 to 3
// digits. Raises ValueError.
inline std::shared_ptr<PackedIntegers> pack_integers(
    const at::Tensor& weight,
    const at::Tensor& scales,
    const std::optional<at::Tensor>& start,
    const std::optional<double>& input_scale,
    int64_t input_offset,
    int digits) {
  TORCH_CHECK_VALUE(
      weight.dim() == 2 && weight.scalar_type() == at::kChar, "int8 [F, K] is expected");
  TORCH_CHECK_VALUE(
      digits >= 1 && digits <= kMaxDigits && (digits == 1 || !input_scale), digits,
      " digits; 1 to ", kMaxDigits, " are expected, and 1 with an input scale");
  auto packed = std::make_shared<PackedIntegers>();
  packed->features = weight.size(0);
  packed->depth = weight.size(1);
  packed->digits = digits;
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

// Activations [T, K] in digits: digit d of row r is row r * digits + d of bytes, and rows are
// `stride` bytes apart. `steps` [T] is what one means.
struct IntegerRows {
  int64_t rows = 0, stride = 0;
  int digits = 1;
  std::vector<uint8_t> values;
  std::vector<float> steps;

  // Make room for rows that multiply `weight`; the memory is reused by later calls.
  void resize(int64_t num_rows, const PackedIntegers& weight) {
    rows = num_rows;
    digits = weight.digits;
    stride = weight.padded() + 64; // rows at a distance of 4096 bytes would share cache lines
    values.resize(std::max<size_t>(values.size(), rows * digits * stride));
    steps.resize(std::max<size_t>(steps.size(), rows));
  }
  const uint8_t* row(int64_t index) const {
    return values.data() + index * digits * stride;
  }

  // Write row `index` from x fp32 [K], in the integers of `weight`. A row with a value that is not
  // finite becomes zeros, with a step of NaN. Padding is 0: its weights are.
  void write(int64_t index, const float* x, const PackedIntegers& weight) {
    uint8_t* to = values.data() + index * digits * stride;
    const int64_t depth = weight.depth;
    const float top = largest(x, depth);
    if (!std::isfinite(top)) {
      std::memset(to, 0, digits * stride);
      steps[index] = std::numeric_limits<float>::quiet_NaN();
      return;
    }
    const float limit = static_cast<float>((1 << (8 * digits - 1)) - 1);
    float scale = weight.is_static ? weight.input_scale : top / limit;
    if (!(scale >= std::numeric_limits<float>::min())) {
      scale = 1.f; // the row is zeros, or so small that it becomes zeros
    }
    to_digits(x, depth, scale, weight.input_offset, to);
    for (int d = 0; d < digits; ++d) {
      std::memset(to + d * stride + depth, 0, stride - depth);
    }
    steps[index] = weight.is_static ? 1.f : scale;
  }

 private:
  // The largest magnitude in x [n]; NaN if there is one.
  static float largest(const float* x, int64_t n) {
    Vec top(0.f);
    int64_t k = 0;
    for (; k + kVec <= n; k += kVec) {
      top = at::vec::maximum(top, Vec::loadu(x + k).abs());
    }
    if (k < n) {
      top = at::vec::maximum(top, Vec::loadu(x + k, n - k).abs());
    }
    alignas(64) float values[kVec];
    top.store(values);
    float out = 0;
    for (const float value : values) {
      out = value > out || std::isnan(value) ? value : out;
      if (std::isnan(out)) {
        break;
      }
    }
    return out;
  }

  // round(x / scale + offset) of x [count], clamped, as digits.
  void to_digits(const float* x, int64_t count, float scale, float offset, uint8_t* out) const {
    const int32_t half = 1 << (8 * digits - 1);
    const float low = -static_cast<float>(half), high = static_cast<float>(half - 1);
#if defined(CPU_CAPABILITY_AVX512)
    const __m512 divisor = _mm512_set1_ps(scale), added = _mm512_set1_ps(offset);
    for (int64_t k = 0; k < count; k += kVec) {
      const __mmask16 mask = count - k >= kVec ? 0xffff : (1 << (count - k)) - 1;
      const __m512 wide = _mm512_maskz_loadu_ps(mask, x + k);
      const __m512 exact = _mm512_add_ps(_mm512_div_ps(wide, divisor), added);
      const __m512 clamped =
          _mm512_min_ps(_mm512_max_ps(exact, _mm512_set1_ps(low)), _mm512_set1_ps(high));
      const __m512i q = _mm512_add_epi32(_mm512_cvtps_epi32(clamped), _mm512_set1_epi32(half));
      for (int d = 0; d < digits; ++d) {
        const __m512i digit = _mm512_srli_epi32(q, 8 * (digits - 1 - d));
        _mm512_mask_cvtepi32_storeu_epi8(out + d * stride + k, mask, digit);
      }
    }
#else
    for (int64_t k = 0; k < count; ++k) {
      const float exact = std::nearbyint(x[k] / scale + offset);
      const int32_t q = static_cast<int32_t>(std::min(std::max(exact, low), high)) + half;
      for (int d = 0; d < digits; ++d) {
        out[d * stride + k] = static_cast<uint8_t>(q >> (8 * (digits - 1 - d)));
      }
    }
#endif
  }
};

// Integers that this thread's calls reuse, so that later steps touch no new pages.
inline IntegerRows& scratch_integers(int slot_id) {
  static thread_local IntegerRows slots[2];
  return slots[slot_id];
}

// All of x, fp32 [T, K] and contiguous, to the integers of `weight`.
inline void fill_integers(IntegerRows& out, const at::Tensor& x, const PackedIntegers& weight) {
  out.resize(x.size(0), weight);
  const float* data = x.const_data_ptr<float>();
  for_ranges(out.rows, 4, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      out.write(r, data + r * weight.depth, weight);
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
  const int64_t ahead = fetch_distance(4096);
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
      __builtin_prefetch(p + ahead, 0, 2);
      __builtin_prefetch(p + ahead + 64, 0, 2);
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
  with_rows<kDotRows>(rows, [&](auto r) {
    dot_tile<decltype(r)::value>(panel, x, stride, padded, c);
  });
}

// The compiler's vector of as many integers as `Lanes` has floats.
typedef int32_t IntLanes __attribute__((vector_size(kVec * sizeof(int32_t))));

inline IntLanes integer_lanes(const int32_t* p) {
  IntLanes out;
  std::memcpy(&out, p, sizeof(out));
  return out;
}

// x W.T
struct IntegerTerm {
  const PackedIntegers* weight;
  const IntegerRows* x;
};

// What turns the sums of a panel's columns into those of a term, half `j` of the columns.
struct PanelScales {
  Lanes scale[2];
  IntLanes start[2];

  PanelScales() = default;
  PanelScales(const PackedIntegers& weight, int64_t panel) {
    for (int j = 0; j < 2; ++j) {
      const int64_t column = panel * kCols + j * kVec;
      scale[j] = lanes(weight.scales.const_data_ptr<float>() + column);
      start[j] = integer_lanes(weight.start.const_data_ptr<int32_t>() + column);
    }
  }
  // The sums of `digits` rows of digits, one row of activations, whose step is 1.
  Lanes number(int digits, const int32_t* sums, int j) const {
    Lanes total = __builtin_convertvector(integer_lanes(sums + j * kVec) + start[j], Lanes);
    for (int d = 1; d < digits; ++d) {
      const IntLanes next = integer_lanes(sums + d * kCols + j * kVec);
      total = total * 256.f + __builtin_convertvector(next, Lanes);
    }
    return total * scale[j];
  }
};

// One output of `multiply_integers`: act(sum over terms of x_i W_i.T + bias) + residual. All its
// terms have the same features and rows.
struct IntegerOutput {
  std::vector<IntegerTerm> terms; // at most kTerms
  const float* bias; // [features], or null
  Activation activation;
  float* y; // [T, features]
  const float* residual = nullptr; // [T, features], added last; may be y itself
  bool blocked = false; // by brgemm; `multiply_integers` decides

  int64_t rows() const {
    return terms[0].x->rows;
  }
  int64_t num_panels() const {
    return terms[0].weight->num_panels();
  }
  int digits() const { // the most of a term
    int most = 1;
    for (const IntegerTerm& term : terms) {
      most = std::max(most, term.x->digits);
    }
    return most;
  }

  // Columns of one panel, rows [first, first + count), from the sums of each term, rows of digits
  // of kCols each, `size` values from one term's to the next.
  void finish(int64_t panel, int64_t first, int64_t count, const int32_t* sums, int64_t size) const {
    const int64_t column = panel * kCols, features = terms[0].weight->features;
    const int64_t width = std::min<int64_t>(kCols, features - column);
    const bool is_linear = activation == Activation::kNone;
    const float* added = bias ? bias + column : nullptr;
    PanelScales scales[kTerms];
    for (size_t t = 0; t < terms.size(); ++t) {
      scales[t] = PanelScales(*terms[t].weight, panel);
    }
    alignas(64) float tile[kDotRows * kCols];
    for (int64_t r = 0; r < count; r += kDotRows) {
      const int64_t height = std::min<int64_t>(kDotRows, count - r);
      for (int64_t i = 0; i < height; ++i) {
        Lanes total[2] = {};
        for (size_t t = 0; t < terms.size(); ++t) {
          const IntegerRows& x = *terms[t].x;
          const int32_t* from = sums + t * size + (r + i) * x.digits * kCols;
          for (int j = 0; j < 2; ++j) {
            total[j] += scales[t].number(x.digits, from, j) * x.steps[first + r + i];
          }
        }
        std::memcpy(tile + i * kCols, total, sizeof(total));
      }
      if (!is_linear) {
        apply(activation, added, width, height, tile);
      }
      const int64_t offset = (first + r) * features + column;
      store_tile(
          tile, height, width, is_linear ? added : nullptr, residual ? residual + offset : nullptr,
          y + offset, features);
    }
  }
};

// One panel, rows [first, last), few at a time: the panel is read from memory once.
inline void integer_panel_few(
    const IntegerOutput& out, int64_t panel, int64_t first, int64_t last) {
  alignas(64) int32_t sums[kTerms * kDotRows * kCols];
  const int64_t height = kDotRows / out.digits();
  for (int64_t r = first; r < last; r += height) {
    const int64_t count = std::min(height, last - r);
    for (size_t t = 0; t < out.terms.size(); ++t) {
      const auto& [weight, x] = out.terms[t];
      run_dot_tile(
          count * x->digits, weight->panel(panel), x->row(r), x->stride, weight->padded(),
          sums + t * kDotRows * kCols);
    }
    out.finish(panel, r, count, sums, kDotRows * kCols);
  }
}

// c [rows][kCols] (+)= x * panel over `depth` of K, by brgemm, in a few fixed heights: it compiles a
// kernel for every number of rows.
inline void block_integers(
    int64_t rows, const uint8_t* x, int64_t stride, const int8_t* panel, int64_t depth, int32_t* c,
    bool accumulate) {
#if GPTNEOX_BRGEMM_INTEGERS
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
#else
  TORCH_CHECK(false, "torch " TORCH_VERSION " has no brgemm for integers; 2.7 has");
#endif
}

// Panels [panel, end), rows [first, last), by brgemm, in chunks of K that stay in the second-level
// cache while all panels are multiplied. `sums` has room for every panel and term.
inline void integer_panels_blocked(
    const IntegerOutput& out, int64_t panel, int64_t end, int64_t first, int64_t last,
    int32_t* sums) {
  const int64_t rows = last - first, size = rows * out.digits() * kCols;
  const int64_t resident = kResidentBytes / (rows * out.digits()) / 64 * 64;
  const int64_t chunk = std::clamp<int64_t>(resident, 512, 4 * kChunk);
  const int64_t num_terms = static_cast<int64_t>(out.terms.size());
  for (int64_t t = 0; t < num_terms; ++t) {
    const auto& [weight, x] = out.terms[t];
    for (int64_t k = 0; k < weight->padded(); k += chunk) {
      const int64_t depth = std::min(chunk, weight->padded() - k);
      for (int64_t p = panel; p < end; ++p) {
        block_integers(
            rows * x->digits, x->row(first) + k, x->stride, weight->panel(p) + k * kCols, depth,
            sums + ((p - panel) * num_terms + t) * size, k > 0);
      }
    }
  }
  for (int64_t p = panel; p < end; ++p) {
    out.finish(p, first, rows, sums + (p - panel) * num_terms * size, size);
  }
}

// Compute all outputs, which have the same rows, in one parallel loop over their panels.
inline void multiply_integers(std::vector<IntegerOutput> outputs) {
  int64_t total = 0;
  int digits = 1;
  bool blocked = false;
  const int64_t rows = outputs[0].rows();
  if (rows == 0) {
    return;
  }
  for (IntegerOutput& out : outputs) {
    total += out.num_panels();
    digits = std::max(digits, out.digits());
    // Once: a trial in another thread may change the number meanwhile.
    out.blocked = rows > 1 && rows * out.digits() >= integers_blocked_from;
    blocked = blocked || out.blocked;
  }
  const int64_t span = blocked ? std::min(rows, kBlockedSweep / digits) : rows;
  const int64_t sweeps = (rows + span - 1) / span;
  WorkQueue queue(total * sweeps, blocked ? kBlockedPanels : 16);
  on_all_threads([&] {
    static thread_local std::vector<int32_t> sums;
    if (blocked) {
      const int64_t room = span * digits * kTerms * kBlockedPanels * kCols;
      sums.resize(std::max<size_t>(sums.size(), room));
    }
    int64_t begin, end;
    while (queue.take(begin, end)) {
      for (int64_t i = begin, count = 1; i < end; i += count) {
        int64_t panel = i % total;
        size_t which = 0;
        for (; panel >= outputs[which].num_panels(); ++which) {
          panel -= outputs[which].num_panels();
        }
        const IntegerOutput& out = outputs[which];
        const int64_t first = i / total * span, last = std::min(first + span, rows);
        count = 1;
        if (out.blocked) {
          count = std::min(end - i, out.num_panels() - panel);
          integer_panels_blocked(out, panel, panel + count, first, last, sums.data());
        } else {
          integer_panel_few(out, panel, first, last);
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
  IntegerRows& integers = scratch_integers(0);
  fill_integers(integers, rows, *weight);
  multiply_integers({{
      .terms = {{weight.get(), &integers}},
      .bias = bias_of(bias, weight->features),
      .activation = static_cast<Activation>(activation),
      .y = y.data_ptr<float>(),
  }});
  return y;
}

} // namespace gptneox

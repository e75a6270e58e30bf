// SPDX-License-Identifier: Apache-2.0
// Weights of four bits with a scale, and perhaps a zero, for each group of values of K in each row.
//
// Their panel layout: [K / 4][kVec][4] bytes; the byte of a value of K at j has feature j of the
// panel in its low half and feature kVec + j in its high half. Scales and zeros: [panels][groups]
// [kCols]. A group is a multiple of kDepth values, or all of K, so unrolled loops end with it.
//
// Few rows are multiplied by dot products where the processor has them (vpdpbusd): every 32
// activations become integers of two signed digits with a scale of their own (DigitBlock), which
// err by 1.6e-5 of the largest of them. Otherwise weights are widened to fp32.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <memory>
#include <optional>

#include "blocked.h"
#include "memory.h"
#include "packing.h"
#include "tile.h"

namespace gptneox {

// Weights of four bits.
template <typename F>
constexpr bool kGrouped = std::is_same_v<typename F::Weight, Int4>;

// Whether few rows go through dot products, in blocks of this many digits, which end with a group.
template <typename F>
constexpr bool kDigitForm = kGrouped<F> && GPTNEOX_INT8_DOT;
constexpr int64_t kDigitCount = 32;

// The weights of a panel that belong to one value of K, in elements of its type.
template <typename F>
constexpr int64_t kPanelRow = kGrouped<F> ? kVec : kCols;

// Where value `k` of K of a panel begins.
template <typename F>
const typename F::Weight* panel_at(const Packed& weight, int64_t panel, int64_t k = 0) {
  const auto* data = static_cast<const typename F::Weight*>(weight.panels.const_data_ptr());
  return data + (panel * weight.padded() + k) * kPanelRow<F>;
}

// The features of a panel for value `i` of four of K, as floats: 0 to 15 with kZeros, which are
// subtracted later; else less 8.
template <bool kZeros>
inline void load_int4(const Int4* p, int i, Lanes& first, Lanes& second) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512 counted =
      _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512 table = kZeros ? counted : _mm512_sub_ps(counted, _mm512_set1_ps(8));
  const __m512i both = _mm512_srli_epi32(_mm512_loadu_si512(p), 8 * i);
  first = (Lanes)_mm512_permutexvar_ps(both, table); // takes the low four bits of an index
  second = (Lanes)_mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), table);
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256i four = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i both = _mm256_srli_epi32(four, 8 * i), mask = _mm256_set1_epi32(15);
  first = (Lanes)_mm256_cvtepi32_ps(_mm256_and_si256(both, mask));
  second = (Lanes)_mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(both, 4), mask));
  if constexpr (!kZeros) {
    first -= 8.f;
    second -= 8.f;
  }
#else
  for (int j = 0; j < kVec; ++j) {
    first[j] = static_cast<float>((p[4 * j + i].pair & 15) - (kZeros ? 0 : 8));
    second[j] = static_cast<float>((p[4 * j + i].pair >> 4) - (kZeros ? 0 : 8));
  }
#endif
}

// Scales and zeros of one panel.
struct Groups {
  const void* scales; // fp16 or fp32
  const int8_t* zeros; // null: all are 8
  bool half; // what scales are
  int64_t size; // values of K

  Groups(const Packed& weight, int64_t panel)
      : half(weight.scales.scalar_type() == at::kHalf), size(weight.group) {
    const int64_t offset = panel * weight.scales.size(1) * kCols;
    scales = static_cast<const char*>(weight.scales.const_data_ptr()) +
        offset * weight.scales.element_size();
    zeros = weight.zeros.defined() ? weight.zeros.const_data_ptr<int8_t>() + offset : nullptr;
  }
  // Half `j` of the features' scales and zeros, in group `g`.
  Lanes scale(int64_t g, int j) const {
    const int64_t at = g * kCols + j * kVec;
    return half ? lanes(load(static_cast<const c10::Half*>(scales) + at))
                : lanes(static_cast<const float*>(scales) + at);
  }
  Lanes zero(int64_t g, int j) const {
    return lanes(load(zeros + g * kCols + j * kVec));
  }
};

// `tile` of weights of four bits: the sums of each group are those of small integers, then scaled.
template <int R, bool kZeros>
inline void tile_int4(
    const Int4* panel, const Groups& groups, const float* a, int64_t k_steps, float* c,
    int64_t ldc, bool accumulate) {
  constexpr int kChains = R == 1 ? 4 : R <= 3 ? 2 : 1;
  constexpr int kUnrolled = 4;
  const int64_t ahead = fetch_distance(2048);
  if (!accumulate) {
    for (int r = 0; r < R; ++r) {
      std::memset(c + r * ldc, 0, kCols * sizeof(float));
    }
  }
  for (int64_t k = 0, g = 0; k < k_steps; ++g) {
    const int64_t end = std::min(k + groups.size, k_steps);
    Lanes sum[kChains][R][2] = {};
    Lanes zeros[2] = {};
    if constexpr (kZeros) {
      zeros[0] = groups.zero(g, 0);
      zeros[1] = groups.zero(g, 1);
    }
    for (; k < end; k += kUnrolled) {
      __builtin_prefetch(reinterpret_cast<const char*>(panel + k * kVec) + ahead, 0, 2);
#pragma GCC unroll 4
      for (int u = 0; u < kUnrolled; ++u) {
        Lanes first, second;
        load_int4<kZeros>(panel + k * kVec, u, first, second);
        if constexpr (kZeros) {
          first -= zeros[0];
          second -= zeros[1];
        }
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
          const float x = a[(k + u) * R + r];
          sum[u % kChains][r][0] += first * x;
          sum[u % kChains][r][1] += second * x;
        }
      }
    }
    for (int j = 0; j < 2; ++j) {
      const Lanes scale = groups.scale(g, j);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        Lanes total = sum[0][r][j];
#pragma GCC unroll 4
        for (int u = 1; u < kChains; ++u) {
          total += sum[u][r][j];
        }
        float* out = c + r * ldc + j * kVec;
        const Lanes added = lanes(out) + total * scale;
        std::memcpy(out, &added, sizeof(added));
      }
    }
  }
}

// 32 activations as integers: scale * (256 * high + low), with `sum` the sum of the integers.
struct DigitBlock {
  int8_t high[32], low[32];
  float scale, sum;
  float unused[14]; // as large as 32 floats

  // From x [32]. If a value is not finite, everything is zero and the scale NaN.
  void fill(const float* x) {
#if GPTNEOX_INT8_DOT
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i largest = _mm512_setzero_si512();
    for (int i = 0; i < 32; i += 16) {
      const __m512i bits = _mm512_and_si512(_mm512_loadu_si512(x + i), magnitude);
      largest = _mm512_max_epu32(largest, bits);
    }
    const uint32_t bits = _mm512_reduce_max_epu32(largest); // of floats without sign: their order
    float top;
    std::memcpy(&top, &bits, sizeof(top));
    if (!std::isfinite(top)) {
      std::memset(high, 0, sizeof(high) + sizeof(low));
      scale = std::numeric_limits<float>::quiet_NaN();
      sum = 0;
      return;
    }
    scale = top / 32639.f; // 127 * 256 + 127
    if (!(scale >= std::numeric_limits<float>::min())) {
      scale = 1.f;
    }
    __m512i total = _mm512_setzero_si512();
    for (int i = 0; i < 32; i += 16) {
      const __m512 exact = _mm512_div_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(scale));
      const __m512i q = _mm512_cvtps_epi32(exact);
      const __m512i rounded = _mm512_add_epi32(q, _mm512_set1_epi32(128));
      _mm_storeu_si128(
          reinterpret_cast<__m128i*>(high + i),
          _mm512_cvtepi32_epi8(_mm512_srai_epi32(rounded, 8)));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(low + i), _mm512_cvtepi32_epi8(q));
      total = _mm512_add_epi32(total, q);
    }
    sum = static_cast<float>(_mm512_reduce_add_epi32(total));
#else
    (void)x; // this form is not used
#endif
  }
};
static_assert(sizeof(DigitBlock) == 32 * sizeof(float));

// `tile_int4` of activations in digits, rows of x [k_steps / 32] `stride` blocks apart. The sum of a
// block is exact: 32 * 15 * 32639 < 2^24.
template <int R>
inline void digit_tile(
    const Int4* panel, const Groups& groups, const DigitBlock* x, int64_t stride, int64_t k_steps,
    float* c, int64_t ldc, bool accumulate) {
#if GPTNEOX_INT8_DOT
  __m512 total[R][2];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    total[r][0] = accumulate ? _mm512_loadu_ps(c + r * ldc) : _mm512_setzero_ps();
    total[r][1] = accumulate ? _mm512_loadu_ps(c + r * ldc + kVec) : _mm512_setzero_ps();
  }
  const __m512i mask = _mm512_set1_epi8(15);
  const int64_t ahead = fetch_distance(2048);
  for (int64_t k = 0; k < k_steps; ++x) {
    const int64_t g = k / groups.size, end = std::min<int64_t>(k + 32, k_steps);
    __m512i sum[R][2][2]; // of both digits
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      sum[r][0][0] = sum[r][0][1] = sum[r][1][0] = sum[r][1][1] = _mm512_setzero_si512();
    }
    for (int i = 0; k < end; k += 4, i += 4) {
      const Int4* p = panel + k * kVec;
      __builtin_prefetch(reinterpret_cast<const char*>(p) + ahead, 0, 2);
      const __m512i both = _mm512_loadu_si512(p);
      const __m512i half[2] = {
          _mm512_and_si512(both, mask), _mm512_and_si512(_mm512_srli_epi16(both, 4), mask)};
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        int32_t high, low;
        std::memcpy(&high, x[r * stride].high + i, 4);
        std::memcpy(&low, x[r * stride].low + i, 4);
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
          sum[r][0][j] = _mm512_dpbusd_epi32(sum[r][0][j], half[j], _mm512_set1_epi32(high));
          sum[r][1][j] = _mm512_dpbusd_epi32(sum[r][1][j], half[j], _mm512_set1_epi32(low));
        }
      }
    }
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512 scale = (__m512)groups.scale(g, j);
      const __m512 zero = groups.zeros ? (__m512)groups.zero(g, j) : _mm512_set1_ps(8);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const DigitBlock& block = x[r * stride];
        __m512 value = _mm512_fmadd_ps(
            _mm512_cvtepi32_ps(sum[r][0][j]), _mm512_set1_ps(256),
            _mm512_cvtepi32_ps(sum[r][1][j]));
        value = _mm512_fnmadd_ps(zero, _mm512_set1_ps(block.sum), value);
        const __m512 step = _mm512_mul_ps(scale, _mm512_set1_ps(block.scale));
        total[r][j] = _mm512_fmadd_ps(value, step, total[r][j]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    _mm512_storeu_ps(c + r * ldc, total[r][0]);
    _mm512_storeu_ps(c + r * ldc + kVec, total[r][1]);
  }
#endif
}

// Rows of activations in digits times a panel of four bits; as `run_tile_int4`.
inline void run_digit_tile(
    int rows, const Packed& weight, int64_t panel, const float* a, int64_t k_steps, float* c,
    int64_t ldc, bool accumulate) {
  constexpr int kHeight = 4; // its sums fill the registers
  const Int4* data = panel_at<Format<Int4>>(weight, panel);
  const Groups groups(weight, panel);
  const auto* x = reinterpret_cast<const DigitBlock*>(a);
  const int64_t stride = round_up(k_steps, kDigitCount) / kDigitCount;
  for (; rows > 0; rows -= kHeight, x += kHeight * stride, c += kHeight * ldc) {
    with_rows<kHeight>(std::min(rows, kHeight), [&](auto r) {
      digit_tile<decltype(r)::value>(data, groups, x, stride, k_steps, c, ldc, accumulate);
    });
  }
}

// `run_tile` of a panel of four bits.
inline void run_tile_int4(
    int rows, const Packed& weight, int64_t panel, const float* a, int64_t k_steps, float* c,
    int64_t ldc, bool accumulate) {
  const Int4* data = panel_at<Format<Int4>>(weight, panel);
  const Groups groups(weight, panel);
  with_rows<kRows>(rows, [&](auto r) {
    constexpr int R = decltype(r)::value;
    groups.zeros ? tile_int4<R, true>(data, groups, a, k_steps, c, ldc, accumulate)
                 : tile_int4<R, false>(data, groups, a, k_steps, c, ldc, accumulate);
  });
}

// Values [k, k + count) of K of a panel, scaled, to fp32 [count][kCols].
inline void widen_int4(
    const Packed& weight, int64_t panel, int64_t k, int64_t count, float* out) {
  const Groups groups(weight, panel);
  const int64_t last = k + count;
  for (const Int4* p = panel_at<Format<Int4>>(weight, panel, k); k < last;) {
    const int64_t g = k / groups.size, end = std::min((g + 1) * groups.size, last);
    Lanes scales[2], zeros[2];
    for (int j = 0; j < 2; ++j) {
      scales[j] = groups.scale(g, j);
      zeros[j] = groups.zeros ? groups.zero(g, j) : Lanes{} + 8.f;
    }
    for (; k < end; k += 4, p += 4 * kVec) {
      __builtin_prefetch(reinterpret_cast<const char*>(p) + 2048, 0, 2);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i, out += kCols) {
        Lanes values[2];
        load_int4<true>(p, i, values[0], values[1]);
        for (int j = 0; j < 2; ++j) {
          const Lanes scaled = (values[j] - zeros[j]) * scales[j];
          std::memcpy(out + j * kVec, &scaled, sizeof(scaled));
        }
      }
    }
  }
}

#if GPTNEOX_BF16_DOT
// `split_weights` of weights of four bits, values [k, k + count) of K; without kLow, w_hi alone.
template <bool kLow, bool kZeros>
inline void split_int4(
    const Packed& weight, int64_t panel, int64_t k, int64_t count, c10::BFloat16* high,
    c10::BFloat16* low) {
  const Groups groups(weight, panel);
  const int64_t last = k + count;
  for (const Int4* p = panel_at<Format<Int4>>(weight, panel, k); k < last;) {
    const int64_t g = k / groups.size, end = std::min((g + 1) * groups.size, last);
    Lanes scales[2], zeros[2] = {};
    for (int j = 0; j < 2; ++j) {
      scales[j] = groups.scale(g, j);
      if constexpr (kZeros) {
        zeros[j] = groups.zero(g, j);
      }
    }
    for (; k < end; k += 4, p += 4 * kVec) {
      __builtin_prefetch(reinterpret_cast<const char*>(p) + 2048, 0, 2);
#pragma GCC unroll 2
      for (int i = 0; i < 4; i += 2, high += 2 * kCols, low += 2 * kCols) {
        Lanes even[2], odd[2];
        load_int4<kZeros>(p, i, even[0], even[1]);
        load_int4<kZeros>(p, i + 1, odd[0], odd[1]);
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
          if constexpr (kZeros) {
            even[j] -= zeros[j];
            odd[j] -= zeros[j];
          }
          split_pairs<kLow>(
              (__m512)(even[j] * scales[j]), (__m512)(odd[j] * scales[j]), high + j * 2 * kVec,
              low + j * 2 * kVec);
        }
      }
    }
  }
}

inline void split_int4(
    const Packed& weight, int64_t panel, int64_t k, int64_t count, c10::BFloat16* high,
    c10::BFloat16* low) {
  const bool has_zeros = weight.zeros.defined();
  const auto split = weight.rounds
      ? (has_zeros ? split_int4<false, true> : split_int4<false, false>)
      : (has_zeros ? split_int4<true, true> : split_int4<true, false>);
  split(weight, panel, k, count, high, low);
}
#endif

// Two features' values of K in a panel: 0 to 15 each.
inline uint8_t int4_at(const uint8_t* row, int64_t k) {
  return row[k / 2] >> (k % 2 * 4) & 15;
}

// Weight scale[f, g] * (value[f, k] - zero[f, g]). values uint8 [F, K / 2], the even k in the low
// half of a byte; scales fp32 and zeros uint8, [F, G]. K is G equal groups. `rounds`: see Packed.
// `digits`: activations may take that form. Raises ValueError.
inline std::shared_ptr<Packed> pack_int4(
    const at::Tensor& values, const at::Tensor& scales, const at::Tensor& zeros, bool rounds,
    bool digits) {
  TORCH_CHECK_VALUE(
      values.dim() == 2 && values.scalar_type() == at::kByte, "values: uint8 [F, K / 2]");
  TORCH_CHECK_VALUE(
      scales.dim() == 2 && scales.size(0) == values.size(0) && zeros.sizes() == scales.sizes() &&
          zeros.scalar_type() == at::kByte,
      "scales and zeros: [F, G], zeros uint8");
  auto packed = std::make_shared<Packed>();
  packed->rounds = rounds;
  const int64_t features = packed->features = values.size(0);
  const int64_t depth = packed->depth = 2 * values.size(1);
  const int64_t num_groups = scales.size(1), num_panels = (features + kCols - 1) / kCols;
  const int64_t padded = round_up(depth, kDepth);
  packed->group = num_groups == 1 ? round_up(padded, kDigitCount) : depth / num_groups;
  TORCH_CHECK_VALUE(
      (num_groups == 1 || packed->group * num_groups == padded) && packed->group % kDepth == 0,
      "groups of ",
      static_cast<double>(depth) / num_groups, " values of K; multiples of ", kDepth,
      " are expected");
  packed->takes_digits =
      digits && kDigitForm<Format<Int4>> && packed->group % kDigitCount == 0;
  const at::Tensor source = values.contiguous();
  packed->panels = allocate({num_panels, padded, int64_t{kVec}}, at::kByte);
  const auto* from = source.const_data_ptr<uint8_t>();
  auto* to = packed->panels.data_ptr<uint8_t>();
  at::parallel_for(0, num_panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      for (int64_t k = 0; k < padded; ++k) {
        for (int64_t j = 0; j < kVec; ++j) {
          const int64_t low = panel * kCols + j, high = low + kVec;
          const auto value = [&](int64_t row) -> int {
            return row < features && k < depth ? int4_at(from + row * (depth / 2), k) : 0;
          };
          to[panel * padded * kVec + (k / 4 * kVec + j) * 4 + k % 4] =
              static_cast<uint8_t>(value(low) | value(high) << 4);
        }
      }
    }
  });
  const auto in_panels = [&](const at::Tensor& x) { // [F, G] to [panels, G, kCols]
    const at::Tensor rows = at::zeros({num_panels * kCols, num_groups}, x.options());
    rows.narrow(0, 0, features).copy_(x);
    return rows.view({num_panels, kCols, num_groups}).transpose(1, 2).contiguous();
  };
  const at::Tensor wide = scales.to(at::kFloat), narrow = wide.to(at::kHalf);
  packed->scales = in_panels(at::equal(narrow.to(at::kFloat), wide) ? narrow : wide);
  if (!zeros.eq(8).all().item<bool>()) {
    packed->zeros = in_panels(zeros.to(at::kChar));
  }
  return packed;
}

} // namespace gptneox

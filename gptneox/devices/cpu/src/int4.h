// SPDX-License-Identifier: Apache-2.0
// Weights of four bits with a scale, and perhaps a zero, for each group of values of K in each row.
//
// Their panel layout: [K][kVec] bytes; byte j of a value of K has feature j of the panel in its low
// half and feature kVec + j in its high half. Scales and zeros: [panels][groups][kCols]. A group is
// a multiple of kDepth values, or all of K, so unrolled loops end with it.
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

// The weights of a panel that belong to one value of K, in elements of its type.
template <typename F>
constexpr int64_t kPanelRow = kGrouped<F> ? kVec : kCols;

// Where value `k` of K of a panel begins.
template <typename F>
const typename F::Weight* panel_at(const Packed& weight, int64_t panel, int64_t k = 0) {
  const auto* data = static_cast<const typename F::Weight*>(weight.panels.const_data_ptr());
  return data + (panel * weight.padded() + k) * kPanelRow<F>;
}

// The features of a panel for one value of K, as floats: 0 to 15 with kZeros, which are subtracted
// later; else less 8.
template <bool kZeros>
inline void load_int4(const Int4* p, Lanes& first, Lanes& second) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512 counted =
      _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512 table = kZeros ? counted : _mm512_sub_ps(counted, _mm512_set1_ps(8));
  const __m512i both =
      _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  first = (Lanes)_mm512_permutexvar_ps(both, table); // takes the low four bits of an index
  second = (Lanes)_mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), table);
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256i both =
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  first = (Lanes)_mm256_cvtepi32_ps(_mm256_and_si256(both, _mm256_set1_epi32(15)));
  second = (Lanes)_mm256_cvtepi32_ps(_mm256_srli_epi32(both, 4));
  if constexpr (!kZeros) {
    first -= 8.f;
    second -= 8.f;
  }
#else
  for (int j = 0; j < kVec; ++j) {
    first[j] = static_cast<float>((p[j].pair & 15) - (kZeros ? 0 : 8));
    second[j] = static_cast<float>((p[j].pair >> 4) - (kZeros ? 0 : 8));
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
      __builtin_prefetch(reinterpret_cast<const char*>(panel + k * kVec) + 2048, 0, 2);
#pragma GCC unroll 4
      for (int u = 0; u < kUnrolled; ++u) {
        Lanes first, second;
        load_int4<kZeros>(panel + (k + u) * kVec, first, second);
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

// `run_tile` of a panel of four bits.
inline void run_tile_int4(
    int rows, const Packed& weight, int64_t panel, const float* a, int64_t k_steps, float* c,
    int64_t ldc, bool accumulate) {
  const Int4* data = panel_at<Format<Int4>>(weight, panel);
  const Groups groups(weight, panel);
  switch (rows) {
#define GPTNEOX_ROWS(R)                                                       \
  case R:                                                                     \
    if constexpr (R <= kRows) {                                               \
      return groups.zeros                                                     \
          ? tile_int4<R, true>(data, groups, a, k_steps, c, ldc, accumulate)  \
          : tile_int4<R, false>(data, groups, a, k_steps, c, ldc, accumulate); \
    }                                                                         \
    break;
    GPTNEOX_ROWS(1)
    GPTNEOX_ROWS(2)
    GPTNEOX_ROWS(3)
    GPTNEOX_ROWS(4)
    GPTNEOX_ROWS(5)
    GPTNEOX_ROWS(6)
    GPTNEOX_ROWS(7)
    GPTNEOX_ROWS(8)
    GPTNEOX_ROWS(9)
    GPTNEOX_ROWS(10)
    GPTNEOX_ROWS(11)
    GPTNEOX_ROWS(12)
#undef GPTNEOX_ROWS
  }
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
    for (; k < end; ++k, p += kVec, out += kCols) {
      __builtin_prefetch(reinterpret_cast<const char*>(p) + 2048, 0, 2);
      Lanes values[2];
      load_int4<true>(p, values[0], values[1]);
      for (int j = 0; j < 2; ++j) {
        const Lanes scaled = (values[j] - zeros[j]) * scales[j];
        std::memcpy(out + j * kVec, &scaled, sizeof(scaled));
      }
    }
  }
}

#if GPTNEOX_BF16_DOT
// `split_weights` of weights of four bits.
inline void split_int4(
    const Packed& weight, int64_t panel, int64_t k, int64_t count, c10::BFloat16* high,
    c10::BFloat16* low) {
  alignas(64) float wide[kDepth * kCols];
  for (int64_t i = 0; i < count; i += kDepth) {
    widen_int4(weight, panel, k + i, kDepth, wide);
    split_weights(wide, kDepth, high + i * kCols, low + i * kCols);
  }
}
#endif

// Two features' values of K in a panel: 0 to 15 each.
inline uint8_t int4_at(const uint8_t* row, int64_t k) {
  return row[k / 2] >> (k % 2 * 4) & 15;
}

// Weight scale[f, g] * (value[f, k] - zero[f, g]). values uint8 [F, K / 2], the even k in the low
// half of a byte; scales fp32 and zeros uint8, [F, G]. K is G equal groups. Raises ValueError.
inline std::shared_ptr<Packed> pack_int4(
    const at::Tensor& values, const at::Tensor& scales, const at::Tensor& zeros) {
  TORCH_CHECK_VALUE(
      values.dim() == 2 && values.scalar_type() == at::kByte, "values: uint8 [F, K / 2]");
  TORCH_CHECK_VALUE(
      scales.dim() == 2 && scales.size(0) == values.size(0) && zeros.sizes() == scales.sizes() &&
          zeros.scalar_type() == at::kByte,
      "scales and zeros: [F, G], zeros uint8");
  auto packed = std::make_shared<Packed>();
  const int64_t features = packed->features = values.size(0);
  const int64_t depth = packed->depth = 2 * values.size(1);
  const int64_t num_groups = scales.size(1), num_panels = (features + kCols - 1) / kCols;
  const int64_t padded = round_up(depth, kDepth);
  packed->group = num_groups == 1 ? padded : depth / num_groups;
  TORCH_CHECK_VALUE(
      packed->group * num_groups == padded && packed->group % kDepth == 0, "groups of ",
      static_cast<double>(depth) / num_groups, " values of K; multiples of ", kDepth,
      " are expected");
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
          to[(panel * padded + k) * kVec + j] =
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

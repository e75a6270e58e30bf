// SPDX-License-Identifier: Apache-2.0
// One query times the rows of a cache that belong to one head: the inner loops of decode attention.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "tile.h"

namespace gptneox {

// The most rows that are multiplied in one call.
constexpr int64_t kRowTile = 128;

// The sum of a vector's elements.
inline float total(const Vec& x) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, x);
}

inline float total(Lanes x) {
  Vec v;
  std::memcpy(&v, &x, sizeof(v));
  return total(v);
}

// Prefetch the row about 4 KiB ahead of row `i` of `count`; near the end, the rows of `next`, which
// is read afterwards. Into the second-level cache, for the reason in tile.h.
template <int N, typename C>
inline void fetch_ahead(const C* row, int64_t stride, int64_t i, int64_t count, const C* next) {
  constexpr int64_t kRowBytes = N * kVec * static_cast<int64_t>(sizeof(C));
  constexpr int64_t kAhead = std::max<int64_t>(1, 4096 / kRowBytes);
  const C* from = i + kAhead < count ? row + kAhead * stride : next + (i + kAhead - count) * stride;
#pragma GCC unroll 32
  for (int64_t offset = 0; offset < kRowBytes; offset += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(from) + offset, 0, 2);
  }
}

// scores[i] = q . k_i for `count` tokens; D = N * kVec. `next`: see `fetch_ahead`.
template <int N, typename C>
inline void scores_of(
    const float* q, const C* k, int64_t stride, int64_t count, const C* next, float* scores) {
  Lanes query[N];
#pragma GCC unroll 32
  for (int n = 0; n < N; ++n) {
    query[n] = lanes(q + n * kVec);
  }
  int64_t i = 0;
  for (; i + 4 <= count; i += 4, k += 4 * stride) {
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      fetch_ahead<N>(k + r * stride, stride, i + r, count, next);
    }
    Lanes s0{}, s1{}, s2{}, s3{};
#pragma GCC unroll 32
    for (int n = 0; n < N; ++n) {
      s0 += query[n] * lanes(load(k + n * kVec));
      s1 += query[n] * lanes(load(k + stride + n * kVec));
      s2 += query[n] * lanes(load(k + 2 * stride + n * kVec));
      s3 += query[n] * lanes(load(k + 3 * stride + n * kVec));
    }
    scores[i] = total(s0);
    scores[i + 1] = total(s1);
    scores[i + 2] = total(s2);
    scores[i + 3] = total(s3);
  }
  for (; i < count; ++i, k += stride) {
    Lanes s{};
#pragma GCC unroll 32
    for (int n = 0; n < N; ++n) {
      s += query[n] * lanes(load(k + n * kVec));
    }
    scores[i] = total(s);
  }
}

// out [D] = out * factor + sum of p_i v_i over `count` tokens; D = N * kVec. `next`: see
// `fetch_ahead`.
template <int N, typename C>
inline void add_values(
    const float* p,
    const C* v,
    int64_t stride,
    int64_t count,
    const C* next,
    float factor,
    float* out) {
  Lanes sum[N];
#pragma GCC unroll 32
  for (int n = 0; n < N; ++n) {
    sum[n] = lanes(out + n * kVec) * factor;
  }
  for (int64_t i = 0; i < count; ++i, v += stride) {
    fetch_ahead<N>(v, stride, i, count, next);
#pragma GCC unroll 32
    for (int n = 0; n < N; ++n) {
      sum[n] += lanes(load(v + n * kVec)) * p[i];
    }
  }
#pragma GCC unroll 32
  for (int n = 0; n < N; ++n) {
    std::memcpy(out + n * kVec, &sum[n], sizeof(Lanes));
  }
}

// `scores_of` and `add_values` for one head size.
template <typename C>
struct Kernels {
  void (*scores)(const float*, const C*, int64_t, int64_t, const C*, float*);
  void (*values)(const float*, const C*, int64_t, int64_t, const C*, float, float*);
};

#if GPTNEOX_INT8_DOT
// -- an int8 cache, by dot products of integers ---------------------------------------------------
//
// The float of the other side becomes an integer of two digits of eight bits with a scale, which
// errs by 1.5e-5 of its largest value; sums of products are exact in int32.

// Bytes of rows of N * kVec values in register `m` of those that hold a row.
template <int N>
inline __mmask64 bytes_of(int m) {
  const int count = std::min(64, N * kVec - m * 64);
  return count == 64 ? ~__mmask64{0} : (__mmask64{1} << count) - 1;
}

// `scores_of` an int8 cache, without its scales. Keys plus 128 are the unsigned side of the product,
// so its sums begin at minus 128 times those of the query.
template <int N>
inline void int8_scores(
    const float* q, const int8_t* k, int64_t stride, int64_t count, const int8_t* next,
    float* scores) {
  constexpr int kRegisters = (N + 3) / 4;
  static_assert(int64_t{127} * 32639 * N * kVec <= std::numeric_limits<int32_t>::max());
  Vec top(0.f);
  for (int n = 0; n < N; ++n) {
    top = at::vec::maximum(top, Vec::loadu(q + n * kVec).abs()); // NaN if there is one
  }
  const float largest = at::vec::vec_reduce_all<float>(
      [](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, top);
  float scale = largest / 32639.f; // 127 * 256 + 127
  if (!std::isfinite(scale)) {
    std::fill(scores, scores + count, std::numeric_limits<float>::quiet_NaN());
    return;
  }
  if (scale < std::numeric_limits<float>::min()) {
    scale = 1; // the query is zeros, or so small that it becomes zeros
  }
  alignas(64) int8_t digits[2][kRegisters * 64] = {};
  for (int n = 0; n < N; ++n) {
    const __m512 exact = _mm512_div_ps(_mm512_loadu_ps(q + n * kVec), _mm512_set1_ps(scale));
    const __m512i value = _mm512_cvtps_epi32(exact);
    const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(value, _mm512_set1_epi32(128)), 8);
    _mm_store_si128(
        reinterpret_cast<__m128i*>(digits[0] + n * kVec), _mm512_cvtepi32_epi8(high));
    _mm_store_si128(
        reinterpret_cast<__m128i*>(digits[1] + n * kVec), _mm512_cvtepi32_epi8(value));
  }
  const __m512i shift = _mm512_set1_epi8(static_cast<char>(128));
  __m512i query[2][kRegisters], begin[2];
#pragma GCC unroll 2
  for (int d = 0; d < 2; ++d) {
    begin[d] = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int m = 0; m < kRegisters; ++m) {
      query[d][m] = _mm512_load_si512(digits[d] + m * 64);
      begin[d] = _mm512_dpbusd_epi32(begin[d], shift, query[d][m]);
    }
    begin[d] = _mm512_sub_epi32(_mm512_setzero_si512(), begin[d]);
  }
  const auto sums = [&](const int8_t* row) { // of both digits, in 16 parts
    __m512i high = begin[0], low = begin[1];
#pragma GCC unroll 8
    for (int m = 0; m < kRegisters; ++m) {
      const __m512i key =
          _mm512_xor_si512(_mm512_maskz_loadu_epi8(bytes_of<N>(m), row + m * 64), shift);
      high = _mm512_dpbusd_epi32(high, key, query[0][m]);
      low = _mm512_dpbusd_epi32(low, key, query[1][m]);
    }
    return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
  };
  int64_t i = 0;
  for (; i + 4 <= count; i += 4, k += 4 * stride) {
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      fetch_ahead<N>(k + r * stride, stride, i + r, count, next);
    }
    const __m512i a = sums(k), b = sums(k + stride), c = sums(k + 2 * stride),
                  d = sums(k + 3 * stride);
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    const __m512i all =
        _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i half =
        _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    const __m128i four =
        _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    _mm_storeu_ps(scores + i, _mm_mul_ps(_mm_cvtepi32_ps(four), _mm_set1_ps(scale)));
  }
  for (; i < count; ++i, k += stride) {
    scores[i] = static_cast<float>(_mm512_reduce_add_epi32(sums(k))) * scale;
  }
}

// `add_values` of an int8 cache, without its scales. p >= 0.
template <int N>
inline void int8_values(
    const float* p, const int8_t* v, int64_t stride, int64_t count, const int8_t* next,
    float factor, float* out) {
  static_assert(255 * 127 * kRowTile * 256 <= std::numeric_limits<int32_t>::max());
  alignas(64) uint8_t digits[2][kRowTile] = {};
  float largest = 0;
  for (int64_t i = 0; i < count; i += kVec) {
    const __mmask16 mask = count - i >= kVec ? 0xffff : (1 << (count - i)) - 1;
    // Of floats that are not negative the bits have the same order, and NaN is the largest.
    const __m512i bits = _mm512_castps_si512(_mm512_maskz_loadu_ps(mask, p + i));
    const uint32_t top = _mm512_reduce_max_epu32(bits);
    uint32_t before;
    std::memcpy(&before, &largest, sizeof(before));
    if (top > before) {
      std::memcpy(&largest, &top, sizeof(top));
    }
  }
  float scale = largest / 65535.f;
  if (!std::isfinite(scale)) {
    std::fill(out, out + N * kVec, std::numeric_limits<float>::quiet_NaN());
    return;
  }
  if (scale < std::numeric_limits<float>::min()) {
    scale = 1; // zeros, or so small that they become zeros
  }
  for (int64_t i = 0; i < count; i += kVec) {
    const __mmask16 mask = count - i >= kVec ? 0xffff : (1 << (count - i)) - 1;
    const __m512 x = _mm512_maskz_loadu_ps(mask, p + i);
    const __m512i value = _mm512_cvtps_epi32(_mm512_div_ps(x, _mm512_set1_ps(scale)));
    _mm_store_si128(
        reinterpret_cast<__m128i*>(digits[0] + i),
        _mm512_cvtepi32_epi8(_mm512_srli_epi32(value, 8)));
    _mm_store_si128(reinterpret_cast<__m128i*>(digits[1] + i), _mm512_cvtepi32_epi8(value));
  }
#pragma GCC unroll 8
  for (int m = 0; m < (N + 3) / 4; ++m) {
    const __mmask64 bytes = bytes_of<N>(m);
    __m512i sum[2][4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      sum[0][j] = sum[1][j] = _mm512_setzero_si512();
    }
    for (int64_t i = 0; i < count; i += 4) {
      __m512i row[4];
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        const int8_t* from = v + (i + r) * stride;
        if (m == 0) {
          fetch_ahead<N>(from, stride, i + r, count, next);
        }
        row[r] = i + r < count ? _mm512_maskz_loadu_epi8(bytes, from + m * 64)
                               : _mm512_setzero_si512();
      }
      // Values of four rows side by side: of each 16 of a row, 4 to each register.
      const __m512i a = _mm512_unpacklo_epi8(row[0], row[1]);
      const __m512i b = _mm512_unpackhi_epi8(row[0], row[1]);
      const __m512i c = _mm512_unpacklo_epi8(row[2], row[3]);
      const __m512i d = _mm512_unpackhi_epi8(row[2], row[3]);
      const __m512i four[4] = {
          _mm512_unpacklo_epi16(a, c), _mm512_unpackhi_epi16(a, c), _mm512_unpacklo_epi16(b, d),
          _mm512_unpackhi_epi16(b, d)};
#pragma GCC unroll 2
      for (int digit = 0; digit < 2; ++digit) {
        int32_t weights;
        std::memcpy(&weights, digits[digit] + i, sizeof(weights));
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          sum[digit][j] =
              _mm512_dpbusd_epi32(sum[digit][j], _mm512_set1_epi32(weights), four[j]);
        }
      }
    }
    __m512 total[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      total[j] = _mm512_cvtepi32_ps(
          _mm512_add_epi32(_mm512_slli_epi32(sum[0][j], 8), sum[1][j]));
    }
    // Part l of register j are values 16 l + 4 j and the three behind.
    const __m512 low[2] = {
        _mm512_shuffle_f32x4(total[0], total[1], 0x44),
        _mm512_shuffle_f32x4(total[2], total[3], 0x44)};
    const __m512 high[2] = {
        _mm512_shuffle_f32x4(total[0], total[1], 0xee),
        _mm512_shuffle_f32x4(total[2], total[3], 0xee)};
    const __m512 ordered[4] = {
        _mm512_shuffle_f32x4(low[0], low[1], 0x88), _mm512_shuffle_f32x4(low[0], low[1], 0xdd),
        _mm512_shuffle_f32x4(high[0], high[1], 0x88), _mm512_shuffle_f32x4(high[0], high[1], 0xdd)};
#pragma GCC unroll 4
    for (int l = 0; l < 4; ++l) {
      if (4 * m + l < N) {
        float* to = out + (4 * m + l) * kVec;
        const __m512 before = _mm512_mul_ps(_mm512_loadu_ps(to), _mm512_set1_ps(factor));
        _mm512_storeu_ps(to, _mm512_fmadd_ps(ordered[l], _mm512_set1_ps(scale), before));
      }
    }
  }
}
#endif

// The kernels for D = N * kVec.
template <int N, typename C>
Kernels<C> unrolled() {
#if GPTNEOX_INT8_DOT
  constexpr bool kIntegers = std::is_same_v<C, int8_t>;
#else
  constexpr bool kIntegers = false;
#endif
  if constexpr (kIntegers) {
    return {int8_scores<N>, int8_values<N>};
  } else {
    return {scores_of<N, C>, add_values<N, C>};
  }
}

// Unrolled kernels for the head sizes that GPT-NeoX models have. Null for other sizes and where D
// is not a multiple of kVec: plain loops compute those.
template <typename C>
Kernels<C> kernels_for(int64_t dim) {
  if (dim % kVec == 0) {
    switch (dim / kVec) {
#define GPTNEOX_SIZE(N) \
  case N:               \
    return unrolled<N, C>();
      GPTNEOX_SIZE(1)
      GPTNEOX_SIZE(2)
      GPTNEOX_SIZE(3)
      GPTNEOX_SIZE(4)
      GPTNEOX_SIZE(5)
      GPTNEOX_SIZE(6)
      GPTNEOX_SIZE(8)
      GPTNEOX_SIZE(10)
      GPTNEOX_SIZE(12)
      GPTNEOX_SIZE(16)
      GPTNEOX_SIZE(20)
      GPTNEOX_SIZE(24)
      GPTNEOX_SIZE(32)
#undef GPTNEOX_SIZE
    }
  }
  return {nullptr, nullptr};
}

} // namespace gptneox

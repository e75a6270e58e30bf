// SPDX-License-Identifier: Apache-2.0
// The register tile: up to kRows rows of activations times one panel of weights, summed in fp32. It
// is the inner loop of matrix products and of prompt attention. ATen's vector classes let one
// source serve AVX-512, AVX2, NEON and plain C++.
//
// Both operands are read from front to back: panels as packing.h lays them out, activations
// transposed as rows.h lays them out.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>

#if defined(__aarch64__)
#include <arm_neon.h>
#define GPTNEOX_NEON 1
#else
#define GPTNEOX_NEON 0
#endif

// bf16 dot products of AVX-512, and of NEON. Where there is either, Format<BFloat16> has two values
// of K per lane.
#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
#define GPTNEOX_BF16_DOT 1
#else
#define GPTNEOX_BF16_DOT 0
#endif
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define GPTNEOX_NEON_DOT 1
#else
#define GPTNEOX_NEON_DOT 0
#endif

#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512VNNI__)
#define GPTNEOX_INT8_DOT 1
#else
#define GPTNEOX_INT8_DOT 0
#endif

namespace gptneox {

using Vec = at::vec::Vectorized<float>;

constexpr int kVec = Vec::size();
constexpr int kCols = 2 * kVec; // output features of a panel
// Rows of a tile. Its accumulators must fit the register file: 16 registers on AVX2, 32 elsewhere.
constexpr int kRows = kVec == 8 ? 6 : 12;
// K is padded with zeros to a multiple of this, so that unrolled loops have no remainder.
constexpr int64_t kDepth = 16;

// The score of a masked position, and the initial value of a maximum.
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

inline Vec load(const float* p) {
  return Vec::loadu(p);
}

#if GPTNEOX_NEON // ATen would widen one value at a time
inline Vec load(const c10::Half* p) {
  return vcvt_f32_f16(vld1_f16(reinterpret_cast<const float16_t*>(p)));
}

inline Vec load(const c10::BFloat16* p) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16));
}
#else
inline Vec load(const c10::Half* p) {
  Vec out;
  at::vec::load_fp32_from_fp16(p, out);
  return out;
}

inline Vec load(const c10::BFloat16* p) {
  Vec out;
  at::vec::load_fp32_from_bf16(p, out);
  return out;
}
#endif

inline Vec load(const int8_t* p) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
#elif defined(CPU_CAPABILITY_AVX2)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
#elif GPTNEOX_NEON
  uint32_t bytes;
  std::memcpy(&bytes, p, sizeof(bytes));
  const int16x8_t pairs = vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(bytes)));
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(pairs)));
#else
  float wide[kVec];
  for (int i = 0; i < kVec; ++i) {
    wide[i] = p[i];
  }
  return Vec::loadu(wide);
#endif
}

// 2 kVec values rounded to bf16. The processor's instruction makes denormal numbers zero.
inline void store_bf16(const Vec& a, const Vec& b, c10::BFloat16* out) {
#if GPTNEOX_BF16_DOT
  _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(b, a));
#else
  at::vec::convert_float_bfloat16(a, b).store(out);
#endif
}

// The compiler's vector type. Arrays of it stay in registers; arrays of Vec do not.
typedef float Lanes __attribute__((vector_size(kVec * sizeof(float))));

inline Lanes lanes(const Vec& x) {
  static_assert(sizeof(Vec) == sizeof(Lanes));
  Lanes out;
  std::memcpy(&out, &x, sizeof(out));
  return out;
}

inline Lanes lanes(const float* p) {
  Lanes out;
  std::memcpy(&out, p, sizeof(out));
  return out;
}

// Two weights of four bits in a byte; int4.h has what is peculiar to them.
struct Int4 {
  uint8_t pair;
};

// How weights of type W are multiplied. kPerLane: consecutive values of K that share a 32-bit lane;
// one K step multiplies that many. Scalar: the activations of a row for a K step, 32 bits. Operand:
// weights of a K step in a register.
template <typename W>
struct Format {
  using Weight = W;
  using Scalar = float;
  static constexpr int kPerLane = 1;
  using Operand = Lanes;
  static Operand operand(const W* p) {
    return lanes(load(p));
  }
  static Lanes multiply_add(Scalar a, Operand b, Lanes c) {
    return c + b * a; // the compiler makes this one fused multiply-add
  }
};

#if GPTNEOX_BF16_DOT || GPTNEOX_NEON_DOT
// bf16 dot products: two values of K per lane; activations are rounded to bf16.
template <>
struct Format<c10::BFloat16> {
  using Weight = c10::BFloat16;
  using Scalar = uint32_t;
  static constexpr int kPerLane = 2;
#if GPTNEOX_BF16_DOT
  using Operand = __m512bh;
  static Operand operand(const Weight* p) {
    return (__m512bh)_mm512_loadu_si512(p);
  }
  static Lanes multiply_add(Scalar a, Operand b, Lanes c) {
    return (Lanes)_mm512_dpbf16_ps(
        (__m512)c, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), b);
  }
#else
  using Operand = bfloat16x8_t;
  static Operand operand(const Weight* p) {
    return vld1q_bf16(reinterpret_cast<const bfloat16_t*>(p));
  }
  static Lanes multiply_add(Scalar a, Operand b, Lanes c) {
    return (Lanes)vbfdotq_f32((float32x4_t)c, vreinterpretq_bf16_u32(vdupq_n_u32(a)), b);
  }
#endif
};
#endif

template <>
struct Format<Int4> {
  using Weight = Int4;
  using Scalar = float;
  static constexpr int kPerLane = 1;
};

// Weights that no dot-product instruction takes, in half precision, of eight or of four bits: they
// are widened to fp32.
template <typename F>
constexpr bool kWidened = F::kPerLane == 1 && sizeof(typename F::Weight) < 4;

// Weights of eight bits: each row of the matrix has a scale, which its sums are multiplied by.
template <typename F>
constexpr bool kRowScaled = std::is_same_v<typename F::Weight, int8_t>;

// How many bytes ahead weights that come from memory are prefetched for few rows: on Intel's
// processors 8192 (measured on a Xeon with AMX, one to eight rows of every format), on others `bytes`
// (measured on a Zen 4, for each format and number of rows).
inline int64_t fetch_distance(int64_t bytes) {
#if defined(__x86_64__)
  static const bool is_intel = __builtin_cpu_is("intel");
  return is_intel ? 8192 : bytes;
#else
  return bytes;
#endif
}

// One tile: c [R][kCols] (+)= a * panel over `k_steps` K steps, a multiple of kChains. Rows of c
// are `ldc` apart. a is transposed, [k_steps][R], or row-major with kRowStride where that is not 0.
// kStreamed: the panel comes from memory, not from a processor cache.
template <typename F, int R, int kRowStride, bool kStreamed>
inline void tile(
    const typename F::Weight* panel,
    const typename F::Scalar* a,
    int64_t k_steps,
    float* c,
    int64_t ldc,
    bool accumulate) {
  // With few rows, several independent sums hide the latency of a multiply-add.
  constexpr int kChains = R == 1 ? 8 : R <= 3 ? 4 : R <= 6 && kRows > 6 ? 2 : 1;
  constexpr int64_t kStride = kCols * F::kPerLane;
  // Whether to prefetch every cache line or one per K step was measured for each number of rows.
  constexpr bool kAlone = R == 1 && kWidened<F> && !kRowScaled<F>;
  const int64_t ahead =
      !kStreamed ? 2048 : fetch_distance(R > 4 ? 8192 : kAlone ? 256 : 2048);
  constexpr bool kEveryLine = kStreamed && (R <= 2 || R > 4);
  constexpr int64_t kFetched = kEveryLine ? kStride * sizeof(typename F::Weight) : 64;
  Lanes sum[kChains][R][2];
#pragma GCC unroll 8
  for (int u = 0; u < kChains; ++u) {
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      sum[u][r][0] = sum[u][r][1] = Lanes{};
      if (accumulate && u == 0) {
        sum[u][r][0] = lanes(c + r * ldc);
        sum[u][r][1] = lanes(c + r * ldc + kVec);
      }
    }
  }
  for (int64_t k = 0; k < k_steps; k += kChains) {
#pragma GCC unroll 8
    for (int u = 0; u < kChains; ++u) {
      const auto* p = panel + (k + u) * kStride;
      // Prefetch to the second-level cache only: on a Zen 4, prefetching to the first level halved
      // the bandwidth. An address beyond the end is harmless: a prefetch cannot fault.
#pragma GCC unroll 4
      for (int64_t offset = 0; offset < kFetched; offset += 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(p) + ahead + offset, 0, 2);
      }
      const auto b0 = F::operand(p), b1 = F::operand(p + kStride / 2);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const auto x = kRowStride ? a[r * kRowStride + k + u] : a[(k + u) * R + r];
        sum[u][r][0] = F::multiply_add(x, b0, sum[u][r][0]);
        sum[u][r][1] = F::multiply_add(x, b1, sum[u][r][1]);
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      Lanes total = sum[0][r][j];
#pragma GCC unroll 8
      for (int u = 1; u < kChains; ++u) {
        total += sum[u][r][j];
      }
      std::memcpy(c + r * ldc + j * kVec, &total, sizeof(total));
    }
  }
}

// Call `body` with the number of rows, 1 to kMost, as a constant.
template <int kMost, typename Body>
inline void with_rows(int64_t rows, Body&& body) {
  [&]<int... kBefore>(std::integer_sequence<int, kBefore...>) {
    (void)((rows == kBefore + 1 && (body(std::integral_constant<int, kBefore + 1>()), true)) || ...);
  }(std::make_integer_sequence<int, kMost>());
}

// `tile` for a number of rows that is only known at run time.
template <typename F, int kRowStride = 0, bool kStreamed = false>
inline void run_tile(
    int rows,
    const typename F::Weight* panel,
    const typename F::Scalar* a,
    int64_t k_steps,
    float* c,
    int64_t ldc,
    bool accumulate) {
  with_rows<kRows>(rows, [&](auto r) {
    tile<F, decltype(r)::value, kRowStride, kStreamed>(panel, a, k_steps, c, ldc, accumulate);
  });
}

// The vectors and instructions that the library was compiled for.
inline std::string describe() {
  std::string text = "vectors of " + std::to_string(kVec) + " floats";
  text += GPTNEOX_BF16_DOT || GPTNEOX_NEON_DOT ? ", bf16 dot products" : "";
  return text + (GPTNEOX_INT8_DOT ? ", int8 dot products" : "");
}

} // namespace gptneox

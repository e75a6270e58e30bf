// SPDX-License-Identifier: Apache-2.0
// The blocked kernels: oneDNN's brgemm (at::native::cpublas::brgemm), for products of many rows. It
// uses AMX tiles, AVX-512 or AVX2, whichever the processor has. It reads the same panels as the
// register tile, but row-major activations.
//
// fp16 weights are multiplied as two bf16 parts: every finite fp16 value is the sum of two bf16
// values, and so is an fp32 activation to within 2^-16. w x = w_hi x_hi + w_hi x_lo + w_lo x_hi has
// a relative error of 4e-6 (the product in fp32: 3e-7; activations rounded to fp16: 2e-4). Weights
// of four bits are scaled first, and multiplied as fp16 ones are; in a model of bf16, w_hi x_hi is
// enough. Weights of eight bits: see integers.h, where the processor has its instructions.
#pragma once

#include <ATen/native/CPUBlas.h>
#include <c10/util/Exception.h>
#include <torch/version.h>

#include "tile.h"

// Which brgemm this torch declares: 2.5 has none that serves here, 2.6 brought bf16 and fp32, 2.7
// integers.
#define GPTNEOX_TORCH (TORCH_VERSION_MAJOR * 100 + TORCH_VERSION_MINOR)
#define GPTNEOX_BRGEMM (GPTNEOX_TORCH >= 206)
#define GPTNEOX_BRGEMM_INTEGERS (GPTNEOX_TORCH >= 207)

namespace gptneox {

// While one lives, brgemm may leave the matrix units of this thread configured for its next call;
// the outermost one releases them, because other products on the thread configure them anew.
class MatrixUnitScope {
 public:
  MatrixUnitScope() {
    ++depth_;
  }
  ~MatrixUnitScope() {
    if (--depth_ == 0 && used_) {
      used_ = false;
#if GPTNEOX_BRGEMM
      at::native::cpublas::brgemm_release(true);
#endif
    }
  }
  MatrixUnitScope(const MatrixUnitScope&) = delete;
  MatrixUnitScope& operator=(const MatrixUnitScope&) = delete;
  static void mark_used() {
    used_ = true;
  }

 private:
  static inline thread_local int depth_ = 0;
  static inline thread_local bool used_ = false;
};

// Rows of a row block: two AMX tiles.
constexpr int64_t kBlockedRows = 32;
constexpr int64_t kNever = int64_t{1} << 62;

// The smallest K of a split fp16 product. With fewer terms per sum, the error of the split is no
// longer small against the rounding of fp32 sums.
constexpr int64_t kSplitDepth = 256;

// The smallest number of rows that goes to the blocked kernels, by dtype of the weights. With fewer
// rows the register tile is faster. blocked.py measures the numbers after loading the library.
struct BlockedFrom {
  int64_t bf16 = kNever, fp16 = kNever, fp32 = kNever, int4 = kNever, int4_rounded = kNever;
};
inline BlockedFrom blocked_from;

// Whether brgemm can read the panels of this format. It multiplies half precision as pairs of bf16,
// a layout that exists only with bf16 dot products, and only on x86.
template <typename F>
constexpr bool kCanBlock = std::is_same_v<typename F::Weight, float> ||
    (GPTNEOX_BF16_DOT && !kRowScaled<F>);

// Whether activations [rows, depth] go to the blocked kernels. `rounds`: see Packed.
template <typename F>
inline bool is_blocked(int64_t rows, int64_t depth, bool rounds = false) {
  using W = typename F::Weight;
  if constexpr (!kCanBlock<F>) {
    return false;
  } else if constexpr (std::is_same_v<W, float>) {
    return rows >= blocked_from.fp32;
  } else if constexpr (std::is_same_v<W, c10::BFloat16>) {
    return rows >= blocked_from.bf16;
  } else {
    const int64_t least = !std::is_same_v<W, Int4> ? blocked_from.fp16
                          : rounds                 ? blocked_from.int4_rounded
                                                   : blocked_from.int4;
    return rows >= least && (rounds || depth >= kSplitDepth);
  }
}

// Write part of a row of activations, x [count], in the form that multiplies weights of format F.
// fp32: copied. bf16: rounded. Others: split into two planes, x_hi at `out` and x_lo `plane` values later.
template <typename F>
inline void write_row(const float* x, int64_t count, int64_t plane, void* out) {
  if constexpr (std::is_same_v<typename F::Weight, float>) {
    std::memcpy(out, x, count * sizeof(float));
  } else {
    auto* high = static_cast<c10::BFloat16*>(out);
    int64_t i = 0;
    if constexpr (std::is_same_v<typename F::Weight, c10::BFloat16>) {
      for (; i + 2 * kVec <= count; i += 2 * kVec) {
        store_bf16(Vec::loadu(x + i), Vec::loadu(x + i + kVec), high + i);
      }
      for (; i < count; ++i) {
        high[i] = static_cast<c10::BFloat16>(x[i]);
      }
    } else {
      auto* low = high + plane;
      for (; i + 2 * kVec <= count; i += 2 * kVec) {
        const Vec a = Vec::loadu(x + i), b = Vec::loadu(x + i + kVec);
        store_bf16(a, b, high + i);
        store_bf16(a - load(high + i), b - load(high + i + kVec), low + i);
      }
      for (; i < count; ++i) {
        high[i] = static_cast<c10::BFloat16>(x[i]);
        low[i] = static_cast<c10::BFloat16>(x[i] - static_cast<float>(high[i]));
      }
    }
  }
}

#if GPTNEOX_BF16_DOT
// Two values of K of kVec features, even and odd, to kVec pairs of bf16: rounded at `high` and, with
// kLow, what that leaves at `low`.
template <bool kLow>
inline void split_pairs(__m512 even, __m512 odd, c10::BFloat16* high, c10::BFloat16* low) {
  // Value j of the even half (0 to 15) and of the odd half (16 to 31) become pair j.
  const __m512i to_pairs = _mm512_set_epi16(
      31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19,
      3, 18, 2, 17, 1, 16, 0);
  const auto rounded = [&](__m512 first, __m512 second) {
    return _mm512_permutexvar_epi16(to_pairs, (__m512i)_mm512_cvtne2ps_pbh(second, first));
  };
  const __m512i pairs = rounded(even, odd);
  _mm512_storeu_si512(high, pairs);
  if constexpr (kLow) {
    const __m512i top = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    const __m512 even_rest = _mm512_sub_ps(even, (__m512)_mm512_slli_epi32(pairs, 16));
    const __m512 odd_rest = _mm512_sub_ps(odd, (__m512)_mm512_and_si512(pairs, top));
    _mm512_storeu_si512(low, rounded(even_rest, odd_rest));
  }
}

// Split weights [count][kCols] of a panel into w_hi and w_lo, panels of bf16 pairs
// [count / 2][kCols][2].
template <typename W>
inline void split_weights(
    const W* panel, int64_t count, c10::BFloat16* high, c10::BFloat16* low) {
  for (int64_t k = 0; k < count; k += 2, panel += 2 * kCols) {
    __builtin_prefetch(reinterpret_cast<const char*>(panel) + 4096, 0, 2);
    __builtin_prefetch(reinterpret_cast<const char*>(panel) + 4096 + 64, 0, 2);
    for (int64_t j = 0; j < kCols; j += kVec, high += 2 * kVec, low += 2 * kVec) {
      split_pairs<true>(load(panel + j), load(panel + kCols + j), high, low);
    }
  }
}
#endif

// c [rows][columns] (+)= a * panel over `k_steps` K steps. Rows of a are `stride` K steps apart,
// rows of c `ldc` values. The panel is `width` columns wide; the first `columns` are multiplied.
// brgemm compiles a kernel for every number of rows, so rows go in a few fixed heights and a
// remainder below 32. Large heights read the panel again from a near cache.
template <typename F>
inline void block_product(
    int64_t rows, const void* a, int64_t stride, const void* panel, int64_t width, int64_t columns,
    int64_t k_steps, float* c, int64_t ldc, bool accumulate) {
  using T = std::conditional_t<std::is_same_v<typename F::Weight, float>, float, c10::BFloat16>;
  constexpr int64_t kValues = std::is_same_v<T, float> ? 1 : 2; // of a K step
  const T* x = static_cast<const T*>(a);
#if GPTNEOX_BRGEMM
  MatrixUnitScope::mark_used();
  for (int64_t height = 256; rows > 0; height /= 2) {
    const int64_t m = height < kBlockedRows ? rows : height;
    for (; rows > 0 && rows >= m; rows -= m) {
      at::native::cpublas::brgemm(
          m, columns, k_steps * kValues, stride * kValues, width, ldc, accumulate, x,
          static_cast<const T*>(panel), c, kValues == 2);
      x += m * stride * kValues;
      c += m * ldc;
    }
  }
#else
  TORCH_CHECK(false, "torch " TORCH_VERSION " has no brgemm for bf16 and fp32; 2.6 has");
#endif
}

} // namespace gptneox

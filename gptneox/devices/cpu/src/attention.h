// SPDX-License-Identifier: Apache-2.0
// Attention over a paged KV cache, which is read in place: rotary embedding and cache writes,
// decode (one new token per sequence) and prefill (prompt chunks). Scores, softmax and sums are
// fp32 for every cache dtype. Products are fp32 too, except in prefill with a bf16 or int8 cache on
// a processor that has bf16 dot products.
//
// An int8 cache has a scale for each token and head. Keys are multiplied as integers, and the score
// by the scale of its key; the probability of a token is multiplied by the scale of its value.
#pragma once

#include <ATen/ATen.h>

#include <cmath>
#include <vector>

#include "cache_rows.h"
#include "product.h"

namespace gptneox {

// Whether a cache of type C has scales.
template <typename C>
constexpr bool kScaled = std::is_same_v<C, int8_t>;

// One tensor of a layer's cache, [N, P, H, …] with any strides.
template <typename C>
struct TokenRows {
  C* data = nullptr;
  int64_t block_stride = 0, head_stride = 0, token_stride = 0;

  TokenRows() = default;
  explicit TokenRows(const at::Tensor& cache)
      : data(static_cast<C*>(cache.data_ptr())),
        block_stride(cache.stride(0)),
        head_stride(cache.stride(2)),
        token_stride(cache.stride(1)) {}

  // What belongs to token `t` of block `b`, head `h`.
  C* row(int64_t b, int64_t h, int64_t t) const {
    return data + b * block_stride + h * head_stride + t * token_stride;
  }
};

// Keys or values of one layer: rows of D contiguous values, and their scales where they have them.
template <typename C>
struct Cache : TokenRows<C> {
  TokenRows<float> scales;

  Cache(const at::Tensor& cache, const at::Tensor& scale) : TokenRows<C>(cache) {
    if (kScaled<C>) {
      scales = TokenRows<float>(scale);
    }
  }
};

// The tensors of an engine step (step.h owns them). Sequences in decode come first.
struct Step {
  int64_t num_tokens, num_decodes, num_seqs, num_heads, head_dim, block_size;
  const int64_t* slots; // [T]
  const int32_t* block_tables; // [B, max_blocks]
  int64_t max_blocks;
  const int32_t* cu_seqlens; // [B + 1]
  const int32_t* context_lens; // [B]
  const int32_t* starts; // [B] first position that is not padding; null: 0
};

// A row of int8 values and their scale, by the formulas of `quantize` in cache.py: x [count] is
// rounded to out, and overwritten. Returns the scale.
inline float store_quantized(float* x, int64_t count, int8_t* out) {
  constexpr float kMost = 127, kSmallest = std::numeric_limits<float>::min();
  Vec top(0.f);
  int64_t i = 0;
  for (; i + kVec <= count; i += kVec) {
    top = at::vec::maximum(top, Vec::loadu(x + i).abs()); // NaN if there is one
  }
  float largest = at::vec::vec_reduce_all<float>(
      [](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, top);
  for (; i < count; ++i) {
    const float value = std::abs(x[i]);
    largest = value > largest || std::isnan(value) ? value : largest;
  }
  float scale = largest / kMost;
  if (!std::isfinite(scale)) { // whoever reads the row gets NaN
    std::memset(out, 0, count);
    return std::numeric_limits<float>::quiet_NaN();
  }
  if (scale < kSmallest) {
    scale = 1;
  }
  for (i = 0; i < count; ++i) {
    out[i] = static_cast<int8_t>(std::nearbyint(x[i] / scale));
  }
  return scale;
}

// Round `count` values to the cache's type.
template <typename C>
inline void store_rounded(const float* x, int64_t count, C* out) {
  int64_t i = 0;
  if constexpr (std::is_same_v<C, float>) {
    std::memcpy(out, x, count * sizeof(float));
    return;
  } else {
    for (; i + 2 * kVec <= count; i += 2 * kVec) {
      at::vec::convert_from_float<C>(Vec::loadu(x + i), Vec::loadu(x + i + kVec)).store(out + i);
    }
  }
  for (; i < count; ++i) {
    out[i] = static_cast<C>(x[i]);
  }
}

// The new tokens of a step in one layer, before the rotary embedding.
template <typename X>
struct NewTokens {
  const X* qkv; // [T, H, 3, D]
  const int64_t* positions; // [T]
  const float *cos, *sin; // [max_positions, half]
  int64_t half;
  float scale; // softmax scale, which queries are multiplied by

  // Rotate part 0 (query) or 1 (key) of token t, head h: out [D], times `factor`.
  void rotate(const Step& step, int64_t t, int64_t h, int part, float factor, float* out) const {
    const X* x = qkv + ((t * step.num_heads + h) * 3 + part) * step.head_dim;
    const float* c = cos + positions[t] * half;
    const float* s = sin + positions[t] * half;
    for (int64_t i = 0; i < half; ++i) {
      const float a = x[i], b = x[half + i];
      out[i] = (a * c[i] - b * s[i]) * factor;
      out[half + i] = (b * c[i] + a * s[i]) * factor;
    }
    for (int64_t i = 2 * half; i < step.head_dim; ++i) {
      out[i] = static_cast<float>(x[i]) * factor;
    }
  }

  // The rotated and scaled query of token t, head h: out [D].
  void query(const Step& step, int64_t t, int64_t h, float* out) const {
    rotate(step, t, h, 0, scale, out);
  }

  // Write one row of D values, which may be overwritten, to a cache.
  template <typename C>
  static void put(
      float* x, const Step& step, const Cache<C>& cache, int64_t block, int64_t h, int64_t offset) {
    C* to = cache.row(block, h, offset);
    if constexpr (kScaled<C>) {
      *cache.scales.row(block, h, offset) = store_quantized(x, step.head_dim, to);
    } else {
      store_rounded(x, step.head_dim, to);
    }
  }

  // Write rotated key and value of token t, head h, to its slot. `row` is a buffer of D values.
  template <typename C>
  void store(
      const Step& step, int64_t t, int64_t h, const Cache<C>& keys, const Cache<C>& values,
      float* row) const {
    const int64_t block = step.slots[t] / step.block_size;
    const int64_t offset = step.slots[t] % step.block_size;
    rotate(step, t, h, 1, 1.f, row);
    put(row, step, keys, block, h, offset);
    const X* x = qkv + ((t * step.num_heads + h) * 3 + 2) * step.head_dim;
    std::copy(x, x + step.head_dim, row);
    put(row, step, values, block, h, offset);
  }
};

// -- decode: one query per sequence --------------------------------------------------------------

// x[i] *= scale of token i of `count` tokens, the first of which has its scale at `scales`.
inline void apply_scales(const float* scales, int64_t stride, int64_t count, float* x) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) {
      x[i] *= scales[i];
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    x[i] *= scales[i * stride];
  }
}

// One part of a running softmax: raise `largest` to the maximum of x, then x = exp(x - largest) in
// place. Returns the sum, per vector lane. `count` is a multiple of kVec. Masked entries are -inf;
// this or an earlier part holds a finite one. kRounded: the caller rounds the results to bf16, so a
// faster exp is exact enough. On NEON it is right to two units in the last place, and ATen's other
// exp calls the C library for every element.
template <bool kRounded = false>
inline Vec softmax_part(float* x, int64_t count, float& largest) {
  Vec top(largest);
  for (int64_t i = 0; i < count; i += kVec) {
    top = at::vec::maximum(top, Vec::loadu(x + i));
  }
  largest = at::vec::vec_reduce_all<float>(
      [](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, top);
  const Vec shift(largest);
  Vec sum(0.f);
  for (int64_t i = 0; i < count; i += kVec) {
    const Vec offset = Vec::loadu(x + i) - shift;
    const Vec e = kRounded || GPTNEOX_NEON ? offset.exp_u20() : offset.exp();
    e.store(x + i);
    sum = sum + e;
  }
  return sum;
}

// Running softmax over positions [begin, end) of one sequence and head. out [D]: the sum of
// exp(score - largest) v, not yet divided by `sum`. largest, sum: the maximum score and the sum of
// exponentials.
template <typename C>
void attend_one(
    const Step& step,
    const Kernels<C>& kernels,
    const float* q,
    const Cache<C>& keys,
    const Cache<C>& values,
    const int32_t* table,
    int64_t head,
    int64_t begin,
    int64_t end,
    float* out,
    float& largest,
    float& sum) {
  alignas(64) float p[kRowTile];
  const int64_t dim = step.head_dim;
  std::fill(out, out + dim, 0.f);
  largest = kMinusInfinity;
  sum = 0;
  const auto row_of = [&](const auto& cache, int64_t position) {
    return cache.row(table[position / step.block_size], head, position % step.block_size);
  };
  for (int64_t position = begin; position < end;) {
    const int64_t offset = position % step.block_size;
    const int64_t count = std::min({kRowTile, end - position, step.block_size - offset});
    const C* k = row_of(keys, position);
    const C* v = row_of(values, position);
    if (kernels.scores) {
      kernels.scores(q, k, keys.token_stride, count, v, p);
    } else {
      for (int64_t i = 0; i < count; ++i) {
        float s = 0;
        for (int64_t d = 0; d < dim; ++d) {
          s += q[d] * static_cast<float>(k[i * keys.token_stride + d]);
        }
        p[i] = s;
      }
    }
    if constexpr (kScaled<C>) {
      apply_scales(row_of(keys.scales, position), keys.scales.token_stride, count, p);
    }
    const float previous_max = largest;
    const int64_t padded = round_up(count, kVec);
    std::fill(p + count, p + padded, kMinusInfinity);
    const float part = total(softmax_part(p, padded, largest));
    const float factor = previous_max == largest ? 1.f : std::exp(previous_max - largest);
    sum = sum * factor + part;
    if constexpr (kScaled<C>) {
      apply_scales(row_of(values.scales, position), values.scales.token_stride, count, p);
    }
    if (kernels.values) {
      const C* next = position + count < end ? row_of(keys, position + count) : v;
      kernels.values(p, v, values.token_stride, count, next, factor, out);
    } else {
      for (int64_t d = 0; d < dim; ++d) {
        out[d] *= factor;
      }
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t d = 0; d < dim; ++d) {
          out[d] += p[i] * static_cast<float>(v[i * values.token_stride + d]);
        }
      }
    }
    position += count;
  }
}

template <typename Y>
inline void store_row(const float* x, float factor, int64_t dim, Y* y) {
  for (int64_t d = 0; d < dim; ++d) {
    y[d] = static_cast<Y>(x[d] * factor);
  }
}

// Sequences [0, num_decodes): store the new token, then attend. Work is split over sequences, heads
// and, if those are too few for the threads, the context. No sequence reads a slot that another one
// writes.
template <typename X, typename C>
void decode(
    const Step& step, const NewTokens<X>& new_tokens, const Cache<C>& keys, const Cache<C>& values,
    X* y) {
  const int64_t heads = step.num_heads, dim = step.head_dim;
  const int64_t pairs = step.num_decodes * heads;
  const int64_t threads = at::get_num_threads();
  int64_t longest = 0;
  for (int64_t b = 0; b < step.num_decodes; ++b) {
    longest = std::max<int64_t>(longest, step.context_lens[b]);
  }
  constexpr int64_t kMinSplit = 256; // tokens
  const int64_t target = (4 * threads + pairs - 1) / pairs;
  const int64_t splits =
      threads == 1 ? 1 : std::max<int64_t>(1, std::min(target, longest / kMinSplit));
  const auto kernels = kernels_for<C>(dim);
  // Per split: D sums, the maximum score, the sum of exponentials.
  std::vector<float> parts(splits > 1 ? pairs * splits * (dim + 2) : 0);
  WorkQueue queue(pairs * splits, 16);
  on_all_threads([&] {
    std::vector<float> own(dim), q(dim);
    int64_t first, last;
    while (queue.take(first, last)) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t split = i % splits, b = i / splits / heads, h = i / splits % heads;
        const int64_t start = step.starts ? step.starts[b] : 0;
        const int64_t length = step.context_lens[b] - start;
        const int64_t begin = start + length * split / splits;
        const int64_t end = start + length * (split + 1) / splits;
        float largest, sum;
        float* out = splits > 1 ? parts.data() + i * (dim + 2) : own.data();
        if (split == splits - 1) { // only the last split reads the new token
          new_tokens.store(step, b, h, keys, values, q.data());
        }
        new_tokens.query(step, b, h, q.data());
        attend_one(
            step, kernels, q.data(), keys, values, step.block_tables + b * step.max_blocks, h,
            begin, end, out, largest, sum);
        if (splits > 1) {
          out[dim] = largest;
          out[dim + 1] = sum;
        } else {
          store_row(out, 1.f / sum, dim, y + (b * heads + h) * dim);
        }
      }
    }
  });
  if (splits == 1) {
    return;
  }
  std::vector<float> own(dim);
  for (int64_t i = 0; i < pairs; ++i) {
    const float* part = parts.data() + i * splits * (dim + 2);
    float largest = kMinusInfinity, sum = 0;
    for (int64_t s = 0; s < splits; ++s) {
      largest = std::max(largest, part[s * (dim + 2) + dim]);
    }
    std::fill(own.begin(), own.end(), 0.f);
    for (int64_t s = 0; s < splits; ++s) {
      const float* from = part + s * (dim + 2);
      const float factor = std::exp(from[dim] - largest);
      sum += from[dim + 1] * factor;
      for (int64_t d = 0; d < dim; ++d) {
        own[d] += from[d] * factor;
      }
    }
    store_row(own.data(), 1.f / sum, dim, y + i * dim);
  }
}

// -- prefill: many queries per sequence ----------------------------------------------------------

// How prompts multiply with a cache of type C, if it has dot products.
template <typename C>
using PromptFormat = Format<std::conditional_t<kScaled<C>, c10::BFloat16, C>>;

// Attention of a range of queries of a prompt chunk, for one head: row blocks of queries against
// tiles of keys, with a running softmax. kBlocked: the blocked kernels multiply, not the register
// tile.
//
// With a bf16 or int8 cache and bf16 dot products, Q, K, P and V are multiplied in bf16: Q and P
// (the probabilities, before they are normalised) are rounded to it; int8 values are exact in it.
// Otherwise all four are fp32.
template <typename C, bool kBlocked>
class PrefillTask {
 public:
  using F = std::conditional_t<PromptFormat<C>::kPerLane == 2, PromptFormat<C>, Format<float>>;

 private:
  using Weight = typename F::Weight;
  using Scalar = typename F::Scalar; // one fp32 value or two of bf16
  static constexpr int64_t kPerLane = F::kPerLane;
  static constexpr int64_t kKeys = kBlocked ? 8 * kCols : 2 * kCols; // keys per tile
  static constexpr int64_t kHeight = kBlocked ? kBlockedRows : kRows; // queries per row block

 public:
  static constexpr int64_t kQueries = kHeight * (kBlocked ? 8 : kVec == 16 ? 12 : 16); // per task

  explicit PrefillTask(int64_t dim)
      : dim_(dim),
        padded_(round_up(dim, std::max<int64_t>(kCols, kDepth))),
        rows_(kKeys * padded_),
        k_(kKeys * padded_),
        v_(kKeys * padded_),
        s_(kHeight * kKeys),
        p_(kPerLane == 1 ? 0 : kHeight * kKeys),
        k_scale_(kScaled<C> ? kKeys : 0),
        v_scale_(kScaled<C> ? kKeys : 0),
        out_(kQueries * padded_),
        largest_(kQueries),
        sum_(kQueries, Vec(0.f)) {}

  // Attend queries [first, last) of a chunk whose query 0 has position `offset`. `start`: first
  // position that is not padding.
  template <typename Y>
  void run(
      const Step& step,
      const float* q, // [chunk length, H, D]
      const Cache<C>& keys,
      const Cache<C>& values,
      const int32_t* table,
      int64_t head,
      int64_t first,
      int64_t last,
      int64_t offset,
      int64_t start,
      Y* y) { // [chunk length, H, D]
    const int64_t stride = step.num_heads * dim_;
    const int64_t count = last - first;
    q += first * stride + head * dim_;
    q_.resize(count, dim_, kBlocked ? RowForm::kBlocked : RowForm::kTransposed);
    for (int64_t b = 0; b < q_.num_blocks(); ++b) {
      q_.fill(b, q + b * q_.height * stride, dim_, stride);
    }
    std::fill(out_.begin(), out_.end(), 0.f);
    std::fill(largest_.begin(), largest_.end(), kMinusInfinity);
    std::fill(sum_.begin(), sum_.end(), Vec(0.f));
    const int64_t end = offset + last; // causal: the last query attends to positions below this
    for (int64_t position = start / kKeys * kKeys; position < end; position += kKeys) {
      const int64_t tile_begin = std::max<int64_t>(0, start - position);
      const int64_t tile_end = std::min(kKeys, end - position);
      load_tile(step, keys, table, head, position, tile_begin, tile_end, k_scale_);
      transpose_keys();
      load_tile(step, values, table, head, position, tile_begin, tile_end, v_scale_);
      interleave_values();
      for (int64_t b = 0; b < q_.num_blocks(); ++b) {
        // Row r of the row block attends to positions [start, visible + r).
        const int64_t visible = offset + first + b * q_.height + 1;
        if (position < visible + q_.rows_of(b) - 1) {
          attend_rows(b, position, start, visible);
        }
      }
    }
    for (int64_t r = 0; r < count; ++r) {
      // A padding query may have no visible position; its output is not used.
      const float sum = total(sum_[r]);
      const float factor = sum > 0 ? 1.f / sum : 0.f;
      store_row(out_of(r), factor, dim_, y + (first + r) * stride + head * dim_);
    }
  }

 private:
  float* out_of(int64_t row) {
    return out_.data() + row * padded_;
  }

  // Copy tokens [begin, end) of the tile at `position` to rows_ [kKeys][padded_]. The others become
  // zero: an unwritten slot may hold NaN, and a probability of 0 times NaN is NaN. Scales go to
  // `scales` [kKeys].
  void load_tile(
      const Step& step,
      const Cache<C>& cache,
      const int32_t* table,
      int64_t head,
      int64_t position,
      int64_t begin,
      int64_t end,
      std::vector<float>& scales) {
    std::fill(scales.begin(), scales.end(), 0.f);
    std::fill(rows_.begin(), rows_.begin() + begin * padded_, Weight(0.f));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t p = position + i;
      const C* from = cache.row(table[p / step.block_size], head, p % step.block_size);
      Weight* to = rows_.data() + i * padded_;
      if constexpr (kScaled<C>) {
        scales[i] = *cache.scales.row(table[p / step.block_size], head, p % step.block_size);
      }
      if constexpr (std::is_same_v<Weight, C>) {
        std::memcpy(to, from, dim_ * sizeof(C));
      } else if constexpr (kPerLane == 2) {
        widen_exactly(from, to);
      } else {
        int64_t d = 0;
        for (; d + kVec <= dim_; d += kVec) {
          load(from + d).store(to + d);
        }
        for (; d < dim_; ++d) {
          to[d] = static_cast<float>(from[d]);
        }
      }
      std::fill(to + dim_, to + padded_, Weight(0.f));
    }
    std::fill(rows_.begin() + end * padded_, rows_.end(), Weight(0.f));
  }

  // D values of int8 to bf16, which holds them all.
  void widen_exactly(const C* from, Weight* to) const {
    int64_t d = 0;
    for (; d + 2 * kVec <= dim_; d += 2 * kVec) {
      store_bf16(load(from + d), load(from + d + kVec), to + d);
    }
    for (; d < dim_; ++d) {
      to[d] = static_cast<float>(from[d]);
    }
  }

  // rows_ to k_, in the panel layout with keys as features and D as K. The register tile reads
  // panels of kCols keys, the blocked kernels one panel of kKeys. A lane moves as one 32-bit value.
  void transpose_keys() {
    static_assert(kPerLane * sizeof(Weight) == sizeof(float));
    constexpr int64_t kWidth = kBlocked ? kKeys : kCols; // of a panel
    const int64_t depth = padded_ / kPerLane;
    for (int64_t first = 0; first < kKeys; first += kVec) {
      const auto* from = reinterpret_cast<const float*>(rows_.data() + first * padded_);
      auto* to = reinterpret_cast<float*>(k_.data()) + first / kWidth * kWidth * depth +
          first % kWidth;
      for (int64_t d = 0; d < depth; d += kVec) {
        at::vec::transpose_mxn<float, kVec, kVec>(from + d, depth, to + d * kWidth, kWidth);
      }
    }
  }

  // rows_ to v_, in the panel layout with D as features and keys as K. The register tile reads
  // panels of kCols features, the blocked kernels one panel of padded_.
  void interleave_values() {
    const int64_t width = kBlocked ? padded_ : kCols; // of a panel
    for (int64_t d = 0; d < padded_; d += kCols) {
      Weight* to = v_.data() + d / width * width * kKeys + d % width * kPerLane;
      for (int64_t i = 0; i < kKeys; i += kPerLane, to += width * kPerLane) {
        const Weight* from = rows_.data() + i * padded_ + d;
        if constexpr (kPerLane == 1) {
          std::memcpy(to, from, kCols * sizeof(Weight));
        } else {
          interleave(from, from + padded_, to);
        }
      }
    }
  }

  // Put the values of two tokens into one lane each, as the dot-product instruction reads them.
#if GPTNEOX_BF16_DOT
  static void interleave(const c10::BFloat16* even, const c10::BFloat16* odd, c10::BFloat16* to) {
    for (int64_t j = 0; j < kCols; j += kVec) {
      const auto widened = [j](const c10::BFloat16* p) {
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + j)));
      };
      _mm512_storeu_si512(
          to + 2 * j, _mm512_or_si512(widened(even), _mm512_slli_epi32(widened(odd), 16)));
    }
  }
#elif GPTNEOX_NEON_DOT
  static void interleave(const c10::BFloat16* even, const c10::BFloat16* odd, c10::BFloat16* to) {
    static_assert(kCols == 8);
    const auto bits = [](const c10::BFloat16* p) {
      return vld1q_u16(reinterpret_cast<const uint16_t*>(p));
    };
    vst2q_u16(reinterpret_cast<uint16_t*>(to), {{bits(even), bits(odd)}});
  }
#endif

  // Add the tile at `position` to the running softmax of row block `b`.
  void attend_rows(int64_t b, int64_t position, int64_t start, int64_t visible) {
    const int rows = q_.rows_of(b);
    float* s = s_.data();
    // The last row of the row block attends to this many keys of the tile, the others to fewer.
    // They are the K of the second product, so they are rounded up to what `tile` unrolls.
    constexpr int64_t kStep = std::max<int64_t>(kCols, kDepth / 2 * kPerLane);
    const int64_t num_keys = std::min(kKeys, round_up(visible + rows - 1 - position, kStep));
    if constexpr (kBlocked) {
      block_product<F>(
          rows, q_.block(b), q_.stride(), k_.data(), kKeys, num_keys, q_.k_steps, s, kKeys, false);
    } else {
      for (int64_t i = 0; i < num_keys; i += kCols) {
        run_tile<F>(rows, k_.data() + i * padded_, q_.block(b), q_.k_steps, s + i, kKeys, false);
      }
    }
    for (int r = 0; r < rows; ++r) {
      float* row = s + r * kKeys;
      const int64_t row_index = b * q_.height + r;
      const int64_t low = std::clamp<int64_t>(start - position, 0, num_keys);
      const int64_t high = std::clamp<int64_t>(visible + r - position, low, num_keys);
      if (high == low) {
        std::fill(row, row + num_keys, 0.f);
        continue;
      }
      if constexpr (kScaled<C>) {
        apply_scales(k_scale_.data(), 1, num_keys, row);
      }
      std::fill(row, row + low, kMinusInfinity);
      std::fill(row + high, row + num_keys, kMinusInfinity);
      float& largest = largest_[row_index];
      const float previous_max = largest;
      const Vec part = softmax_part<kPerLane == 2>(row, num_keys, largest);
      if constexpr (kScaled<C>) {
        apply_scales(v_scale_.data(), 1, num_keys, row);
      }
      Vec& sum = sum_[row_index];
      if (previous_max == largest) {
        sum = sum + part;
        continue;
      }
      const Vec factor(std::exp(previous_max - largest));
      sum = at::vec::fmadd(sum, factor, part);
      float* out = out_of(row_index);
      for (int64_t d = 0; d < padded_; d += kVec) {
        (Vec::loadu(out + d) * factor).store(out + d);
      }
    }
    const auto* probs = reinterpret_cast<const Scalar*>(s);
    if constexpr (kPerLane == 2) {
      for (int r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < num_keys; i += kCols) {
          const float* from = s + r * kKeys + i;
          store_bf16(load(from), load(from + kVec), p_.data() + r * kKeys + i);
        }
      }
      probs = reinterpret_cast<const Scalar*>(p_.data());
    }
    float* out = out_of(b * q_.height);
    if constexpr (kBlocked) {
      block_product<F>(
          rows, probs, kKeys / kPerLane, v_.data(), padded_, padded_, num_keys / kPerLane, out,
          padded_, true);
    } else {
      for (int64_t d = 0; d < padded_; d += kCols) {
        run_tile<F, kKeys / kPerLane>(
            rows, v_.data() + d * kKeys, probs, num_keys / kPerLane, out + d, padded_, true);
      }
    }
  }

  int64_t dim_, padded_; // D, and D rounded up to whole panels
  std::vector<Weight> rows_, k_, v_;
  RowBlocks<F> q_;
  std::vector<float> s_; // scores of a row block, then their exponentials
  std::vector<Weight> p_; // the exponentials, rounded to bf16
  std::vector<float> k_scale_, v_scale_; // of a tile, where the cache has scales
  std::vector<float> out_, largest_;
  std::vector<Vec> sum_; // per vector lane
};

// Divide the chunks into tasks and run them.
template <bool kBlocked, typename Y, typename C>
void prefill_by(
    const Step& step, const float* q, const Cache<C>& keys, const Cache<C>& values, Y* y) {
  struct Work {
    int64_t seq, head, first, last;
  };
  std::vector<Work> work;
  const int64_t threads = at::get_num_threads();
  int64_t rows = 0;
  for (int64_t b = step.num_decodes; b < step.num_seqs; ++b) {
    rows += step.cu_seqlens[b + 1] - step.cu_seqlens[b];
  }
  // With larger tasks the keys are read less often; with more tasks all threads stay busy.
  constexpr int64_t kHeight = kBlocked ? kBlockedRows : kRows;
  int64_t span = PrefillTask<C, kBlocked>::kQueries;
  while (span > 2 * kHeight && rows * step.num_heads < span * threads * 4) {
    span = round_up(span / 2, kHeight);
  }
  for (int64_t b = step.num_decodes; b < step.num_seqs; ++b) {
    const int64_t length = step.cu_seqlens[b + 1] - step.cu_seqlens[b];
    for (int64_t h = 0; h < step.num_heads; ++h) {
      for (int64_t first = 0; first < length; first += span) {
        work.push_back({b, h, first, std::min(first + span, length)});
      }
    }
  }
  WorkQueue queue(static_cast<int64_t>(work.size()), 1);
  const int64_t stride = step.num_heads * step.head_dim;
  on_all_threads([&] {
    PrefillTask<C, kBlocked> task(step.head_dim);
    int64_t begin, end;
    while (queue.take(begin, end)) {
      // The last queries of a sequence attend to most keys: start with them.
      const Work& w = work[work.size() - 1 - begin];
      const int64_t row = step.cu_seqlens[w.seq];
      const int64_t length = step.cu_seqlens[w.seq + 1] - row;
      task.run(
          step, q + row * stride, keys, values, step.block_tables + w.seq * step.max_blocks,
          w.head, w.first, w.last, step.context_lens[w.seq] - length,
          step.starts ? step.starts[w.seq] : 0, y + row * stride);
    }
  });
}

// Sequences [num_decodes, num_seqs), whose new tokens are in the cache already. q fp32 [T, H, D]:
// rotated and scaled.
template <typename Y, typename C>
void prefill(
    const Step& step, const float* q, const Cache<C>& keys, const Cache<C>& values, Y* y) {
  using F = typename PrefillTask<C, true>::F;
  if constexpr (kCanBlock<F>) {
    if (is_blocked<F>(step.num_tokens - step.num_decodes, step.head_dim)) {
      return prefill_by<true>(step, q, keys, values, y);
    }
  }
  prefill_by<false>(step, q, keys, values, y);
}

} // namespace gptneox

// SPDX-License-Identifier: Apache-2.0
// Attention over a paged cache, read in place: rotation and cache writing, one-token rows
// (decode) and prompt chunks. Scores, softmax and sums are fp32 whatever the cache holds.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <cmath>
#include <limits>
#include <vector>

#include "product.h"

namespace gptneox {

// Keys or values of one layer: token `t` of block `b` of head `h` starts at
// data + b * block + h * head + t * token; its D values are contiguous.
template <typename C>
struct Cache {
  C* data;
  int64_t block, head, token;

  explicit Cache(const at::Tensor& cache) // [N, P, H, D]
      : data(static_cast<C*>(cache.data_ptr())),
        block(cache.stride(0)),
        head(cache.stride(2)),
        token(cache.stride(1)) {}
};

struct Step {
  int64_t num_tokens, num_decodes, num_seqs, num_heads, head_dim, block_size;
  const int64_t* slots; // [T]
  const int32_t* block_tables; // [B, max_blocks]
  int64_t max_blocks;
  const int32_t* cu_seqlens; // [B + 1]
  const int32_t* context_lens; // [B]
  const int32_t* starts; // [B] first visible position, or null
};

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

// Rotate and scale queries into q [T, H, D]; rotate keys and write both to their slots.
template <typename X, typename C>
void rotate_and_store(
    const Step& step,
    const X* qkv, // [T, H, 3, D]
    const int64_t* positions,
    const float* cos, // [max_positions, half]
    const float* sin,
    int64_t half,
    float scale,
    float* q,
    const Cache<C>& keys,
    const Cache<C>& values) {
  const int64_t heads = step.num_heads, dim = step.head_dim;
  const int64_t grain = std::max<int64_t>(1, 8192 / (heads * dim));
  at::parallel_for(0, step.num_tokens, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(dim);
    float* row = buffer.data();
    for (int64_t t = begin; t < end; ++t) {
      const float* c = cos + positions[t] * half;
      const float* s = sin + positions[t] * half;
      const int64_t block = step.slots[t] / step.block_size;
      const int64_t offset = step.slots[t] % step.block_size;
      for (int64_t h = 0; h < heads; ++h) {
        const X* x = qkv + (t * heads + h) * 3 * dim;
        float* out = q + (t * heads + h) * dim;
        for (int64_t i = 0; i < half; ++i) {
          const float a = x[i], b = x[half + i];
          out[i] = (a * c[i] - b * s[i]) * scale;
          out[half + i] = (b * c[i] + a * s[i]) * scale;
        }
        for (int64_t i = 2 * half; i < dim; ++i) {
          out[i] = static_cast<float>(x[i]) * scale;
        }
        x += dim;
        for (int64_t i = 0; i < half; ++i) {
          const float a = x[i], b = x[half + i];
          row[i] = a * c[i] - b * s[i];
          row[half + i] = b * c[i] + a * s[i];
        }
        for (int64_t i = 2 * half; i < dim; ++i) {
          row[i] = x[i];
        }
        store_rounded(
            row, dim, keys.data + block * keys.block + h * keys.head + offset * keys.token);
        x += dim;
        const float* value = row;
        if constexpr (std::is_same_v<X, float>) {
          value = x;
        } else {
          for (int64_t i = 0; i < dim; ++i) {
            row[i] = x[i];
          }
        }
        store_rounded(
            value, dim, values.data + block * values.block + h * values.head + offset * values.token);
      }
    }
  });
}

// -- one query -------------------------------------------------------------------------------------

inline float total(Lanes x) {
  Vec v;
  std::memcpy(&v, &x, sizeof(v));
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, v);
}

// Ask for the row so many bytes ahead of row `i` of `count`, or, near the end, of what is read
// next. To the second level, as the product's panels.
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

// scores[i] = q . k_i for `count` tokens; N vectors of D = N * kVec. `next` is read afterwards.
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

// out = out * factor + sum of p_i v_i. `next` is read afterwards.
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

template <typename C>
struct Kernels {
  void (*scores)(const float*, const C*, int64_t, int64_t, const C*, float*);
  void (*values)(const float*, const C*, int64_t, int64_t, const C*, float, float*);
};

// For the head sizes of the family; null where D is no multiple of the vector.
template <typename C>
Kernels<C> kernels_for(int64_t dim) {
  if (dim % kVec == 0) {
    switch (dim / kVec) {
#define GPTNEOX_SIZE(N) \
  case N:               \
    return {scores_of<N, C>, add_values<N, C>};
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

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Raise `largest` to that of x, then exp(x - largest) in place; returns the sum. `count` is a
// multiple of the vector, entries that do not count are minus infinity; one of them counts, or did.
inline float softmax_part(float* x, int64_t count, float& largest) {
  Vec top(largest);
  for (int64_t i = 0; i < count; i += kVec) {
    top = at::vec::maximum(top, Vec::loadu(x + i));
  }
  largest = at::vec::vec_reduce_all<float>(
      [](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, top);
  const Vec shift(largest);
  Vec sum(0.f);
  for (int64_t i = 0; i < count; i += kVec) {
    const Vec e = (Vec::loadu(x + i) - shift).exp();
    e.store(x + i);
    sum = sum + e;
  }
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, sum);
}

// Running softmax over positions [begin, end) of one sequence and head: the weighted sum of the
// values (not divided) goes to out [D], the largest score and the sum of weights to `largest`, `sum`.
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
  constexpr int64_t kTile = 128;
  alignas(64) float p[kTile];
  const int64_t dim = step.head_dim;
  std::fill(out, out + dim, 0.f);
  largest = kMinusInfinity;
  sum = 0;
  const auto row_of = [&](const Cache<C>& cache, int64_t position) {
    const int64_t block = table[position / step.block_size];
    const int64_t offset = position % step.block_size;
    return cache.data + block * cache.block + head * cache.head + offset * cache.token;
  };
  for (int64_t position = begin; position < end;) {
    const int64_t offset = position % step.block_size;
    const int64_t count = std::min({kTile, end - position, step.block_size - offset});
    const C* k = row_of(keys, position);
    const C* v = row_of(values, position);
    if (kernels.scores) {
      kernels.scores(q, k, keys.token, count, v, p);
    } else {
      for (int64_t i = 0; i < count; ++i) {
        float s = 0;
        for (int64_t d = 0; d < dim; ++d) {
          s += q[d] * static_cast<float>(k[i * keys.token + d]);
        }
        p[i] = s;
      }
    }
    const float before = largest;
    const int64_t padded = round_up(count, kVec);
    std::fill(p + count, p + padded, kMinusInfinity);
    const float part = softmax_part(p, padded, largest);
    const float factor = before == largest ? 1.f : std::exp(before - largest);
    sum = sum * factor + part;
    if (kernels.values) {
      const C* next = position + count < end ? row_of(keys, position + count) : v;
      kernels.values(p, v, values.token, count, next, factor, out);
    } else {
      for (int64_t d = 0; d < dim; ++d) {
        out[d] *= factor;
      }
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t d = 0; d < dim; ++d) {
          out[d] += p[i] * static_cast<float>(v[i * values.token + d]);
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

// Rows [0, num_decodes): work is split over sequences, heads and, where those are too few for the
// threads, over the context.
template <typename Y, typename C>
void decode(
    const Step& step, const float* q, const Cache<C>& keys, const Cache<C>& values, Y* y) {
  const int64_t heads = step.num_heads, dim = step.head_dim;
  const int64_t pairs = step.num_decodes * heads;
  const int64_t threads = at::get_num_threads();
  int64_t longest = 0;
  for (int64_t b = 0; b < step.num_decodes; ++b) {
    longest = std::max<int64_t>(longest, step.context_lens[b]);
  }
  constexpr int64_t kSmallest = 256;
  const int64_t wanted = (4 * threads + pairs - 1) / pairs;
  const int64_t splits =
      threads == 1 ? 1 : std::max<int64_t>(1, std::min(wanted, longest / kSmallest));
  const auto kernels = kernels_for<C>(dim);
  // Of each split: D sums, the largest score, the sum of weights.
  std::vector<float> parts(splits > 1 ? pairs * splits * (dim + 2) : 0);
  WorkQueue queue(pairs * splits, 16);
  on_all_threads([&] {
    std::vector<float> own(dim);
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
        attend_one(
            step, kernels, q + (b * heads + h) * dim, keys, values,
            step.block_tables + b * step.max_blocks, h, begin, end, out, largest, sum);
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

// -- many queries ----------------------------------------------------------------------------------

// Prompt chunks: tiles of queries against tiles of keys, with the product's own register tile.
constexpr int64_t kQueryBlocks = kVec == 16 ? 12 : 16; // blocks of kRows queries per task
constexpr int64_t kKeys = 2 * kCols; // keys per tile

template <typename C>
class PrefillTask {
 public:
  explicit PrefillTask(int64_t dim)
      : dim_(dim),
        depth_(round_up(dim, kDepth)),
        padded_(round_up(dim, kCols)),
        rows_(kKeys * padded_),
        k_(kKeys * depth_),
        v_(kKeys * padded_),
        q_(kQueryBlocks * kRows * depth_),
        out_(kQueryBlocks * kRows * padded_),
        largest_(kQueryBlocks * kRows),
        sum_(kQueryBlocks * kRows) {}

  // Queries [first, last) of a chunk whose query 0 stands at position `offset`.
  template <typename Y>
  void run(
      const Step& step,
      const float* q, // query 0 of the chunk, rows heads * dim apart
      const Cache<C>& keys,
      const Cache<C>& values,
      const int32_t* table,
      int64_t head,
      int64_t first,
      int64_t last,
      int64_t offset,
      int64_t start,
      Y* y) {
    const int64_t stride = step.num_heads * dim_;
    const int64_t count = last - first;
    load_queries(q + first * stride + head * dim_, stride, count);
    std::fill(out_.begin(), out_.end(), 0.f);
    std::fill(largest_.begin(), largest_.end(), kMinusInfinity);
    std::fill(sum_.begin(), sum_.end(), 0.f);
    const int64_t end = offset + last; // the last query sees positions below this
    for (int64_t position = start / kKeys * kKeys; position < end; position += kKeys) {
      const int64_t hidden = std::max<int64_t>(0, start - position);
      const int64_t known = std::min(kKeys, end - position);
      load_tile(step, keys, table, head, position, hidden, known);
      transpose_keys();
      load_tile(step, values, table, head, position, hidden, known);
      split_values();
      for (int64_t b = 0; b * kRows < count; ++b) {
        const int rows = static_cast<int>(std::min<int64_t>(kRows, count - b * kRows));
        // Row r of the block sees positions [start, visible + r).
        const int64_t visible = offset + first + b * kRows + 1;
        if (position < visible + rows - 1) {
          attend_block(b, rows, position, start, visible);
        }
      }
    }
    for (int64_t r = 0; r < count; ++r) {
      // A padding query, which nobody reads, may see nothing.
      const float factor = sum_[r] > 0 ? 1.f / sum_[r] : 0.f;
      store_row(out_of(r), factor, dim_, y + (first + r) * stride + head * dim_);
    }
  }

 private:
  float* out_of(int64_t row) {
    return out_.data() + row * padded_;
  }

  void load_queries(const float* q, int64_t stride, int64_t count) {
    for (int64_t r = 0; r < count; ++r) {
      const int64_t b = r / kRows;
      const int64_t rows = std::min<int64_t>(kRows, count - b * kRows);
      float* to = q_.data() + b * kRows * depth_ + r % kRows;
      for (int64_t d = 0; d < dim_; ++d) {
        to[d * rows] = q[r * stride + d];
      }
      for (int64_t d = dim_; d < depth_; ++d) {
        to[d * rows] = 0;
      }
    }
  }

  // Widen tokens [hidden, known) from `position` on into rows_ [kKeys][padded]; the others, which
  // may never have been written, become zero.
  void load_tile(
      const Step& step,
      const Cache<C>& cache,
      const int32_t* table,
      int64_t head,
      int64_t position,
      int64_t hidden,
      int64_t known) {
    std::fill(rows_.begin(), rows_.begin() + hidden * padded_, 0.f);
    for (int64_t i = hidden; i < known; ++i) {
      const int64_t p = position + i;
      const C* from = cache.data + table[p / step.block_size] * cache.block + head * cache.head +
          p % step.block_size * cache.token;
      float* to = rows_.data() + i * padded_;
      int64_t d = 0;
      for (; d + kVec <= dim_; d += kVec) {
        load(from + d).store(to + d);
      }
      for (; d < dim_; ++d) {
        to[d] = static_cast<float>(from[d]);
      }
      std::fill(to + dim_, to + padded_, 0.f);
    }
    std::fill(rows_.begin() + known * padded_, rows_.begin() + kKeys * padded_, 0.f);
  }

  // k_: panels of kCols keys, [2][depth][kCols].
  void transpose_keys() {
    for (int64_t panel = 0; panel < kKeys / kCols; ++panel) {
      const float* from = rows_.data() + panel * kCols * padded_;
      float* to = k_.data() + panel * kCols * depth_;
      int64_t d = 0;
      for (; d + kVec <= dim_; d += kVec) {
        for (int64_t i = 0; i < kCols; i += kVec) {
          at::vec::transpose_mxn<float>(
              from + i * padded_ + d, padded_, to + d * kCols + i, kCols, kVec, kVec);
        }
      }
      for (; d < depth_; ++d) {
        for (int64_t i = 0; i < kCols; ++i) {
          to[d * kCols + i] = d < dim_ ? from[i * padded_ + d] : 0.f;
        }
      }
    }
  }

  // v_: panels of kCols values, [padded / kCols][kKeys][kCols].
  void split_values() {
    for (int64_t d = 0; d < padded_; d += kCols) {
      for (int64_t i = 0; i < kKeys; ++i) {
        std::memcpy(
            v_.data() + d * kKeys + i * kCols, rows_.data() + i * padded_ + d,
            kCols * sizeof(float));
      }
    }
  }

  void attend_block(int64_t b, int rows, int64_t position, int64_t start, int64_t visible) {
    alignas(64) float s[kRows * kKeys];
    for (int64_t panel = 0; panel < kKeys / kCols; ++panel) {
      run_tile<Format<float>>(
          rows, k_.data() + panel * kCols * depth_, q_.data() + b * kRows * depth_, depth_,
          s + panel * kCols, kKeys, false);
    }
    for (int r = 0; r < rows; ++r) {
      float* row = s + r * kKeys;
      const int64_t row_index = b * kRows + r;
      const int64_t low = std::clamp<int64_t>(start - position, 0, kKeys);
      const int64_t high = std::clamp<int64_t>(visible + r - position, low, kKeys);
      if (high == low) {
        std::fill(row, row + kKeys, 0.f);
        continue;
      }
      std::fill(row, row + low, kMinusInfinity);
      std::fill(row + high, row + kKeys, kMinusInfinity);
      float& largest = largest_[row_index];
      const float before = largest;
      const float part = softmax_part(row, kKeys, largest);
      if (before == largest) {
        sum_[row_index] += part;
        continue;
      }
      const float factor = std::exp(before - largest);
      sum_[row_index] = sum_[row_index] * factor + part;
      float* out = out_of(row_index);
      for (int64_t d = 0; d < padded_; d += kVec) {
        (Vec::loadu(out + d) * Vec(factor)).store(out + d);
      }
    }
    for (int64_t d = 0; d < padded_; d += kCols) {
      run_tile<Format<float>, kKeys>(
          rows, v_.data() + d * kKeys, s, kKeys, out_of(b * kRows) + d, padded_, true);
    }
  }

  int64_t dim_, depth_, padded_;
  std::vector<float> rows_, k_, v_, q_, out_, largest_, sum_;
};

template <typename Y, typename C>
void prefill(
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
  // Large tasks read the keys less often; enough of them keep all threads busy.
  int64_t span = kQueryBlocks * kRows;
  while (span > 2 * kRows && rows * step.num_heads < span * threads * 4) {
    span = round_up(span / 2, kRows);
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
    PrefillTask<C> task(step.head_dim);
    int64_t begin, end;
    while (queue.take(begin, end)) {
      // The last queries of a sequence cost most: they go first.
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

} // namespace gptneox

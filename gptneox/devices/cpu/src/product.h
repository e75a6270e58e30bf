// SPDX-License-Identifier: Apache-2.0
// Matrix products with packed weights: y = act(sum over terms of x_i W_i.T + bias) + residual, in
// fp32, or packed for the product that follows.
#pragma once

#include <ATen/ATen.h>

#include <vector>

#include "blocked.h"
#include "team.h"
#include "tile.h"

namespace gptneox {

enum class Activation : int { kNone = 0, kGeluErf = 1, kGeluTanh = 2, kSilu = 3, kRelu = 4 };

template <Activation kind>
inline Vec activate(const Vec& x) {
  if constexpr (kind == Activation::kGeluErf) {
    return x * Vec(0.5f) * (Vec(1.f) + (x * Vec(0.70710678118654752f)).erf());
  } else if constexpr (kind == Activation::kGeluTanh) {
    const Vec inner = Vec(0.79788456080286536f) * (x + Vec(0.044715f) * x * x * x);
    return x * Vec(0.5f) * (Vec(1.f) + inner.tanh());
  } else if constexpr (kind == Activation::kSilu) {
    return x / (Vec(1.f) + x.neg().exp());
  } else if constexpr (kind == Activation::kRelu) {
    return at::vec::maximum(x, Vec(0.f));
  } else {
    return x;
  }
}

// A matrix [F, K] in panels: tensor [ceil(F / kCols), K padded, kCols] of the weight's type.
struct Packed {
  at::Tensor panels;
  int64_t features = 0;
  int64_t depth = 0; // K, unpadded

  int64_t padded() const {
    return panels.size(1);
  }
  int64_t num_panels() const {
    return panels.size(0);
  }
};

// kRows, rounded to whole vectors.
constexpr int kTall = static_cast<int>(round_up(kRows, kVec));

// Transpose the first `count` of rows [kTall][kVec]: out [width][count]. Numbers of 32 bits,
// whatever they are.
inline void to_columns(const float* rows, int count, int64_t width, float* out) {
  if (4 * count < kVec) { // not worth it
    for (int r = 0; r < count; ++r) {
      for (int64_t i = 0; i < width; ++i) {
        std::memcpy(out + i * count + r, rows + r * kVec + i, sizeof(float));
      }
    }
    return;
  }
  alignas(64) float columns[kVec * kTall];
  for (int r = 0; r < kTall; r += kVec) {
    at::vec::transpose_mxn<float, kVec, kVec>(rows + r * kVec, kVec, columns + r, kTall);
  }
  // Whole vectors, whose surplus the next column overwrites: masked stores are slow.
  const int64_t stored = round_up(count, kVec);
  int64_t i = 0;
  for (; i * count + stored <= width * count; ++i) {
    for (int64_t r = 0; r < stored; r += kVec) {
      Vec::loadu(columns + i * kTall + r).store(out + i * count + r);
    }
  }
  for (; i < width; ++i) {
    std::memcpy(out + i * count, columns + i * kTall, count * sizeof(float));
  }
}

// Activations [T, K] as blocks of rows. For the register tile each is transposed to
// [K padded / kStep][rows], and rows are spread evenly over as few blocks of at most kRows as they
// need. For the blocked kernels a block is kBlockedRows rows, one after another (`write_row`).
template <typename F>
struct Blocks {
  using Scalar = typename F::Scalar;
  int64_t rows = 0, steps = 0, height = 1;
  bool blocked = false;

  // In memory of its own, kept for the next time.
  void resize(int64_t num_rows, int64_t depth, bool for_blocked) {
    bind(nullptr, num_rows, depth, for_blocked);
    if (static_cast<int64_t>(own_.size()) < rows * steps) {
      own_.resize(rows * steps);
    }
    data_ = own_.data();
  }
  // In memory for `count(num_rows, depth)` scalars.
  void bind(Scalar* data, int64_t num_rows, int64_t depth, bool for_blocked) {
    data_ = data;
    rows = num_rows;
    steps = round_up(depth, kDepth) / F::kStep;
    blocked = for_blocked;
    if (blocked) {
      height = std::min(kBlockedRows, rows);
      return;
    }
    const int64_t blocks = std::max<int64_t>(1, (rows + kRows - 1) / kRows);
    height = std::max<int64_t>(1, (rows + blocks - 1) / blocks);
  }
  static int64_t count(int64_t num_rows, int64_t depth) {
    return num_rows * (round_up(depth, kDepth) / F::kStep);
  }
  // Block `index` holds the rows from height * index on.
  Scalar* block(int64_t index) {
    return data_ + index * height * steps;
  }
  const Scalar* block(int64_t index) const {
    return data_ + index * height * steps;
  }
  int rows_of(int64_t index) const {
    return static_cast<int>(std::min<int64_t>(height, rows - index * height));
  }
  int64_t num_blocks() const {
    return (rows + height - 1) / height;
  }

  // Write block `index` from its rows, fp32 [rows, depth], `stride` apart.
  void fill(int64_t index, const float* x, int64_t depth, int64_t stride) {
    if (blocked) {
      const int64_t padding = steps * F::kStep - depth;
      const float zeros[kDepth] = {};
      for (int r = 0; r < rows_of(index); ++r) {
        write(index, r, 0, x + r * stride, depth);
        write(index, r, depth, zeros, padding);
      }
      return;
    }
    int64_t k = 0;
    for (; k + kCols <= depth; k += kCols) {
      fill_tile(index, k, x + k, stride);
    }
    for (; k < steps * F::kStep; k += kCols) {
      alignas(64) float rest[kRows * kCols] = {};
      for (int r = 0; k < depth && r < rows_of(index); ++r) {
        std::memcpy(rest + r * kCols, x + r * stride + k, (depth - k) * sizeof(float));
      }
      fill_tile(index, k, rest, kCols);
    }
  }

  // Write entries [k, k + kCols) of all rows of a block, as far as it has them, from rows
  // `stride` apart.
  void fill_tile(int64_t index, int64_t k, const float* rows, int64_t stride) {
    const int count = rows_of(index);
    if (blocked) {
      for (int r = 0; r < count; ++r) {
        write(index, r, k, rows + r * stride, std::min<int64_t>(kCols, steps * F::kStep - k));
      }
      return;
    }
    Scalar* out = block(index) + k / F::kStep * count;
    const int64_t width = steps - k / F::kStep;
    alignas(64) float entries[kTall * kVec];
    for (int64_t i = 0; i < std::min<int64_t>(width, kCols / F::kStep); i += kVec) {
      for (int r = 0; r < count; ++r) {
        const float* from = rows + r * stride + i;
        if constexpr (F::kStep == 1) {
          Vec::loadu(from).store(entries + r * kVec);
        } else {
          at::vec::convert_float_bfloat16(Vec::loadu(from), Vec::loadu(from + kVec))
              .store(entries + r * kVec);
        }
      }
      to_columns(
          entries, count, std::min<int64_t>(kVec, width - i),
          reinterpret_cast<float*>(out) + i * count);
    }
  }

 private:
  // Entries [k, k + count) of row r of a block, for the blocked kernels.
  void write(int64_t index, int r, int64_t k, const float* x, int64_t count) {
    const int64_t size = rows_of(index) * steps; // of a plane, where there are two
    // A row has 4 bytes for each step; each of two planes has half of them.
    const int64_t row_bytes = kWidened<F> ? 2 * steps : 4 * steps;
    const int64_t entry_bytes = kWidened<F> ? 2 : 4 / F::kStep;
    auto* out = reinterpret_cast<char*>(block(index)) + r * row_bytes + k * entry_bytes;
    write_row<F>(x, count, size, out);
  }

  Scalar* data_ = nullptr;
  std::vector<Scalar> own_;
};

template <typename F>
struct Term {
  const Packed* weight;
  const Blocks<F>* x;
};

// One output of a run: all terms have the same features and rows.
template <typename F>
struct Output {
  std::vector<Term<F>> terms;
  const float* bias = nullptr; // [features]
  Activation activation = Activation::kNone;
  float* y = nullptr; // [T, features]
  const float* residual = nullptr; // [T, features], added last; may be y itself
  Blocks<F>* packed = nullptr; // instead of y: as the next product reads it
};

// Bias and activation of a tile c [rows][kCols], in place; columns beyond the features stay zero.
template <Activation kind>
void activate_tile(const float* bias, int64_t width, int rows, float* c) {
  Vec added[2] = {Vec(0.f), Vec(0.f)};
  if (bias) {
    for (int j = 0; j < 2 && j * kVec < width; ++j) {
      added[j] = Vec::loadu(bias + j * kVec, std::min<int64_t>(kVec, width - j * kVec));
    }
  }
  for (int i = 0; i < 2 * rows; ++i, c += kVec) {
    activate<kind>(Vec::loadu(c) + added[i % 2]).store(c);
  }
}

// A finished tile of block `b`: sums c [rows][kCols] to where they belong.
template <typename F>
void finish(const Output<F>& out, int64_t panel, int64_t b, float* c) {
  const auto* x = out.terms[0].x;
  const int rows = x->rows_of(b);
  const int64_t features = out.terms[0].weight->features, first = panel * kCols;
  const int64_t width = std::min<int64_t>(kCols, features - first);
  const float* bias = out.bias ? out.bias + first : nullptr;
  switch (out.activation) {
    case Activation::kNone:
      if (bias) {
        activate_tile<Activation::kNone>(bias, width, rows, c);
      }
      break;
    case Activation::kGeluErf:
      activate_tile<Activation::kGeluErf>(bias, width, rows, c);
      break;
    case Activation::kGeluTanh:
      activate_tile<Activation::kGeluTanh>(bias, width, rows, c);
      break;
    case Activation::kSilu:
      activate_tile<Activation::kSilu>(bias, width, rows, c);
      break;
    case Activation::kRelu:
      activate_tile<Activation::kRelu>(bias, width, rows, c);
      break;
  }
  if (out.packed) {
    out.packed->fill_tile(b, first, c, kCols);
    return;
  }
  const int64_t offset = b * x->height * features + first;
  for (int r = 0; r < rows; ++r, c += kCols) {
    float* y = out.y + offset + r * features;
    const float* residual = out.residual ? out.residual + offset + r * features : nullptr;
    if (width == kCols) {
      for (int j = 0; j < kCols; j += kVec) {
        const Vec value = Vec::loadu(c + j);
        (residual ? value + Vec::loadu(residual + j) : value).store(y + j);
      }
    } else {
      for (int64_t j = 0; j < width; ++j) {
        y[j] = residual ? c[j] + residual[j] : c[j];
      }
    }
  }
}

// Entries of K that are multiplied in one go when there are many rows: a chunk of a panel then
// stays in the second-level cache while all rows pass.
constexpr int64_t kChunk = 1024;
// Bytes of activations that pass together: every panel reads them again, from the last-level cache.
constexpr int64_t kSpanBytes = int64_t{3} << 20;

// Few rows: every panel is read once, from front to back.
template <typename F>
void panel_few(const Output<F>& out, int64_t panel) {
  alignas(64) float c[kRows * kCols];
  const int64_t num_blocks = out.terms[0].x->num_blocks();
  for (int64_t b = 0; b < num_blocks; ++b) {
    bool accumulate = false;
    for (const auto& term : out.terms) {
      const auto* weight = term.weight->panels.template const_data_ptr<typename F::Weight>();
      weight += panel * term.weight->padded() * kCols;
      run_tile<F, 0, true>(
          term.x->rows_of(b), weight, term.x->block(b), term.x->steps, c, kCols, accumulate);
      accumulate = true;
    }
    finish(out, panel, b, c);
  }
}

// Many rows, `first` to `last` block: chunks of K outside, rows inside. Half-precision weights
// without an instruction of their own are widened once per chunk.
template <typename F>
void panel_many(
    const Output<F>& out, int64_t panel, int64_t first, int64_t last, float* c, float* wide) {
  using W = typename F::Weight;
  bool accumulate = false;
  for (const auto& term : out.terms) {
    const W* weight = term.weight->panels.template const_data_ptr<W>();
    weight += panel * term.weight->padded() * kCols;
    const int64_t steps = term.x->steps;
    for (int64_t k = 0; k < steps; k += kChunk) {
      const int64_t count = std::min(kChunk, steps - k);
      const W* chunk = weight + k * kCols * F::kStep;
      if constexpr (kWidened<F>) {
        for (int64_t i = 0; i < count * kCols; i += kCols) {
          __builtin_prefetch(reinterpret_cast<const char*>(chunk + i) + 4096, 0, 2);
          load(chunk + i).store(wide + i);
          load(chunk + i + kVec).store(wide + i + kVec);
        }
      }
      for (int64_t b = first; b < last; ++b) {
        const int rows = term.x->rows_of(b);
        const auto* a = term.x->block(b) + k * rows;
        float* tile_c = c + (b - first) * kRows * kCols;
        if constexpr (kWidened<F>) {
          run_tile<Format<float>>(rows, wide, a, count, tile_c, kCols, accumulate);
        } else {
          run_tile<F>(rows, chunk, a, count, tile_c, kCols, accumulate);
        }
      }
      accumulate = true;
    }
  }
  for (int64_t b = first; b < last; ++b) {
    finish(out, panel, b, c + (b - first) * kRows * kCols);
  }
}

// Blocked kernels, `first` to `last` block: chunks of K outside, rows inside.
template <typename F>
void panel_blocked(
    const Output<F>& out, int64_t panel, int64_t first, int64_t last, float* c, float* wide) {
  using W = typename F::Weight;
  bool accumulate = false;
  for (const auto& term : out.terms) {
    const W* weight = term.weight->panels.template const_data_ptr<W>();
    weight += panel * term.weight->padded() * kCols;
    const int64_t steps = term.x->steps;
    for (int64_t k = 0; k < steps; k += kChunk) {
      const int64_t count = std::min(kChunk, steps - k);
      const W* chunk = weight + k * kCols * F::kStep;
      if constexpr (kWidened<F>) {
        auto* high = reinterpret_cast<c10::BFloat16*>(wide);
        auto* low = high + kChunk * kCols;
        split_weights(chunk, count, high, low);
        for (int64_t b = first; b < last; ++b) {
          const int rows = term.x->rows_of(b);
          const auto* a = reinterpret_cast<const c10::BFloat16*>(term.x->block(b)) + k;
          const auto* a_low = a + rows * steps;
          float* tile_c = c + (b - first) * kBlockedRows * kCols;
          const auto add = [&](const void* x, const void* w, bool sums) {
            block_product<F>(
                rows, x, steps / 2, w, kCols, kCols, count / 2, tile_c, kCols, sums);
          };
          add(a, high, accumulate);
          add(a_low, high, true);
          add(a, low, true);
        }
      } else {
        for (int64_t b = first; b < last; ++b) {
          block_product<F>(
              term.x->rows_of(b), term.x->block(b) + k, steps, chunk, kCols, kCols, count,
              c + (b - first) * kBlockedRows * kCols, kCols, accumulate);
        }
      }
      accumulate = true;
    }
  }
  for (int64_t b = first; b < last; ++b) {
    finish(out, panel, b, c + (b - first) * kBlockedRows * kCols);
  }
}

template <typename F>
void run(const std::vector<Output<F>>& outputs) {
  int64_t total = 0;
  for (const auto& out : outputs) {
    total += out.terms[0].weight->num_panels();
  }
  const int64_t rows = outputs[0].terms[0].x->rows;
  const int64_t num_blocks = outputs[0].terms[0].x->num_blocks();
  const auto locate = [&](int64_t index) {
    size_t which = 0;
    while (index >= outputs[which].terms[0].weight->num_panels()) {
      index -= outputs[which].terms[0].weight->num_panels();
      ++which;
    }
    return std::make_pair(which, index);
  };
  const bool blocked = outputs[0].terms[0].x->blocked;
  const bool few = !blocked && rows <= 2 * kRows;
  int64_t bytes = 0;
  for (const auto& term : outputs[0].terms) {
    bytes += rows * term.x->steps * static_cast<int64_t>(sizeof(typename F::Scalar));
  }
  const int64_t sweeps = few ? 1 : std::min((bytes + kSpanBytes - 1) / kSpanBytes, num_blocks);
  const int64_t span = (num_blocks + sweeps - 1) / sweeps;
  WorkQueue queue(total * sweeps, few ? 16 : 1);
  on_all_threads([&] {
    static thread_local std::vector<float> c, wide;
    if (!few) {
      c.resize(std::max<size_t>(c.size(), span * (blocked ? kBlockedRows : kRows) * kCols));
      wide.resize(std::max<size_t>(wide.size(), F::kStep == 1 ? kChunk * kCols : 0));
    }
    int64_t begin, end;
    while (queue.take(begin, end)) {
      for (int64_t i = begin; i < end; ++i) {
        const auto [which, panel] = locate(i % total);
        if (few) {
          panel_few(outputs[which], panel);
        } else {
          const int64_t first = i / total * span, last = std::min(first + span, num_blocks);
          if constexpr (kCanBlock<F>) {
            if (blocked) {
              panel_blocked(outputs[which], panel, first, last, c.data(), wide.data());
              continue;
            }
          }
          panel_many(outputs[which], panel, first, last, c.data(), wide.data());
        }
      }
    }
    if (blocked) {
      at::native::cpublas::brgemm_release(true);
    }
  });
}

} // namespace gptneox

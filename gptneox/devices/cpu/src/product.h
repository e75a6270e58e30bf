// SPDX-License-Identifier: Apache-2.0
// Matrix products with packed weights: y = act(sum over terms of x_i W_i.T + bias) + residual. y is
// fp32, or row blocks for the next product.
#pragma once

#include <ATen/ATen.h>

#include <utility>
#include <vector>

#include "blocked.h"
#include "int4.h"
#include "packing.h"
#include "rows.h"
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

// x W.T
template <typename F>
struct Term {
  const Packed* weight;
  const RowBlocks<F>* x;
};

// The most terms of an output.
constexpr int kTerms = 2;

// One output of `multiply`. All its terms have the same features and rows.
template <typename F>
struct Output {
  std::vector<Term<F>> terms;
  const float* bias = nullptr; // [features]
  Activation activation = Activation::kNone;
  float* y = nullptr; // [T, features]
  const float* residual = nullptr; // [T, features], added last; may be y itself
  RowBlocks<F>* packed = nullptr; // written instead of y, without residual
};

// Apply bias and activation to a tile c [rows][kCols] in place. Columns beyond `width` stay zero.
template <Activation kind>
void activate_tile(const float* bias, int64_t width, int rows, float* c) {
  Vec low(0.f), high(0.f);
  if (bias) {
    low = Vec::loadu(bias, std::min<int64_t>(kVec, width));
    if (width > kVec) {
      high = Vec::loadu(bias + kVec, width - kVec);
    }
  }
  for (int r = 0; r < rows; ++r, c += kCols) {
    activate<kind>(Vec::loadu(c) + low).store(c);
    activate<kind>(Vec::loadu(c + kVec) + high).store(c + kVec);
  }
}

// `activate_tile` for an activation that is only known at run time.
inline void apply(Activation kind, const float* bias, int64_t width, int rows, float* c) {
  switch (kind) {
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
}

// The sums of int8 weights are those of integers, apart for each term, `size` values one behind the
// other. Write the sum of all terms, each times its scales, over the first, c [rows][kCols].
template <typename F>
void combine(const Output<F>& out, int64_t panel, int64_t rows, int64_t size, float* c) {
  for (size_t t = 0; t < out.terms.size(); ++t) {
    const float* scales = out.terms[t].weight->scales.template const_data_ptr<float>();
    const Vec low = Vec::loadu(scales + panel * kCols);
    const Vec high = Vec::loadu(scales + panel * kCols + kVec);
    const float* sums = c + t * size;
    float* total = c;
    for (int64_t r = 0; r < rows; ++r, sums += kCols, total += kCols) {
      Vec left = Vec::loadu(sums) * low, right = Vec::loadu(sums + kVec) * high;
      if (t > 0) {
        left = left + Vec::loadu(total);
        right = right + Vec::loadu(total + kVec);
      }
      left.store(total);
      right.store(total + kVec);
    }
  }
}

// Write c [rows][kCols] plus bias [width] and residual, which may be null, to y, whose rows and those
// of the residual are `ldy` apart.
inline void store_tile(
    const float* c, int64_t rows, int64_t width, const float* bias, const float* residual, float* y,
    int64_t ldy) {
  if (width == kCols) {
    const Vec low = bias ? Vec::loadu(bias) : Vec(0.f);
    const Vec high = bias ? Vec::loadu(bias + kVec) : Vec(0.f);
    for (int64_t r = 0; r < rows; ++r, c += kCols, y += ldy) {
      Vec left = Vec::loadu(c) + low, right = Vec::loadu(c + kVec) + high;
      if (residual) {
        left = left + Vec::loadu(residual + r * ldy);
        right = right + Vec::loadu(residual + r * ldy + kVec);
      }
      left.store(y);
      right.store(y + kVec);
    }
    return;
  }
  for (int64_t r = 0; r < rows; ++r, c += kCols, y += ldy) {
    for (int64_t j = 0; j < width; ++j) {
      const float value = c[j] + (bias ? bias[j] : 0.f);
      y[j] = residual ? value + residual[r * ldy + j] : value;
    }
  }
}

// Apply bias and activation to the sums c [rows][kCols] of row block `b` and write the output.
template <typename F>
void finish(const Output<F>& out, int64_t panel, int64_t b, float* c) {
  const auto* x = out.terms[0].x;
  const int rows = x->rows_of(b);
  const int64_t features = out.terms[0].weight->features, first = panel * kCols;
  const int64_t width = std::min<int64_t>(kCols, features - first);
  const float* bias = out.bias ? out.bias + first : nullptr;
  if (out.activation != Activation::kNone || out.packed) {
    apply(out.activation, bias, width, rows, c);
  }
  if (out.packed) {
    out.packed->fill_tile(b, first, c, kCols);
    return;
  }
  if (out.activation != Activation::kNone) {
    bias = nullptr; // added before the activation
  }
  const int64_t offset = b * x->height * features + first;
  const float* residual = out.residual ? out.residual + offset : nullptr;
  store_tile(c, rows, width, bias, residual, out.y + offset, features);
}

// K steps per chunk of a panel with many rows: the chunk stays in the second-level cache while all
// rows are multiplied by it.
constexpr int64_t kChunk = 1024;
// Bytes of activations per sweep over the panels: every panel reads them again, so they must stay
// in the last-level cache.
constexpr int64_t kSpanBytes = int64_t{3} << 20;

// Few rows: the panel is streamed from memory, once, from front to back.
template <typename F>
void panel_few(const Output<F>& out, int64_t panel) {
  constexpr int64_t kSize = kRows * kCols;
  alignas(64) float c[(kRowScaled<F> ? kTerms : 1) * kSize];
  const int64_t num_blocks = out.terms[0].x->num_blocks();
  for (int64_t b = 0; b < num_blocks; ++b) {
    bool accumulate = false;
    float* sums = c;
    for (const auto& term : out.terms) {
      const int block_rows = term.x->rows_of(b);
      if constexpr (kGrouped<F>) {
        const bool in_digits = term.x->form == RowForm::kDigits;
        (in_digits ? run_digit_tile : run_tile_int4)(
            block_rows, *term.weight, panel, term.x->block(b), term.x->k_steps, sums, kCols,
            accumulate);
      } else {
        run_tile<F, 0, true>(
            block_rows, panel_at<F>(*term.weight, panel), term.x->block(b), term.x->k_steps, sums,
            kCols, accumulate);
      }
      accumulate = !kRowScaled<F>;
      sums += kRowScaled<F> ? kSize : 0;
    }
    if constexpr (kRowScaled<F>) {
      combine(out, panel, out.terms[0].x->rows_of(b), kSize, c);
    }
    finish(out, panel, b, c);
  }
}

// Many rows, row blocks [first, last): the outer loop is over chunks of K, the inner over rows.
// kWidened weights are widened once per chunk.
template <typename F>
void panel_many(
    const Output<F>& out, int64_t panel, int64_t first, int64_t last, float* c, float* wide) {
  const int64_t size = (last - first) * kRows * kCols; // of the sums of a term
  bool accumulate = false;
  float* sums = c;
  for (const auto& term : out.terms) {
    const int64_t k_steps = term.x->k_steps;
    for (int64_t k = 0; k < k_steps; k += kChunk) {
      const int64_t count = std::min(kChunk, k_steps - k);
      const auto* chunk = panel_at<F>(*term.weight, panel, k * F::kPerLane);
      if constexpr (kGrouped<F>) {
        widen_int4(*term.weight, panel, k, count, wide);
      } else if constexpr (kWidened<F>) {
        for (int64_t i = 0; i < count * kCols; i += kCols) {
          __builtin_prefetch(reinterpret_cast<const char*>(chunk + i) + 4096, 0, 2);
          load(chunk + i).store(wide + i);
          load(chunk + i + kVec).store(wide + i + kVec);
        }
      }
      for (int64_t b = first; b < last; ++b) {
        const int rows = term.x->rows_of(b);
        const auto* a = term.x->block(b) + k * rows;
        float* tile_c = sums + (b - first) * kRows * kCols;
        if constexpr (kWidened<F>) {
          run_tile<Format<float>>(rows, wide, a, count, tile_c, kCols, accumulate);
        } else {
          run_tile<F>(rows, chunk, a, count, tile_c, kCols, accumulate);
        }
      }
      accumulate = true;
    }
    if constexpr (kRowScaled<F>) {
      accumulate = false;
      sums += size;
    }
  }
  for (int64_t b = first; b < last; ++b) {
    float* tile_c = c + (b - first) * kRows * kCols;
    if constexpr (kRowScaled<F>) {
      combine(out, panel, out.terms[0].x->rows_of(b), size, tile_c);
    }
    finish(out, panel, b, tile_c);
  }
}

// The blocked kernels take at most this many rows and this many panels at once.
constexpr int64_t kBlockedSweep = 512, kBlockedPanels = 4;
// Of these rows, a chunk of K of this size is multiplied by all panels before the next one: it
// stays in the second-level cache, as all of K does not for the wide products of large models.
constexpr int64_t kResidentBytes = int64_t{1} << 20;

// Panels [panel, end) of an output, row blocks [first, last), by the blocked kernels. kWidened
// weights are split once per chunk (blocked.h). c has room for the sums of all panels.
template <typename F>
void panels_blocked(
    const Output<F>& out, int64_t panel, int64_t end, int64_t first, int64_t last, float* c,
    float* wide) {
  const auto& x0 = *out.terms[0].x;
  const int64_t rows = std::min(last * x0.height, x0.rows) - first * x0.height;
  const int64_t resident = kResidentBytes / (rows * sizeof(typename F::Scalar)) / 32 * 32;
  const int64_t chunk = std::clamp<int64_t>(resident, 256, kChunk);
  bool accumulate = false;
  for (const auto& term : out.terms) {
    const int64_t k_steps = term.x->k_steps, stride = term.x->stride();
    for (int64_t k = 0; k < k_steps; k += chunk, accumulate = true) {
      const int64_t count = std::min(chunk, k_steps - k);
      for (int64_t p = panel; p < end; ++p) {
        const auto* part = panel_at<F>(*term.weight, p, k * F::kPerLane);
        float* sums = c + (p - panel) * rows * kCols;
        if constexpr (kWidened<F>) {
          auto* high = reinterpret_cast<c10::BFloat16*>(wide);
          auto* low = high + kChunk * kCols;
          if constexpr (kGrouped<F>) {
            split_int4(*term.weight, p, k, count, high, low);
          } else {
            split_weights(part, count, high, low);
          }
          const auto* a = reinterpret_cast<const c10::BFloat16*>(term.x->block(first)) + k;
          const auto add = [&](const void* x, const void* w, bool adds) {
            block_product<F>(rows, x, stride, w, kCols, kCols, count / 2, sums, kCols, adds);
          };
          add(a, high, accumulate);
          if (!term.weight->rounds) {
            add(a, low, true);
            add(a + k_steps, high, true);
          }
        } else {
          block_product<F>(
              rows, term.x->block(first) + k, stride, part, kCols, kCols, count, sums, kCols,
              accumulate);
        }
      }
    }
  }
  for (int64_t b = first; b < last; ++b) {
    for (int64_t p = panel; p < end; ++p) {
      finish(out, p, b, c + ((p - panel) * rows + (b - first) * x0.height) * kCols);
    }
  }
}

// Compute all outputs, which have the same rows, in one parallel loop over their panels.
template <typename F>
void multiply(const std::vector<Output<F>>& outputs) {
  int64_t total = 0;
  for (const auto& out : outputs) {
    total += out.terms[0].weight->num_panels();
  }
  const int64_t rows = outputs[0].terms[0].x->rows;
  const int64_t num_blocks = outputs[0].terms[0].x->num_blocks();
  const auto locate = [&](int64_t index) { // to output and panel
    size_t which = 0;
    while (index >= outputs[which].terms[0].weight->num_panels()) {
      index -= outputs[which].terms[0].weight->num_panels();
      ++which;
    }
    return std::make_pair(which, index);
  };
  const RowForm form = outputs[0].terms[0].x->form;
  const bool blocked = form == RowForm::kBlocked;
  const bool few = form == RowForm::kDigits || (!blocked && rows <= 2 * kRows);
  int64_t bytes = 0, deepest = 0; // of all rows; of one row of a term
  for (const auto& term : outputs[0].terms) {
    const int64_t row_bytes = term.x->k_steps * static_cast<int64_t>(sizeof(typename F::Scalar));
    bytes += rows * row_bytes;
    deepest = std::max(deepest, row_bytes);
  }
  const int64_t wanted = blocked ? (rows + kBlockedSweep - 1) / kBlockedSweep
                         : few   ? 1
                                 : (bytes + kSpanBytes - 1) / kSpanBytes;
  const int64_t sweeps = std::max<int64_t>(1, std::min(wanted, num_blocks));
  const int64_t span = (num_blocks + sweeps - 1) / sweeps;
  WorkQueue queue(total * sweeps, few ? 16 : blocked ? kBlockedPanels : 1);
  on_all_threads([&] {
    static thread_local std::vector<float> c, wide;
    if (!few) {
      const int64_t sums =
          blocked ? kBlockedPanels * kBlockedRows : kRows * (kRowScaled<F> ? kTerms : 1);
      c.resize(std::max<size_t>(c.size(), span * sums * kCols));
      wide.resize(std::max<size_t>(wide.size(), F::kPerLane == 1 ? kChunk * kCols : 0));
    }
    int64_t begin, end;
    while (queue.take(begin, end)) {
      for (int64_t i = begin, count = 1; i < end; i += count) {
        const auto [which, panel] = locate(i % total);
        const Output<F>& out = outputs[which];
        const int64_t first = i / total * span, last = std::min(first + span, num_blocks);
        if constexpr (kCanBlock<F>) {
          if (blocked) {
            // Of the panels taken, those of this output; where all of K stays in the cache, one
            // after another, from front to back.
            if (deepest * std::min(rows, kBlockedSweep) > kResidentBytes) {
              count = std::min(end - i, out.terms[0].weight->num_panels() - panel);
            }
            panels_blocked(out, panel, panel + count, first, last, c.data(), wide.data());
            continue;
          }
        }
        if (few) {
          panel_few(out, panel);
        } else {
          panel_many(out, panel, first, last, c.data(), wide.data());
        }
      }
    }
  });
}

} // namespace gptneox

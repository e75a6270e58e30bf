// SPDX-License-Identifier: Apache-2.0
// Packing of activations into row blocks.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <vector>

#include "blocked.h"
#include "int4.h"
#include "packing.h"
#include "team.h"
#include "tile.h"

namespace gptneox {

// kRows, rounded up to whole vectors.
constexpr int kTall = static_cast<int>(round_up(kRows, kVec));

// Transpose the first `count` of rows [kTall][kVec] to out [width][count]. Elements are 32 bits of
// any type.
inline void to_columns(const float* rows, int count, int64_t width, float* out) {
  if (4 * count < kVec) { // too few rows for the vector transpose to pay
    for (int r = 0; r < count; ++r) {
      for (int64_t i = 0; i < width; ++i) {
        std::memcpy(out + i * count + r, rows + r * kVec + i, sizeof(float));
      }
    }
    return;
  }
  alignas(64) float columns[kVec * kTall];
  for (int r = 0; r < count; r += kVec) {
    at::vec::transpose_mxn<float, kVec, kVec>(rows + r * kVec, kVec, columns + r, kTall);
  }
  // Store whole vectors; the next column overwrites the surplus. Masked stores are slow.
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

// How activations [T, K] lie in row blocks. K is padded with zeros to a multiple of kDepth.
enum class RowForm {
  // For the register tile: a row block is transposed, [K / kPerLane][rows][kPerLane]. The rows are
  // spread evenly over the fewest blocks of at most kRows.
  kTransposed,
  // For the blocked kernels: all rows are row-major (`write_row`), a cache line apart. Rows at a
  // distance of 4096 bytes would compete for the same lines of the first-level cache.
  kBlocked,
  // For dot products with weights of four bits: rows of DigitBlocks, spread as for kTransposed.
  kDigits,
};

// The form that `rows` activations for a weight take.
template <typename F>
RowForm form_for(const Packed& weight, int64_t rows) {
  if (is_blocked<F>(rows, weight.depth, weight.rounds)) {
    return RowForm::kBlocked;
  }
  return weight.takes_digits ? RowForm::kDigits : RowForm::kTransposed;
}

template <typename F>
struct RowBlocks {
  using Scalar = typename F::Scalar;
  int64_t rows = 0, k_steps = 0, height = 1; // height: rows of a block; the last may have fewer
  RowForm form = RowForm::kTransposed;

  // Use memory of its own, which later calls reuse.
  void resize(int64_t num_rows, int64_t depth, RowForm row_form) {
    bind(nullptr, num_rows, depth, row_form);
    if (static_cast<int64_t>(own_.size()) < rows * stride()) {
      own_.resize(rows * stride());
    }
    data_ = own_.data();
  }
  // Use the caller's memory of `num_scalars(num_rows, depth, row_form)` scalars.
  void bind(Scalar* data, int64_t num_rows, int64_t depth, RowForm row_form) {
    data_ = data;
    rows = num_rows;
    k_steps = round_up(depth, kDepth) / F::kPerLane;
    form = row_form;
    if (form == RowForm::kBlocked) {
      height = std::min(kBlockedRows, rows);
      return;
    }
    const int64_t blocks = std::max<int64_t>(1, (rows + kRows - 1) / kRows);
    height = std::max<int64_t>(1, (rows + blocks - 1) / blocks);
  }
  static int64_t num_scalars(int64_t num_rows, int64_t depth, RowForm row_form) {
    return num_rows * stride_of(round_up(depth, kDepth) / F::kPerLane, row_form);
  }
  // Scalars of a row; but for kTransposed, also from one row to the next.
  int64_t stride() const {
    return stride_of(k_steps, form);
  }
  // Block `index` starts at row height * index.
  Scalar* block(int64_t index) {
    return data_ + index * height * stride();
  }
  const Scalar* block(int64_t index) const {
    return data_ + index * height * stride();
  }
  int rows_of(int64_t index) const {
    return static_cast<int>(std::min<int64_t>(height, rows - index * height));
  }
  int64_t num_blocks() const {
    return (rows + height - 1) / height;
  }

  // Write block `index` from its rows, fp32 [rows_of(index), depth], `stride` apart.
  void fill(int64_t index, const float* x, int64_t depth, int64_t stride) {
    if (form == RowForm::kBlocked) {
      const int64_t padding = k_steps * F::kPerLane - depth;
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
    for (; k < k_steps * F::kPerLane; k += kCols) {
      alignas(64) float rest[kRows * kCols] = {};
      for (int r = 0; k < depth && r < rows_of(index); ++r) {
        std::memcpy(rest + r * kCols, x + r * stride + k, (depth - k) * sizeof(float));
      }
      fill_tile(index, k, rest, kCols);
    }
  }

  // Write columns [k, k + kCols) of a block, or those before the padded end of K, from rows
  // `stride` apart.
  void fill_tile(int64_t index, int64_t k, const float* rows, int64_t stride) {
    const int count = rows_of(index);
    if (form == RowForm::kBlocked) {
      for (int r = 0; r < count; ++r) {
        write(index, r, k, rows + r * stride, std::min<int64_t>(kCols, k_steps * F::kPerLane - k));
      }
      return;
    }
    if constexpr (kDigitForm<F>) {
      if (form == RowForm::kDigits) {
        for (int r = 0; r < count; ++r) {
          auto* row = reinterpret_cast<DigitBlock*>(block(index) + r * this->stride());
          row[k / kCols].fill(rows + r * stride);
        }
        return;
      }
    }
    Scalar* out = block(index) + k / F::kPerLane * count;
    const int64_t width = k_steps - k / F::kPerLane;
    alignas(64) float entries[kTall * kVec];
    for (int64_t i = 0; i < std::min<int64_t>(width, kCols / F::kPerLane); i += kVec) {
      for (int r = 0; r < count; ++r) {
        const float* from = rows + r * stride + i;
        if constexpr (F::kPerLane == 1) {
          Vec::loadu(from).store(entries + r * kVec);
        } else {
          store_bf16(
              Vec::loadu(from), Vec::loadu(from + kVec),
              reinterpret_cast<c10::BFloat16*>(entries + r * kVec));
        }
      }
      to_columns(
          entries, count, std::min<int64_t>(kVec, width - i),
          reinterpret_cast<float*>(out) + i * count);
    }
  }

 private:
  // Write columns [k, k + count) of row r of a block, for the blocked kernels.
  void write(int64_t index, int r, int64_t k, const float* x, int64_t count) {
    const int64_t value_bytes = kWidened<F> ? 2 : sizeof(Scalar) / F::kPerLane;
    auto* out = reinterpret_cast<char*>(block(index) + r * stride()) + k * value_bytes;
    write_row<F>(x, count, k_steps, out); // of two planes, x_lo follows x_hi in the row
  }

  static int64_t stride_of(int64_t steps, RowForm form) {
    return form == RowForm::kBlocked  ? steps + static_cast<int64_t>(64 / sizeof(Scalar))
           : form == RowForm::kDigits ? round_up(steps, kCols)
                                      : steps;
  }

  Scalar* data_ = nullptr;
  std::vector<Scalar> own_;
};

// All of x, fp32 [T, K] and contiguous, to row blocks.
template <typename F>
void fill_blocks(RowBlocks<F>& blocks, const at::Tensor& x, RowForm form) {
  const int64_t rows = x.size(0), depth = x.size(1);
  blocks.resize(rows, depth, form);
  const float* data = x.const_data_ptr<float>();
  for_ranges(blocks.num_blocks(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      blocks.fill(b, data + b * blocks.height * depth, depth, depth);
    }
  });
}

// Row blocks that this thread's calls reuse, so that later steps touch no new pages.
template <typename F>
RowBlocks<F>& scratch(int slot_id) {
  static thread_local RowBlocks<F> slots[2];
  return slots[slot_id];
}

} // namespace gptneox

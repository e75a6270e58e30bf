// SPDX-License-Identifier: Apache-2.0
// One engine step: its tensors, checked once, and the layers that run over them.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "arguments.h"
#include "attention.h"
#include "layer.h"
#include "memory.h"
#include "team.h"

namespace gptneox {

// Bounds-check every index that the kernels use; the cost is negligible. Raises IndexError.
inline void check_indices(
    const Step& step, const int64_t* positions, int64_t num_positions, int64_t num_blocks) {
  const int64_t num_slots = num_blocks * step.block_size;
  for (int64_t t = 0; t < step.num_tokens; ++t) {
    TORCH_CHECK_INDEX(
        positions[t] >= 0 && positions[t] < num_positions, "position ", positions[t],
        " is outside of the rotary table, which has ", num_positions);
    TORCH_CHECK_INDEX(
        step.slots[t] >= 0 && step.slots[t] < num_slots, "slot ", step.slots[t],
        " is outside of the cache, which has ", num_slots);
  }
  int64_t rows = 0;
  for (int64_t b = 0; b < step.num_seqs; ++b) {
    const int64_t length = step.cu_seqlens[b + 1] - step.cu_seqlens[b];
    const int64_t context = step.context_lens[b], start = step.starts ? step.starts[b] : 0;
    const int64_t used = (context + step.block_size - 1) / step.block_size;
    rows += length;
    TORCH_CHECK_INDEX(
        step.cu_seqlens[b] == rows - length && (b < step.num_decodes ? length == 1 : length >= 0) &&
            length <= context && start >= 0 && start < context && used <= step.max_blocks,
        "sequence ", b, " has ", length, " new tokens of ", context, " from ", start, " on and ",
        step.max_blocks, " blocks of ", step.block_size);
    for (int64_t i = 0; i < used; ++i) {
      const int64_t block = step.block_tables[b * step.max_blocks + i];
      TORCH_CHECK_INDEX(
          block >= 0 && block < num_blocks, "block ", block, " is outside of the cache, which has ",
          num_blocks);
    }
    if (b < step.num_decodes) {
      // `decode` stores the token of a sequence while other threads already read the cache, so the
      // token must go to the sequence's own last position.
      const int64_t block = step.block_tables[b * step.max_blocks + used - 1];
      const int64_t slot = block * step.block_size + (context - 1) % step.block_size;
      TORCH_CHECK_INDEX(
          step.slots[b] == slot, "sequence ", b, " has its last position in slot ", slot,
          " and its new token in slot ", step.slots[b]);
    }
  }
  TORCH_CHECK_INDEX(
      rows == step.num_tokens, "the sequences have ", rows, " tokens, qkv has ", step.num_tokens);
}

// What all layers of a step share: checked once, when the step begins. Caches are [N, P, H, D] with
// any strides, except that D is contiguous.
class StepAttention {
 public:
  StepAttention(
      const at::Tensor& cache,
      const at::Tensor& positions,
      const at::Tensor& cos,
      const at::Tensor& sin,
      const at::Tensor& slots,
      const at::Tensor& block_tables,
      const at::Tensor& cu_seqlens,
      const at::Tensor& context_lens,
      int64_t num_decodes,
      double scale,
      const std::optional<at::Tensor>& starts)
      // The caller may pass views, such as the used columns of the block tables.
      : slots_(slots.contiguous()),
        block_tables_(block_tables.contiguous()),
        cu_seqlens_(cu_seqlens.contiguous()),
        context_lens_(context_lens.contiguous()),
        positions_(positions.contiguous()),
        cos_(cos.contiguous()),
        sin_(sin.contiguous()),
        starts_(starts ? starts->contiguous() : at::Tensor()),
        scale_(static_cast<float>(scale)) {
    TORCH_CHECK_VALUE(
        cache.dim() == 4, "a cache has shape ", cache.sizes(), "; [N, P, H, D] is expected");
    const int64_t num_tokens = positions.numel(), head_dim = cache.size(3);
    TORCH_CHECK_VALUE(
        cos.dim() == 2 && cos.sizes() == sin.sizes() && 2 * cos.size(1) <= head_dim,
        "the rotary tables have shapes ", cos.sizes(), " and ", sin.sizes(), " for heads of ",
        head_dim);
    TORCH_CHECK_VALUE(
        slots.numel() == num_tokens && block_tables.dim() == 2 &&
            block_tables.size(0) == context_lens.numel() &&
            cu_seqlens.numel() == context_lens.numel() + 1 && num_decodes >= 0 &&
            num_decodes <= context_lens.numel() &&
            (!starts || starts->numel() == context_lens.numel()),
        "the step's tensors do not belong together");
    step_.num_tokens = num_tokens;
    step_.num_decodes = num_decodes;
    step_.num_seqs = context_lens.numel();
    step_.num_heads = cache.size(2);
    step_.head_dim = head_dim;
    step_.block_size = cache.size(1);
    step_.slots = slots_.const_data_ptr<int64_t>();
    step_.block_tables = block_tables_.const_data_ptr<int32_t>();
    step_.max_blocks = block_tables.size(1);
    step_.cu_seqlens = cu_seqlens_.const_data_ptr<int32_t>();
    step_.context_lens = context_lens_.const_data_ptr<int32_t>();
    step_.starts = starts ? starts_.const_data_ptr<int32_t>() : nullptr;
    num_blocks_ = cache.size(0);
    check_indices(step_, positions_.const_data_ptr<int64_t>(), cos.size(0), num_blocks_);
  }

  int64_t num_tokens() const { return step_.num_tokens; }
  int64_t num_heads() const { return step_.num_heads; }
  int64_t head_dim() const { return step_.head_dim; }

  // Attention of one layer: stores the new keys and values in its cache, K and V, and their scales
  // if those are int8. qkv [T, H, 3, D]; returns [T, H, D] of the same dtype. Raises ValueError.
  at::Tensor attend(const at::Tensor& qkv_in, const std::vector<at::Tensor>& cache) const {
    TORCH_CHECK_VALUE(
        qkv_in.dim() == 4 && qkv_in.size(0) == step_.num_tokens &&
            qkv_in.size(1) == step_.num_heads && qkv_in.size(2) == 3 &&
            qkv_in.size(3) == step_.head_dim,
        "qkv has shape ", qkv_in.sizes(), "; [", step_.num_tokens, ", ", step_.num_heads, ", 3, ",
        step_.head_dim, "] is expected");
    const at::Tensor qkv = qkv_in.contiguous();
    check_cache(cache);
    at::Tensor out =
        workspace(2, {step_.num_tokens, step_.num_heads, step_.head_dim}, qkv.scalar_type());
    with_type(qkv.scalar_type(), [&](auto x_zero) {
      using X = decltype(x_zero);
      const NewTokens<X> new_tokens{
          qkv.const_data_ptr<X>(), positions_.const_data_ptr<int64_t>(),
          cos_.const_data_ptr<float>(), sin_.const_data_ptr<float>(), cos_.size(1), scale_};
      with_stored_type(cache[0].scalar_type(), [&](auto c_zero) {
        using C = decltype(c_zero);
        const Cache<C> keys(cache[0], cache[kScaled<C> ? 2 : 0]);
        const Cache<C> values(cache[1], cache[kScaled<C> ? 3 : 1]);
        X* y = out.data_ptr<X>();
        const float* q = store_prompt(new_tokens, keys, values);
        if (step_.num_decodes > 0) {
          decode<X, C>(step_, new_tokens, keys, values, y);
        }
        if (step_.num_decodes < step_.num_seqs) {
          prefill<X, C>(step_, q, keys, values, y);
        }
      });
    });
    return out;
  }

 private:
  void check_cache(const std::vector<at::Tensor>& cache) const {
    const bool is_scaled = !cache.empty() && cache[0].scalar_type() == at::kChar;
    TORCH_CHECK_VALUE(
        cache.size() == (is_scaled ? 4 : 2), "a cache has ", cache.size(),
        " tensors; K and V are expected, and the scales of both if they are int8");
    for (size_t i = 0; i < cache.size(); ++i) {
      const at::Tensor& part = cache[i];
      const bool is_scale = i >= 2;
      bool fits = part.dim() == (is_scale ? 3 : 4) && part.size(0) == num_blocks_ &&
          part.size(1) == step_.block_size && part.size(2) == step_.num_heads &&
          part.scalar_type() == (is_scale ? at::kFloat : cache[0].scalar_type());
      fits = fits && (is_scale || (part.size(3) == step_.head_dim && part.stride(3) == 1));
      TORCH_CHECK_VALUE(
          fits, "a cache has shape ", part.sizes(), "; [N, P, ", step_.num_heads,
          is_scale ? "] in float32" : ", ", is_scale ? "" : std::to_string(step_.head_dim) + "]",
          " is expected, K and V of one dtype and with D in one piece");
    }
  }

  // Store keys and values of the prompt tokens, which `prefill` reads from the cache. Returns the
  // rotated queries [T, H, D], undefined for rows of `decode`; null if there are no prompt tokens.
  template <typename X, typename C>
  const float* store_prompt(
      const NewTokens<X>& new_tokens, const Cache<C>& keys, const Cache<C>& values) const {
    const int64_t heads = step_.num_heads, dim = step_.head_dim, first = step_.num_decodes;
    if (first == step_.num_tokens) {
      return nullptr;
    }
    static thread_local std::vector<float> queries; // reused by later layers and steps
    queries.resize(std::max<size_t>(queries.size(), step_.num_tokens * heads * dim));
    float* q = queries.data();
    const int64_t grain = std::max<int64_t>(1, 8192 / (heads * dim));
    for_ranges(step_.num_tokens - first, grain, [&](int64_t begin, int64_t end) {
      std::vector<float> row(dim);
      for (int64_t t = first + begin; t < first + end; ++t) {
        for (int64_t h = 0; h < heads; ++h) {
          new_tokens.query(step_, t, h, q + (t * heads + h) * dim);
          new_tokens.store(step_, t, h, keys, values, row.data());
        }
      }
    });
    return q;
  }

  // step_ points into these.
  at::Tensor slots_, block_tables_, cu_seqlens_, context_lens_, positions_, cos_, sin_, starts_;
  float scale_;
  Step step_{};
  int64_t num_blocks_ = 0;
};

// Run all layers of a step over x fp32 [T, C], in place, layer i over caches[i]. Raises ValueError.
inline void run_layers(
    const StepAttention& step,
    at::Tensor x,
    const std::vector<std::shared_ptr<Layer>>& layers,
    const std::vector<std::vector<at::Tensor>>& caches) {
  TORCH_CHECK_VALUE(
      !layers.empty() && caches.size() == layers.size(), layers.size(), " layers have ",
      caches.size(), " caches; one each is expected");
  TORCH_CHECK_VALUE(
      x.dim() == 2 && x.size(0) == step.num_tokens(), "x has shape ", x.sizes(), "; [",
      step.num_tokens(), ", C] is expected");
  const int64_t num_heads = step.num_heads(), head_dim = step.head_dim();
  Team::lead([&] {
    for (size_t i = 0; i < layers.size(); ++i) {
      const auto [qkv, mlp] = layers[i]->front(x);
      TORCH_CHECK_VALUE(
          qkv.size(1) == 3 * num_heads * head_dim, "layer ", i, " makes ", qkv.size(1),
          " columns of qkv; 3 x ", num_heads, " x ", head_dim, " are expected");
      const at::Tensor attended =
          step.attend(qkv.view({x.size(0), num_heads, 3, head_dim}), caches[i]);
      layers[i]->back(attended.view({x.size(0), num_heads * head_dim}), mlp, x);
    }
  });
}

} // namespace gptneox

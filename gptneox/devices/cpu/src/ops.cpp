// SPDX-License-Identifier: Apache-2.0
// What Python sees: packing, products, a parallel-residual layer in two calls, paged attention.

#include <ATen/ATen.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <optional>
#include <string>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "attention.h"
#include "product.h"

namespace gptneox {
namespace {

using at::Tensor;

// Memory that is read from front to back, weights and caches: in huge pages where the system gives
// them.
Tensor allocate(at::IntArrayRef sizes, at::ScalarType type) {
  size_t bytes = c10::elementSize(type);
  for (const int64_t size : sizes) {
    bytes *= size;
  }
  constexpr size_t kPage = size_t{2} << 20;
  if (bytes < kPage) {
    return at::empty(sizes, at::TensorOptions().dtype(type));
  }
  void* data = nullptr;
  TORCH_CHECK_WITH(
      OutOfMemoryError, posix_memalign(&data, kPage, bytes) == 0, "not enough memory for ", bytes,
      " bytes");
#if defined(__linux__)
  madvise(data, bytes, MADV_HUGEPAGE);
#endif
  return at::from_blob(
      data, sizes, [](void* p) { std::free(p); }, at::TensorOptions().dtype(type));
}

template <typename W>
void pack_into(const Tensor& weight, const Tensor& out) {
  using F = Format<W>;
  const W* from = weight.const_data_ptr<W>();
  W* to = out.data_ptr<W>();
  const int64_t features = weight.size(0), depth = weight.size(1), padded = out.size(1);
  at::parallel_for(0, out.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      W* p = to + panel * padded * kCols;
      // Sixteen values of K at a time, so that what is written stays in the first-level cache.
      for (int64_t k0 = 0; k0 < padded; k0 += kDepth) {
        for (int64_t j = 0; j < kCols; ++j) {
          const int64_t row = panel * kCols + j;
          const W* source = from + row * depth;
          for (int64_t k = k0; k < k0 + kDepth; ++k) {
            const W value = row < features && k < depth ? source[k] : W(0.f);
            p[k / F::kStep * F::kStep * kCols + j * F::kStep + k % F::kStep] = value;
          }
        }
      }
    }
  });
}

template <typename Body>
void with_type(at::ScalarType type, Body&& body) {
  switch (type) {
    case at::kFloat:
      return body(float{});
    case at::kHalf:
      return body(c10::Half{});
    case at::kBFloat16:
      return body(c10::BFloat16{});
    default:
      TORCH_CHECK_TYPE(
          false, "dtype ", type, " is not served; float32, float16 or bfloat16 is expected");
  }
}

std::shared_ptr<Packed> pack(const Tensor& weight) {
  TORCH_CHECK_VALUE(weight.dim() == 2, "weight has ", weight.dim(), " dimensions; 2 are expected");
  auto packed = std::make_shared<Packed>();
  packed->features = weight.size(0);
  packed->depth = weight.size(1);
  const Tensor source = weight.contiguous();
  with_type(weight.scalar_type(), [&](auto zero) {
    packed->panels = allocate(
        {(packed->features + kCols - 1) / kCols, round_up(packed->depth, kDepth), kCols},
        weight.scalar_type());
    pack_into<decltype(zero)>(source, packed->panels);
  });
  return packed;
}

// What a row is normalised by: (x - mean - rest) * rstd. Two passes; `rest` is what rounding left
// of the mean, which matters where a row lies far from zero.
struct Moments {
  float mean, rest, rstd;
};

inline Moments moments(const float* x, int64_t n, float eps) {
  const auto add = [](Vec& a, Vec& b) { return a + b; };
  Vec total(0.f);
  int64_t i = 0;
  for (; i + kVec <= n; i += kVec) {
    total = total + Vec::loadu(x + i);
  }
  float sum = at::vec::vec_reduce_all<float>(add, total);
  for (; i < n; ++i) {
    sum += x[i];
  }
  const float count = static_cast<float>(n), mean = sum / count;
  Vec offsets(0.f), squares(0.f);
  for (i = 0; i + kVec <= n; i += kVec) {
    const Vec d = Vec::loadu(x + i) - Vec(mean);
    offsets = offsets + d;
    squares = at::vec::fmadd(d, d, squares);
  }
  float offset = at::vec::vec_reduce_all<float>(add, offsets);
  float square = at::vec::vec_reduce_all<float>(add, squares);
  for (; i < n; ++i) {
    offset += x[i] - mean;
    square += (x[i] - mean) * (x[i] - mean);
  }
  const float rest = offset / count;
  const float variance = std::max(0.f, square / count - rest * rest);
  return {mean, rest, 1.f / std::sqrt(variance + eps)};
}

struct Norm {
  Tensor scale, shift; // fp32 [C]
};

inline void normalise(const float* x, const Norm& norm, const Moments& m, float* y) {
  const int64_t n = norm.scale.numel();
  const float *scale = norm.scale.const_data_ptr<float>(), *shift = norm.shift.const_data_ptr<float>();
  for (int64_t i = 0; i < n; ++i) {
    y[i] = (x[i] - m.mean - m.rest) * m.rstd * scale[i] + shift[i];
  }
}

const float* bias_of(const std::optional<Tensor>& bias, int64_t features) {
  if (!bias) {
    return nullptr;
  }
  TORCH_CHECK_VALUE(
      bias->dim() == 1 && bias->numel() == features && bias->is_contiguous(), "bias has shape ",
      bias->sizes(), "; [", features, "] without gaps is expected");
  return bias->const_data_ptr<float>();
}

Tensor check_rows(const Tensor& x, int64_t width, const char* name) {
  TORCH_CHECK_VALUE(
      x.dim() == 2 && x.size(1) == width, name, " has shape ", x.sizes(), "; [any, ", width,
      "] is expected");
  return x.to(at::kFloat).contiguous();
}

template <typename F>
void fill_blocks(Blocks<F>& blocks, const Tensor& x, bool blocked) {
  const int64_t rows = x.size(0), depth = x.size(1);
  blocks.resize(rows, depth, blocked);
  const float* data = x.const_data_ptr<float>();
  for_ranges(blocks.num_blocks(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      blocks.fill(b, data + b * blocks.height * depth, depth, depth);
    }
  });
}

template <typename F>
Blocks<F>& scratch(int which) {
  // Reused between calls: the activations of a step need no new pages.
  static thread_local Blocks<F> blocks[2];
  return blocks[which];
}

// Memory for what one call hands to the next: given out again once nobody holds it, so that the
// layers of a step share it and touch no new pages.
Tensor workspace(int which, at::IntArrayRef sizes, at::ScalarType type) {
  static thread_local Tensor slots[3];
  // What was made in inference mode could not be written to outside of it.
  const c10::InferenceMode ordinary(false);
  int64_t count = 1;
  for (const int64_t size : sizes) {
    count *= size;
  }
  Tensor& slot = slots[which];
  if (!slot.defined() || slot.scalar_type() != type || slot.numel() < count ||
      slot.storage().use_count() != 1) {
    slot = at::empty({count}, at::TensorOptions().dtype(type));
  }
  return slot.narrow(0, 0, count).view(sizes);
}

// x [T, K] of any float type; returns act(x W.T + bias) in fp32.
Tensor linear(
    const Tensor& x,
    const std::shared_ptr<Packed>& weight,
    const std::optional<Tensor>& bias,
    int activation) {
  const Tensor rows = check_rows(x, weight->depth, "x");
  Tensor y = at::empty({rows.size(0), weight->features}, rows.options());
  if (rows.size(0) == 0) {
    return y;
  }
  with_type(weight->panels.scalar_type(), [&](auto zero) {
    using F = Format<decltype(zero)>;
    auto& blocks = scratch<F>(0);
    fill_blocks(blocks, rows, is_blocked<F>(rows.size(0), weight->depth));
    Output<F> out;
    out.terms = {{weight.get(), &blocks}};
    out.bias = bias_of(bias, weight->features);
    out.activation = static_cast<Activation>(activation);
    out.y = y.data_ptr<float>();
    run<F>({out});
  });
  return y;
}

Tensor layer_norm(const Tensor& x, const Tensor& scale, const Tensor& shift, double eps) {
  const Tensor rows = check_rows(x, scale.numel(), "x");
  const Norm norm{scale.to(at::kFloat).contiguous(), shift.to(at::kFloat).contiguous()};
  TORCH_CHECK_VALUE(
      shift.numel() == scale.numel(), "shift has ", shift.numel(), " values; ", scale.numel(),
      " are expected");
  Tensor y = at::empty_like(rows);
  const int64_t width = std::max<int64_t>(1, rows.size(1));
  at::parallel_for(0, rows.size(0), std::max<int64_t>(1, 16384 / width), [&](int64_t b, int64_t e) {
    for (int64_t r = b; r < e; ++r) {
      const float* row = rows.const_data_ptr<float>() + r * width;
      normalise(row, norm, moments(row, width, static_cast<float>(eps)), y.data_ptr<float>() + r * width);
    }
  });
  return y;
}

// A layer with parallel residual: x + attention(LN1(x)) + mlp(LN2(x)).
struct Layer {
  Norm norms[2];
  std::shared_ptr<Packed> qkv, up, dense, down;
  std::optional<Tensor> qkv_bias, up_bias, out_bias; // fp32
  float eps;
  Activation activation;

  void check() const {
    const int64_t width = qkv->depth;
    bool fits = up->depth == width && dense->features == width && down->features == width;
    for (const Norm& norm : norms) {
      fits = fits && norm.scale.numel() == width && norm.shift.numel() == width;
    }
    for (const auto& weight : {up, dense, down}) {
      fits = fits && weight->panels.scalar_type() == qkv->panels.scalar_type();
    }
    TORCH_CHECK_VALUE(fits, "the weights of a layer differ in width or dtype");
  }

  // Both terms of `back` are multiplied alike.
  template <typename F>
  bool back_is_blocked(int64_t rows) const {
    return is_blocked<F>(rows, std::min(dense->depth, down->depth));
  }

  // x fp32 [T, C] to qkv fp32 [T, 3W] and the activated MLP, packed as `back` reads it.
  std::pair<Tensor, Tensor> front(const Tensor& x) const {
    const Tensor rows = check_rows(x, qkv->depth, "x");
    const int64_t count = rows.size(0), width = rows.size(1);
    Tensor y = workspace(0, {count, qkv->features}, at::kFloat);
    Tensor mlp; // Blocks of [T, F], their 32-bit entries in one row
    with_type(qkv->panels.scalar_type(), [&](auto zero) {
      using F = Format<decltype(zero)>;
      Blocks<F>* blocks[2] = {&scratch<F>(0), &scratch<F>(1)};
      for (auto* each : blocks) {
        each->resize(count, width, is_blocked<F>(count, width));
      }
      const float* data = rows.const_data_ptr<float>();
      for_ranges(blocks[0]->num_blocks(), 1, [&](int64_t begin, int64_t end) {
        const int64_t height = blocks[0]->height;
        std::vector<float> normed(height * width);
        std::vector<Moments> found(height);
        for (int64_t b = begin; b < end; ++b) {
          const int known = blocks[0]->rows_of(b);
          const float* from = data + b * height * width;
          for (int i = 0; i < 2; ++i) {
            for (int r = 0; r < known; ++r) {
              if (i == 0) {
                found[r] = moments(from + r * width, width, eps);
              }
              normalise(from + r * width, norms[i], found[r], normed.data() + r * width);
            }
            blocks[i]->fill(b, normed.data(), width, width);
          }
        }
      });
      Output<F> first, second;
      first.terms = {{qkv.get(), blocks[0]}};
      first.bias = bias_of(qkv_bias, qkv->features);
      first.y = y.data_ptr<float>();
      second.terms = {{up.get(), blocks[1]}};
      second.bias = bias_of(up_bias, up->features);
      second.activation = activation;
      using Scalar = typename F::Scalar;
      static_assert(sizeof(Scalar) == sizeof(int32_t));
      mlp = workspace(1, {Blocks<F>::count(count, up->features)}, at::kInt);
      if (round_up(up->features, kCols) < round_up(up->features, kDepth)) {
        mlp.zero_(); // the panels do not reach the end of the padded depth
      }
      Blocks<F> packed;
      packed.bind(
          reinterpret_cast<Scalar*>(mlp.data_ptr<int32_t>()), count, up->features,
          back_is_blocked<F>(count));
      second.packed = &packed;
      run<F>({first, second});
    });
    return {y, mlp};
  }

  // attended [T, W] and `front`'s mlp to the partial sum [T, C]; with `residual` it is added
  // there, in place.
  Tensor back(
      const Tensor& attended, const Tensor& mlp, const std::optional<Tensor>& residual) const {
    const Tensor a = check_rows(attended, dense->depth, "attended");
    Tensor y = residual ? *residual : at::empty({a.size(0), dense->features}, a.options());
    TORCH_CHECK_VALUE(
        y.dim() == 2 && y.is_contiguous() && y.scalar_type() == at::kFloat &&
            y.size(0) == a.size(0) && y.size(1) == dense->features,
        "residual has shape ", y.sizes(), "; a contiguous float32 [", a.size(0), ", ",
        dense->features, "] is expected");
    with_type(dense->panels.scalar_type(), [&](auto zero) {
      using F = Format<decltype(zero)>;
      auto& first = scratch<F>(0);
      fill_blocks(first, a, back_is_blocked<F>(a.size(0)));
      TORCH_CHECK_VALUE(
          mlp.scalar_type() == at::kInt && mlp.is_contiguous() &&
              mlp.numel() == Blocks<F>::count(a.size(0), down->depth),
          "mlp is not what `front` returned for the ", a.size(0), " rows of attended");
      Blocks<F> second;
      second.bind(
          reinterpret_cast<typename F::Scalar*>(mlp.data_ptr<int32_t>()), a.size(0), down->depth,
          first.blocked);
      Output<F> out;
      out.terms = {{dense.get(), &first}, {down.get(), &second}};
      out.bias = bias_of(out_bias, dense->features);
      out.y = y.data_ptr<float>();
      out.residual = residual ? out.y : nullptr;
      run<F>({out});
    });
    return y;
  }
};

// What the loops index memory by: one look at each is nothing beside the work that follows.
void check_indices(
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
      // Rows are stored while others are read already, each by whoever attends it.
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

// What the attention of all layers of a step has in common, checked once. Caches are
// [N, P, H, D], any strides but D's.
class StepAttention {
 public:
  StepAttention(
      const Tensor& cache,
      const Tensor& positions,
      const Tensor& cos,
      const Tensor& sin,
      const Tensor& slots,
      const Tensor& block_tables,
      const Tensor& cu_seqlens,
      const Tensor& context_lens,
      int64_t num_decodes,
      double scale,
      const std::optional<Tensor>& starts)
      // Parts of larger tensors may come, such as the columns in use of the block tables.
      : tables_{slots.contiguous(), block_tables.contiguous(), cu_seqlens.contiguous(),
                context_lens.contiguous(), positions.contiguous(), cos.contiguous(),
                sin.contiguous(), starts ? starts->contiguous() : Tensor()},
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
    step_.slots = tables_[0].const_data_ptr<int64_t>();
    step_.block_tables = tables_[1].const_data_ptr<int32_t>();
    step_.max_blocks = block_tables.size(1);
    step_.cu_seqlens = tables_[2].const_data_ptr<int32_t>();
    step_.context_lens = tables_[3].const_data_ptr<int32_t>();
    step_.starts = starts ? tables_[7].const_data_ptr<int32_t>() : nullptr;
    num_blocks_ = cache.size(0);
    check_indices(step_, tables_[4].const_data_ptr<int64_t>(), cos.size(0), num_blocks_);
  }

  int64_t num_tokens() const { return step_.num_tokens; }
  int64_t num_heads() const { return step_.num_heads; }
  int64_t head_dim() const { return step_.head_dim; }

  // One layer: qkv [T, H, 3, D]; returns [T, H, D] of its type.
  Tensor attend(const Tensor& qkv_in, const Tensor& k_cache, const Tensor& v_cache) const {
    TORCH_CHECK_VALUE(
        qkv_in.dim() == 4 && qkv_in.size(0) == step_.num_tokens &&
            qkv_in.size(1) == step_.num_heads && qkv_in.size(2) == 3 &&
            qkv_in.size(3) == step_.head_dim,
        "qkv has shape ", qkv_in.sizes(), "; [", step_.num_tokens, ", ", step_.num_heads, ", 3, ",
        step_.head_dim, "] is expected");
    const Tensor qkv = qkv_in.contiguous();
    for (const Tensor& cache : {k_cache, v_cache}) {
      TORCH_CHECK_VALUE(
          cache.dim() == 4 && cache.size(0) == num_blocks_ &&
              cache.size(1) == step_.block_size && cache.size(2) == step_.num_heads &&
              cache.size(3) == step_.head_dim && cache.stride(3) == 1 &&
              cache.scalar_type() == k_cache.scalar_type(),
          "a cache has shape ", cache.sizes(), "; [N, P, ", step_.num_heads, ", ",
          step_.head_dim, "] is expected, both of one dtype and with D in one piece");
    }
    Tensor out =
        workspace(2, {step_.num_tokens, step_.num_heads, step_.head_dim}, qkv.scalar_type());
    with_type(qkv.scalar_type(), [&](auto x_zero) {
      using X = decltype(x_zero);
      const Incoming<X> incoming{
          qkv.const_data_ptr<X>(), tables_[4].const_data_ptr<int64_t>(),
          tables_[5].const_data_ptr<float>(), tables_[6].const_data_ptr<float>(),
          tables_[5].size(1), scale_};
      with_type(k_cache.scalar_type(), [&](auto c_zero) {
        using C = decltype(c_zero);
        const Cache<C> keys(k_cache), values(v_cache);
        X* y = out.data_ptr<X>();
        const float* q = take_in(incoming, keys, values);
        if (step_.num_decodes > 0) {
          decode<X, C>(step_, incoming, keys, values, y);
        }
        if (step_.num_decodes < step_.num_seqs) {
          prefill<X, C>(step_, q, keys, values, y);
        }
      });
    });
    return out;
  }

 private:
  // Store the tokens of prompts; returns their queries [T, H, D], those of other rows undefined.
  template <typename X, typename C>
  const float* take_in(
      const Incoming<X>& incoming, const Cache<C>& keys, const Cache<C>& values) const {
    const int64_t heads = step_.num_heads, dim = step_.head_dim, first = step_.num_decodes;
    if (first == step_.num_tokens) {
      return nullptr;
    }
    static thread_local std::vector<float> room;
    room.resize(std::max<size_t>(room.size(), step_.num_tokens * heads * dim));
    float* q = room.data();
    const int64_t grain = std::max<int64_t>(1, 8192 / (heads * dim));
    for_ranges(step_.num_tokens - first, grain, [&](int64_t begin, int64_t end) {
      std::vector<float> row(dim);
      for (int64_t t = first + begin; t < first + end; ++t) {
        for (int64_t h = 0; h < heads; ++h) {
          incoming.query(step_, t, h, q + (t * heads + h) * dim);
          incoming.store(step_, t, h, keys, values, row.data());
        }
      }
    });
    return q;
  }

  Tensor tables_[8];
  float scale_;
  Step step_{};
  int64_t num_blocks_ = 0;
};

// All layers of a step over x fp32 [T, C], in place; layer i has caches[2 i] and caches[2 i + 1].
void run_layers(
    const StepAttention& step,
    Tensor x,
    const std::vector<std::shared_ptr<Layer>>& layers,
    const std::vector<Tensor>& caches) {
  TORCH_CHECK_VALUE(
      !layers.empty() && caches.size() == 2 * layers.size(), layers.size(), " layers have ",
      caches.size(), " caches; two each are expected");
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
      const Tensor attended = step.attend(
          qkv.view({x.size(0), num_heads, 3, head_dim}), caches[2 * i], caches[2 * i + 1]);
      layers[i]->back(attended.view({x.size(0), num_heads * head_dim}), mlp, x);
    }
  });
}

// The first of the largest values of each row of logits fp32 [S, V], then 1 when the sum of all is
// finite, else 0: int64 [S + 1].
Tensor greedy(const Tensor& logits) {
  TORCH_CHECK_VALUE(
      logits.dim() == 2 && logits.size(1) > 0 && logits.scalar_type() == at::kFloat,
      "logits have shape ", logits.sizes(), " and dtype ", logits.scalar_type(),
      "; float32 [S, V] is expected");
  const Tensor x = logits.stride(1) == 1 ? logits : logits.contiguous();
  const int64_t rows = x.size(0), width = x.size(1), stride = x.stride(0);
  const float* data = x.const_data_ptr<float>();
  Tensor out = at::empty({rows + 1}, at::TensorOptions().dtype(at::kLong));
  int64_t* ids = out.data_ptr<int64_t>();
  std::atomic<bool> finite{true};
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float* row = data + r * stride;
      Vec largest(kMinusInfinity), sum(0.f);
      int64_t i = 0;
      for (; i + kVec <= width; i += kVec) {
        const Vec v = Vec::loadu(row + i);
        largest = at::vec::maximum(largest, v);
        sum = sum + v;
      }
      float top = at::vec::vec_reduce_all<float>(
          [](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, largest);
      float total = at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, sum);
      for (; i < width; ++i) {
        top = std::max(top, row[i]);
        total += row[i];
      }
      if (!std::isfinite(total)) {
        finite.store(false, std::memory_order_relaxed);
      }
      ids[r] = std::find(row, row + width, top) - row;
      if (ids[r] == width) {
        ids[r] = 0; // NaN, which the flag tells
      }
    }
  });
  ids[rows] = finite.load() ? 1 : 0;
  return out;
}

std::string describe() {
  std::string text = "vectors of " + std::to_string(kVec) + " floats";
  return GPTNEOX_BF16_DOT ? text + ", bf16 dot products" : text;
}

} // namespace
} // namespace gptneox

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  namespace py = pybind11;
  using namespace gptneox;
  using Release = py::call_guard<py::gil_scoped_release>;
  py::class_<Packed, std::shared_ptr<Packed>>(m, "Packed").def_property_readonly("nbytes", [](const Packed& p) {
    return p.panels.nbytes();
  });
  py::class_<Layer, std::shared_ptr<Layer>>(m, "Layer")
      .def(py::init([](std::vector<at::Tensor> norms, std::vector<std::shared_ptr<Packed>> weights,
                       std::vector<std::optional<at::Tensor>> biases, double eps, int activation) {
        auto layer = std::make_shared<Layer>();
        layer->norms[0] = {norms.at(0), norms.at(1)};
        layer->norms[1] = {norms.at(2), norms.at(3)};
        layer->qkv = weights.at(0);
        layer->up = weights.at(1);
        layer->dense = weights.at(2);
        layer->down = weights.at(3);
        layer->qkv_bias = biases.at(0);
        layer->up_bias = biases.at(1);
        layer->out_bias = biases.at(2);
        layer->eps = static_cast<float>(eps);
        layer->activation = static_cast<Activation>(activation);
        layer->check();
        return layer;
      }), py::arg("norms"), py::arg("weights"), py::arg("biases"), py::arg("eps"), py::arg("activation"))
      .def("front", &Layer::front, Release())
      .def("back", &Layer::back, Release());
  py::class_<StepAttention>(m, "Step")
      .def(
          py::init<const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                   const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                   int64_t, double, const std::optional<at::Tensor>&>(),
          py::kw_only(), py::arg("cache"), py::arg("positions"), py::arg("cos"), py::arg("sin"),
          py::arg("slots"), py::arg("block_tables"), py::arg("cu_seqlens"), py::arg("context_lens"),
          py::arg("num_decodes"), py::arg("scale"), py::arg("starts"))
      .def("attend", &StepAttention::attend, Release())
      .def("run", &run_layers, Release());
  m.def("pack", &pack, Release());
  m.def("linear", &linear, Release());
  m.def("layer_norm", &layer_norm, Release());
  m.def("greedy", &greedy, Release());
  m.def("allocate", [](std::vector<int64_t> sizes, const at::Tensor& like) {
    return allocate(sizes, like.scalar_type());
  });
  m.def("describe", &describe);
  m.def(
      "set_blocked_from",
      [](int64_t bf16, int64_t fp16, int64_t fp32) { blocked_from = {bf16, fp16, fp32}; },
      py::arg("bf16"), py::arg("fp16"), py::arg("fp32"));
  m.def("blocked_from", [] {
    return std::make_tuple(blocked_from.bf16, blocked_from.fp16, blocked_from.fp32);
  });
}

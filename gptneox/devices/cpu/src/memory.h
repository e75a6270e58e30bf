// SPDX-License-Identifier: Apache-2.0
// Memory of tensors: huge pages for weights and caches, a workspace that layers share.
#pragma once

#include <ATen/ATen.h>

#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace gptneox {

// An uninitialised tensor for weights or caches. They are read from front to back, so small pages
// would cost TLB misses: from 2 MiB on, Linux is asked for huge pages.
inline at::Tensor allocate(at::IntArrayRef sizes, at::ScalarType type) {
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

// An uninitialised tensor that one call of a layer passes to the next. The memory of a slot is
// reused when no tensor refers to it any more, so that all layers of a step share the same pages.
inline at::Tensor workspace(int slot_id, at::IntArrayRef sizes, at::ScalarType type) {
  static thread_local at::Tensor slots[3];
  // A tensor created in inference mode could not be written to outside of it.
  const c10::InferenceMode normal_mode(false);
  int64_t count = 1;
  for (const int64_t size : sizes) {
    count *= size;
  }
  at::Tensor& slot = slots[slot_id];
  if (!slot.defined() || slot.scalar_type() != type || slot.numel() < count ||
      slot.storage().use_count() != 1) {
    slot = at::empty({count}, at::TensorOptions().dtype(type));
  }
  return slot.narrow(0, 0, count).view(sizes);
}

} // namespace gptneox

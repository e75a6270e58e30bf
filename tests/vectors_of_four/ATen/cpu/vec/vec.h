// SPDX-License-Identifier: Apache-2.0
// In place of ATen's header: vectors of four floats, as on aarch64, in plain C++, with what the CPU
// kernels use of them. Compiled against this, the code for that width runs anywhere.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>

namespace at::vec {

template <typename T>
struct Vectorized;

template <>
struct Vectorized<float> {
  float v[4];

  static constexpr int size() {
    return 4;
  }
  Vectorized() = default;
  Vectorized(float x) : v{x, x, x, x} {}
  static Vectorized loadu(const void* p, int64_t count = 4) {
    Vectorized out(0.f);
    std::memcpy(out.v, p, count * sizeof(float));
    return out;
  }
  void store(void* p, int64_t count = 4) const {
    std::memcpy(p, v, count * sizeof(float));
  }

  template <typename F>
  static Vectorized each(F f) {
    Vectorized out;
    for (int i = 0; i < 4; ++i) {
      out.v[i] = f(i);
    }
    return out;
  }
  Vectorized exp() const {
    return each([this](int i) { return std::exp(v[i]); });
  }
  Vectorized exp_u20() const {
    return exp();
  }
  Vectorized erf() const {
    return each([this](int i) { return std::erf(v[i]); });
  }
  Vectorized tanh() const {
    return each([this](int i) { return std::tanh(v[i]); });
  }
  Vectorized neg() const {
    return each([this](int i) { return -v[i]; });
  }
};

using Four = Vectorized<float>;

inline Four operator+(const Four& a, const Four& b) {
  return Four::each([&](int i) { return a.v[i] + b.v[i]; });
}
inline Four operator-(const Four& a, const Four& b) {
  return Four::each([&](int i) { return a.v[i] - b.v[i]; });
}
inline Four operator*(const Four& a, const Four& b) {
  return Four::each([&](int i) { return a.v[i] * b.v[i]; });
}
inline Four operator/(const Four& a, const Four& b) {
  return Four::each([&](int i) { return a.v[i] / b.v[i]; });
}
inline Four fmadd(const Four& a, const Four& b, const Four& c) {
  return Four::each([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
}
inline Four maximum(const Four& a, const Four& b) { // NaN where either is
  return Four::each([&](int i) { return a.v[i] > b.v[i] || std::isnan(a.v[i]) ? a.v[i] : b.v[i]; });
}

template <typename T, typename F>
T vec_reduce_all(F f, Four x) {
  Four total(x.v[0]);
  for (int i = 1; i < 4; ++i) {
    Four next(x.v[i]);
    total = f(total, next);
  }
  return total.v[0];
}

template <typename C>
struct Eight {
  C v[8];

  void store(void* p) const {
    std::memcpy(p, v, sizeof(v));
  }
};

template <typename C>
Eight<C> convert_from_float(const Four& a, const Four& b) {
  Eight<C> out;
  for (int i = 0; i < 4; ++i) {
    out.v[i] = static_cast<C>(a.v[i]);
    out.v[4 + i] = static_cast<C>(b.v[i]);
  }
  return out;
}
inline Eight<c10::BFloat16> convert_float_bfloat16(const Four& a, const Four& b) {
  return convert_from_float<c10::BFloat16>(a, b);
}
inline std::tuple<Four, Four> convert_bfloat16_float(const Eight<c10::BFloat16>& x) {
  return {
      Four::each([&](int i) { return static_cast<float>(x.v[i]); }),
      Four::each([&](int i) { return static_cast<float>(x.v[4 + i]); })};
}
inline void load_fp32_from_bf16(const c10::BFloat16* p, Four& out) {
  out = Four::each([p](int i) { return static_cast<float>(p[i]); });
}
inline void load_fp32_from_fp16(const c10::Half* p, Four& out) {
  out = Four::each([p](int i) { return static_cast<float>(p[i]); });
}

template <typename T, int M, int N>
void transpose_mxn(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < N; ++j) {
      to[j * to_stride + i] = from[i * from_stride + j];
    }
  }
}

} // namespace at::vec

// Transposing blocks of elements in registers, for any vector type. Included by one source per instruction set, which
// is compiled for that set: so nothing here may have a name that another source could link to, and no inline function
// of the standard library is used.
//
// A vector type V has: kBytes, load, store, and
//   even(a, b), odd(a, b)   the even (odd) bytes of a, then those of b
//   zip(a, b, &lo, &hi)     a0 b0 a1 b1 ...
#pragma once

#include <cstddef>
#include <cstdint>

namespace snapd {
namespace {

/// `kWidth` vectors of elements of that width to one vector of each plane.
template <class V, size_t kWidth>
struct Planes {
  static inline void split(const V* in, V* out) noexcept {
    constexpr size_t kHalf = kWidth / 2;
    V even[kHalf], odd[kHalf], even_out[kHalf], odd_out[kHalf];
    for (size_t i = 0; i < kHalf; ++i) {
      even[i] = V::even(in[2 * i], in[2 * i + 1]);
      odd[i] = V::odd(in[2 * i], in[2 * i + 1]);
    }
    Planes<V, kHalf>::split(even, even_out);
    Planes<V, kHalf>::split(odd, odd_out);
    for (size_t i = 0; i < kHalf; ++i) {
      out[2 * i] = even_out[i];
      out[2 * i + 1] = odd_out[i];
    }
  }

  static inline void merge(const V* in, V* out) noexcept {
    constexpr size_t kHalf = kWidth / 2;
    V even[kHalf], odd[kHalf], even_out[kHalf], odd_out[kHalf];
    for (size_t i = 0; i < kHalf; ++i) {
      even[i] = in[2 * i];
      odd[i] = in[2 * i + 1];
    }
    Planes<V, kHalf>::merge(even, even_out);
    Planes<V, kHalf>::merge(odd, odd_out);
    for (size_t i = 0; i < kHalf; ++i) V::zip(even_out[i], odd_out[i], &out[2 * i], &out[2 * i + 1]);
  }
};

template <class V>
struct Planes<V, 1> {
  static inline void split(const V* in, V* out) noexcept { out[0] = in[0]; }
  static inline void merge(const V* in, V* out) noexcept { out[0] = in[0]; }
};

template <class V, size_t kWidth>
size_t shuffle_width(uint8_t* dst, const uint8_t* src, size_t count) noexcept {
  size_t at = 0;
  for (; at + V::kBytes <= count; at += V::kBytes) {
    V elements[kWidth], planes[kWidth];
    for (size_t i = 0; i < kWidth; ++i) elements[i] = V::load(src + at * kWidth + i * V::kBytes);
    Planes<V, kWidth>::split(elements, planes);
    for (size_t i = 0; i < kWidth; ++i) planes[i].store(dst + i * count + at);
  }
  return at;
}

template <class V, size_t kWidth>
size_t unshuffle_width(uint8_t* dst, const uint8_t* src, size_t count) noexcept {
  size_t at = 0;
  for (; at + V::kBytes <= count; at += V::kBytes) {
    V elements[kWidth], planes[kWidth];
    for (size_t i = 0; i < kWidth; ++i) planes[i] = V::load(src + i * count + at);
    Planes<V, kWidth>::merge(planes, elements);
    for (size_t i = 0; i < kWidth; ++i) elements[i].store(dst + at * kWidth + i * V::kBytes);
  }
  return at;
}

template <class V>
size_t shuffle_any(uint8_t* dst, const uint8_t* src, size_t count, size_t width) noexcept {
  if (width == 2) return shuffle_width<V, 2>(dst, src, count);
  if (width == 4) return shuffle_width<V, 4>(dst, src, count);
  return shuffle_width<V, 8>(dst, src, count);
}

template <class V>
size_t unshuffle_any(uint8_t* dst, const uint8_t* src, size_t count, size_t width) noexcept {
  if (width == 2) return unshuffle_width<V, 2>(dst, src, count);
  if (width == 4) return unshuffle_width<V, 4>(dst, src, count);
  return unshuffle_width<V, 8>(dst, src, count);
}

}  // namespace
}  // namespace snapd

// Byte planes with 32-byte vectors. This source alone is compiled for AVX2, and called only where there is AVX2.
#if defined(__x86_64__)

#include <immintrin.h>

#include "byte_filter_blocks.hpp"
#include "byte_filter_sets.hpp"

namespace snapd {
namespace {

// Packing and unpacking work within halves of 16 bytes, so each is followed by putting the halves in order.
struct Vector256 {
  static constexpr size_t kBytes = 32;
  __m256i value;

  static inline Vector256 load(const uint8_t* from) noexcept {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))};
  }
  inline void store(uint8_t* to) const noexcept { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), value); }
  static inline Vector256 packed(__m256i a, __m256i b) noexcept {
    return {_mm256_permute4x64_epi64(_mm256_packus_epi16(a, b), 0xD8)};
  }
  static inline Vector256 even(Vector256 a, Vector256 b) noexcept {
    const __m256i low = _mm256_set1_epi16(0xFF);
    return packed(_mm256_and_si256(a.value, low), _mm256_and_si256(b.value, low));
  }
  static inline Vector256 odd(Vector256 a, Vector256 b) noexcept {
    return packed(_mm256_srli_epi16(a.value, 8), _mm256_srli_epi16(b.value, 8));
  }
  static inline void zip(Vector256 a, Vector256 b, Vector256* low, Vector256* high) noexcept {
    const __m256i lows = _mm256_unpacklo_epi8(a.value, b.value);
    const __m256i highs = _mm256_unpackhi_epi8(a.value, b.value);
    low->value = _mm256_permute2x128_si256(lows, highs, 0x20);
    high->value = _mm256_permute2x128_si256(lows, highs, 0x31);
  }
};

}  // namespace

size_t shuffle_blocks_avx2(uint8_t* dst, const uint8_t* src, size_t count, size_t width) noexcept {
  return shuffle_any<Vector256>(dst, src, count, width);
}

size_t unshuffle_blocks_avx2(uint8_t* dst, const uint8_t* src, size_t count, size_t width) noexcept {
  return unshuffle_any<Vector256>(dst, src, count, width);
}

}  // namespace snapd

#endif

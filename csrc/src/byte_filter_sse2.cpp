// Byte planes with 16-byte vectors: every x86-64 processor has them.
#if defined(__x86_64__)

#include <emmintrin.h>

#include "byte_filter_blocks.hpp"
#include "byte_filter_sets.hpp"

namespace snapd {
namespace {

struct Vector128 {
  static constexpr size_t kBytes = 16;
  __m128i value;

  static inline Vector128 load(const uint8_t* from) noexcept {
    return {_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))};
  }
  inline void store(uint8_t* to) const noexcept { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), value); }
  static inline Vector128 even(Vector128 a, Vector128 b) noexcept {
    const __m128i low = _mm_set1_epi16(0xFF);
    return {_mm_packus_epi16(_mm_and_si128(a.value, low), _mm_and_si128(b.value, low))};
  }
  static inline Vector128 odd(Vector128 a, Vector128 b) noexcept {
    return {_mm_packus_epi16(_mm_srli_epi16(a.value, 8), _mm_srli_epi16(b.value, 8))};
  }
  static inline void zip(Vector128 a, Vector128 b, Vector128* low, Vector128* high) noexcept {
    low->value = _mm_unpacklo_epi8(a.value, b.value);
    high->value = _mm_unpackhi_epi8(a.value, b.value);
  }
};

}  // namespace

size_t shuffle_blocks_sse2(uint8_t* dst, const uint8_t* src, size_t count, size_t width) noexcept {
  return shuffle_any<Vector128>(dst, src, count, width);
}

size_t unshuffle_blocks_sse2(uint8_t* dst, const uint8_t* src, size_t count, size_t width) noexcept {
  return unshuffle_any<Vector128>(dst, src, count, width);
}

}  // namespace snapd

#endif

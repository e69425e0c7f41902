#include "copy_kernel_sets.hpp"

#include <algorithm>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// A revoked copy may read a source that is being changed; what it read is then thrown away (as readers of a seqlock
// do). ThreadSanitizer cannot know that, so it is told not to look at these functions, and they call no memcpy of a
// length that the compiler does not know, because that one is looked at in any case.
#if defined(__SANITIZE_THREAD__)
#define SNAPD_MAY_RACE __attribute__((no_sanitize("thread")))
#else
#define SNAPD_MAY_RACE
#endif

namespace snapd {
namespace {

constexpr size_t kLineBytes = 64;

bool is_granted(Permit permit) noexcept {
  // Every load of the window comes before this look, in the compiler's eyes and in the processor's.
  std::atomic_thread_fence(std::memory_order_acquire);
  return permit.state->load(std::memory_order_relaxed) == permit.granted;
}

bool always() noexcept { return true; }

/// One `T` at a time.
template <class T>
SNAPD_MAY_RACE bool copy_as(uint8_t* dst, const uint8_t* src, size_t nbytes, Permit permit) noexcept {
  for (size_t at = 0; at < nbytes; at += sizeof(T)) {
    T window;
    __builtin_memcpy(&window, src + at, sizeof window);
    if (!is_granted(permit)) return false;
    __builtin_memcpy(dst + at, &window, sizeof window);
  }
  return true;
}

struct Line {
  uint64_t words[8];
};

bool copy_scalar(uint8_t* dst, const uint8_t* src, size_t nbytes, Permit permit) noexcept {
  const size_t lines = nbytes / sizeof(Line) * sizeof(Line);
  const size_t words = nbytes / sizeof(uint64_t) * sizeof(uint64_t);
  return copy_as<Line>(dst, src, lines, permit) && copy_as<uint64_t>(dst + lines, src + lines, words - lines, permit) &&
         copy_as<uint8_t>(dst + words, src + words, nbytes - words, permit);
}

/// One `T` at a time.
template <class T>
SNAPD_MAY_RACE bool zero_as(uint8_t* dst, size_t nbytes, Permit permit) noexcept {
  constexpr T zero{};
  for (size_t at = 0; at < nbytes; at += sizeof(T)) {
    if (!is_granted(permit)) return false;
    __builtin_memcpy(dst + at, &zero, sizeof zero);
  }
  return true;
}

#if defined(__x86_64__)

/// Runs `stream` (whole windows, destination aligned to a line) between a scalar head and tail.
template <size_t kWindowBytes, class Stream>
bool copy_streamed(uint8_t* dst, const uint8_t* src, size_t nbytes, Permit permit, Stream stream) noexcept {
  const size_t misaligned = reinterpret_cast<uintptr_t>(dst) % kLineBytes;
  const size_t head = std::min(nbytes, misaligned == 0 ? 0 : kLineBytes - misaligned);
  if (head > 0 && !copy_scalar(dst, src, head, permit)) return false;
  const size_t body = (nbytes - head) / kWindowBytes * kWindowBytes;
  const bool is_whole = body == 0 || stream(dst + head, src + head, body, permit);
  _mm_sfence();  // streaming stores are not ordered by a release store
  if (!is_whole) return false;
  const size_t done = head + body;
  return done == nbytes || copy_scalar(dst + done, src + done, nbytes - done, permit);
}

constexpr size_t kWindow512 = 256;
constexpr size_t kWindow256 = 128;
constexpr size_t kWindow128 = 128;

__attribute__((target("avx512f"))) SNAPD_MAY_RACE bool stream_avx512(uint8_t* dst, const uint8_t* src, size_t nbytes,
                                                                     Permit permit) noexcept {
  for (size_t at = 0; at < nbytes; at += kWindow512) {
    const __m512i a = _mm512_loadu_si512(src + at);
    const __m512i b = _mm512_loadu_si512(src + at + 64);
    const __m512i c = _mm512_loadu_si512(src + at + 128);
    const __m512i d = _mm512_loadu_si512(src + at + 192);
    if (!is_granted(permit)) return false;
    _mm512_stream_si512(reinterpret_cast<__m512i*>(dst + at), a);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(dst + at + 64), b);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(dst + at + 128), c);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(dst + at + 192), d);
  }
  return true;
}

__attribute__((target("avx2"))) SNAPD_MAY_RACE bool stream_avx2(uint8_t* dst, const uint8_t* src, size_t nbytes,
                                                                Permit permit) noexcept {
  for (size_t at = 0; at < nbytes; at += kWindow256) {
    const auto* from = reinterpret_cast<const __m256i*>(src + at);
    auto* to = reinterpret_cast<__m256i*>(dst + at);
    const __m256i a = _mm256_loadu_si256(from);
    const __m256i b = _mm256_loadu_si256(from + 1);
    const __m256i c = _mm256_loadu_si256(from + 2);
    const __m256i d = _mm256_loadu_si256(from + 3);
    if (!is_granted(permit)) return false;
    _mm256_stream_si256(to, a);
    _mm256_stream_si256(to + 1, b);
    _mm256_stream_si256(to + 2, c);
    _mm256_stream_si256(to + 3, d);
  }
  return true;
}

SNAPD_MAY_RACE bool stream_sse2(uint8_t* dst, const uint8_t* src, size_t nbytes, Permit permit) noexcept {
  for (size_t at = 0; at < nbytes; at += kWindow128) {
    const auto* from = reinterpret_cast<const __m128i*>(src + at);
    auto* to = reinterpret_cast<__m128i*>(dst + at);
    __m128i window[8];
    for (int i = 0; i < 8; ++i) window[i] = _mm_loadu_si128(from + i);
    if (!is_granted(permit)) return false;
    for (int i = 0; i < 8; ++i) _mm_stream_si128(to + i, window[i]);
  }
  return true;
}

bool copy_avx512(uint8_t* dst, const uint8_t* src, size_t nbytes, Permit permit) noexcept {
  return copy_streamed<kWindow512>(dst, src, nbytes, permit, stream_avx512);
}
bool copy_avx2(uint8_t* dst, const uint8_t* src, size_t nbytes, Permit permit) noexcept {
  return copy_streamed<kWindow256>(dst, src, nbytes, permit, stream_avx2);
}
bool copy_sse2(uint8_t* dst, const uint8_t* src, size_t nbytes, Permit permit) noexcept {
  return copy_streamed<kWindow128>(dst, src, nbytes, permit, stream_sse2);
}
bool has_avx512() noexcept { return __builtin_cpu_supports("avx512f") != 0; }
bool has_avx2() noexcept { return __builtin_cpu_supports("avx2") != 0; }

#endif

// AVX2 comes before AVX-512: it is not slower (docs/adr/0001-copy-kernel.md) and lowers no processor's clock.
constexpr CopyKernel kKernels[] = {
#if defined(__x86_64__)
    {"avx2", has_avx2, copy_avx2},
    {"avx512", has_avx512, copy_avx512},
    {"sse2", always, copy_sse2},
#endif
    {"scalar", always, copy_scalar},
};

}  // namespace

std::span<const CopyKernel> copy_kernels() noexcept { return kKernels; }

// Padding, so it is small and plain stores do.
bool fill_zero_revocable(void* place, size_t nbytes, Permit permit) noexcept {
  auto* dst = static_cast<uint8_t*>(place);
  const size_t lines = nbytes / sizeof(Line) * sizeof(Line);
  return zero_as<Line>(dst, lines, permit) && zero_as<uint8_t>(dst + lines, nbytes - lines, permit);
}

}  // namespace snapd

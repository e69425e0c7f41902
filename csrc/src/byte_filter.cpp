#include "snapd/byte_filter.hpp"

#include <atomic>
#include <cstring>

#include "byte_filter_sets.hpp"

namespace snapd {
namespace {

bool always() noexcept { return true; }
size_t no_blocks(uint8_t*, const uint8_t*, size_t, size_t) noexcept { return 0; }
#if defined(__x86_64__)
bool has_avx2() noexcept { return __builtin_cpu_supports("avx2") != 0; }
#endif

// Best first.
constexpr ByteFilter kFilters[] = {
#if defined(__x86_64__)
    {"avx2", has_avx2, shuffle_blocks_avx2, unshuffle_blocks_avx2},
    {"sse2", always, shuffle_blocks_sse2, unshuffle_blocks_sse2},
#endif
    {"scalar", always, no_blocks, no_blocks},
};

// Constant-initialised and never destroyed, so that threads may still use it while the process exits.
std::atomic<const ByteFilter*> chosen{nullptr};

const ByteFilter& fastest() noexcept {
  for (const ByteFilter& filter : kFilters) {
    if (filter.is_supported()) return filter;
  }
  __builtin_unreachable();  // "scalar" is always supported
}

const ByteFilter& current() noexcept {
  const ByteFilter* filter = chosen.load(std::memory_order_acquire);
  if (filter == nullptr) {
    filter = &fastest();
    chosen.store(filter, std::memory_order_release);
  }
  return *filter;
}

}  // namespace

void shuffle_bytes(uint8_t* dst, const uint8_t* src, size_t nbytes, size_t width) noexcept {
  const size_t count = nbytes / width;
  for (size_t i = current().shuffle(dst, src, count, width); i < count; ++i) {
    for (size_t plane = 0; plane < width; ++plane) dst[plane * count + i] = src[i * width + plane];
  }
  const size_t whole = count * width;
  if (whole < nbytes) std::memcpy(dst + whole, src + whole, nbytes - whole);
}

void unshuffle_bytes(uint8_t* dst, const uint8_t* src, size_t nbytes, size_t width) noexcept {
  const size_t count = nbytes / width;
  for (size_t i = current().unshuffle(dst, src, count, width); i < count; ++i) {
    for (size_t plane = 0; plane < width; ++plane) dst[i * width + plane] = src[plane * count + i];
  }
  const size_t whole = count * width;
  if (whole < nbytes) std::memcpy(dst + whole, src + whole, nbytes - whole);
}

const char* byte_filter_name() noexcept { return current().name; }

bool select_byte_filter(const char* name) noexcept {
  if (name == nullptr) {
    chosen.store(&fastest(), std::memory_order_release);
    return true;
  }
  for (const ByteFilter& filter : kFilters) {
    if (std::strcmp(filter.name, name) == 0 && filter.is_supported()) {
      chosen.store(&filter, std::memory_order_release);
      return true;
    }
  }
  return false;
}

}  // namespace snapd

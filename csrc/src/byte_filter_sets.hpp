// The kernels of byte_filter.hpp. Private to the sources that define and choose them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace snapd {

/// Filters whole blocks from the front; returns how many of the `count` elements it did (planes are `count` apart).
using FilterBlocks = size_t (*)(uint8_t* dst, const uint8_t* src, size_t count, size_t width) noexcept;

struct ByteFilter {
  const char* name;
  bool (*is_supported)() noexcept;
  FilterBlocks shuffle;
  FilterBlocks unshuffle;
};

// Each in a source of its own, compiled for its instruction set.
size_t shuffle_blocks_sse2(uint8_t* dst, const uint8_t* src, size_t count, size_t width) noexcept;
size_t unshuffle_blocks_sse2(uint8_t* dst, const uint8_t* src, size_t count, size_t width) noexcept;
size_t shuffle_blocks_avx2(uint8_t* dst, const uint8_t* src, size_t count, size_t width) noexcept;
size_t unshuffle_blocks_avx2(uint8_t* dst, const uint8_t* src, size_t count, size_t width) noexcept;

}  // namespace snapd

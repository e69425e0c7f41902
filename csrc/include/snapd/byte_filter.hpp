// Bytes of equal significance side by side: what a compressor needs to find the few values that exponents take.
//
// A run of elements of `width` bytes becomes `width` planes: first byte 0 of every element, then byte 1 of every
// element, and so on. Bytes behind the last whole element stay at the end as they are. Part of the format of durable
// tiers (docs/format.md), so it never changes; kernels differ in speed only.
#pragma once

#include <cstddef>
#include <cstdint>

namespace snapd {

/// The widths that elements may have.
constexpr bool is_filter_width(size_t width) noexcept { return width == 2 || width == 4 || width == 8; }

/// dst[plane * count + i] = src[i * width + plane], where count = nbytes / width; the rest is copied.
///
/// dst, src  `nbytes` each, at any alignment; they must not overlap.
/// width     2, 4 or 8.
void shuffle_bytes(uint8_t* dst, const uint8_t* src, size_t nbytes, size_t width) noexcept;

/// The inverse, under the same conditions.
void unshuffle_bytes(uint8_t* dst, const uint8_t* src, size_t nbytes, size_t width) noexcept;

/// "avx2", "sse2" or "scalar": what filters in this process.
const char* byte_filter_name() noexcept;

/// Make every later call of this process use the kernel `name`; null chooses the fastest that the processor has.
/// False, and nothing changes, if there is no such kernel or the processor lacks it.
bool select_byte_filter(const char* name) noexcept;

}  // namespace snapd

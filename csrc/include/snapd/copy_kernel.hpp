// Copying bytes: one kernel per instruction set, chosen once at run time.
//
// Kernels write the destination with non-temporal stores: a snapshot is far larger than the caches, is not read again
// by the writer, and a plain store would first fetch each destination line (docs/adr/0001-copy-kernel.md).
//
// Revocable copies. The helper of a fence may take over a block that a starved thread is in the middle of. The
// starved thread must then never write anything that it read after the fence let the source change. So every kernel
// works in small windows (64..256 bytes, held in registers): load a window, look at the block's state, and only if
// the block is still its own store the window. Since loads are ordered before that look, and the look before the
// stores, whatever a thread stores was read before its block was revoked. A revoked thread may still *store* one window
// of the old bytes, long after; see copy_engine.hpp for who waits for that.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace snapd {

/// A block's state word and the value that it has while the copy may go on.
struct Permit {
  const std::atomic<uint8_t>* state;
  uint8_t granted;
};

/// Copy `nbytes` from `src` to `dst`, which must not overlap, in the calling thread.
///
/// All stores are ordered before the caller's next release store (weakly ordered stores are drained before returning).
void copy_bytes(void* dst, const void* src, size_t nbytes) noexcept;

/// As copy_bytes, but stops when `permit` is withdrawn. True if all was copied.
bool copy_revocable(void* dst, const void* src, size_t nbytes, Permit permit) noexcept;

/// Set `nbytes` at `dst` to zero, ordered like copy_bytes; may be revoked like copy_revocable.
void fill_zero(void* dst, size_t nbytes) noexcept;
bool fill_zero_revocable(void* dst, size_t nbytes, Permit permit) noexcept;

/// "avx512", "avx2", "sse2" or "scalar": what copies in this process.
const char* copy_kernel_name() noexcept;

/// Make every later copy of this process use the kernel `name`; null chooses the fastest that the processor has.
/// False, and nothing changes, if there is no such kernel or the processor lacks it.
bool select_copy_kernel(const char* name) noexcept;

}  // namespace snapd

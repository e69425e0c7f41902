// The kernels, best first. Private to the two sources that define and choose them.
#pragma once

#include <span>

#include "snapd/copy_kernel.hpp"

namespace snapd {

struct CopyKernel {
  const char* name;
  bool (*is_supported)() noexcept;
  /// As copy_revocable.
  bool (*copy)(uint8_t* dst, const uint8_t* src, size_t nbytes, Permit permit) noexcept;
};

std::span<const CopyKernel> copy_kernels() noexcept;

}  // namespace snapd

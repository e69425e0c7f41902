#include "snapd/copy_kernel.hpp"

#include <cstring>

#include "copy_kernel_sets.hpp"

namespace snapd {
namespace {

// Constant-initialised and never destroyed, so that threads may still use it while the process exits.
std::atomic<const CopyKernel*> chosen{nullptr};

const CopyKernel* fastest() noexcept {
  for (const CopyKernel& kernel : copy_kernels()) {
    if (kernel.is_supported()) return &kernel;
  }
  return nullptr;  // not reached: "scalar" is always supported
}

const CopyKernel& current() noexcept {
  const CopyKernel* kernel = chosen.load(std::memory_order_acquire);
  if (kernel == nullptr) {
    kernel = fastest();
    chosen.store(kernel, std::memory_order_release);
  }
  return *kernel;
}

}  // namespace

bool copy_revocable(void* dst, const void* src, size_t nbytes, Permit permit) noexcept {
  return current().copy(static_cast<uint8_t*>(dst), static_cast<const uint8_t*>(src), nbytes, permit);
}

void copy_bytes(void* dst, const void* src, size_t nbytes) noexcept {
  const std::atomic<uint8_t> state{1};
  copy_revocable(dst, src, nbytes, Permit{&state, 1});
}

void fill_zero(void* dst, size_t nbytes) noexcept { std::memset(dst, 0, nbytes); }

const char* copy_kernel_name() noexcept { return current().name; }

bool select_copy_kernel(const char* name) noexcept {
  if (name == nullptr) {
    chosen.store(fastest(), std::memory_order_release);
    return true;
  }
  for (const CopyKernel& kernel : copy_kernels()) {
    if (std::strcmp(kernel.name, name) == 0 && kernel.is_supported()) {
      chosen.store(&kernel, std::memory_order_release);
      return true;
    }
  }
  return false;
}

}  // namespace snapd

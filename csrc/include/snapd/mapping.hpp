// A shared mapping of a file, absent in forked children.
#pragma once

#include <sys/types.h>
#include <cstddef>
#include <cstdint>

#include "snapd/status.hpp"

namespace snapd {

/// Owns one MAP_SHARED mapping. It is not inherited by forked children (MADV_DONTFORK): there is_mapped() is false,
/// and destroying the object touches nothing, since the addresses may belong to something else by then.
class Mapping {
 public:
  Mapping() = default;
  ~Mapping() { unmap(); }
  Mapping(Mapping&& other) noexcept { swap(other); }
  Mapping& operator=(Mapping&& other) noexcept {
    Mapping taken(static_cast<Mapping&&>(other));
    swap(taken);
    return *this;
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  /// Map the first `nbytes` of `fd`, which stays the caller's. Invalid if the file is shorter: touching pages
  /// beyond its end would kill the process.
  static Status map(int fd, size_t nbytes, bool is_writable, Mapping* out);

  /// Fill the page tables for all of it (and back holes of the file, if writable), so that no copy pays for faults.
  /// A refusal by an old kernel is not an error: the pages are then faulted in as they are touched. In pieces, so that
  /// other threads can map and unmap meanwhile.
  Status populate() noexcept { return populate(0, nbytes_); }

  /// The same for a part that begins on a page; several threads may each do theirs.
  Status populate(size_t offset, size_t nbytes) noexcept;

  void unmap() noexcept;
  bool is_mapped() const noexcept;
  bool is_writable() const noexcept { return is_writable_; }
  uint8_t* data() const noexcept { return data_; }
  size_t nbytes() const noexcept { return nbytes_; }

 private:
  void swap(Mapping& other) noexcept;

  uint8_t* data_ = nullptr;
  size_t nbytes_ = 0;
  bool is_writable_ = false;
  pid_t pid_ = 0;
};

}  // namespace snapd

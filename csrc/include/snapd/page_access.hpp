// Reading and writing a control page through atomics, with every index checked.
//
// The other side may be broken or hostile: counts and capacities are read once, at attach, checked and kept here;
// whatever is read later is checked against them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "snapd/control_page.hpp"
#include "snapd/mapping.hpp"
#include "snapd/status.hpp"

namespace snapd {

/// What a new page is made for.
struct PageSpec {
  uint32_t lane_count;
  uint32_t entry_capacity;
  uint32_t rank;
  uint64_t session_id;
  uint64_t chunk_bytes;
  uint64_t generation;
};

/// One mapped control page. Every function fails as invalid once the page is closed, in a forked child, for
/// a lane or a name that does not exist.
class PageAccess {
 public:
  /// Size, back and format the file behind `fd` (which stays the caller's) and map it. The magic is written last.
  static Status create(int fd, const PageSpec& spec, PageAccess* out);
  /// Map a page that somebody formatted. Invalid says what is wrong with it: magic, version, counts or size.
  static Status attach(int fd, PageAccess* out);

  const PageSpec& spec() const noexcept { return spec_; }
  void close() noexcept { mapping_.unmap(); }

  /// A header word by the name of its field in PageHeader; acquire and release order.
  Status load(std::string_view word, uint64_t* out) const;
  Status store(std::string_view word, uint64_t value);
  /// Add (modulo 2^64); `*out` is the new value.
  Status add(std::string_view word, uint64_t value, uint64_t* out);

  Status lane_state(uint32_t lane, uint32_t* out) const;
  /// Compare and set; `*is_set` is false, and nothing changes, if the state was not `expected`.
  Status set_lane_state(uint32_t lane, uint32_t expected, uint32_t desired, bool* is_set);
  /// A field of LaneHeader by name, except `state` for storing.
  Status lane_load(uint32_t lane, std::string_view field, uint64_t* out) const;
  Status lane_store(uint32_t lane, std::string_view field, uint64_t value);

  /// The grant's frames, and their count. At most entry_capacity.
  Status write_grant(uint32_t lane, std::span<const Frame> frames);
  Status read_grant(uint32_t lane, std::vector<Frame>* out) const;
  /// The shard's chunks, and their count. At most entry_capacity.
  Status write_entries(uint32_t lane, std::span<const Entry> entries);
  Status read_entries(uint32_t lane, std::vector<Entry>* out) const;

  /// OPEN -> COMPLETE, then add 1 to the eventfd `wake_fd` unless it is -1. Once `*is_set` is true the snapshot exists;
  /// a wake-up that fails changes nothing about that, the daemon also looks from time to time.
  Status commit(uint32_t lane, int wake_fd, bool* is_set);

 private:
  Status check_open() const;
  Status lane_at(uint32_t lane, LaneHeader** out) const;
  Status word_at(std::string_view word, uint64_t** out) const;
  Entry* entries_of(LaneHeader* lane) const noexcept;
  Frame* frames_of(LaneHeader* lane) const noexcept;

  Mapping mapping_;
  PageSpec spec_{};
};

}  // namespace snapd

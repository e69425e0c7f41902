// The control page: one small shared file per session, mapped by the trainer and by the daemon. It is how a
// snapshot is handed over without a call: the daemon grants frames ahead of time, the trainer says what it wrote
// where, and one word, the lane's state, commits.
//
// Ownership of a lane goes round:
//
//   FREE --daemon: writes the grant--> GRANTED --trainer: writes the table--> OPEN --last byte copied--> COMPLETE
//     ^                                                                        |                             |
//     |                                                                        +--trainer: check failed--> DISCARDED
//     +-------------------------- daemon: hashed and recorded, or dropped ------------------------------------+
//
// Only the owner of the present state writes the lane's other fields. State is stored with release and loaded with
// acquire order, so whoever sees a state sees everything written before it. A trainer killed in OPEN leaves a
// shard that is dropped; killed after COMPLETE, a whole one.
//
// The file: PageHeader, then lane_count x (LaneHeader, entry_capacity x Entry, entry_capacity x Frame), each lane
// padded to a multiple of 64 bytes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace snapd {

inline constexpr char kPageMagic[8] = {'S', 'N', 'A', 'P', 'D', 'C', 'T', 'L'};
inline constexpr uint32_t kPageVersion = 1;
inline constexpr uint32_t kLaneCountMax = 8;
inline constexpr uint32_t kEntryCapacityMax = 1u << 22;

enum class LaneState : uint32_t { kFree = 0, kGranted = 1, kOpen = 2, kComplete = 3, kDiscarded = 4 };

/// A place in the arena: `frame` x chunk_bytes into segment `segment` of this session's (job, rank).
struct Frame {
  uint32_t segment;
  uint32_t frame;
};

/// One chunk of the shard, in order. `kReused`: the frame was not granted for this lane; it holds the same chunk of
/// the newest shard that this session captured, and was not copied again.
struct Entry {
  Frame place;
  uint32_t nbytes;
  uint32_t flags;
};
inline constexpr uint32_t kReused = 1;
inline constexpr uint64_t kReplicasDiffer = UINT64_MAX;

struct alignas(64) PageHeader {
  char magic[8];
  uint32_t version;
  uint32_t lane_count;
  uint32_t entry_capacity;
  uint32_t rank;
  uint64_t session_id;
  uint64_t chunk_bytes;
  uint64_t file_bytes;
  // daemon -> trainer, each written on its own. The first: 1 while every slot holds a snapshot that has to stay, so
  // that a lane is not worth waiting for. The second: the newest step at which all replicas of this node were captured
  // in full, compared and found equal; 0: none yet; kReplicasDiffer: they are not, and sharing out is over
  uint64_t slots_held;
  uint64_t replicas_equal_step_plus_one;
  alignas(64) uint64_t generation;  // changes on rollback only
  uint64_t daemon_instance;         // who serves this page
  uint64_t segments_version;        // > what the client has: fetch the descriptors again
  uint64_t fenced;                  // 1: an older generation; nothing more is taken
  uint64_t interval_from_step;      // from this step on ...
  uint64_t interval_steps;          // ... snapshots are taken every so many steps (0: as configured)
  uint64_t captured_step_plus_one;  // newest of this rank
  uint64_t complete_step_plus_one;  // newest on all ranks
  // trainer -> daemon
  alignas(64) uint64_t wanted_frames;  // what the next grant must hold
  uint64_t skipped_step_plus_one;      // newest step that this rank skipped for want of a lane (abort record)
  uint64_t skipped_count;
  uint64_t step_seen_plus_one;  // newest step passed to snap.step
  uint64_t node_first_rank;     // the ranks of this node that may share out what they hold alike ...
  uint64_t node_rank_count;     // ... and how many they are (0: not said)
};

struct alignas(64) LaneHeader {
  uint32_t state;           // LaneState
  uint32_t grant_count;     // daemon
  uint32_t entry_count;     // trainer, as is all below
  uint32_t discard_reason;  // 1 counter, 2 sample, 3 address, 4 full audit, 5 error, 6 closed
  uint64_t sequence;        // counts the captures of the session
  uint64_t generation;
  uint64_t step;
  uint64_t layout_nbytes;  // the layout fills the first ceil(layout_nbytes / chunk_bytes) entries
  uint64_t early_values_offset;
  uint64_t early_values_nbytes;
  uint64_t handed_over_ns;  // CLOCK_MONOTONIC
  uint64_t copied_ns;
  uint64_t copied_bytes;
  uint64_t reserved[5];
};

static_assert(sizeof(Frame) == 8 && sizeof(Entry) == 16);
static_assert(offsetof(PageHeader, generation) == 64 && offsetof(PageHeader, wanted_frames) == 128);
static_assert(sizeof(PageHeader) == 192);
static_assert(offsetof(LaneHeader, sequence) == 16 && sizeof(LaneHeader) == 128);

/// Bytes of a page with these counts; 0 if a bound is broken.
size_t page_bytes(uint32_t lane_count, uint32_t entry_capacity) noexcept;

}  // namespace snapd

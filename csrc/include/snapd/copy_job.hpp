// One copy under way: which blocks are free, taken or done, who works on it, who waits for it.
//
// Any number of threads work on a job at once: the engine's copy threads, and whoever waits and helps. A block goes
//
//   free (0) --claim--> owner 1 --copied--> done (255)
//                          |                  ^
//                          +--seize--> owner 2, 3, ... --copied--+
//
// Seizing. A fence must not wait for a copy thread that was descheduled in the middle of a block (with all cores busy
// that is the usual state of a copy thread, and its next turn may be many milliseconds away). So a waiter that finds
// nothing free spins for about the time that one block takes and then seizes the block: it copies the whole block
// itself, while the source still stands still, and the fence passes. The first owner, whenever it runs again, sees
// before its next store that the block is no longer its own (copy_kernel.hpp). What it can still do is store one window
// (<= 256 bytes) that it read before the block was seized: the very bytes that are there already. That is harmless as
// long as the place still holds this copy, and harmful once the place was handed on. Hence two kinds of "ready":
//
//   copied    all bytes of a group are in place: its sources may change. What a fence waits for.
//   settled   all bytes are in place (or the job is cancelled) and no thread is inside any block: the destinations
//             are no longer touched. What a commit or a hand-over of the destinations waits for.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "snapd/copy_kernel.hpp"
#include "snapd/copy_plan.hpp"

namespace snapd {

enum class Worker : uint8_t { kEngineThread, kHelper, kSeizer };

/// As a group: all of them.
inline constexpr int kAllGroups = -1;

class CopyJob {
 public:
  /// The bases were checked against the plan. Owned by its tickets and by the engine's queue.
  CopyJob(std::shared_ptr<const CopyPlan> plan, std::vector<uint64_t> src, std::vector<uint64_t> dst);
  ~CopyJob();
  CopyJob(const CopyJob&) = delete;
  CopyJob& operator=(const CopyJob&) = delete;

  /// Copy free blocks, urgent group first, until none is left or the job is cancelled.
  void work() noexcept;

  /// Wait until `group` is copied (kAllGroups: until the job is settled and not cancelled), helping or not.
  /// False when `deadline_ns` (CLOCK_MONOTONIC, -1: never) passed or the job was cancelled first.
  bool wait(int group, bool help, int64_t deadline_ns) noexcept;
  /// Wait, helping, until `group` (kAllGroups: everything) is copied, though perhaps not settled.
  bool fence(int group, int64_t deadline_ns) noexcept;

  /// Is `group` copied (kAllGroups: is all copied and settled)? Never true for a cancelled job's missing bytes.
  bool is_done(int group) const noexcept;
  bool is_settled() const noexcept { return settled_.load(std::memory_order_acquire); }
  bool is_cancelled() const noexcept { return cancelled_.load(std::memory_order_acquire); }

  /// Begin no further block; returns when no thread is inside one. All that was copied stays. No effect once settled.
  void cancel() noexcept;

  /// An eventfd, readable once settled; owned by the job. -1 and errno if there is none to be had.
  int event_fd() noexcept;

  uint64_t bytes_copied() const noexcept { return bytes_copied_.load(std::memory_order_relaxed); }
  uint64_t bytes_total() const noexcept { return plan_->nbytes(); }
  uint64_t helped_bytes() const noexcept { return helped_bytes_.load(std::memory_order_relaxed); }
  uint64_t seized_bytes() const noexcept { return seized_bytes_.load(std::memory_order_relaxed); }
  uint64_t started_ns() const noexcept { return started_ns_.load(std::memory_order_relaxed); }
  uint64_t finished_ns() const noexcept { return finished_ns_.load(std::memory_order_relaxed); }
  uint64_t cpu_ns() const noexcept { return cpu_ns_.load(std::memory_order_relaxed); }

 private:
  static constexpr uint8_t kFree = 0;
  static constexpr uint8_t kDone = 255;
  struct Group {
    std::atomic<uint32_t> cursor{0};  // next block that may be free
    std::atomic<uint32_t> blocks_left{0};
  };
  struct Claim {
    uint32_t block;
    uint8_t owner;  // the block's state while it is ours: 1, or more for those who seized it
  };

  class CpuMeter;

  bool enter() noexcept;
  void leave() noexcept;
  std::optional<Claim> claim(uint32_t group) noexcept;
  std::optional<Claim> claim_any() noexcept;
  std::optional<Claim> claim_for(int group) noexcept;
  std::optional<Claim> seize(uint32_t first_block, uint32_t end_block) noexcept;
  bool copy_one(int group, Worker worker, CpuMeter& meter) noexcept;
  bool seize_one(int group, CpuMeter& meter) noexcept;
  void execute(const Claim& claim, Worker worker, CpuMeter& meter) noexcept;
  bool copy_block(uint32_t block, Permit permit) noexcept;
  void finish_block(const Claim& claim, Worker worker) noexcept;
  bool is_copied(int group) const noexcept;
  void settle() noexcept;
  void sleep(bool until_settled, int group, int64_t deadline_ns) noexcept;

  const std::shared_ptr<const CopyPlan> plan_;
  const std::vector<uint64_t> src_;
  const std::vector<uint64_t> dst_;
  std::unique_ptr<std::atomic<uint8_t>[]> state_;
  std::unique_ptr<Group[]> groups_;         // kGroupCount; those without blocks are copied from the start
  std::atomic<uint32_t> blocks_left_;       // not done
  std::atomic<uint32_t> blocks_unclaimed_;  // free
  std::atomic<uint32_t> open_group_{0};     // no lower group has a free block
  std::atomic<uint32_t> inside_{0};         // threads between claim and leave
  std::atomic<int> urgent_group_{kAllGroups};
  std::atomic<bool> cancelled_{false};
  std::atomic<bool> settled_{false};
  std::atomic<uint64_t> bytes_copied_{0};
  std::atomic<uint64_t> helped_bytes_{0};
  std::atomic<uint64_t> seized_bytes_{0};
  std::atomic<uint64_t> cpu_ns_{0};
  std::atomic<uint64_t> started_ns_{0};
  std::atomic<uint64_t> finished_ns_{0};
  std::mutex mutex_;                 // for waiting and for event_fd_
  std::condition_variable changed_;  // a group was copied, or settled
  int event_fd_ = -1;
};

/// CLOCK_MONOTONIC in nanoseconds.
int64_t monotonic_ns() noexcept;

}  // namespace snapd

#include "snapd/copy_job.hpp"

#include <sys/eventfd.h>
#include <unistd.h>
#include <cerrno>
#include <chrono>
#include <ctime>

#include "snapd/copy_kernel.hpp"

namespace snapd {
namespace {

// The time that one block takes at 8 GB/s: an owner that runs will have finished by then.
constexpr int64_t kPatienceNs = 32'000;
// Reading the thread's CPU clock is a system call: once in so many blocks, and once nothing is left to claim.
constexpr uint32_t kBlocksPerCpuReading = 16;

int64_t clock_ns(clockid_t clock) noexcept {
  timespec now{};
  clock_gettime(clock, &now);
  return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

void relax() noexcept {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield" ::: "memory");
#endif
}

bool has_passed(int64_t deadline_ns) noexcept { return deadline_ns >= 0 && monotonic_ns() >= deadline_ns; }

}  // namespace

int64_t monotonic_ns() noexcept { return clock_ns(CLOCK_MONOTONIC); }

/// The calling thread's CPU time since it was made or last read, booked on the job.
class CopyJob::CpuMeter {
 public:
  explicit CpuMeter(CopyJob& job) noexcept : job_(job), last_ns_(clock_ns(CLOCK_THREAD_CPUTIME_ID)) {}
  void count_block() noexcept {
    blocks_ += 1;
    const bool is_last = job_.blocks_unclaimed_.load(std::memory_order_relaxed) == 0;
    if (!is_last && blocks_ % kBlocksPerCpuReading != 0) return;
    const int64_t now_ns = clock_ns(CLOCK_THREAD_CPUTIME_ID);
    job_.cpu_ns_.fetch_add(static_cast<uint64_t>(now_ns - last_ns_), std::memory_order_relaxed);
    last_ns_ = now_ns;
  }

 private:
  CopyJob& job_;
  int64_t last_ns_;
  uint32_t blocks_ = 0;
};

CopyJob::CopyJob(std::shared_ptr<const CopyPlan> plan, std::vector<uint64_t> src, std::vector<uint64_t> dst)
    : plan_(std::move(plan)),
      src_(std::move(src)),
      dst_(std::move(dst)),
      state_(std::make_unique<std::atomic<uint8_t>[]>(plan_->blocks().size())),
      groups_(std::make_unique<Group[]>(kGroupCount)),
      blocks_left_(static_cast<uint32_t>(plan_->blocks().size())),
      blocks_unclaimed_(static_cast<uint32_t>(plan_->blocks().size())) {
  for (uint32_t g = 0; g < kGroupCount; ++g) {
    groups_[g].cursor.store(plan_->group_begin(g), std::memory_order_relaxed);
    groups_[g].blocks_left.store(plan_->group_begin(g + 1) - plan_->group_begin(g), std::memory_order_relaxed);
  }
  if (plan_->blocks().empty()) settle();
}

CopyJob::~CopyJob() {
  if (event_fd_ >= 0) close(event_fd_);
}

void CopyJob::work() noexcept {
  CpuMeter meter(*this);
  while (copy_one(kAllGroups, Worker::kEngineThread, meter)) {
  }
}

bool CopyJob::wait(int group, bool help, int64_t deadline_ns) noexcept {
  if (help && group != kAllGroups) return fence(group, deadline_ns);
  if (help && !is_settled()) {
    CpuMeter meter(*this);
    while (!has_passed(deadline_ns) && copy_one(kAllGroups, Worker::kHelper, meter)) {
    }
  }
  sleep(group == kAllGroups, group, deadline_ns);
  return is_done(group);
}

bool CopyJob::fence(int group, int64_t deadline_ns) noexcept {
  if (is_copied(group)) return true;
  CpuMeter meter(*this);
  urgent_group_.store(group, std::memory_order_relaxed);
  int64_t patient_until_ns = -1;
  while (!is_copied(group) && !is_cancelled() && !has_passed(deadline_ns)) {
    if (copy_one(group, Worker::kHelper, meter)) {
      patient_until_ns = -1;
    } else if (patient_until_ns < 0) {
      patient_until_ns = monotonic_ns() + kPatienceNs;
    } else if (!has_passed(patient_until_ns)) {
      relax();
    } else if (!seize_one(group, meter)) {
      relax();
    }
  }
  return is_copied(group);
}

bool CopyJob::is_done(int group) const noexcept { return is_copied(group) && (group != kAllGroups || is_settled()); }

bool CopyJob::is_copied(int group) const noexcept {
  const auto& left = group == kAllGroups ? blocks_left_ : groups_[static_cast<uint32_t>(group)].blocks_left;
  return left.load(std::memory_order_acquire) == 0;
}

void CopyJob::cancel() noexcept {
  if (!is_copied(kAllGroups)) cancelled_.store(true);
  // If nobody is inside, nobody else will settle it; entering and leaving does (see leave()).
  inside_.fetch_add(1);
  leave();
  sleep(true, kAllGroups, -1);
}

int CopyJob::event_fd() noexcept {
  const std::lock_guard lock(mutex_);
  if (event_fd_ < 0) event_fd_ = eventfd(is_settled() ? 1 : 0, EFD_CLOEXEC | EFD_NONBLOCK);
  return event_fd_;
}

/// Announce a claim. False (and not inside) if the job was cancelled.
bool CopyJob::enter() noexcept {
  inside_.fetch_add(1);  // sequentially consistent, as are cancelled_ and inside_ everywhere: see leave()
  if (!cancelled_.load()) return true;
  leave();
  return false;
}

void CopyJob::leave() noexcept {
  inside_.fetch_sub(1);
  if (blocks_left_.load() != 0 && !cancelled_.load()) return;
  // Looked at after the line above: whoever enters from now on sees that nothing may be begun, so zero stays final.
  if (inside_.load() == 0) settle();
}

std::optional<CopyJob::Claim> CopyJob::claim(uint32_t group) noexcept {
  Group& cursor_of = groups_[group];
  const uint32_t end = plan_->group_begin(group + 1);
  while (cursor_of.cursor.load(std::memory_order_relaxed) < end) {
    const uint32_t block = cursor_of.cursor.fetch_add(1, std::memory_order_relaxed);
    if (block >= end) return std::nullopt;
    uint8_t expected = kFree;  // a seizer may have come between the cursor and this line
    if (state_[block].compare_exchange_strong(expected, 1)) {
      blocks_unclaimed_.fetch_sub(1, std::memory_order_relaxed);
      return Claim{block, 1};
    }
  }
  return std::nullopt;
}

std::optional<CopyJob::Claim> CopyJob::claim_any() noexcept {
  const int urgent = urgent_group_.load(std::memory_order_relaxed);
  if (urgent != kAllGroups) {
    if (auto claimed = claim(static_cast<uint32_t>(urgent))) return claimed;
  }
  for (uint32_t group = open_group_.load(std::memory_order_relaxed); group < kGroupCount; ++group) {
    if (auto claimed = claim(group)) return claimed;
    open_group_.store(group + 1, std::memory_order_relaxed);  // lost updates only cost another look
  }
  return std::nullopt;
}

std::optional<CopyJob::Claim> CopyJob::claim_for(int group) noexcept {
  return group == kAllGroups ? claim_any() : claim(static_cast<uint32_t>(group));
}

std::optional<CopyJob::Claim> CopyJob::seize(uint32_t first_block, uint32_t end_block) noexcept {
  for (uint32_t block = first_block; block < end_block; ++block) {
    uint8_t owner = state_[block].load();
    if (owner >= kDone - 1) continue;
    if (state_[block].compare_exchange_strong(owner, static_cast<uint8_t>(owner + 1))) {
      if (owner == kFree) blocks_unclaimed_.fetch_sub(1, std::memory_order_relaxed);
      return Claim{block, static_cast<uint8_t>(owner + 1)};
    }
  }
  return std::nullopt;
}

bool CopyJob::copy_one(int group, Worker worker, CpuMeter& meter) noexcept {
  if (!enter()) return false;
  const auto claimed = claim_for(group);
  if (claimed) execute(*claimed, worker, meter);
  leave();
  return claimed.has_value();
}

bool CopyJob::seize_one(int group, CpuMeter& meter) noexcept {
  if (!enter()) return false;
  const auto blocks = static_cast<uint32_t>(plan_->blocks().size());
  const bool all = group == kAllGroups;
  const auto g = static_cast<uint32_t>(group);
  const auto seized = seize(all ? 0 : plan_->group_begin(g), all ? blocks : plan_->group_begin(g + 1));
  if (seized) execute(*seized, Worker::kSeizer, meter);
  leave();
  return seized.has_value();
}

void CopyJob::execute(const Claim& claim, Worker worker, CpuMeter& meter) noexcept {
  if (started_ns_.load(std::memory_order_relaxed) == 0) {
    uint64_t expected = 0;
    started_ns_.compare_exchange_strong(expected, static_cast<uint64_t>(monotonic_ns()));
  }
  const bool is_whole = copy_block(claim.block, Permit{&state_[claim.block], claim.owner});
  meter.count_block();
  if (is_whole) finish_block(claim, worker);
}

bool CopyJob::copy_block(uint32_t block, Permit permit) noexcept {
  const Block& range = plan_->blocks()[block];
  for (const Piece& part : plan_->parts().subspan(range.first_part, range.part_count)) {
    auto* dst = reinterpret_cast<uint8_t*>(dst_[part.dst_index] + part.dst_offset);
    if (part.src_index == kZeroFill) {
      if (!fill_zero_revocable(dst, part.nbytes, permit)) return false;
      continue;
    }
    const auto* src = reinterpret_cast<const uint8_t*>(src_[part.src_index] + part.src_offset);
    if (!copy_revocable(dst, src, part.nbytes, permit)) return false;
  }
  return true;
}

void CopyJob::finish_block(const Claim& claim, Worker worker) noexcept {
  uint8_t expected = claim.owner;
  if (!state_[claim.block].compare_exchange_strong(expected, kDone)) return;  // seized at the last moment
  const uint64_t nbytes = plan_->blocks()[claim.block].nbytes;
  bytes_copied_.fetch_add(nbytes, std::memory_order_relaxed);
  if (worker != Worker::kEngineThread) helped_bytes_.fetch_add(nbytes, std::memory_order_relaxed);
  if (worker == Worker::kSeizer) seized_bytes_.fetch_add(nbytes, std::memory_order_relaxed);
  const bool is_group_copied = groups_[plan_->group_of(claim.block)].blocks_left.fetch_sub(1) == 1;
  const bool is_all_copied = blocks_left_.fetch_sub(1) == 1;
  if (is_group_copied || is_all_copied) {
    {
      const std::lock_guard lock(mutex_);
    }  // a sleeper has seen either the count or will get the call
    changed_.notify_all();
  }
}

void CopyJob::settle() noexcept {
  {
    const std::lock_guard lock(mutex_);
    if (settled_.load(std::memory_order_relaxed)) return;
    finished_ns_.store(static_cast<uint64_t>(monotonic_ns()), std::memory_order_relaxed);
    settled_.store(true, std::memory_order_release);
    if (event_fd_ >= 0) eventfd_write(event_fd_, 1);
  }
  changed_.notify_all();
}

void CopyJob::sleep(bool until_settled, int group, int64_t deadline_ns) noexcept {
  const auto is_over = [&] { return until_settled ? is_settled() : is_copied(group) || is_settled(); };
  std::unique_lock lock(mutex_);
  if (deadline_ns < 0) {
    changed_.wait(lock, is_over);
  } else {
    const std::chrono::steady_clock::time_point deadline{std::chrono::nanoseconds(deadline_ns)};
    changed_.wait_until(lock, deadline, is_over);
  }
}

}  // namespace snapd

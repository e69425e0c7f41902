// Threads that copy, outside of any interpreter's lock, what is handed to them.
#pragma once

#include <pthread.h>
#include <sys/types.h>
#include <cstdint>
#include <memory>
#include <vector>

#include "snapd/copy_job.hpp"
#include "snapd/status.hpp"

namespace snapd {

inline constexpr uint32_t kThreadCountMax = 64;
inline constexpr size_t kJobsUnderWayMax = 64;

/// Copy threads named `snapd-copy-N`, at normal priority (SCHED_BATCH), with all signals blocked. They take jobs in
/// order of submission and keep each one alive until they are done with it.
///
/// A forked child has none of the threads: there submit() refuses, close() and the destructor touch nothing.
class CopyEngine {
 public:
  static Status start(uint32_t thread_count, std::unique_ptr<CopyEngine>* out);
  ~CopyEngine() { close(); }
  CopyEngine(const CopyEngine&) = delete;
  CopyEngine& operator=(const CopyEngine&) = delete;

  /// Start copying. The memory behind the bases must live until the job is settled.
  Status submit(std::shared_ptr<const CopyPlan> plan, std::vector<uint64_t> src, std::vector<uint64_t> dst,
                std::shared_ptr<CopyJob>* out);

  /// Cancel what is left and join the threads. Idempotent; not to be called by two threads at once.
  void close() noexcept;

 private:
  struct Shared;
  CopyEngine();
  static void* run(void* shared) noexcept;

  std::shared_ptr<Shared> shared_;  // the threads hold it too: after a fork the child's copy is never destroyed
  std::vector<pthread_t> threads_;
  const pid_t pid_;
};

}  // namespace snapd

#include "snapd/copy_engine.hpp"

#include <sched.h>
#include <unistd.h>
#include <algorithm>
#include <condition_variable>
#include <csignal>
#include <cstdio>
#include <deque>
#include <mutex>
#include <string>

namespace snapd {

struct CopyEngine::Shared {
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<std::shared_ptr<CopyJob>> jobs;  // those with free blocks, oldest first
  bool is_closing = false;
};

namespace {

/// Blocks all signals of the calling thread; threads made meanwhile inherit that.
class SignalsBlocked {
 public:
  SignalsBlocked() noexcept {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  SignalsBlocked(const SignalsBlocked&) = delete;
  SignalsBlocked& operator=(const SignalsBlocked&) = delete;

 private:
  sigset_t before_;
};

/// A batch thread has the same weight as any other, but waking it does not preempt the thread that woke it. Without
/// this, submit() costs its caller 1.5 to 5 ms whenever the kernel wakes the copy thread on the caller's core, as it
/// does while the other cores are busy (docs/adr/0003-copy-threads.md). A refusal only costs that.
void become_batch() noexcept {
  const sched_param priority{};
  pthread_setschedparam(pthread_self(), SCHED_BATCH, &priority);
}

void name_thread(pthread_t thread, uint32_t index) noexcept {
  char name[16];  // the kernel's limit
  std::snprintf(name, sizeof name, "snapd-copy-%u", index);
  pthread_setname_np(thread, name);
}

}  // namespace

CopyEngine::CopyEngine() : shared_(std::make_shared<Shared>()), pid_(getpid()) {}

Status CopyEngine::start(uint32_t thread_count, std::unique_ptr<CopyEngine>* out) {
  if (thread_count < 1 || thread_count > kThreadCountMax) {
    return Status::invalid("thread_count is " + std::to_string(thread_count) + ", must be 1.." +
                           std::to_string(kThreadCountMax));
  }
  std::unique_ptr<CopyEngine> engine(new CopyEngine());
  const SignalsBlocked blocked;
  for (uint32_t i = 0; i < thread_count; ++i) {
    auto* held = new std::shared_ptr<Shared>(engine->shared_);
    pthread_t thread{};
    if (const int error = pthread_create(&thread, nullptr, &CopyEngine::run, held); error != 0) {
      delete held;
      return Status::system(error, "cannot start copy thread " + std::to_string(i));  // the destructor joins the others
    }
    name_thread(thread, i);
    engine->threads_.push_back(thread);
  }
  *out = std::move(engine);
  return Status::good();
}

void* CopyEngine::run(void* held) noexcept {
  std::unique_ptr<std::shared_ptr<Shared>> holder(static_cast<std::shared_ptr<Shared>*>(held));
  Shared& shared = **holder;
  become_batch();
  std::unique_lock lock(shared.mutex);
  while (true) {
    shared.changed.wait(lock, [&] { return shared.is_closing || !shared.jobs.empty(); });
    if (shared.is_closing) return nullptr;
    const std::shared_ptr<CopyJob> job = shared.jobs.front();
    lock.unlock();
    job->work();
    lock.lock();
    // Nothing of it is free any more; another thread may have taken it out already.
    if (const auto at = std::find(shared.jobs.begin(), shared.jobs.end(), job); at != shared.jobs.end()) {
      shared.jobs.erase(at);
    }
  }
}

Status CopyEngine::submit(std::shared_ptr<const CopyPlan> plan, std::vector<uint64_t> src, std::vector<uint64_t> dst,
                          std::shared_ptr<CopyJob>* out) {
  if (getpid() != pid_) {
    return Status::invalid("the copy engine belongs to process " + std::to_string(pid_) + ", this is a fork of it");
  }
  if (Status status = plan->check(Bases{src, dst}); !status.ok()) return status;
  auto job = std::make_shared<CopyJob>(std::move(plan), std::move(src), std::move(dst));
  if (!job->is_settled()) {
    const std::lock_guard lock(shared_->mutex);
    if (shared_->is_closing) return Status::invalid("the copy engine is closed");
    if (shared_->jobs.size() >= kJobsUnderWayMax) {
      return Status::invalid(std::to_string(kJobsUnderWayMax) + " copies are under way already");
    }
    shared_->jobs.push_back(job);
  }
  shared_->changed.notify_one();
  *out = std::move(job);
  return Status::good();
}

void CopyEngine::close() noexcept {
  if (getpid() != pid_ || threads_.empty()) return;
  std::deque<std::shared_ptr<CopyJob>> left;
  {
    const std::lock_guard lock(shared_->mutex);
    shared_->is_closing = true;
    left.swap(shared_->jobs);
  }
  shared_->changed.notify_all();
  for (const auto& job : left) job->cancel();
  for (const pthread_t thread : threads_) pthread_join(thread, nullptr);
  threads_.clear();
}

}  // namespace snapd

#include <poll.h>
#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <thread>

#include "plans.hpp"
#include "snapd/copy_engine.hpp"

using namespace snapd;
using namespace snapd::test;

namespace {

std::unique_ptr<CopyEngine> started(uint32_t thread_count) {
  std::unique_ptr<CopyEngine> engine;
  const Status status = CopyEngine::start(thread_count, &engine);
  CHECK(status.ok());
  return engine;
}

std::shared_ptr<CopyJob> submitted(CopyEngine& engine, const Scene& scene) {
  std::shared_ptr<CopyJob> job;
  const Status status = engine.submit(scene.plan, scene.src_bases(), scene.dst_bases(), &job);
  CHECK(status.ok());
  return job;
}

bool is_readable(int fd) {
  pollfd entry{fd, POLLIN, 0};
  return poll(&entry, 1, 0) == 1;
}

/// One big source, one destination, in `group_count` groups.
Scene plain_scene(size_t nbytes, uint64_t group_count, uint64_t seed) {
  Scene scene;
  Columns columns;
  scene.sources.push_back(random_bytes(nbytes, seed));
  const size_t share = nbytes / group_count;
  for (uint64_t g = 0; g < group_count; ++g) columns.add(0, g * share, 0, g * share, share, group_count - 1 - g);
  scene.destination.assign(nbytes, 0);
  scene.expected = scene.sources[0];
  CHECK(CopyPlan::build(columns.view(), &scene.plan).ok());
  return scene;
}

void pin_to(std::thread& thread, int cpu) {
  cpu_set_t cpus;
  CPU_ZERO(&cpus);
  CPU_SET(cpu, &cpus);
  pthread_setaffinity_np(thread.native_handle(), sizeof cpus, &cpus);
}

}  // namespace

CASE("engine: random plans arrive whole, whoever copies them") {
  for (const uint32_t thread_count : {1u, 3u}) {
    const auto engine = started(thread_count);
    for (uint64_t seed = 0; seed < 30; ++seed) {
      Scene scene = random_scene(seed, 50, 200'000, 6);
      const auto job = submitted(*engine, scene);
      if (seed % 3 == 0) {
        std::thread other([&] { CHECK(job->wait(static_cast<int>(seed % 6), true, -1)); });
        for (int group = 5; group >= 0; --group) CHECK(job->wait(group, true, -1));
        other.join();
      }
      CHECK(job->wait(kAllGroups, seed % 2 == 0, -1));
      CHECK(scene.destination == scene.expected);
      CHECK(job->is_done(kAllGroups) && job->is_settled() && !job->is_cancelled());
      CHECK_EQUAL(job->bytes_copied(), scene.plan->nbytes());
      CHECK(job->helped_bytes() <= job->bytes_copied() && job->seized_bytes() <= job->helped_bytes());
      CHECK(job->finished_ns() >= job->started_ns());
    }
  }
}

CASE("engine: a group is done before the others are") {
  // No thread of an engine: what is copied is what the fence copied.
  Scene scene = plain_scene(8 << 20, 4, 1);
  CopyJob job(scene.plan, scene.src_bases(), scene.dst_bases());
  CHECK(job.fence(2, -1));
  CHECK(job.is_done(2) && !job.is_done(0) && !job.is_done(1) && !job.is_done(3) && !job.is_done(kAllGroups));
  CHECK_EQUAL(job.bytes_copied(), uint64_t{2} << 20);
  CHECK_EQUAL(job.helped_bytes(), uint64_t{2} << 20);
  CHECK(std::memcmp(scene.destination.data() + (2 << 20), scene.expected.data() + (2 << 20), 2 << 20) == 0);
  CHECK_EQUAL(scene.destination[0], 0);
  CHECK(!job.is_settled());
  CHECK(job.wait(kAllGroups, true, -1));
  CHECK(scene.destination == scene.expected);
}

CASE("engine: waiting without help ends at the deadline") {
  Scene scene = plain_scene(1 << 20, 1, 2);
  CopyJob job(scene.plan, scene.src_bases(), scene.dst_bases());  // nobody works on it
  const int64_t before = monotonic_ns();
  CHECK(!job.wait(0, false, before + 20'000'000));
  CHECK(!job.wait(kAllGroups, false, before + 30'000'000));
  CHECK(monotonic_ns() - before >= 30'000'000);
  CHECK(!job.fence(0, before));  // a deadline in the past copies nothing
  CHECK_EQUAL(job.bytes_copied(), 0u);
}

CASE("engine: nothing is written after cancel returns") {
  const auto engine = started(2);
  int cut_short = 0;
  for (int i = 0; i < 40; ++i) {
    Scene scene = plain_scene(16 << 20, 1, 3);
    const auto job = submitted(*engine, scene);
    std::this_thread::sleep_for(std::chrono::microseconds(i * 30));
    job->cancel();
    const auto after = scene.destination;
    CHECK(job->is_settled());
    cut_short += job->bytes_copied() < scene.plan->nbytes() ? 1 : 0;
    CHECK_EQUAL(job->wait(kAllGroups, true, -1), job->bytes_copied() == scene.plan->nbytes());
    std::this_thread::sleep_for(std::chrono::microseconds(200));
    CHECK(scene.destination == after);
  }
  CHECK(cut_short > 0);
}

CASE("engine: close cancels what is left, and is idempotent") {
  auto engine = started(1);
  Scene scene = plain_scene(64 << 20, 1, 4);
  const auto first = submitted(*engine, scene);
  const auto second = submitted(*engine, scene);
  engine->close();
  engine->close();
  CHECK(second->is_settled() && first->is_settled());
  CHECK(!second->wait(kAllGroups, true, -1));
  std::shared_ptr<CopyJob> refused;
  CHECK(!engine->submit(scene.plan, scene.src_bases(), scene.dst_bases(), &refused).ok());
}

CASE("engine: the eventfd becomes readable once settled, made before or after") {
  const auto engine = started(1);
  Scene scene = plain_scene(4 << 20, 1, 5);
  CopyJob idle(scene.plan, scene.src_bases(), scene.dst_bases());
  CHECK(!is_readable(idle.event_fd()));
  idle.cancel();
  CHECK(is_readable(idle.event_fd()));
  const auto job = submitted(*engine, scene);
  CHECK(job->wait(kAllGroups, false, -1));
  CHECK(is_readable(job->event_fd()));
  CHECK_EQUAL(job->event_fd(), job->event_fd());
}

CASE("engine: an empty plan is done at once") {
  const auto engine = started(1);
  Scene scene = plain_scene(0, 1, 6);
  const auto job = submitted(*engine, scene);
  CHECK(job->is_done(kAllGroups) && job->is_done(0) && job->is_settled());
  CHECK(job->wait(kAllGroups, true, -1) && job->fence(17, -1));
}

CASE("engine: threads are named, take no signals, and their CPU time is booked") {
  const auto engine = started(1);
  Scene scene = plain_scene(64 << 20, 1, 7);
  const auto job = submitted(*engine, scene);
  CHECK(job->wait(kAllGroups, false, -1));
  CHECK(job->cpu_ns() > 1'000'000 && job->cpu_ns() < 10 * (job->finished_ns() - job->started_ns()));
  bool is_found = false;
  for (const auto& task : std::filesystem::directory_iterator("/proc/self/task")) {
    std::ifstream status(task.path() / "status");
    const std::string text((std::istreambuf_iterator<char>(status)), std::istreambuf_iterator<char>());
    if (text.find("Name:\tsnapd-copy-0\n") == std::string::npos) continue;
    is_found = true;
    const uint64_t blocked = std::stoull(text.substr(text.find("SigBlk:\t") + 8), nullptr, 16);
    for (const int signal : {SIGTERM, SIGINT, SIGUSR1}) CHECK((blocked >> (signal - 1) & 1) == 1);
  }
  CHECK(is_found);
}

CASE("engine: bounds") {
  std::unique_ptr<CopyEngine> none;
  CHECK(!CopyEngine::start(0, &none).ok());
  CHECK(!CopyEngine::start(kThreadCountMax + 1, &none).ok());
  Scene scene = plain_scene(256 << 20, 1, 8);
  const auto engine = started(1);  // after the scene: closed before the memory goes
  std::shared_ptr<CopyJob> job;
  size_t accepted = 0;
  while (accepted < 200 && engine->submit(scene.plan, scene.src_bases(), scene.dst_bases(), &job).ok()) ++accepted;
  CHECK(accepted >= kJobsUnderWayMax && accepted < 200);
}

CASE("fork: the child refuses, touches nothing, and ends") {
  auto engine = started(2);
  Scene scene = plain_scene(64 << 20, 1, 9);
  const auto job = submitted(*engine, scene);
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    std::shared_ptr<CopyJob> refused;
    const bool is_refused = !engine->submit(scene.plan, scene.src_bases(), scene.dst_bases(), &refused).ok();
    engine->close();
    engine.reset();
    _exit(is_refused ? 0 : 1);
  }
  int status = -1;
  CHECK_EQUAL(waitpid(child, &status, 0), child);
  CHECK_EQUAL(status, 0);
  CHECK(job->wait(kAllGroups, true, -1));
  CHECK(scene.destination == scene.expected);
}

// The fault: a thread of the lowest class, sharing its processor with one that never sleeps, is in the middle of a
// block.
CASE("starved: a fence takes the block over, and what the source becomes never reaches the copy") {
  constexpr size_t kBytes = 2 << 20;
  std::atomic<bool> is_over{false};
  std::thread hog([&] {
    while (!is_over.load(std::memory_order_relaxed)) {
    }
  });
  pin_to(hog, 0);
  uint64_t seized_bytes = 0;
  int64_t longest_ns = 0;
  for (int round = 0; round < 400 && seized_bytes < 8 * kBlockBytesMax; ++round) {
    Scene scene = plain_scene(kBytes, 1, static_cast<uint64_t>(round));
    CopyJob job(scene.plan, scene.src_bases(), scene.dst_bases());
    std::thread starved([&] {
      const sched_param lowest{};
      pthread_setschedparam(pthread_self(), SCHED_IDLE, &lowest);
      job.work();
    });
    pin_to(starved, 0);
    const int64_t begin = monotonic_ns();
    while (job.started_ns() == 0 && monotonic_ns() - begin < 50'000'000) sched_yield();
    const int64_t before = monotonic_ns();
    CHECK(job.fence(0, -1));
    longest_ns = std::max(longest_ns, monotonic_ns() - before);
    std::memset(scene.sources[0].data(), 0x5A, kBytes);  // the update that the fence held back
    CHECK(job.wait(kAllGroups, false, -1));
    CHECK(job.is_settled());
    CHECK(scene.destination == scene.expected);
    seized_bytes += job.seized_bytes();
    starved.join();
  }
  is_over = true;
  hog.join();
  std::printf("    %zu blocks taken over, longest fence %.1f ms\n", static_cast<size_t>(seized_bytes / kBlockBytesMax),
              static_cast<double>(longest_ns) * 1e-6);
  CHECK(seized_bytes > 0);
}

#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cstring>
#include <thread>

#include "harness.hpp"
#include "snapd/page_access.hpp"

using namespace snapd;
using namespace snapd::test;

namespace {

constexpr PageSpec kSpec{
    .lane_count = 3, .entry_capacity = 5, .rank = 4, .session_id = 77, .chunk_bytes = 4096, .generation = 9};

struct File {
  int fd = memfd_create("snapd-test", MFD_CLOEXEC);
  ~File() { close(fd); }
};

uint64_t loaded(const PageAccess& page, const char* word) {
  uint64_t value = 0;
  CHECK(page.load(word, &value).ok());
  return value;
}

}  // namespace

CASE("mapping: populating fills the page tables of all of it, the last odd piece too") {
  constexpr size_t kBytes = (size_t{9} << 20) + 4096 + 17;
  const File file;
  CHECK_EQUAL(ftruncate(file.fd, kBytes), 0);
  Mapping mapping;
  CHECK(Mapping::map(file.fd, kBytes, true, &mapping).ok());
  CHECK(mapping.populate().ok());
  struct stat found{};
  CHECK_EQUAL(fstat(file.fd, &found), 0);
  CHECK_EQUAL(static_cast<size_t>(found.st_blocks) * 512, (kBytes + 4095) / 4096 * 4096);
}

CASE("mapping: populating a part fills that part, and refuses what is no part") {
  constexpr size_t kBytes = size_t{9} << 20;
  const File file;
  CHECK_EQUAL(ftruncate(file.fd, kBytes), 0);
  Mapping mapping;
  CHECK(Mapping::map(file.fd, kBytes, true, &mapping).ok());
  CHECK(mapping.populate(size_t{2} << 20, (size_t{5} << 20) + 4096).ok());
  struct stat found{};
  CHECK_EQUAL(fstat(file.fd, &found), 0);
  CHECK_EQUAL(static_cast<size_t>(found.st_blocks) * 512, (size_t{5} << 20) + 4096);
  CHECK(mapping.populate(kBytes, 0).ok());
  CHECK(!mapping.populate(1, 4096).ok());
  CHECK(!mapping.populate(4096, kBytes).ok());
  CHECK(!mapping.populate(kBytes + 4096, 0).ok());
}

CASE("mapping: refuses what is beyond the file, and is absent in a forked child") {
  const File file;
  CHECK_EQUAL(ftruncate(file.fd, 10'000), 0);
  Mapping mapping;
  CHECK(!Mapping::map(file.fd, 10'001, true, &mapping).ok());
  CHECK(!Mapping::map(file.fd, 0, true, &mapping).ok());
  CHECK_EQUAL(static_cast<int>(Mapping::map(-1, 10, true, &mapping).code), static_cast<int>(Code::kSystem));
  CHECK(Mapping::map(file.fd, 10'000, true, &mapping).ok());
  CHECK(mapping.populate().ok());
  mapping.data()[9'999] = 42;
  const pid_t child = fork();
  if (child == 0) _exit(mapping.is_mapped() || mapping.populate().ok() ? 1 : 0);
  int status = -1;
  CHECK_EQUAL(waitpid(child, &status, 0), child);
  CHECK_EQUAL(status, 0);
  Mapping read_only;
  CHECK(Mapping::map(file.fd, 10'000, false, &read_only).ok());
  CHECK(read_only.populate().ok() && !read_only.is_writable());
  CHECK_EQUAL(read_only.data()[9'999], 42);
}

CASE("page: what one side writes the other reads") {
  const File file;
  PageAccess daemon, trainer;
  CHECK(PageAccess::create(file.fd, kSpec, &daemon).ok());
  CHECK(PageAccess::attach(file.fd, &trainer).ok());
  CHECK(trainer.spec().lane_count == 3 && trainer.spec().entry_capacity == 5 && trainer.spec().rank == 4);
  CHECK(trainer.spec().session_id == 77 && trainer.spec().chunk_bytes == 4096);
  CHECK_EQUAL(loaded(trainer, "generation"), 9u);
  CHECK(trainer.store("step_seen_plus_one", 12).ok());
  uint64_t sum = 0;
  CHECK(trainer.add("skipped_count", 2, &sum).ok() && daemon.add("skipped_count", 3, &sum).ok());
  CHECK(sum == 5 && loaded(daemon, "step_seen_plus_one") == 12);

  const std::vector<Frame> grant{{0, 8}, {1, 9}};
  CHECK(daemon.write_grant(2, grant).ok());
  bool is_set = false;
  CHECK(daemon.set_lane_state(2, 0, 1, &is_set).ok() && is_set);
  std::vector<Frame> granted;
  CHECK(trainer.read_grant(2, &granted).ok());
  CHECK(granted.size() == 2 && granted[1].segment == 1 && granted[1].frame == 9);
  const std::vector<Entry> entries{{{0, 8}, 4096, 0}, {{7, 3}, 100, kReused}};
  CHECK(trainer.write_entries(2, entries).ok() && trainer.lane_store(2, "step", 500).ok());
  CHECK(trainer.set_lane_state(2, 1, 2, &is_set).ok() && is_set);

  const int wake = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  CHECK(trainer.commit(2, wake, &is_set).ok() && is_set);
  CHECK(trainer.commit(2, wake, &is_set).ok() && !is_set);  // only once
  eventfd_t count = 0;
  CHECK(eventfd_read(wake, &count) == 0 && count == 1);
  close(wake);
  std::vector<Entry> seen;
  uint64_t step = 0;
  CHECK(daemon.read_entries(2, &seen).ok() && daemon.lane_load(2, "step", &step).ok());
  CHECK(seen.size() == 2 && seen[1].place.segment == 7 && seen[1].nbytes == 100 && seen[1].flags == kReused);
  CHECK_EQUAL(step, 500u);
}

CASE("page: indexes, names, counts and states out of bounds are refused") {
  const File file;
  PageAccess page;
  CHECK(PageAccess::create(file.fd, kSpec, &page).ok());
  uint32_t state = 0;
  uint64_t value = 0;
  bool is_set = true;
  CHECK(!page.lane_state(3, &state).ok() && !page.lane_load(3, "step", &value).ok());
  CHECK(!page.load("magic", &value).ok() && !page.store("rank", 1).ok() && !page.lane_load(0, "steps", &value).ok());
  CHECK(!page.lane_store(0, "state", 3).ok() && !page.lane_store(0, "discard_reason", uint64_t{1} << 32).ok());
  CHECK(!page.set_lane_state(0, 0, 5, &is_set).ok());
  CHECK(page.set_lane_state(0, 2, 3, &is_set).ok() && !is_set);
  const std::vector<Frame> many(6);
  CHECK(!page.write_grant(0, many).ok());
  const std::vector<Entry> entries(6);
  CHECK(!page.write_entries(0, entries).ok());
  CHECK(page.lane_store(0, "entry_count", 6).ok() && page.lane_store(0, "grant_count", UINT32_MAX).ok());
  std::vector<Entry> read_back;
  std::vector<Frame> grant;
  CHECK(!page.read_entries(0, &read_back).ok() && !page.read_grant(0, &grant).ok());
  page.close();
  CHECK(!page.load("generation", &value).ok() && !page.lane_state(0, &state).ok());
}

CASE("page: lanes do not overlap") {
  const File file;
  PageAccess page;
  CHECK(PageAccess::create(file.fd, kSpec, &page).ok());
  for (uint32_t lane = 0; lane < 3; ++lane) {
    CHECK(page.write_grant(lane, std::vector<Frame>(5, Frame{lane, 100 + lane})).ok());
    CHECK(page.write_entries(lane, std::vector<Entry>(5, Entry{{lane, 200 + lane}, 1, 0})).ok());
    CHECK(page.lane_store(lane, "step", lane).ok());
  }
  for (uint32_t lane = 0; lane < 3; ++lane) {
    std::vector<Frame> grant;
    std::vector<Entry> entries;
    uint64_t step = 99;
    CHECK(page.read_grant(lane, &grant).ok() && page.read_entries(lane, &entries).ok());
    CHECK(page.lane_load(lane, "step", &step).ok() && step == lane);
    for (const Frame& frame : grant) CHECK(frame.segment == lane && frame.frame == 100 + lane);
    for (const Entry& entry : entries) CHECK(entry.place.frame == 200 + lane);
  }
}

CASE("page: broken files are refused, each for its own reason") {
  const auto reason = [](size_t offset, const void* bytes, size_t nbytes, off_t file_bytes) {
    const File file;
    PageAccess page;
    CHECK(PageAccess::create(file.fd, kSpec, &page).ok());
    CHECK(pwrite(file.fd, bytes, nbytes, static_cast<off_t>(offset)) == static_cast<ssize_t>(nbytes));
    if (file_bytes > 0) CHECK(ftruncate(file.fd, file_bytes) == 0);
    PageAccess attached;
    const Status status = PageAccess::attach(file.fd, &attached);
    CHECK_EQUAL(static_cast<int>(status.code), static_cast<int>(Code::kInvalid));
    return status.text.substr(0, status.text.find_first_of(": "));
  };
  const uint32_t nine = 9;
  const uint32_t huge = UINT32_MAX;
  const uint64_t wide = uint64_t{1} << 40;
  CHECK_EQUAL(reason(0, "X", 1, 0), "magic");
  CHECK_EQUAL(reason(offsetof(PageHeader, version), &nine, 4, 0), "version");
  CHECK_EQUAL(reason(offsetof(PageHeader, lane_count), &nine, 4, 0), "counts");
  CHECK_EQUAL(reason(offsetof(PageHeader, entry_capacity), &huge, 4, 0), "counts");
  CHECK_EQUAL(reason(offsetof(PageHeader, entry_capacity), &nine, 4, 0), "size");
  CHECK_EQUAL(reason(offsetof(PageHeader, file_bytes), &wide, 8, 0), "size");
  CHECK_EQUAL(reason(offsetof(PageHeader, chunk_bytes), &wide, 8, 0), "chunk_bytes");
  CHECK_EQUAL(reason(0, "S", 1, 100), "size");
  CHECK_EQUAL(reason(0, "S", 1, 100'000), "size");
}

CASE("page: only one of many wins a compare-and-set, and sums are exact") {
  const File file;
  PageAccess page;
  CHECK(PageAccess::create(file.fd, kSpec, &page).ok());
  std::atomic<int> winners{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      bool is_set = false;
      uint64_t sum = 0;
      for (int i = 0; i < 1000; ++i) CHECK(page.add("wanted_frames", 1, &sum).ok());
      CHECK(page.set_lane_state(1, 0, 1, &is_set).ok());
      winners += is_set ? 1 : 0;
    });
  }
  for (auto& thread : threads) thread.join();
  CHECK_EQUAL(winners.load(), 1);
  CHECK_EQUAL(loaded(page, "wanted_frames"), 4000u);
}

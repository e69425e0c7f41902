#include "snapd/page_access.hpp"

#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <unistd.h>
#include <algorithm>
#include <atomic>
#include <bit>
#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

namespace snapd {
namespace {

static_assert(std::endian::native == std::endian::little, "the page's byte order is the machine's");

struct Field {
  std::string_view name;
  uint16_t offset;
  uint8_t nbytes;
};

#define SNAPD_FIELD(type, name) \
  Field { #name, offsetof(type, name), sizeof(type::name) }
constexpr Field kWords[] = {
    SNAPD_FIELD(PageHeader, slots_held),
    SNAPD_FIELD(PageHeader, replicas_equal_step_plus_one),
    SNAPD_FIELD(PageHeader, generation),
    SNAPD_FIELD(PageHeader, daemon_instance),
    SNAPD_FIELD(PageHeader, segments_version),
    SNAPD_FIELD(PageHeader, fenced),
    SNAPD_FIELD(PageHeader, interval_from_step),
    SNAPD_FIELD(PageHeader, interval_steps),
    SNAPD_FIELD(PageHeader, captured_step_plus_one),
    SNAPD_FIELD(PageHeader, complete_step_plus_one),
    SNAPD_FIELD(PageHeader, wanted_frames),
    SNAPD_FIELD(PageHeader, skipped_step_plus_one),
    SNAPD_FIELD(PageHeader, skipped_count),
    SNAPD_FIELD(PageHeader, step_seen_plus_one),
    SNAPD_FIELD(PageHeader, node_first_rank),
    SNAPD_FIELD(PageHeader, node_rank_count),
};
constexpr Field kLaneFields[] = {
    SNAPD_FIELD(LaneHeader, state),
    SNAPD_FIELD(LaneHeader, grant_count),
    SNAPD_FIELD(LaneHeader, entry_count),
    SNAPD_FIELD(LaneHeader, discard_reason),
    SNAPD_FIELD(LaneHeader, sequence),
    SNAPD_FIELD(LaneHeader, generation),
    SNAPD_FIELD(LaneHeader, step),
    SNAPD_FIELD(LaneHeader, layout_nbytes),
    SNAPD_FIELD(LaneHeader, early_values_offset),
    SNAPD_FIELD(LaneHeader, early_values_nbytes),
    SNAPD_FIELD(LaneHeader, handed_over_ns),
    SNAPD_FIELD(LaneHeader, copied_ns),
    SNAPD_FIELD(LaneHeader, copied_bytes),
};
#undef SNAPD_FIELD

template <size_t N>
const Field* find(const Field (&fields)[N], std::string_view name) noexcept {
  const auto* at = std::find_if(fields, fields + N, [&](const Field& field) { return field.name == name; });
  return at == fields + N ? nullptr : at;
}

template <class T>
T load_acquire(T* at) noexcept {
  return std::atomic_ref<T>(*at).load(std::memory_order_acquire);
}
template <class T>
void store_release(T* at, T value) noexcept {
  std::atomic_ref<T>(*at).store(value, std::memory_order_release);
}

size_t lane_stride(const PageSpec& spec) noexcept {
  return (page_bytes(spec.lane_count, spec.entry_capacity) - sizeof(PageHeader)) / spec.lane_count;
}

Status unknown(const char* what, std::string_view name) {
  return Status::invalid("no " + std::string(what) + " is called '" + std::string(name.substr(0, 64)) + "'");
}

Status too_many(const char* what, size_t count, uint32_t capacity) {
  return Status::invalid(std::string(what) + " holds " + std::to_string(count) + ", the lane's capacity is " +
                         std::to_string(capacity));
}

Status check_header(const PageHeader& header, uint64_t file_bytes) {
  if (std::memcmp(header.magic, kPageMagic, sizeof kPageMagic) != 0)
    return Status::invalid("magic: not a control page");
  if (header.version != kPageVersion) {
    return Status::invalid("version is " + std::to_string(header.version) + ", this program knows " +
                           std::to_string(kPageVersion));
  }
  const size_t expected = page_bytes(header.lane_count, header.entry_capacity);
  if (expected == 0) {
    return Status::invalid("counts out of bounds: lane_count " + std::to_string(header.lane_count) +
                           ", entry_capacity " + std::to_string(header.entry_capacity));
  }
  if (header.file_bytes != expected || file_bytes != expected) {
    return Status::invalid("size: the counts need " + std::to_string(expected) + " bytes, the header says " +
                           std::to_string(header.file_bytes) + ", the file has " + std::to_string(file_bytes));
  }
  return Status::good();
}

Status check_spec(const PageSpec& spec) {
  if (page_bytes(spec.lane_count, spec.entry_capacity) == 0) {
    return Status::invalid("lane_count is " + std::to_string(spec.lane_count) + " (1.." +
                           std::to_string(kLaneCountMax) + "), entry_capacity is " +
                           std::to_string(spec.entry_capacity) + " (1.." + std::to_string(kEntryCapacityMax) + ")");
  }
  if (spec.chunk_bytes == 0 || spec.chunk_bytes > UINT32_MAX) {
    return Status::invalid("chunk_bytes is " + std::to_string(spec.chunk_bytes) + ", must be 1..2^32-1");
  }
  return Status::good();
}

}  // namespace

Status PageAccess::create(int fd, const PageSpec& spec, PageAccess* out) {
  if (Status status = check_spec(spec); !status.ok()) return status;
  const size_t nbytes = page_bytes(spec.lane_count, spec.entry_capacity);
  if (ftruncate(fd, 0) != 0 || ftruncate(fd, static_cast<off_t>(nbytes)) != 0) {
    return Status::system(errno, "sizing a control page to " + std::to_string(nbytes) + " bytes");
  }
  if (const int error = posix_fallocate(fd, 0, static_cast<off_t>(nbytes)); error != 0) {
    return Status::system(error, "backing a control page of " + std::to_string(nbytes) + " bytes");
  }
  PageAccess page;
  if (Status status = Mapping::map(fd, nbytes, true, &page.mapping_); !status.ok()) return status;
  page.spec_ = spec;
  auto* header = reinterpret_cast<PageHeader*>(page.mapping_.data());
  header->version = kPageVersion;
  header->lane_count = spec.lane_count;
  header->entry_capacity = spec.entry_capacity;
  header->rank = spec.rank;
  header->session_id = spec.session_id;
  header->chunk_bytes = spec.chunk_bytes;
  header->file_bytes = nbytes;
  header->generation = spec.generation;
  std::atomic_thread_fence(std::memory_order_release);
  std::memcpy(header->magic, kPageMagic, sizeof kPageMagic);
  *out = std::move(page);
  return Status::good();
}

Status PageAccess::attach(int fd, PageAccess* out) {
  struct stat file{};
  if (fstat(fd, &file) != 0) return Status::system(errno, "fstat of descriptor " + std::to_string(fd));
  const auto file_bytes = static_cast<uint64_t>(file.st_size);
  if (file_bytes < sizeof(PageHeader) || file_bytes > page_bytes(kLaneCountMax, kEntryCapacityMax)) {
    return Status::invalid("size: a file of " + std::to_string(file_bytes) + " bytes is no control page");
  }
  PageAccess page;
  if (Status status = Mapping::map(fd, file_bytes, true, &page.mapping_); !status.ok()) return status;
  PageHeader header;  // a copy: what is checked is what is used
  std::memcpy(&header, page.mapping_.data(), sizeof header);
  if (Status status = check_header(header, file_bytes); !status.ok()) return status;
  page.spec_ = {header.lane_count, header.entry_capacity, header.rank,
                header.session_id, header.chunk_bytes,    header.generation};
  if (Status status = check_spec(page.spec_); !status.ok()) return status;
  *out = std::move(page);
  return Status::good();
}

Status PageAccess::check_open() const {
  if (mapping_.is_mapped()) return Status::good();
  return Status::invalid("the control page is closed, or belongs to the parent process");
}

Status PageAccess::word_at(std::string_view word, uint64_t** out) const {
  if (Status status = check_open(); !status.ok()) return status;
  const Field* field = find(kWords, word);
  if (field == nullptr) return unknown("header word", word);
  *out = reinterpret_cast<uint64_t*>(mapping_.data() + field->offset);
  return Status::good();
}

Status PageAccess::load(std::string_view word, uint64_t* out) const {
  uint64_t* at = nullptr;
  if (Status status = word_at(word, &at); !status.ok()) return status;
  *out = load_acquire(at);
  return Status::good();
}

Status PageAccess::store(std::string_view word, uint64_t value) {
  uint64_t* at = nullptr;
  if (Status status = word_at(word, &at); !status.ok()) return status;
  store_release(at, value);
  return Status::good();
}

Status PageAccess::add(std::string_view word, uint64_t value, uint64_t* out) {
  uint64_t* at = nullptr;
  if (Status status = word_at(word, &at); !status.ok()) return status;
  *out = std::atomic_ref<uint64_t>(*at).fetch_add(value, std::memory_order_acq_rel) + value;
  return Status::good();
}

Status PageAccess::lane_at(uint32_t lane, LaneHeader** out) const {
  if (Status status = check_open(); !status.ok()) return status;
  if (lane >= spec_.lane_count) {
    return Status::invalid("lane is " + std::to_string(lane) + ", the page has " + std::to_string(spec_.lane_count));
  }
  *out = reinterpret_cast<LaneHeader*>(mapping_.data() + sizeof(PageHeader) + lane * lane_stride(spec_));
  return Status::good();
}

Entry* PageAccess::entries_of(LaneHeader* lane) const noexcept { return reinterpret_cast<Entry*>(lane + 1); }

Frame* PageAccess::frames_of(LaneHeader* lane) const noexcept {
  return reinterpret_cast<Frame*>(entries_of(lane) + spec_.entry_capacity);
}

Status PageAccess::lane_state(uint32_t lane, uint32_t* out) const {
  LaneHeader* header = nullptr;
  if (Status status = lane_at(lane, &header); !status.ok()) return status;
  *out = load_acquire(&header->state);
  return Status::good();
}

Status PageAccess::set_lane_state(uint32_t lane, uint32_t expected, uint32_t desired, bool* is_set) {
  LaneHeader* header = nullptr;
  if (Status status = lane_at(lane, &header); !status.ok()) return status;
  if (desired > static_cast<uint32_t>(LaneState::kDiscarded)) {
    return Status::invalid("new is " + std::to_string(desired) + ", not a lane state");
  }
  *is_set = std::atomic_ref<uint32_t>(header->state).compare_exchange_strong(expected, desired);
  return Status::good();
}

Status PageAccess::lane_load(uint32_t lane, std::string_view name, uint64_t* out) const {
  LaneHeader* header = nullptr;
  if (Status status = lane_at(lane, &header); !status.ok()) return status;
  const Field* field = find(kLaneFields, name);
  if (field == nullptr) return unknown("lane field", name);
  auto* at = reinterpret_cast<uint8_t*>(header) + field->offset;
  *out = field->nbytes == 4 ? load_acquire(reinterpret_cast<uint32_t*>(at))
                            : load_acquire(reinterpret_cast<uint64_t*>(at));
  return Status::good();
}

Status PageAccess::lane_store(uint32_t lane, std::string_view name, uint64_t value) {
  LaneHeader* header = nullptr;
  if (Status status = lane_at(lane, &header); !status.ok()) return status;
  const Field* field = find(kLaneFields, name);
  if (field == nullptr || field->offset == offsetof(LaneHeader, state)) return unknown("lane field to store", name);
  auto* at = reinterpret_cast<uint8_t*>(header) + field->offset;
  if (field->nbytes == 8) {
    store_release(reinterpret_cast<uint64_t*>(at), value);
    return Status::good();
  }
  if (value > UINT32_MAX) {
    return Status::invalid(std::string(name) + " is " + std::to_string(value) + ", must be below 2^32");
  }
  store_release(reinterpret_cast<uint32_t*>(at), static_cast<uint32_t>(value));
  return Status::good();
}

Status PageAccess::write_grant(uint32_t lane, std::span<const Frame> frames) {
  LaneHeader* header = nullptr;
  if (Status status = lane_at(lane, &header); !status.ok()) return status;
  if (frames.size() > spec_.entry_capacity) return too_many("the grant", frames.size(), spec_.entry_capacity);
  std::copy(frames.begin(), frames.end(), frames_of(header));
  store_release(&header->grant_count, static_cast<uint32_t>(frames.size()));
  return Status::good();
}

Status PageAccess::read_grant(uint32_t lane, std::vector<Frame>* out) const {
  LaneHeader* header = nullptr;
  if (Status status = lane_at(lane, &header); !status.ok()) return status;
  const uint32_t count = load_acquire(&header->grant_count);
  if (count > spec_.entry_capacity) return too_many("grant_count", count, spec_.entry_capacity);
  out->assign(frames_of(header), frames_of(header) + count);
  return Status::good();
}

Status PageAccess::write_entries(uint32_t lane, std::span<const Entry> entries) {
  LaneHeader* header = nullptr;
  if (Status status = lane_at(lane, &header); !status.ok()) return status;
  if (entries.size() > spec_.entry_capacity) return too_many("the table", entries.size(), spec_.entry_capacity);
  std::copy(entries.begin(), entries.end(), entries_of(header));
  store_release(&header->entry_count, static_cast<uint32_t>(entries.size()));
  return Status::good();
}

Status PageAccess::read_entries(uint32_t lane, std::vector<Entry>* out) const {
  LaneHeader* header = nullptr;
  if (Status status = lane_at(lane, &header); !status.ok()) return status;
  const uint32_t count = load_acquire(&header->entry_count);
  if (count > spec_.entry_capacity) return too_many("entry_count", count, spec_.entry_capacity);
  out->assign(entries_of(header), entries_of(header) + count);
  return Status::good();
}

Status PageAccess::commit(uint32_t lane, int wake_fd, bool* is_set) {
  const auto open = static_cast<uint32_t>(LaneState::kOpen);
  const auto complete = static_cast<uint32_t>(LaneState::kComplete);
  if (Status status = set_lane_state(lane, open, complete, is_set); !status.ok()) return status;
  if (*is_set && wake_fd >= 0) eventfd_write(wake_fd, 1);
  return Status::good();
}

}  // namespace snapd

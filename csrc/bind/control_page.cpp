#include <string_view>

#include <nanobind/stl/string_view.h>

#include "convert.hpp"
#include "parts.hpp"
#include "snapd/page_access.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace snapd::bind {
namespace {

uint32_t to_u32(nb::handle value, const char* name) {
  return static_cast<uint32_t>(to_number(value, name, UINT32_MAX));
}

PageAccess create(nb::handle fd, nb::handle lane_count, nb::handle entry_capacity, nb::handle rank,
                  nb::handle session_id, nb::handle chunk_bytes, nb::handle generation) {
  const PageSpec spec{
      .lane_count = to_u32(lane_count, "lane_count"),
      .entry_capacity = to_u32(entry_capacity, "entry_capacity"),
      .rank = to_u32(rank, "rank"),
      .session_id = to_number(session_id, "session_id"),
      .chunk_bytes = to_number(chunk_bytes, "chunk_bytes"),
      .generation = to_number(generation, "generation"),
  };
  PageAccess page;
  raise_unless_ok(PageAccess::create(to_fd(fd, "fd", false), spec, &page));
  return page;
}

PageAccess attach(nb::handle fd) {
  PageAccess page;
  raise_unless_ok(PageAccess::attach(to_fd(fd, "fd", false), &page));
  return page;
}

size_t nbytes_for(nb::handle lane_count, nb::handle entry_capacity) {
  const size_t nbytes = page_bytes(to_u32(lane_count, "lane_count"), to_u32(entry_capacity, "entry_capacity"));
  if (nbytes == 0) throw nb::value_error("lane_count or entry_capacity is out of bounds");
  return nbytes;
}

/// Columns of 32-bit numbers, of equal length.
std::vector<uint64_t> column(nb::handle values, const char* name, size_t expected_count) {
  auto numbers = to_numbers(values, name);
  if (numbers.size() != expected_count) {
    throw nb::value_error((std::string(name) + " has " + std::to_string(numbers.size()) + " entries, segments has " +
                           std::to_string(expected_count))
                              .c_str());
  }
  for (size_t i = 0; i < numbers.size(); ++i) {
    if (numbers[i] <= UINT32_MAX) continue;
    throw nb::value_error(
        (std::string(name) + "[" + std::to_string(i) + "] is " + std::to_string(numbers[i]) + ", must be below 2^32")
            .c_str());
  }
  return numbers;
}

void write_grant(PageAccess& self, nb::handle lane, nb::handle segments, nb::handle frames) {
  const size_t count = nb::len(segments);
  const auto segment = column(segments, "segments", count);
  const auto frame = column(frames, "frames", count);
  std::vector<Frame> grant(count);
  for (size_t i = 0; i < count; ++i) grant[i] = {static_cast<uint32_t>(segment[i]), static_cast<uint32_t>(frame[i])};
  raise_unless_ok(self.write_grant(to_u32(lane, "lane"), grant));
}

nb::tuple read_grant(const PageAccess& self, nb::handle lane) {
  std::vector<Frame> grant;
  raise_unless_ok(self.read_grant(to_u32(lane, "lane"), &grant));
  nb::list segments, frames;
  for (const Frame& place : grant) {
    segments.append(place.segment);
    frames.append(place.frame);
  }
  return nb::make_tuple(segments, frames);
}

void write_entries(PageAccess& self, nb::handle lane, nb::handle segments, nb::handle frames, nb::handle nbytes,
                   nb::handle flags) {
  const size_t count = nb::len(segments);
  const auto segment = column(segments, "segments", count);
  const auto frame = column(frames, "frames", count);
  const auto size = column(nbytes, "nbytes", count);
  const auto flag = column(flags, "flags", count);
  std::vector<Entry> entries(count);
  for (size_t i = 0; i < count; ++i) {
    const Frame place{static_cast<uint32_t>(segment[i]), static_cast<uint32_t>(frame[i])};
    entries[i] = {place, static_cast<uint32_t>(size[i]), static_cast<uint32_t>(flag[i])};
  }
  raise_unless_ok(self.write_entries(to_u32(lane, "lane"), entries));
}

nb::tuple read_entries(const PageAccess& self, nb::handle lane) {
  std::vector<Entry> entries;
  raise_unless_ok(self.read_entries(to_u32(lane, "lane"), &entries));
  nb::list segments, frames, nbytes, flags;
  for (const Entry& entry : entries) {
    segments.append(entry.place.segment);
    frames.append(entry.place.frame);
    nbytes.append(entry.nbytes);
    flags.append(entry.flags);
  }
  return nb::make_tuple(segments, frames, nbytes, flags);
}

void add_constants(nb::module_& module) {
  module.attr("LANE_FREE") = static_cast<uint32_t>(LaneState::kFree);
  module.attr("LANE_GRANTED") = static_cast<uint32_t>(LaneState::kGranted);
  module.attr("LANE_OPEN") = static_cast<uint32_t>(LaneState::kOpen);
  module.attr("LANE_COMPLETE") = static_cast<uint32_t>(LaneState::kComplete);
  module.attr("LANE_DISCARDED") = static_cast<uint32_t>(LaneState::kDiscarded);
  module.attr("ENTRY_REUSED") = kReused;
  module.attr("REPLICAS_DIFFER") = kReplicasDiffer;
}

void add_words(nb::class_<PageAccess>& page) {
  page.def(
          "load",
          [](const PageAccess& self, std::string_view word) {
            uint64_t value = 0;
            raise_unless_ok(self.load(word, &value));
            return value;
          },
          "word"_a)
      .def(
          "store",
          [](PageAccess& self, std::string_view word, nb::handle value) {
            raise_unless_ok(self.store(word, to_number(value, "value")));
          },
          "word"_a, "value"_a)
      .def(
          "add",
          [](PageAccess& self, std::string_view word, nb::handle value) {
            uint64_t sum = 0;
            raise_unless_ok(self.add(word, to_number(value, "value"), &sum));
            return sum;
          },
          "word"_a, "value"_a);
}

void add_lanes(nb::class_<PageAccess>& page) {
  page.def(
          "lane_state",
          [](const PageAccess& self, nb::handle lane) {
            uint32_t state = 0;
            raise_unless_ok(self.lane_state(to_u32(lane, "lane"), &state));
            return state;
          },
          "lane"_a)
      .def(
          "set_lane_state",
          [](PageAccess& self, nb::handle lane, nb::handle expected, nb::handle desired) {
            bool is_set = false;
            raise_unless_ok(self.set_lane_state(to_u32(lane, "lane"), to_u32(expected, "expected"),
                                                to_u32(desired, "new"), &is_set));
            return is_set;
          },
          "lane"_a, "expected"_a, "new"_a)
      .def(
          "lane_load",
          [](const PageAccess& self, nb::handle lane, std::string_view field) {
            uint64_t value = 0;
            raise_unless_ok(self.lane_load(to_u32(lane, "lane"), field, &value));
            return value;
          },
          "lane"_a, "field"_a)
      .def(
          "lane_store",
          [](PageAccess& self, nb::handle lane, std::string_view field, nb::handle value) {
            raise_unless_ok(self.lane_store(to_u32(lane, "lane"), field, to_number(value, "value")));
          },
          "lane"_a, "field"_a, "value"_a)
      .def("write_grant", &write_grant, "lane"_a, "segments"_a, "frames"_a)
      .def("read_grant", &read_grant, "lane"_a)
      .def("write_entries", &write_entries, "lane"_a, "segments"_a, "frames"_a, "nbytes"_a, "flags"_a)
      .def("read_entries", &read_entries, "lane"_a)
      .def(
          "commit",
          [](PageAccess& self, nb::handle lane, nb::handle wake_fd) {
            bool is_set = false;
            raise_unless_ok(self.commit(to_u32(lane, "lane"), to_fd(wake_fd, "wake_fd", true), &is_set));
            return is_set;
          },
          "lane"_a, "wake_fd"_a);
}

}  // namespace

void add_control_page(nb::module_& module) {
  add_constants(module);
  nb::class_<PageAccess> page(module, "ControlPage", nb::is_final());
  page.def_static("nbytes_for", &nbytes_for, "lane_count"_a, "entry_capacity"_a)
      .def_static("create", &create, "fd"_a, nb::kw_only(), "lane_count"_a, "entry_capacity"_a, "rank"_a,
                  "session_id"_a, "chunk_bytes"_a, "generation"_a)
      .def_static("attach", &attach, "fd"_a)
      .def_prop_ro("lane_count", [](const PageAccess& self) { return self.spec().lane_count; })
      .def_prop_ro("entry_capacity", [](const PageAccess& self) { return self.spec().entry_capacity; })
      .def_prop_ro("rank", [](const PageAccess& self) { return self.spec().rank; })
      .def_prop_ro("session_id", [](const PageAccess& self) { return self.spec().session_id; })
      .def_prop_ro("chunk_bytes", [](const PageAccess& self) { return self.spec().chunk_bytes; })
      .def("close", &PageAccess::close);
  add_words(page);
  add_lanes(page);
}

}  // namespace snapd::bind

#include "plan.hpp"

#include <nanobind/stl/unique_ptr.h>
#include <cmath>

#include "convert.hpp"
#include "parts.hpp"
#include "snapd/copy_kernel.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace snapd::bind {
namespace {

constexpr uint64_t kSampleBytesMax = uint64_t{1} << 30;

PyPlan make_plan(nb::handle src_index, nb::handle src_offset, nb::handle dst_index, nb::handle dst_offset,
                 nb::handle nbytes, nb::handle group) {
  const auto c1 = to_numbers(src_index, "src_index");
  const auto c2 = to_numbers(src_offset, "src_offset");
  const auto c3 = to_numbers(dst_index, "dst_index");
  const auto c4 = to_numbers(dst_offset, "dst_offset");
  const auto c5 = to_numbers(nbytes, "nbytes");
  const auto c6 = to_numbers(group, "group");
  const nb::gil_scoped_release released;
  PyPlan made;
  const Status status = CopyPlan::build({c1, c2, c3, c4, c5, c6}, &made.plan);
  if (status.ok()) {
    made.sampler = std::make_shared<const Sampler>(made.plan);
    return made;
  }
  const nb::gil_scoped_acquire held;
  raise_unless_ok(status);
  return made;
}

HeldBases checked_bases(const PyPlan& self, nb::handle src_bases, nb::handle dst_bases) {
  HeldBases bases{to_numbers(src_bases, "src_bases"), to_numbers(dst_bases, "dst_bases")};
  raise_unless_ok(self.plan->check(bases.view()));
  return bases;
}

void run(const PyPlan& self, nb::handle src_bases, nb::handle dst_bases, nb::handle first_piece, int64_t piece_count) {
  const HeldBases bases = checked_bases(self, src_bases, dst_bases);
  const size_t all = self.plan->pieces().size();
  const uint64_t first = to_number(first_piece, "first_piece", all);
  const uint64_t left = all - first;
  if (piece_count < -1 || (piece_count >= 0 && static_cast<uint64_t>(piece_count) > left)) {
    throw nb::value_error(("piece_count is " + std::to_string(piece_count) + ", the plan has " + std::to_string(left) +
                           " pieces from first_piece on")
                              .c_str());
  }
  const nb::gil_scoped_release released;
  self.plan->run(bases.view(), first, piece_count < 0 ? left : static_cast<uint64_t>(piece_count));
}

std::unique_ptr<Sample> sample(const PyPlan& self, nb::handle src_bases, nb::handle turn, nb::handle sample_bytes,
                               double share_max) {
  const auto src = to_numbers(src_bases, "src_bases");
  raise_unless_ok(self.plan->check_sources(src));
  if (!(share_max >= 0 && share_max <= 1)) {
    throw nb::value_error(("share_max is " + std::to_string(share_max) + ", must be 0..1").c_str());
  }
  const SampleLimits limits{to_number(sample_bytes, "sample_bytes", kSampleBytesMax), share_max};
  const uint64_t turn_number = to_number(turn, "turn");
  const nb::gil_scoped_release released;
  return self.sampler->take(Bases{src, {}}, turn_number, limits);
}

nb::list plan_differing(const PyPlan& self, nb::handle src_bases, nb::handle dst_bases) {
  const HeldBases bases = checked_bases(self, src_bases, dst_bases);
  std::vector<uint32_t> found;
  {
    const nb::gil_scoped_release released;
    found = self.plan->differing(bases.view());
  }
  return to_list<uint32_t>(found);
}

nb::list sample_differing(const Sample& self, nb::handle dst_bases) {
  const auto dst = to_numbers(dst_bases, "dst_bases");
  std::vector<uint32_t> found;
  Status status;
  {
    const nb::gil_scoped_release released;
    status = self.differing(dst, &found);
  }
  raise_unless_ok(status);
  return to_list<uint32_t>(found);
}

void copy_bytes_from_python(nb::handle dst, nb::handle src, nb::handle nbytes) {
  const uint64_t to = to_number(dst, "dst");
  const uint64_t from = to_number(src, "src");
  const uint64_t count = to_number(nbytes, "nbytes", kPlanBytesMax);
  if (count == 0) return;
  if (to == 0 || from == 0) throw nb::value_error("dst or src is null");
  const nb::gil_scoped_release released;
  copy_bytes(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), count);
}

}  // namespace

void add_plan(nb::module_& module) {
  module.attr("ZERO_FILL") = kZeroFill;
  nb::class_<Sample>(module, "Sample", nb::is_final())
      .def_prop_ro("nbytes", &Sample::nbytes)
      .def("differing", &sample_differing, "dst_bases"_a);
  nb::class_<PyPlan>(module, "CopyPlan", nb::is_final())
      .def(
          "__init__",
          [](PyPlan* self, nb::handle src_index, nb::handle src_offset, nb::handle dst_index, nb::handle dst_offset,
             nb::handle nbytes, nb::handle group) {
            new (self) PyPlan(make_plan(src_index, src_offset, dst_index, dst_offset, nbytes, group));
          },
          "src_index"_a, "src_offset"_a, "dst_index"_a, "dst_offset"_a, "nbytes"_a, "group"_a)
      .def_prop_ro("nbytes", [](const PyPlan& self) { return self.plan->nbytes(); })
      .def_prop_ro("piece_count", [](const PyPlan& self) { return self.plan->pieces().size(); })
      .def("run", &run, "src_bases"_a, "dst_bases"_a, "first_piece"_a = 0, "piece_count"_a = -1)
      .def("sample", &sample, "src_bases"_a, "turn"_a, "sample_bytes"_a = 4096, "share_max"_a = 0.0025)
      .def("differing", &plan_differing, "src_bases"_a, "dst_bases"_a);
  module.def("copy_bytes", &copy_bytes_from_python, "dst"_a, "src"_a, "nbytes"_a);
  module.def("copy_kernel", [] { return copy_kernel_name(); });
}

}  // namespace snapd::bind

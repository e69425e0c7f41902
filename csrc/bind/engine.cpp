#include <unistd.h>
#include <cerrno>
#include <memory>
#include <vector>

#include "convert.hpp"
#include "parts.hpp"
#include "plan.hpp"
#include "snapd/copy_engine.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace snapd::bind {
namespace {

struct PyEngine {
  std::shared_ptr<CopyEngine> engine;
};

/// In a forked child the threads that would finish the job do not exist: nothing there may wait for it.
struct PyTicket {
  std::shared_ptr<CopyJob> job;
  pid_t pid = getpid();

  bool is_ours() const { return pid == getpid(); }
  void check_ours() const {
    if (is_ours()) return;
    throw nb::value_error(("the ticket belongs to process " + std::to_string(pid) + ", this is a fork of it").c_str());
  }
};

/// Engines that are alive, for the end of the interpreter. Guarded by the GIL; never destroyed.
std::vector<std::weak_ptr<CopyEngine>>& live_engines() {
  static auto* engines = new std::vector<std::weak_ptr<CopyEngine>>();
  return *engines;
}

/// At the interpreter's end tensors are freed in any order: no copy may be reading them then. Whoever did not close an
/// engine loses the copies that are under way, not the process.
void close_live_engines() {
  std::vector<std::shared_ptr<CopyEngine>> alive;
  for (const auto& weak : live_engines()) {
    if (auto engine = weak.lock()) alive.push_back(std::move(engine));
  }
  const nb::gil_scoped_release released;
  for (const auto& engine : alive) engine->close();
}

PyEngine make_engine(nb::handle thread_count) {
  const uint64_t count = to_number(thread_count, "thread_count", UINT32_MAX);
  std::unique_ptr<CopyEngine> engine;
  raise_unless_ok(CopyEngine::start(static_cast<uint32_t>(count), &engine));
  PyEngine made{std::move(engine)};
  std::erase_if(live_engines(), [](const auto& weak) { return weak.expired(); });
  live_engines().push_back(made.engine);
  return made;
}

PyTicket submit(const PyEngine& self, const PyPlan& plan, nb::handle src_bases, nb::handle dst_bases) {
  auto src = to_numbers(src_bases, "src_bases");
  auto dst = to_numbers(dst_bases, "dst_bases");
  PyTicket ticket;
  raise_unless_ok(self.engine->submit(plan.plan, std::move(src), std::move(dst), &ticket.job));
  return ticket;
}

int to_group(int64_t group) {
  if (group < kAllGroups || group >= static_cast<int64_t>(kGroupCount)) {
    throw nb::value_error(("group is " + std::to_string(group) + ", must be -1 or 0..255").c_str());
  }
  return static_cast<int>(group);
}

bool wait(const PyTicket& self, int64_t group, bool help, double timeout_s) {
  self.check_ours();
  const int checked = to_group(group);
  const int64_t deadline_ns = to_deadline_ns(timeout_s);
  const nb::gil_scoped_release released;
  return self.job->wait(checked, help, deadline_ns);
}

bool fence(const PyTicket& self, int64_t group, double timeout_s) {
  self.check_ours();
  const int checked = to_group(group);
  const int64_t deadline_ns = to_deadline_ns(timeout_s);
  const nb::gil_scoped_release released;
  return self.job->fence(checked, deadline_ns);
}

void cancel(const PyTicket& self) {
  if (!self.is_ours()) return;
  const nb::gil_scoped_release released;
  self.job->cancel();
}

int fileno(const PyTicket& self) {
  self.check_ours();
  const int fd = self.job->event_fd();
  if (fd < 0) raise_unless_ok(Status::system(errno, "eventfd"));
  return fd;
}

void add_ticket(nb::module_& module) {
  nb::class_<PyTicket>(module, "Ticket", nb::is_final())
      .def("wait", &wait, "group"_a = kAllGroups, "help"_a = true, "timeout_s"_a = -1.0)
      .def("fence", &fence, "group"_a = kAllGroups, "timeout_s"_a = -1.0)
      .def(
          "is_done", [](const PyTicket& self, int64_t group) { return self.job->is_done(to_group(group)); },
          "group"_a = kAllGroups)
      .def("progress",
           [](const PyTicket& self) { return nb::make_tuple(self.job->bytes_copied(), self.job->bytes_total()); })
      .def("cancel", &cancel)
      .def("fileno", &fileno)
      .def_prop_ro("is_cancelled", [](const PyTicket& self) { return self.job->is_cancelled(); })
      .def_prop_ro("helped_bytes", [](const PyTicket& self) { return self.job->helped_bytes(); })
      .def_prop_ro("seized_bytes", [](const PyTicket& self) { return self.job->seized_bytes(); })
      .def_prop_ro("started_ns", [](const PyTicket& self) { return self.job->started_ns(); })
      .def_prop_ro("finished_ns", [](const PyTicket& self) { return self.job->finished_ns(); })
      .def_prop_ro("cpu_ns", [](const PyTicket& self) { return self.job->cpu_ns(); });
}

}  // namespace

void add_engine(nb::module_& module) {
  add_ticket(module);
  nb::class_<PyEngine>(module, "CopyEngine", nb::is_final())
      .def(
          "__init__", [](PyEngine* self, nb::handle thread_count) { new (self) PyEngine(make_engine(thread_count)); },
          "thread_count"_a = 1)
      .def("submit", &submit, "plan"_a, "src_bases"_a, "dst_bases"_a)
      .def("close", [](const PyEngine& self) {
        const nb::gil_scoped_release released;
        self.engine->close();
      });
  nb::module_::import_("atexit").attr("register")(nb::cpp_function(&close_live_engines));
}

}  // namespace snapd::bind

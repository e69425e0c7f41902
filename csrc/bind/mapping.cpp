#include "snapd/mapping.hpp"

#include <string>

#include "convert.hpp"
#include "parts.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace snapd::bind {
namespace {

struct PyMapping {
  Mapping mapping;
  Py_ssize_t view_count = 0;  // buffers given out; guarded by the GIL
};

const Mapping& opened(const PyMapping& self) {
  if (self.mapping.is_mapped()) return self.mapping;
  throw nb::value_error("the mapping is closed, or belongs to the parent process");
}

int get_buffer(PyObject* object, Py_buffer* view, int flags) noexcept {
  auto* self = nb::inst_ptr<PyMapping>(object);
  if (!self->mapping.is_mapped()) {
    view->obj = nullptr;
    PyErr_SetString(PyExc_BufferError, "the mapping is closed, or belongs to the parent process");
    return -1;
  }
  const int is_read_only = self->mapping.is_writable() ? 0 : 1;
  const auto nbytes = static_cast<Py_ssize_t>(self->mapping.nbytes());
  if (PyBuffer_FillInfo(view, object, self->mapping.data(), nbytes, is_read_only, flags) != 0) return -1;
  self->view_count += 1;
  return 0;
}

void release_buffer(PyObject* object, Py_buffer*) noexcept { nb::inst_ptr<PyMapping>(object)->view_count -= 1; }

PyType_Slot slots[] = {
    {Py_bf_getbuffer, reinterpret_cast<void*>(&get_buffer)},
    {Py_bf_releasebuffer, reinterpret_cast<void*>(&release_buffer)},
    {0, nullptr},
};

nb::object view(nb::handle object, nb::handle offset, nb::handle nbytes) {
  const Mapping& mapping = opened(nb::cast<const PyMapping&>(object));
  const uint64_t begin = to_number(offset, "offset", mapping.nbytes());
  const uint64_t count = to_number(nbytes, "nbytes", mapping.nbytes() - begin);
  const auto whole = nb::steal<nb::object>(PyMemoryView_FromObject(object.ptr()));
  if (!whole.is_valid()) throw nb::python_error();
  return whole[nb::slice(static_cast<Py_ssize_t>(begin), static_cast<Py_ssize_t>(begin + count))];
}

void close(PyMapping& self) {
  if (self.view_count > 0) {
    throw nb::value_error((std::to_string(self.view_count) + " views of the mapping are alive").c_str());
  }
  self.mapping.unmap();
}

}  // namespace

void add_mapping(nb::module_& module) {
  nb::class_<PyMapping>(module, "Mapping", nb::is_final(), nb::type_slots(slots))
      .def(
          "__init__",
          [](PyMapping* self, nb::handle fd, nb::handle nbytes, bool writable) {
            Mapping mapping;
            const int checked_fd = to_fd(fd, "fd", false);
            raise_unless_ok(Mapping::map(checked_fd, to_number(nbytes, "nbytes", INT64_MAX), writable, &mapping));
            new (self) PyMapping{std::move(mapping)};
          },
          "fd"_a, "nbytes"_a, "writable"_a)
      .def_prop_ro("address", [](const PyMapping& self) { return reinterpret_cast<uintptr_t>(opened(self).data()); })
      .def_prop_ro("nbytes", [](const PyMapping& self) { return self.mapping.nbytes(); })
      .def("populate",
           [](PyMapping& self, nb::handle offset, nb::handle nbytes) {
             const uint64_t size = opened(self).nbytes();
             const uint64_t begin = to_number(offset, "offset", size);
             const uint64_t count = nbytes.is_none() ? size - begin : to_number(nbytes, "nbytes", size - begin);
             self.view_count += 1;  // keeps close() away meanwhile
             Status status;
             {
               const nb::gil_scoped_release released;
               status = self.mapping.populate(begin, count);
             }
             self.view_count -= 1;
             raise_unless_ok(status);
           },
           "offset"_a = 0, "nbytes"_a.none() = nb::none())
      .def("view", &view, "offset"_a, "nbytes"_a)
      .def("close", &close);
}

}  // namespace snapd::bind

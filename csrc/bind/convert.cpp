#include "convert.hpp"

#include <cmath>
#include <cstring>

#include "snapd/copy_job.hpp"

namespace nb = nanobind;

namespace snapd::bind {
namespace {

[[noreturn]] void refuse(const std::string& text) { throw nb::value_error(text.c_str()); }

/// Releases a Py_buffer.
class HeldBuffer {
 public:
  HeldBuffer(nb::handle values, const char* name) {
    if (PyObject_GetBuffer(values.ptr(), &buffer_, PyBUF_FORMAT | PyBUF_ND) != 0) {
      PyErr_Clear();
      refuse(std::string(name) + " is a buffer that is not contiguous");
    }
  }
  ~HeldBuffer() { PyBuffer_Release(&buffer_); }
  HeldBuffer(const HeldBuffer&) = delete;
  HeldBuffer& operator=(const HeldBuffer&) = delete;
  const Py_buffer& get() const { return buffer_; }

 private:
  Py_buffer buffer_{};
};

template <class T>
std::vector<uint64_t> widen(const Py_buffer& buffer, const char* name) {
  const auto* begin = static_cast<const T*>(buffer.buf);
  const std::span<const T> items(begin, static_cast<size_t>(buffer.len) / sizeof(T));
  if constexpr (std::is_signed_v<T>) {
    for (size_t i = 0; i < items.size(); ++i) {
      if (items[i] < 0) {
        refuse(std::string(name) + "[" + std::to_string(i) + "] is " + std::to_string(items[i]) +
               ", must not be negative");
      }
    }
  }
  return std::vector<uint64_t>(items.begin(), items.end());
}

std::vector<uint64_t> from_buffer(nb::handle values, const char* name) {
  const HeldBuffer held(values, name);
  const Py_buffer& buffer = held.get();
  const char* format = buffer.format == nullptr ? "B" : buffer.format;
  if (*format == '@' || *format == '=' || *format == '<') ++format;
  if (buffer.ndim == 1 && std::strlen(format) == 1) {
    const auto nbytes = static_cast<size_t>(buffer.itemsize);
    if (std::strchr("BHILQN", *format) != nullptr) {
      if (nbytes == 8) return widen<uint64_t>(buffer, name);
      if (nbytes == 4) return widen<uint32_t>(buffer, name);
      if (nbytes == 2) return widen<uint16_t>(buffer, name);
      return widen<uint8_t>(buffer, name);
    }
    if (std::strchr("ilqn", *format) != nullptr) {
      if (nbytes == 8) return widen<int64_t>(buffer, name);
      if (nbytes == 4) return widen<int32_t>(buffer, name);
    }
  }
  refuse(std::string(name) + " is a buffer of format '" + format + "' and " + std::to_string(buffer.ndim) +
         " dimensions, wanted one dimension of integers");
}

std::vector<uint64_t> from_sequence(nb::handle values, const char* name) {
  const auto items = nb::steal<nb::object>(PySequence_Fast(values.ptr(), ""));
  if (!items.is_valid()) {
    PyErr_Clear();
    refuse(std::string(name) + " is " + Py_TYPE(values.ptr())->tp_name + ", wanted a sequence of integers");
  }
  const auto count = static_cast<size_t>(PySequence_Fast_GET_SIZE(items.ptr()));
  PyObject** const objects = PySequence_Fast_ITEMS(items.ptr());
  std::vector<uint64_t> result(count);
  for (size_t i = 0; i < count; ++i) {
    result[i] = PyLong_Check(objects[i]) ? PyLong_AsUnsignedLongLong(objects[i]) : UINT64_MAX;
    if (result[i] != UINT64_MAX) continue;
    // All bits set is also what a failure looks like.
    if (PyLong_Check(objects[i]) && !PyErr_Occurred()) continue;
    PyErr_Clear();
    const std::string shown = nb::repr(nb::handle(objects[i])).c_str();
    refuse(std::string(name) + "[" + std::to_string(i) + "] is " + shown.substr(0, 100) +
           ", wanted an integer in 0..2^64-1");
  }
  return result;
}

}  // namespace

void raise_unless_ok(const Status& status) {
  switch (status.code) {
    case Code::kOk:
      return;
    case Code::kInvalid:
      refuse(status.text);
    case Code::kSystem:
      break;
  }
  const nb::object arguments = nb::make_tuple(status.system_errno, status.text.c_str());
  PyErr_SetObject(PyExc_OSError, arguments.ptr());
  throw nb::python_error();
}

uint64_t to_number(nb::handle value, const char* name, uint64_t max) {
  const auto whole = nb::steal<nb::object>(PyNumber_Index(value.ptr()));
  const uint64_t result = whole.is_valid() ? PyLong_AsUnsignedLongLong(whole.ptr()) : 0;
  if (PyErr_Occurred() != nullptr || result > max) {
    PyErr_Clear();
    const std::string shown = nb::repr(value).c_str();
    refuse(std::string(name) + " is " + shown.substr(0, 100) + ", wanted an integer in 0.." + std::to_string(max));
  }
  return result;
}

int to_fd(nb::handle value, const char* name, bool may_be_none) {
  int overflow = 0;
  const auto whole = nb::steal<nb::object>(PyNumber_Index(value.ptr()));
  const long result = whole.is_valid() ? PyLong_AsLongAndOverflow(whole.ptr(), &overflow) : -2;
  if (PyErr_Occurred() != nullptr) PyErr_Clear();
  if (overflow != 0 || result < (may_be_none ? -1 : 0) || result > INT32_MAX) {
    const std::string shown = nb::repr(value).c_str();
    refuse(std::string(name) + " is " + shown.substr(0, 100) + ", wanted a file descriptor");
  }
  return static_cast<int>(result);
}

int64_t to_deadline_ns(double timeout_s) {
  constexpr double kForeverS = 1e9;
  if (std::isnan(timeout_s)) refuse("timeout_s is not a number");
  if (timeout_s < 0 || timeout_s > kForeverS) return -1;
  return monotonic_ns() + static_cast<int64_t>(timeout_s * 1e9);
}

std::vector<uint64_t> to_numbers(nb::handle values, const char* name) {
  return PyObject_CheckBuffer(values.ptr()) != 0 ? from_buffer(values, name) : from_sequence(values, name);
}

}  // namespace snapd::bind

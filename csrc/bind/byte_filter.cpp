#include "snapd/byte_filter.hpp"

#include <string>

#include "convert.hpp"
#include "parts.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace snapd::bind {
namespace {

/// A contiguous buffer of bytes, held while it is used.
class HeldBytes {
 public:
  HeldBytes(nb::handle object, const char* name, bool is_writable) {
    if (PyObject_GetBuffer(object.ptr(), &buffer_, is_writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) != 0) {
      PyErr_Clear();
      const char* wanted = is_writable ? ", wanted a writable contiguous buffer" : ", wanted a contiguous buffer";
      throw nb::value_error((std::string(name) + " is " + Py_TYPE(object.ptr())->tp_name + wanted).c_str());
    }
  }
  ~HeldBytes() { PyBuffer_Release(&buffer_); }
  HeldBytes(const HeldBytes&) = delete;
  HeldBytes& operator=(const HeldBytes&) = delete;
  uint8_t* data() const { return static_cast<uint8_t*>(buffer_.buf); }
  size_t nbytes() const { return static_cast<size_t>(buffer_.len); }

 private:
  Py_buffer buffer_{};
};

using Filter = void (*)(uint8_t*, const uint8_t*, size_t, size_t) noexcept;

void apply(Filter filter, nb::handle source, nb::handle destination, nb::handle width_object) {
  const uint64_t width = to_number(width_object, "width", 8);
  if (!is_filter_width(width)) {
    throw nb::value_error(("width is " + std::to_string(width) + ", wanted 2, 4 or 8").c_str());
  }
  const HeldBytes src(source, "src", false);
  const HeldBytes dst(destination, "dst", true);
  if (src.nbytes() != dst.nbytes()) {
    throw nb::value_error(
        ("dst has " + std::to_string(dst.nbytes()) + " bytes, src has " + std::to_string(src.nbytes())).c_str());
  }
  if (dst.data() < src.data() + src.nbytes() && src.data() < dst.data() + dst.nbytes()) {
    throw nb::value_error("dst and src overlap");
  }
  const nb::gil_scoped_release released;
  filter(dst.data(), src.data(), src.nbytes(), width);
}

}  // namespace

void add_byte_filter(nb::module_& module) {
  module.def(
      "shuffle_bytes", [](nb::handle src, nb::handle dst, nb::handle width) { apply(&shuffle_bytes, src, dst, width); },
      "src"_a, "dst"_a, "width"_a);
  module.def(
      "unshuffle_bytes",
      [](nb::handle src, nb::handle dst, nb::handle width) { apply(&unshuffle_bytes, src, dst, width); }, "src"_a,
      "dst"_a, "width"_a);
  module.def("byte_filter", [] { return byte_filter_name(); });
}

}  // namespace snapd::bind

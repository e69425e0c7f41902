// The module: a list of its areas.
#include <cstdlib>
#include <string>

#include <nanobind/nanobind.h>

#include "parts.hpp"
#include "snapd/copy_kernel.hpp"

namespace nb = nanobind;

NB_MODULE(snapd_native, module) {
  // A trainer may exit with tickets alive; that is no defect of its code.
  nb::set_leak_warnings(false);
  if (const char* name = std::getenv("SNAPD_COPY_KERNEL"); name != nullptr && *name != '\0') {
    if (!snapd::select_copy_kernel(name)) {
      throw nb::value_error(("SNAPD_COPY_KERNEL is '" + std::string(name).substr(0, 64) +
                             "', this processor has no such kernel (avx512, avx2, sse2, scalar)")
                                .c_str());
    }
  }
  snapd::bind::add_plan(module);
  snapd::bind::add_engine(module);
  snapd::bind::add_mapping(module);
  snapd::bind::add_control_page(module);
  snapd::bind::add_byte_filter(module);
}

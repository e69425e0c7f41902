// What each area of the module adds to it.
#pragma once

#include <nanobind/nanobind.h>

namespace snapd::bind {

void add_plan(nanobind::module_& module);
void add_engine(nanobind::module_& module);
void add_mapping(nanobind::module_& module);
void add_control_page(nanobind::module_& module);
void add_byte_filter(nanobind::module_& module);

}  // namespace snapd::bind

// Python arguments to C++ values and statuses to exceptions. Every message names the argument.
#pragma once

#include <nanobind/nanobind.h>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "snapd/status.hpp"

namespace snapd::bind {

/// Raise ValueError or OSError (with its errno) unless `status` is good.
void raise_unless_ok(const Status& status);

/// A whole number within [0, max]. ValueError otherwise.
uint64_t to_number(nanobind::handle value, const char* name, uint64_t max = UINT64_MAX);

/// A descriptor, or -1 where that is allowed.
int to_fd(nanobind::handle value, const char* name, bool may_be_none);

/// Seconds, negative for "for ever", to a CLOCK_MONOTONIC deadline in ns, -1 for "never".
int64_t to_deadline_ns(double timeout_s);

/// Numbers from a buffer of integers (one-dimensional, contiguous; copied without touching Python objects) or from a
/// sequence. Negative numbers and other types are a ValueError.
std::vector<uint64_t> to_numbers(nanobind::handle values, const char* name);

/// A list of ints.
template <class T>
nanobind::list to_list(std::span<const T> values) {
  nanobind::list result;
  for (const T value : values) result.append(nanobind::int_(value));
  return result;
}

}  // namespace snapd::bind

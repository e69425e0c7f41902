// CopyPlan as Python holds it.
#pragma once

#include <nanobind/nanobind.h>
#include <memory>
#include <vector>

#include "snapd/copy_plan.hpp"
#include "snapd/sampling.hpp"

namespace snapd::bind {

struct PyPlan {
  std::shared_ptr<const CopyPlan> plan;
  std::shared_ptr<const Sampler> sampler;
};

/// Bases that own their numbers.
struct HeldBases {
  std::vector<uint64_t> src;
  std::vector<uint64_t> dst;
  Bases view() const { return {src, dst}; }
};

}  // namespace snapd::bind

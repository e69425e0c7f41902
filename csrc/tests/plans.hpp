// Plans for tests.
#pragma once

#include "harness.hpp"
#include "snapd/copy_plan.hpp"

namespace snapd::test {

/// Columns that own their numbers.
struct Columns {
  std::vector<uint64_t> src_index, src_offset, dst_index, dst_offset, nbytes, group;

  void add(uint64_t src, uint64_t src_at, uint64_t dst, uint64_t dst_at, uint64_t n, uint64_t g) {
    src_index.push_back(src);
    src_offset.push_back(src_at);
    dst_index.push_back(dst);
    dst_offset.push_back(dst_at);
    nbytes.push_back(n);
    group.push_back(g);
  }
  PlanColumns view() const { return {src_index, src_offset, dst_index, dst_offset, nbytes, group}; }
};

/// A plan from several sources into one destination of `total` bytes, and what it must produce.
struct Scene {
  std::shared_ptr<const CopyPlan> plan;
  std::vector<std::vector<uint8_t>> sources;
  std::vector<uint8_t> destination;
  std::vector<uint8_t> expected;

  std::vector<uint64_t> src_bases() const {
    std::vector<uint64_t> bases;
    for (const auto& source : sources) bases.push_back(address(source.data()));
    return bases;
  }
  std::vector<uint64_t> dst_bases() const { return {address(destination.data())}; }
};

/// Random pieces, in shuffled order, of `group_count` groups; some are zero fill, some empty.
inline Scene random_scene(uint64_t seed, size_t piece_count, size_t nbytes_max, uint64_t group_count) {
  std::mt19937_64 random(seed);
  Scene scene;
  Columns columns;
  uint64_t at = random() % 100;
  for (size_t i = 0; i < piece_count; ++i) {
    const uint64_t n = random() % 8 == 0 ? 0 : random() % nbytes_max;
    const uint64_t skip_bytes = random() % 50;
    scene.sources.push_back(random_bytes(n + skip_bytes + 1, random()));
    const bool is_zero = random() % 10 == 0;
    columns.add(is_zero ? kZeroFill : i, skip_bytes, 0, at, n, random() % group_count);
    scene.expected.resize(at + n, 0xEE);
    for (uint64_t k = 0; k < n; ++k) scene.expected[at + k] = is_zero ? 0 : scene.sources[i][skip_bytes + k];
    at += n + random() % 3;
  }
  scene.expected.resize(at + 64, 0xEE);
  scene.destination.assign(scene.expected.size(), 0xEE);
  const Status status = CopyPlan::build(columns.view(), &scene.plan);
  CHECK(status.ok());
  return scene;
}

}  // namespace snapd::test

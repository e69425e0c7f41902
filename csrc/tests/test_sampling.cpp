#include <algorithm>
#include <set>

#include "plans.hpp"
#include "snapd/sampling.hpp"

using namespace snapd;
using namespace snapd::test;

namespace {

/// Three sources of very different size, cut across pieces that lie apart in the destination.
Scene cut_scene() {
  Scene scene;
  Columns columns;
  uint64_t at = 0;
  const auto add = [&](uint64_t index, uint64_t offset, uint64_t n) {
    columns.add(index, offset, 0, at, n, 0);
    at += n + 37;
  };
  for (const size_t nbytes : {1'000'000, 9'999, 10}) scene.sources.push_back(random_bytes(nbytes, nbytes));
  add(0, 0, 300'001);
  add(1, 0, 5'000);
  add(0, 300'001, 699'999);
  add(2, 0, 10);
  add(1, 5'000, 4'999);
  columns.add(kZeroFill, 0, 0, at, 1'000, 0);
  scene.destination.assign(at + 1'000, 0);
  CHECK(CopyPlan::build(columns.view(), &scene.plan).ok());
  const auto src = scene.src_bases();
  const auto dst = scene.dst_bases();
  scene.plan->run({src, dst}, 0, columns.nbytes.size());
  return scene;
}

}  // namespace

CASE("sample: equal bytes do not differ, and the limits hold") {
  const Scene scene = cut_scene();
  const Sampler sampler(scene.plan);
  const auto src = scene.src_bases();
  const auto dst = scene.dst_bases();
  for (uint64_t turn = 0; turn < 500; ++turn) {
    for (const double share : {0.0, 0.00001, 0.001, 0.004, 0.01, 1.0}) {
      const auto sample = sampler.take({src, {}}, turn, {4096, share});
      CHECK(sample->nbytes() <= static_cast<uint64_t>(static_cast<double>(scene.plan->nbytes()) * share));
      CHECK(sample->nbytes() <= 2 * 4096 + 10);
      if (share == 1.0) CHECK(sample->nbytes() >= 576 + 1807 + 10);  // the last windows of a source are shorter
      std::vector<uint32_t> differing{9};
      CHECK(sample->differing(dst, &differing).ok());
      CHECK(differing.empty());
    }
  }
}

CASE("sample: every byte of every source is looked at within one round of its windows") {
  Scene scene = cut_scene();
  const Sampler sampler(scene.plan);
  const auto src = scene.src_bases();
  const auto dst = scene.dst_bases();
  const uint64_t windows = (1'000'000 + 4095) / 4096;
  std::mt19937_64 random(1);
  for (int i = 0; i < 12; ++i) {
    const uint32_t source = static_cast<uint32_t>(i % 3);
    uint8_t& byte = scene.sources[source][random() % scene.sources[source].size()];
    byte ^= 0x40;
    int found = 0;
    for (uint64_t turn = 1000; turn < 1000 + windows; ++turn) {
      std::vector<uint32_t> differing;
      CHECK(sampler.take({src, {}}, turn, {4096, 1.0})->differing(dst, &differing).ok());
      if (differing == std::vector<uint32_t>{source}) ++found;
    }
    CHECK(found >= 1);
    byte ^= 0x40;
  }
}

CASE("sample: with too small a budget the sources take turns, all of them") {
  Scene scene;
  Columns columns;
  constexpr uint64_t kSources = 50;
  for (uint64_t i = 0; i < kSources; ++i) {
    scene.sources.push_back(random_bytes(20'000, i));
    columns.add(i, 0, 0, i * 20'000, 20'000, 0);
  }
  scene.destination.assign(kSources * 20'000, 0);  // differs everywhere: what is sampled is what is reported
  CHECK(CopyPlan::build(columns.view(), &scene.plan).ok());
  const Sampler sampler(scene.plan);
  const auto src = scene.src_bases();
  const auto dst = scene.dst_bases();
  std::set<uint32_t> seen;
  for (uint64_t turn = 0; turn < 15; ++turn) {
    const auto sample = sampler.take({src, {}}, turn, {4096, 0.02});
    CHECK(sample->nbytes() > 0 && sample->nbytes() <= 20'000);
    std::vector<uint32_t> differing;
    CHECK(sample->differing(dst, &differing).ok());
    CHECK(differing.size() <= 5);
    seen.insert(differing.begin(), differing.end());
  }
  CHECK_EQUAL(seen.size(), kSources);
}

CASE("sample: missing destinations are refused") {
  const Scene scene = cut_scene();
  const Sampler sampler(scene.plan);
  const auto src = scene.src_bases();
  const auto sample = sampler.take({src, {}}, 0, {4096, 1.0});
  std::vector<uint32_t> differing;
  CHECK(!sample->differing({}, &differing).ok());
  const std::vector<uint64_t> null{0};
  CHECK(!sample->differing(null, &differing).ok());
}

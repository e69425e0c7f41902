#include "plans.hpp"

using namespace snapd;
using namespace snapd::test;

CASE("plan: blocks are bounded, in order of group, and cover every byte once") {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    const Scene scene = random_scene(seed, 40, 900'000, 5);
    const CopyPlan& plan = *scene.plan;
    uint64_t sum = 0;
    uint32_t part = 0;
    for (uint32_t i = 0; i < plan.blocks().size(); ++i) {
      const Block& block = plan.blocks()[i];
      uint64_t block_sum = 0;
      CHECK_EQUAL(block.first_part, part);
      for (const Piece& p : plan.parts().subspan(block.first_part, block.part_count)) block_sum += p.nbytes;
      CHECK_EQUAL(block.nbytes, block_sum);
      CHECK(block.nbytes > 0 && block.nbytes <= kBlockBytesMax);
      CHECK(i == 0 || plan.group_of(i - 1) <= plan.group_of(i));
      CHECK(plan.group_begin(plan.group_of(i)) <= i && i < plan.group_begin(plan.group_of(i) + 1));
      part += block.part_count;
      sum += block_sum;
    }
    CHECK_EQUAL(part, plan.parts().size());
    CHECK_EQUAL(sum, plan.nbytes());
  }
}

CASE("plan: run() copies the pieces that were named, and no other byte") {
  Scene scene = random_scene(7, 60, 5'000, 3);
  const auto src = scene.src_bases();
  const auto dst = scene.dst_bases();
  CHECK(scene.plan->check({src, dst}).ok());
  scene.plan->run({src, dst}, 0, 30);
  CHECK(scene.destination != scene.expected);
  scene.plan->run({src, dst}, 30, 30);
  CHECK(scene.destination == scene.expected);
  CHECK(scene.plan->differing({src, dst}).empty());
}

CASE("plan: differing() names the sources, sorted") {
  Columns columns;
  columns.add(2, 0, 0, 0, 100, 0);
  columns.add(0, 0, 0, 100, 100, 0);
  columns.add(2, 100, 0, 200, 100, 0);
  std::shared_ptr<const CopyPlan> plan;
  CHECK(CopyPlan::build(columns.view(), &plan).ok());
  const auto a = random_bytes(200, 1);
  auto b = random_bytes(200, 2);
  std::vector<uint8_t> destination(300);
  const std::vector<uint64_t> src{address(a.data()), 0, address(b.data())};
  const std::vector<uint64_t> dst{address(destination.data())};
  plan->run({src, dst}, 0, 3);
  CHECK(plan->differing({src, dst}).empty());
  b[199] ^= 1;
  CHECK(plan->differing({src, dst}) == std::vector<uint32_t>{2});
  destination[150] ^= 1;
  CHECK((plan->differing({src, dst}) == std::vector<uint32_t>{0, 2}));
}

CASE("plan: what is out of bounds is refused by name") {
  std::shared_ptr<const CopyPlan> plan;
  const auto refused = [&](uint64_t src, uint64_t dst, uint64_t n, uint64_t group, const char* word) {
    Columns columns;
    columns.add(src, 0, dst, 0, n, group);
    const Status status = CopyPlan::build(columns.view(), &plan);
    return status.code == Code::kInvalid && status.text.find(word) != std::string::npos && plan == nullptr;
  };
  CHECK(refused(uint64_t{kZeroFill} + 1, 0, 1, 0, "src_index[0] is 4294967296"));
  CHECK(refused(0, kZeroFill, 1, 0, "dst_index"));
  CHECK(refused(0, 0, kPlanBytesMax + 1, 0, "nbytes"));
  CHECK(refused(0, 0, 1, 256, "group[0] is 256"));
  Columns uneven;
  uneven.add(0, 0, 0, 0, 1, 0);
  uneven.group.clear();
  CHECK(!CopyPlan::build(uneven.view(), &plan).ok());
}

CASE("plan: bases that are missing or null are refused, unless nothing uses them") {
  Columns columns;
  columns.add(1, 0, 1, 0, 10, 0);
  columns.add(3, 0, 0, 0, 0, 0);
  std::shared_ptr<const CopyPlan> plan;
  CHECK(CopyPlan::build(columns.view(), &plan).ok());
  const std::vector<uint64_t> all{0, 64, 0, 0};
  const std::vector<uint64_t> few{0};
  const std::vector<uint64_t> null{0, 0, 0, 0};
  CHECK(plan->check({all, all}).ok());
  CHECK(!plan->check({few, all}).ok());
  CHECK(!plan->check({all, few}).ok());
  CHECK(!plan->check({null, all}).ok());
  CHECK(!plan->check({all, null}).ok());
}

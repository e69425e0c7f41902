#include <algorithm>
#include <string>

#include "harness.hpp"
#include "snapd/copy_kernel.hpp"

using namespace snapd;
using namespace snapd::test;

namespace {

/// Runs `body` with each kernel that this processor has.
template <class Body>
void with_each_kernel(Body body) {
  for (const char* name : {"scalar", "sse2", "avx2", "avx512"}) {
    if (select_copy_kernel(name)) body(name);
  }
  select_copy_kernel(nullptr);
}

}  // namespace

CASE("kernel: copies exactly the bytes asked for, at any alignment and length") {
  with_each_kernel([](const char* name) {
    const auto source = random_bytes(70'000, 1);
    std::mt19937_64 random(2);
    for (int i = 0; i < 3'000; ++i) {
      const size_t nbytes = i < 1'200 ? static_cast<size_t>(i) : random() % 60'000;
      const size_t from = random() % 130;
      const size_t to = random() % 130;
      std::vector<uint8_t> destination(nbytes + 300, 0xA5);
      std::vector<uint8_t> expected = destination;
      std::copy_n(source.begin() + static_cast<long>(from), nbytes, expected.begin() + static_cast<long>(to));
      copy_bytes(destination.data() + to, source.data() + from, nbytes);
      if (destination != expected) {
        fail(__FILE__, __LINE__, std::string(name) + ", " + std::to_string(nbytes) + " bytes");
        return;
      }
    }
  });
}

CASE("kernel: writes nothing without a permit, and stops when it is withdrawn") {
  with_each_kernel([](const char*) {
    const auto source = random_bytes(40'000, 3);
    std::vector<uint8_t> destination(source.size(), 0);
    const std::atomic<uint8_t> state{7};
    CHECK(!copy_revocable(destination.data() + 3, source.data(), 39'000, Permit{&state, 6}));
    CHECK_EQUAL(std::count(destination.begin(), destination.end(), 0), 40'000);
    CHECK(copy_revocable(destination.data() + 3, source.data(), 39'000, Permit{&state, 7}));
    CHECK(std::equal(source.begin(), source.begin() + 39'000, destination.begin() + 3));
  });
}

CASE("kernel: unknown names change nothing") {
  const std::string before = copy_kernel_name();
  CHECK(!select_copy_kernel("mmx"));
  CHECK(!select_copy_kernel(""));
  CHECK_EQUAL(std::string(copy_kernel_name()), before);
  CHECK(select_copy_kernel("scalar"));
  CHECK_EQUAL(std::string(copy_kernel_name()), "scalar");
  CHECK(select_copy_kernel(nullptr));
  CHECK_EQUAL(std::string(copy_kernel_name()), before);
}

CASE("kernel: zero fill") {
  std::vector<uint8_t> destination(1000, 0xFF);
  fill_zero(destination.data() + 1, 998);
  CHECK_EQUAL(std::count(destination.begin(), destination.end(), 0), 998);
  CHECK(destination.front() == 0xFF && destination.back() == 0xFF);
}

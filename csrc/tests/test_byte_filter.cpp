#include <algorithm>
#include <string>

#include "harness.hpp"
#include "snapd/byte_filter.hpp"

using namespace snapd;
using namespace snapd::test;

namespace {

/// Runs `body` with each kernel that this processor has.
template <class Body>
void with_each_filter(Body body) {
  for (const char* name : {"scalar", "sse2", "avx2"}) {
    if (select_byte_filter(name)) body(name);
  }
  select_byte_filter(nullptr);
}

/// The definition, in the plainest words.
std::vector<uint8_t> planes_of(const uint8_t* data, size_t nbytes, size_t width) {
  std::vector<uint8_t> result;
  const size_t count = nbytes / width;
  for (size_t plane = 0; plane < width; ++plane) {
    for (size_t i = 0; i < count; ++i) result.push_back(data[i * width + plane]);
  }
  result.insert(result.end(), data + count * width, data + nbytes);
  return result;
}

}  // namespace

CASE("filter: planes are those of the definition, and come back, at any length and alignment") {
  with_each_filter([](const char* name) {
    const auto source = random_bytes(9'000, 11);
    std::mt19937_64 random(12);
    for (const size_t width : {2, 4, 8}) {
      for (size_t i = 0; i < 1'100; ++i) {
        const size_t nbytes = i < 700 ? i : random() % 8'000;
        const size_t from = random() % 70;
        const size_t to = random() % 70;
        std::vector<uint8_t> shuffled(nbytes + 200, 0xA5);
        shuffle_bytes(shuffled.data() + to, source.data() + from, nbytes, width);
        const auto expected = planes_of(source.data() + from, nbytes, width);
        std::vector<uint8_t> back(nbytes + 200, 0x5A);
        unshuffle_bytes(back.data() + from, shuffled.data() + to, nbytes, width);
        const bool is_right = std::equal(expected.begin(), expected.end(), shuffled.begin() + static_cast<long>(to));
        const bool is_back =
            std::equal(source.begin() + static_cast<long>(from), source.begin() + static_cast<long>(from + nbytes),
                       back.begin() + static_cast<long>(from));
        // Nothing beside the destination was touched.
        const auto spared = std::count(shuffled.begin(), shuffled.begin() + static_cast<long>(to), 0xA5) +
                            std::count(shuffled.begin() + static_cast<long>(to + nbytes), shuffled.end(), 0xA5);
        if (!is_right || !is_back || spared != 200) {
          fail(__FILE__, __LINE__,
               std::string(name) + ", width " + std::to_string(width) + ", " + std::to_string(nbytes) + " bytes");
          return;
        }
      }
    }
  });
}

CASE("filter: unknown names change nothing") {
  const std::string before = byte_filter_name();
  CHECK(!select_byte_filter("mmx"));
  CHECK_EQUAL(std::string(byte_filter_name()), before);
  CHECK(select_byte_filter("scalar"));
  CHECK_EQUAL(std::string(byte_filter_name()), "scalar");
  CHECK(select_byte_filter(nullptr));
  CHECK_EQUAL(std::string(byte_filter_name()), before);
}

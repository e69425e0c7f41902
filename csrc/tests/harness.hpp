// A very small test harness: named cases, checks that say what they compared.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <sstream>
#include <string>
#include <vector>

namespace snapd::test {

struct Case {
  const char* name;
  std::function<void()> body;
};

/// All cases of the program, in order of registration.
std::vector<Case>& cases();
/// Count a failure and print it.
void fail(const char* file, int line, const std::string& text);
/// Note that a case cannot run here, and why; it then counts as skipped.
void skip(const std::string& why);

struct Registration {
  Registration(const char* name, std::function<void()> body) { cases().push_back({name, std::move(body)}); }
};

template <class A, class B>
void check_equal(const A& a, const B& b, const char* text, const char* file, int line) {
  if (a == b) return;
  std::ostringstream message;
  message << text << ": " << a << " != " << b;
  fail(file, line, message.str());
}

inline std::vector<uint8_t> random_bytes(size_t count, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<uint8_t> bytes(count);
  size_t at = 0;
  for (; at + 8 <= count; at += 8) {
    const uint64_t word = random();
    std::memcpy(bytes.data() + at, &word, 8);
  }
  for (; at < count; ++at) bytes[at] = static_cast<uint8_t>(random());
  return bytes;
}

inline uint64_t address(const void* pointer) { return reinterpret_cast<uint64_t>(pointer); }

}  // namespace snapd::test

#define SNAPD_JOIN2(a, b) a##b
#define SNAPD_JOIN(a, b) SNAPD_JOIN2(a, b)
#define CASE(name)                                                                                              \
  static void SNAPD_JOIN(case_, __LINE__)();                                                                    \
  static const snapd::test::Registration SNAPD_JOIN(registered_, __LINE__)(name, &SNAPD_JOIN(case_, __LINE__)); \
  static void SNAPD_JOIN(case_, __LINE__)()
#define CHECK(condition) \
  if (!(condition)) snapd::test::fail(__FILE__, __LINE__, #condition)
#define CHECK_EQUAL(a, b) snapd::test::check_equal((a), (b), #a " == " #b, __FILE__, __LINE__)

#include "harness.hpp"

#include <cstdio>
#include <cstring>

namespace snapd::test {
namespace {

int failure_count = 0;
int skipped_count = 0;

}  // namespace

std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

void fail(const char* file, int line, const std::string& text) {
  ++failure_count;
  std::printf("%s:%d: %s\n", file, line, text.c_str());
}

void skip(const std::string& why) {
  ++skipped_count;
  std::printf("    skipped: %s\n", why.c_str());
}

}  // namespace snapd::test

/// Runs the cases whose name contains the first argument (all without one). Exit status 1 if a check failed or none
/// ran.
int main(int argc, char** argv) {
  using namespace snapd::test;
  int run_count = 0;
  int failed_count = 0;
  for (const Case& test : cases()) {
    if (argc > 1 && std::strstr(test.name, argv[1]) == nullptr) continue;
    const int before = failure_count;
    std::printf("- %s\n", test.name);
    std::fflush(stdout);
    test.body();
    ++run_count;
    failed_count += failure_count > before ? 1 : 0;
  }
  std::printf("%d passed, %d failed, %d skipped\n", run_count - failed_count - skipped_count, failed_count,
              skipped_count);
  return failed_count > 0 || run_count == 0 ? 1 : 0;
}

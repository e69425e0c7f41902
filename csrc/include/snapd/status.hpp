// What the core returns instead of throwing.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

namespace snapd {

enum class Code : uint8_t {
  kOk,
  kInvalid,  // an argument or a file is not what it must be: the caller's fault
  kSystem,   // a system call failed; `system_errno` says how
};

/// An outcome. `text` names the offending argument and its value.
struct [[nodiscard]] Status {
  Code code = Code::kOk;
  int system_errno = 0;
  std::string text;

  bool ok() const noexcept { return code == Code::kOk; }

  static Status good() { return {}; }
  static Status invalid(std::string text) { return {Code::kInvalid, 0, std::move(text)}; }
  static Status system(int error, std::string text) { return {Code::kSystem, error, std::move(text)}; }
};

}  // namespace snapd

// A few bytes of each source, kept for a later comparison with the copy.
//
// Version counters do not see every write (fused optimizers, raw pointers), so at the fence some bytes of the source
// are kept or were kept earlier, and compared with the destination. Which bytes: windows that move from turn to turn,
// in an order that visits every window of a source once before it comes back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "snapd/copy_plan.hpp"

namespace snapd {

/// Hands out byte buffers and takes them back, so that sampling costs no fresh pages. Shared by a sampler's samples.
class BufferPool {
 public:
  std::vector<uint8_t> take();
  void give_back(std::vector<uint8_t> buffer) noexcept;

 private:
  static constexpr size_t kKeptMax = 4;
  std::mutex mutex_;
  std::vector<std::vector<uint8_t>> kept_;
};

class Sample {
 public:
  explicit Sample(std::shared_ptr<BufferPool> pool) : pool_(std::move(pool)), kept_(pool_->take()) {}
  ~Sample() { pool_->give_back(std::move(kept_)); }
  Sample(const Sample&) = delete;
  Sample& operator=(const Sample&) = delete;

  uint64_t nbytes() const noexcept { return nbytes_; }
  /// Sorted source indexes whose kept bytes differ from those at the destination.
  /// Invalid if a destination base is missing or null.
  Status differing(std::span<const uint64_t> dst_bases, std::vector<uint32_t>* out) const;

 private:
  friend class Sampler;
  struct Window {
    uint64_t dst_offset;
    uint32_t src_index;
    uint32_t dst_index;
    uint32_t nbytes;
  };
  std::shared_ptr<BufferPool> pool_;
  std::vector<Window> windows_;
  std::vector<uint8_t> kept_;  // the windows' bytes, one after the other
  uint64_t nbytes_ = 0;
};

struct SampleLimits {
  uint64_t bytes_per_source = 4096;
  double share_max = 0.0025;  // of the plan's bytes, 0..1
};

/// Knows where each source's bytes lie in a plan.
class Sampler {
 public:
  explicit Sampler(std::shared_ptr<const CopyPlan> plan);

  /// Keep bytes of the sources. The bases were checked against the plan. In turn t + 1 other windows are kept than in
  /// t; where `share_max` does not suffice for a window of every source, turns take the sources in rotation.
  std::unique_ptr<Sample> take(Bases bases, uint64_t turn, SampleLimits limits) const;

 private:
  struct Source {
    uint32_t src_index;
    uint32_t first_extent;
    uint32_t extent_count;
    uint64_t nbytes;
  };
  struct Extent {
    uint64_t begin;  // in the source's bytes that are copied, counted from 0
    uint32_t piece;
  };
  void keep(Sample& sample, Bases bases, const Source& source, uint64_t begin, uint64_t nbytes) const;
  void keep_turn(Sample& sample, Bases bases, const Source& source, uint64_t visit, uint64_t window_bytes) const;

  std::shared_ptr<const CopyPlan> plan_;
  std::shared_ptr<BufferPool> pool_;
  std::vector<Source> sources_;
  std::vector<Extent> extents_;
};

}  // namespace snapd

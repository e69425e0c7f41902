#include "snapd/sampling.hpp"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>

namespace snapd {
namespace {

__extension__ using Wide = unsigned __int128;

/// A step through 0..count-1 that visits all of them and neighbours late.
uint64_t coprime_stride(uint64_t count) noexcept {
  uint64_t stride = std::max<uint64_t>(1, count / 1000 * 618 + count % 1000 * 618 / 1000);
  while (std::gcd(stride, count) != 1) --stride;
  return stride;
}

}  // namespace

std::vector<uint8_t> BufferPool::take() {
  const std::lock_guard lock(mutex_);
  if (kept_.empty()) return {};
  std::vector<uint8_t> buffer = std::move(kept_.back());
  kept_.pop_back();
  return buffer;
}

void BufferPool::give_back(std::vector<uint8_t> buffer) noexcept {
  const std::lock_guard lock(mutex_);
  if (kept_.size() < kKeptMax) kept_.push_back(std::move(buffer));
}

Status Sample::differing(std::span<const uint64_t> dst_bases, std::vector<uint32_t>* out) const {
  out->clear();
  size_t at = 0;
  for (const Window& window : windows_) {
    if (window.dst_index >= dst_bases.size() || dst_bases[window.dst_index] == 0) {
      return Status::invalid("dst_bases[" + std::to_string(window.dst_index) + "] is missing or null");
    }
    const auto* copy = reinterpret_cast<const uint8_t*>(dst_bases[window.dst_index] + window.dst_offset);
    if (std::memcmp(kept_.data() + at, copy, window.nbytes) != 0) out->push_back(window.src_index);
    at += window.nbytes;
  }
  std::sort(out->begin(), out->end());
  out->erase(std::unique(out->begin(), out->end()), out->end());
  return Status::good();
}

Sampler::Sampler(std::shared_ptr<const CopyPlan> plan) : plan_(std::move(plan)), pool_(std::make_shared<BufferPool>()) {
  const auto pieces = plan_->pieces();
  std::vector<uint32_t> order;
  for (uint32_t i = 0; i < pieces.size(); ++i) {
    if (pieces[i].src_index != kZeroFill && pieces[i].nbytes > 0) order.push_back(i);
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](uint32_t a, uint32_t b) { return pieces[a].src_index < pieces[b].src_index; });
  for (const uint32_t i : order) {
    if (sources_.empty() || sources_.back().src_index != pieces[i].src_index) {
      sources_.push_back({pieces[i].src_index, static_cast<uint32_t>(extents_.size()), 0, 0});
    }
    Source& source = sources_.back();
    extents_.push_back({source.nbytes, i});
    source.extent_count += 1;
    source.nbytes += pieces[i].nbytes;
  }
}

std::unique_ptr<Sample> Sampler::take(Bases bases, uint64_t turn, SampleLimits limits) const {
  auto sample = std::make_unique<Sample>(pool_);
  const auto budget = static_cast<uint64_t>(static_cast<double>(plan_->nbytes()) * limits.share_max);
  uint64_t window_bytes = limits.bytes_per_source;
  const auto total = [&] {
    uint64_t sum = 0;
    for (const Source& source : sources_) sum += std::min(window_bytes, source.nbytes);
    return sum;
  };
  uint64_t all_bytes = total();
  if (budget == 0 || all_bytes == 0) return sample;
  if (all_bytes <= budget) {
    for (const Source& source : sources_) keep_turn(*sample, bases, source, turn, window_bytes);
    return sample;
  }
  // The sources' windows lie on a ring; each turn takes those that begin in the next stretch of it. The stretch is one
  // window shorter than the budget, because the last window may reach beyond it.
  window_bytes = std::min(window_bytes, std::max<uint64_t>(1, budget / 2));
  all_bytes = total();
  const uint64_t stretch = std::max<uint64_t>(1, std::min(budget - window_bytes, all_bytes));
  const Wide from = Wide{turn} * stretch;
  const auto lap = static_cast<uint64_t>(from / all_bytes);
  const auto begin = static_cast<uint64_t>(from % all_bytes);
  uint64_t at = 0;
  for (const Source& source : sources_) {
    if (at >= begin && at < begin + stretch) keep_turn(*sample, bases, source, lap, window_bytes);
    if (at + all_bytes < begin + stretch) keep_turn(*sample, bases, source, lap + 1, window_bytes);
    at += std::min(window_bytes, source.nbytes);
  }
  return sample;
}

void Sampler::keep_turn(Sample& sample, Bases bases, const Source& source, uint64_t visit,
                        uint64_t window_bytes) const {
  const uint64_t width = std::min(window_bytes, source.nbytes);
  if (width == 0) return;
  const uint64_t windows = (source.nbytes + width - 1) / width;
  const uint64_t stride = coprime_stride(windows);
  const auto index = static_cast<uint64_t>((Wide{visit % windows} * stride + source.src_index) % windows);
  keep(sample, bases, source, index * width, std::min(width, source.nbytes - index * width));
}

void Sampler::keep(Sample& sample, Bases bases, const Source& source, uint64_t begin, uint64_t nbytes) const {
  const auto first = extents_.begin() + source.first_extent;
  const auto last = first + source.extent_count;
  auto extent = std::upper_bound(first, last, begin, [](uint64_t at, const Extent& e) { return at < e.begin; }) - 1;
  while (nbytes > 0) {
    const Piece& piece = plan_->pieces()[extent->piece];
    const uint64_t offset = begin - extent->begin;
    const uint64_t n = std::min(nbytes, piece.nbytes - offset);
    const auto* from = reinterpret_cast<const uint8_t*>(bases.src[piece.src_index] + piece.src_offset + offset);
    if (sample.kept_.size() < sample.nbytes_ + n) sample.kept_.resize(std::max(sample.nbytes_ + n, 2 * sample.nbytes_));
    std::memcpy(sample.kept_.data() + sample.nbytes_, from, n);
    sample.windows_.push_back({piece.dst_offset + offset, piece.src_index, piece.dst_index, static_cast<uint32_t>(n)});
    sample.nbytes_ += n;
    begin += n;
    nbytes -= n;
    ++extent;
  }
}

}  // namespace snapd

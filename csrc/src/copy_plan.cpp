#include "snapd/copy_plan.hpp"

#include <algorithm>
#include <cstring>
#include <string>

#include "snapd/copy_kernel.hpp"

namespace snapd {
namespace {

constexpr uint64_t kAddressMax = uint64_t{1} << 62;

Status bad_entry(const char* column, size_t at, uint64_t value, const char* why) {
  return Status::invalid(std::string(column) + "[" + std::to_string(at) + "] is " + std::to_string(value) + ": " + why);
}

Status check_columns(const PlanColumns& c) {
  const size_t n = c.nbytes.size();
  if (c.src_index.size() != n || c.src_offset.size() != n || c.dst_index.size() != n || c.dst_offset.size() != n ||
      c.group.size() != n) {
    return Status::invalid("the columns of a plan must be of equal length, nbytes has " + std::to_string(n));
  }
  if (n > kPieceCountMax) return Status::invalid("a plan has at most 2^24 pieces, not " + std::to_string(n));
  for (size_t i = 0; i < n; ++i) {
    if (c.src_index[i] > kZeroFill) return bad_entry("src_index", i, c.src_index[i], "not an index");
    if (c.dst_index[i] >= kZeroFill) return bad_entry("dst_index", i, c.dst_index[i], "not an index");
    if (c.src_offset[i] > kAddressMax) return bad_entry("src_offset", i, c.src_offset[i], "too large");
    if (c.dst_offset[i] > kAddressMax) return bad_entry("dst_offset", i, c.dst_offset[i], "too large");
    if (c.nbytes[i] > kAddressMax) return bad_entry("nbytes", i, c.nbytes[i], "too large");
    if (c.group[i] >= kGroupCount) return bad_entry("group", i, c.group[i], "groups are 0..255");
  }
  return Status::good();
}

}  // namespace

Status CopyPlan::build(const PlanColumns& columns, std::shared_ptr<const CopyPlan>* out) {
  if (Status status = check_columns(columns); !status.ok()) return status;
  std::shared_ptr<CopyPlan> plan(new CopyPlan());
  plan->pieces_.reserve(columns.nbytes.size());
  for (size_t i = 0; i < columns.nbytes.size(); ++i) {
    const Piece piece{columns.src_offset[i], columns.dst_offset[i], columns.nbytes[i],
                      static_cast<uint32_t>(columns.src_index[i]), static_cast<uint32_t>(columns.dst_index[i])};
    plan->pieces_.push_back(piece);
    plan->nbytes_ += piece.nbytes;
    if (plan->nbytes_ > kPlanBytesMax) return bad_entry("nbytes", i, piece.nbytes, "a plan has at most 2^42 bytes");
    if (piece.src_index != kZeroFill) plan->src_count_ = std::max(plan->src_count_, piece.src_index + 1);
    plan->dst_count_ = std::max(plan->dst_count_, piece.dst_index + 1);
  }
  plan->cut(columns.group);
  *out = std::move(plan);
  return Status::good();
}

void CopyPlan::cut(std::span<const uint64_t> group) {
  std::vector<uint32_t> order(pieces_.size());
  for (uint32_t i = 0; i < order.size(); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return group[a] < group[b]; });
  size_t at = 0;
  for (uint32_t g = 0; g < kGroupCount; ++g) {
    group_begin_[g] = static_cast<uint32_t>(blocks_.size());
    for (; at < order.size() && group[order[at]] == g; ++at) cut_piece(pieces_[order[at]], group_begin_[g]);
    block_group_.resize(blocks_.size(), static_cast<uint8_t>(g));
  }
  group_begin_[kGroupCount] = static_cast<uint32_t>(blocks_.size());
}

void CopyPlan::cut_piece(const Piece& piece, uint32_t first_block_of_group) {
  Piece rest = piece;
  while (rest.nbytes > 0) {
    Piece part = rest;
    // Cut where the destination crosses a multiple of the block size, so that all later cuts are aligned.
    part.nbytes = std::min<uint64_t>(rest.nbytes, kBlockBytesMax - rest.dst_offset % kBlockBytesMax);
    const bool may_join = blocks_.size() > first_block_of_group && blocks_.back().part_count < kBlockPartsMax &&
                          blocks_.back().nbytes + part.nbytes <= kBlockBytesMax;
    if (may_join) {
      blocks_.back().part_count += 1;
      blocks_.back().nbytes += static_cast<uint32_t>(part.nbytes);
    } else {
      blocks_.push_back({static_cast<uint32_t>(parts_.size()), 1, static_cast<uint32_t>(part.nbytes)});
    }
    parts_.push_back(part);
    rest.src_offset += part.nbytes;
    rest.dst_offset += part.nbytes;
    rest.nbytes -= part.nbytes;
  }
}

Status CopyPlan::check(Bases bases) const {
  if (Status status = check_sources(bases.src); !status.ok()) return status;
  if (bases.dst.size() < dst_count_) {
    return Status::invalid("dst_bases has " + std::to_string(bases.dst.size()) + " entries, the plan uses " +
                           std::to_string(dst_count_));
  }
  for (const Piece& piece : pieces_) {
    if (piece.nbytes > 0 && bases.dst[piece.dst_index] == 0) {
      return bad_entry("dst_bases", piece.dst_index, 0, "null, but used");
    }
  }
  return Status::good();
}

Status CopyPlan::check_sources(std::span<const uint64_t> src) const {
  if (src.size() < src_count_) {
    return Status::invalid("src_bases has " + std::to_string(src.size()) + " entries, the plan uses " +
                           std::to_string(src_count_));
  }
  for (const Piece& piece : pieces_) {
    if (piece.nbytes > 0 && piece.src_index != kZeroFill && src[piece.src_index] == 0) {
      return bad_entry("src_bases", piece.src_index, 0, "null, but used");
    }
  }
  return Status::good();
}

void CopyPlan::run(Bases bases, size_t first, size_t count) const noexcept {
  for (const Piece& piece : std::span(pieces_).subspan(first, count)) {
    if (piece.nbytes == 0) continue;
    auto* dst = reinterpret_cast<uint8_t*>(bases.dst[piece.dst_index] + piece.dst_offset);
    if (piece.src_index == kZeroFill) {
      fill_zero(dst, piece.nbytes);
    } else {
      copy_bytes(dst, reinterpret_cast<const uint8_t*>(bases.src[piece.src_index] + piece.src_offset), piece.nbytes);
    }
  }
}

std::vector<uint32_t> CopyPlan::differing(Bases bases) const {
  std::vector<uint32_t> result;
  for (const Piece& piece : pieces_) {
    if (piece.src_index == kZeroFill || piece.nbytes == 0) continue;
    const auto* src = reinterpret_cast<const uint8_t*>(bases.src[piece.src_index] + piece.src_offset);
    const auto* dst = reinterpret_cast<const uint8_t*>(bases.dst[piece.dst_index] + piece.dst_offset);
    if (std::memcmp(src, dst, piece.nbytes) != 0) result.push_back(piece.src_index);
  }
  std::sort(result.begin(), result.end());
  result.erase(std::unique(result.begin(), result.end()), result.end());
  return result;
}

}  // namespace snapd

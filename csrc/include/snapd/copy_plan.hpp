// Which bytes go where, relative to bases that are given anew for each copy, cut into blocks of bounded size.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "snapd/status.hpp"

namespace snapd {

/// As a source index: the piece is filled with zeroes.
inline constexpr uint32_t kZeroFill = UINT32_MAX;
/// A helper never waits longer than for one block that another thread is in the middle of.
inline constexpr size_t kBlockBytesMax = size_t{256} << 10;
inline constexpr uint32_t kBlockPartsMax = 1024;
inline constexpr uint32_t kGroupCount = 256;
inline constexpr uint32_t kPieceCountMax = 1u << 24;
inline constexpr uint64_t kPlanBytesMax = uint64_t{1} << 42;

/// `nbytes` from src_bases[src_index] + src_offset to dst_bases[dst_index] + dst_offset.
struct Piece {
  uint64_t src_offset;
  uint64_t dst_offset;
  uint64_t nbytes;
  uint32_t src_index;
  uint32_t dst_index;
};

/// Pieces (or parts of one) that are copied in one go: parts [first_part, first_part + part_count).
struct Block {
  uint32_t first_part;
  uint32_t part_count;
  uint32_t nbytes;
};

/// What the pieces refer to. A base is an address as a number.
struct Bases {
  std::span<const uint64_t> src;
  std::span<const uint64_t> dst;
};

/// The columns of a plan as a caller has them; of equal length.
struct PlanColumns {
  std::span<const uint64_t> src_index;  // kZeroFill, or an index into the source bases
  std::span<const uint64_t> src_offset;
  std::span<const uint64_t> dst_index;
  std::span<const uint64_t> dst_offset;
  std::span<const uint64_t> nbytes;
  std::span<const uint64_t> group;  // 0..255; lower ones are copied first
};

/// Immutable once built, so any number of threads may read it.
class CopyPlan {
 public:
  /// Check and cut. On failure `*out` is untouched.
  static Status build(const PlanColumns& columns, std::shared_ptr<const CopyPlan>* out);

  /// The pieces as given.
  std::span<const Piece> pieces() const noexcept { return pieces_; }
  /// Pieces cut at block boundaries, in the order in which they are copied: by group, then as given.
  std::span<const Piece> parts() const noexcept { return parts_; }
  std::span<const Block> blocks() const noexcept { return blocks_; }
  /// Blocks of `group` are [group_begin(group), group_begin(group + 1)).
  uint32_t group_begin(uint32_t group) const noexcept { return group_begin_[group]; }
  uint32_t group_of(uint32_t block) const noexcept { return block_group_[block]; }
  uint64_t nbytes() const noexcept { return nbytes_; }
  /// Number of distinct source indexes is at most this; 0 if all is zero fill.
  uint32_t src_count() const noexcept { return src_count_; }
  uint32_t dst_count() const noexcept { return dst_count_; }

  /// Are these enough bases, none of those used null?
  Status check(Bases bases) const;
  Status check_sources(std::span<const uint64_t> src) const;

  /// Copy pieces [first, first + count) in the calling thread. The bases were checked.
  void run(Bases bases, size_t first, size_t count) const noexcept;

  /// Sorted source indexes of which some byte differs from its destination (zero fill is not compared).
  std::vector<uint32_t> differing(Bases bases) const;

 private:
  CopyPlan() = default;
  void cut(std::span<const uint64_t> group);
  void cut_piece(const Piece& piece, uint32_t first_block_of_group);

  std::vector<Piece> pieces_;
  std::vector<Piece> parts_;
  std::vector<Block> blocks_;
  std::vector<uint8_t> block_group_;
  std::array<uint32_t, kGroupCount + 1> group_begin_{};
  uint64_t nbytes_ = 0;
  uint32_t src_count_ = 0;
  uint32_t dst_count_ = 0;
};

}  // namespace snapd

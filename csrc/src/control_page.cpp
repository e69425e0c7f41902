#include "snapd/control_page.hpp"

namespace snapd {

size_t page_bytes(uint32_t lane_count, uint32_t entry_capacity) noexcept {
  if (lane_count < 1 || lane_count > kLaneCountMax) return 0;
  if (entry_capacity < 1 || entry_capacity > kEntryCapacityMax) return 0;
  // Whole cache lines per lane, so that every lane header is aligned.
  const size_t tables = (size_t{entry_capacity} * (sizeof(Entry) + sizeof(Frame)) + 63) / 64 * 64;
  return sizeof(PageHeader) + lane_count * (sizeof(LaneHeader) + tables);
}

}  // namespace snapd

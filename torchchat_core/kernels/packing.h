// From rows of quantised weights, as they are stored, to the panels of quantized_linear.h, in moves of four bytes.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "quantized_linear.h"

namespace torchchat {

constexpr int64_t kBlocksAtOnce = 4;  // of a row: with four bits one line of the cache, of which nothing is read twice

struct StoredRows {
  const uint8_t* values;  // [rows, row_bytes]: a column each or, with four bits, the even one in the lower half
  int64_t rows, columns, row_bytes;
  const uint16_t *scales, *offsets;  // float16 [rows, groups]; no offsets: null
};

// 32 columns of four bits, neighbours in one byte -> 16 bytes with columns i and i + 16 in one byte.
inline void split_halves(const uint8_t* pairs, uint8_t* out) {
  constexpr uint64_t lower = 0x0F0F0F0F0F0F0F0F;
  uint64_t first, second;
  std::memcpy(&first, pairs, 8);
  std::memcpy(&second, pairs + 8, 8);
  const uint64_t even = (first & lower) | (second & lower) << 4, odd = (first >> 4 & lower) | (second & ~lower);
  uint8_t evens[8], odds[8];
  std::memcpy(evens, &even, 8);
  std::memcpy(odds, &odd, 8);
  for (int i = 0; i < 8; ++i) {
    out[2 * i] = evens[i];
    out[2 * i + 1] = odds[i];
  }
}

// One row of a block, whole: its quads go to the places of that row.
template <int Bits>
inline void put_row(const uint8_t* row, int64_t lane, uint8_t* block) {
  constexpr int64_t bytes = kBlockColumns * Bits / 8;
  uint8_t halves[bytes];
  if (Bits == 4) split_halves(row, halves);
  const uint8_t* from = Bits == 4 ? halves : row;
  for (int64_t quad = 0; quad < bytes / 4; ++quad)
    std::memcpy(block + (quad * kPanelRows + lane) * 4, from + quad * 4, 4);
}

// The same for a row of `count` columns, 0 to 31; the others become `zero`.
template <int Bits>
inline void put_short_row(const uint8_t* row, int64_t count, uint8_t zero, int64_t lane, uint8_t* block) {
  uint8_t whole[kBlockColumns * Bits / 8];
  std::memset(whole, Bits == 4 ? zero | zero << 4 : zero, sizeof whole);
  std::memcpy(whole, row, count * Bits / 8);
  if (Bits == 4 && count % 2) whole[count / 2] = (row[count / 2] & 15) | zero << 4;
  put_row<Bits>(whole, lane, block);
}

inline void put_scales(const StoredRows& stored, const uint16_t* numbers, int64_t panel, const PanelLayout& layout,
                       int64_t group, uint8_t* out) {
  uint16_t lanes[kPanelRows] = {};
  const int64_t first = panel * kPanelRows, count = std::min(kPanelRows, stored.rows - first);
  for (int64_t lane = 0; lane < count; ++lane) lanes[lane] = numbers[(first + lane) * layout.groups() + group];
  std::memcpy(out, lanes, sizeof lanes);
}

template <int Bits>
inline void pack_panel(const PanelLayout& layout, const StoredRows& stored, int64_t panel, uint8_t* out) {
  const int64_t first = panel * kPanelRows, whole_blocks = stored.columns / kBlockColumns;
  const auto zero = static_cast<uint8_t>(layout.zero());
  const auto place = [&](int64_t block) {
    return out + block * layout.block_bytes() + block / layout.group * layout.scale_bytes();
  };
  for (int64_t start = 0; start < layout.blocks; start += kBlocksAtOnce)
    for (int64_t lane = 0; lane < kPanelRows; ++lane) {
      const int64_t row = first + lane, end = std::min(start + kBlocksAtOnce, layout.blocks);
      const uint8_t* from = stored.values + row * stored.row_bytes;
      for (int64_t block = start; block < end; ++block) {
        const uint8_t* columns = from + block * kBlockColumns * Bits / 8;
        if (row >= stored.rows) put_short_row<Bits>(nullptr, 0, zero, lane, place(block));
        else if (block < whole_blocks) put_row<Bits>(columns, lane, place(block));
        else put_short_row<Bits>(columns, stored.columns % kBlockColumns, zero, lane, place(block));
      }
    }
  for (int64_t group = 0; group < layout.groups(); ++group) {
    uint8_t* at = out + std::min((group + 1) * layout.group, layout.blocks) * layout.block_bytes() +
                  group * layout.scale_bytes();
    put_scales(stored, stored.scales, panel, layout, group, at);
    if (stored.offsets != nullptr) put_scales(stored, stored.offsets, panel, layout, group, at + kPanelRows * 2);
  }
}

}  // namespace torchchat

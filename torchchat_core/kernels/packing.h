// From rows of quantised weights, as they are stored, to the panels of quantized_linear.h, four rows at a time.

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
  for (int i = 0; i < 8; ++i) {
    out[2 * i] = (pairs[i] & 15) | pairs[i + 8] << 4;
    out[2 * i + 1] = pairs[i] >> 4 | (pairs[i + 8] & 0xF0);
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

#if defined(__x86_64__)
inline __m128i split_halves(const uint8_t* pairs) {
  const __m128i lower = _mm_set1_epi8(15);
  const __m128i first = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(pairs));
  const __m128i second = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(pairs + 8));
  const __m128i even = _mm_or_si128(_mm_and_si128(first, lower), _mm_slli_epi16(_mm_and_si128(second, lower), 4));
  const __m128i odd = _mm_or_si128(_mm_and_si128(_mm_srli_epi16(first, 4), lower), _mm_andnot_si128(lower, second));
  return _mm_unpacklo_epi8(even, odd);
}

// Four quads of four rows, `step` bytes apart, from `lane` on: a transposition of four by four. SSE2, which every
// x86-64 processor has.
template <int Bits>
inline void put_four_rows(const uint8_t* rows, int64_t step, int64_t lane, uint8_t* block) {
  for (int64_t part = 0; part < Bits / 4; ++part) {
    __m128i found[4];
    for (int64_t i = 0; i < 4; ++i)
      found[i] = Bits == 4 ? split_halves(rows + i * step)
                           : _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + i * step + part * 16));
    const __m128i a = _mm_unpacklo_epi32(found[0], found[1]), b = _mm_unpacklo_epi32(found[2], found[3]);
    const __m128i c = _mm_unpackhi_epi32(found[0], found[1]), d = _mm_unpackhi_epi32(found[2], found[3]);
    const __m128i quads[4] = {_mm_unpacklo_epi64(a, b), _mm_unpackhi_epi64(a, b), _mm_unpacklo_epi64(c, d),
                              _mm_unpackhi_epi64(c, d)};
    for (int64_t i = 0; i < 4; ++i)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(block + ((part * 4 + i) * kPanelRows + lane) * 4), quads[i]);
  }
}
#else
template <int Bits>
inline void put_four_rows(const uint8_t* rows, int64_t step, int64_t lane, uint8_t* block) {
  for (int64_t i = 0; i < 4; ++i) put_row<Bits>(rows + i * step, lane + i, block);
}
#endif

// The same for a row of `count` columns, 0 to 31; the others become `zero`.
template <int Bits>
inline void put_short_row(const uint8_t* row, int64_t count, uint8_t zero, int64_t lane, uint8_t* block) {
  uint8_t whole[kBlockColumns * Bits / 8];
  std::memset(whole, Bits == 4 ? zero | zero << 4 : zero, sizeof whole);
  if (count > 0) std::memcpy(whole, row, count * Bits / 8);  // of rows behind the last there is no memory
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
  const int64_t full = stored.rows - first >= kPanelRows ? whole_blocks : 0;  // blocks without a place to be filled
  const uint8_t* rows = stored.values + first * stored.row_bytes;
  for (int64_t start = 0; start < full; start += kBlocksAtOnce)
    for (int64_t lane = 0; lane < kPanelRows; lane += 4)
      for (int64_t block = start; block < std::min(start + kBlocksAtOnce, full); ++block)
        put_four_rows<Bits>(rows + lane * stored.row_bytes + block * kBlockColumns * Bits / 8, stored.row_bytes, lane,
                            place(block));
  for (int64_t block = full; block < layout.blocks; ++block)
    for (int64_t lane = 0; lane < kPanelRows; ++lane) {
      const uint8_t* columns = rows + lane * stored.row_bytes + block * kBlockColumns * Bits / 8;
      if (first + lane >= stored.rows) put_short_row<Bits>(nullptr, 0, zero, lane, place(block));
      else if (block < whole_blocks) put_row<Bits>(columns, lane, place(block));
      else put_short_row<Bits>(columns, stored.columns % kBlockColumns, zero, lane, place(block));
    }
  for (int64_t group = 0; group < layout.groups(); ++group) {
    uint8_t* at = out + std::min((group + 1) * layout.group, layout.blocks) * layout.block_bytes() +
                  group * layout.scale_bytes();
    put_scales(stored, stored.scales, panel, layout, group, at);
    if (stored.offsets != nullptr) put_scales(stored, stored.offsets, panel, layout, group, at + kPanelRows * 2);
  }
}

}  // namespace torchchat

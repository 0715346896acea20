// Products of a few rows of float32 weights with rows of activations. One row is limited by how fast the matrix is read,
// many by arithmetic: tiles of a few rows of weights and of activations share what they load. A sum is formed in the
// same order in every tile, so that a row's products do not depend on those beside it.

#pragma once

#include <cstdint>

#include "quantized_linear.h"

namespace torchchat {

// weights [count, columns] and x [rows, stride], of whose rows `columns` count -> out [rows, width], first `count` of each.
using MultiplyFloatRows = void (*)(const float* weights, int64_t count, const float* x, int64_t stride, int64_t rows,
                                   int64_t columns, float* out, int64_t width);

inline float multiply_float_row_portable(const float* weights, const float* x, int64_t columns) {
  float sum = 0;
  for (int64_t i = 0; i < columns; ++i) sum += weights[i] * x[i];
  return sum;
}

inline void multiply_float_rows_portable(const float* weights, int64_t count, const float* x, int64_t stride, int64_t rows,
                                         int64_t columns, float* out, int64_t width) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < count; ++i)
      out[row * width + i] = multiply_float_row_portable(weights + i * columns, x + row * stride, columns);
}

// Covers [count, rows] with tiles of `Tile::kCount` by `Tile::kRows`, and with smaller ones at the edges. One row has
// tiles of one by one: a matrix that is read once is read in one stream.
template <int Rows, typename Tile>
void cover_band(int64_t count, int64_t row, const Tile& tile) {
  constexpr int kCount = Rows == 1 ? 1 : Tile::kCount;
  int64_t i = 0;
  for (; i + kCount <= count; i += kCount) tile.template multiply<kCount, Rows>(i, row);
  for (; i < count; ++i) tile.template multiply<1, Rows>(i, row);
}

template <typename Tile>
void cover_with_tiles(int64_t count, int64_t rows, const Tile& tile) {
  int64_t row = 0;
  for (; row + Tile::kRows <= rows; row += Tile::kRows) cover_band<Tile::kRows>(count, row, tile);
  for (; row + 2 <= rows; row += 2) cover_band<2>(count, row, tile);
  for (; row < rows; ++row) cover_band<1>(count, row, tile);
}

#if defined(__x86_64__)

struct FloatTile {
  const float *weights, *x;
  int64_t stride, columns;
  float* out;
  int64_t width;
};

struct FloatTileAvx2 : FloatTile {
  static constexpr int kCount = 1, kRows = 2;  // 8 of the 16 registers hold sums

  template <int Count, int Rows>
  TORCHCHAT_AVX2 void multiply(int64_t first, int64_t row) const {
    const int64_t whole = columns / 32 * 32;
    const float *w = weights + first * columns, *a = x + row * stride;
    __m256 sums[Count][Rows][4];
    for (auto& each : sums)
      for (auto& four : each)
        for (__m256& sum : four) sum = _mm256_setzero_ps();
    for (int64_t i = 0; i < whole; i += 32)
#pragma GCC unroll 4
      for (int part = 0; part < 4; ++part) {
        __m256 loaded[Count];
        for (int c = 0; c < Count; ++c) loaded[c] = _mm256_loadu_ps(w + c * columns + i + part * 8);
        for (int r = 0; r < Rows; ++r)
          for (int c = 0; c < Count; ++c)
            sums[c][r][part] = _mm256_fmadd_ps(loaded[c], _mm256_loadu_ps(a + r * stride + i + part * 8),
                                               sums[c][r][part]);
      }
    for (int c = 0; c < Count; ++c)
      for (int r = 0; r < Rows; ++r) {
        const __m256* each = sums[c][r];
        const __m256 sum = _mm256_add_ps(_mm256_add_ps(each[0], each[1]), _mm256_add_ps(each[2], each[3]));
        __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
        four = _mm_add_ps(four, _mm_movehl_ps(four, four));
        out[(row + r) * width + first + c] =
            _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four))) +
            multiply_float_row_portable(w + c * columns + whole, a + r * stride + whole, columns - whole);
      }
  }
};

struct FloatTileAvx512 : FloatTile {
  static constexpr int kCount = 2, kRows = 3;  // 24 of the 32 registers hold sums

  template <int Count, int Rows>
  TORCHCHAT_AVX512 void multiply(int64_t first, int64_t row) const {
    constexpr int64_t kAhead = 512;  // elements
    const int64_t whole = columns / 64 * 64;
    const float *w = weights + first * columns, *a = x + row * stride;
    __m512 sums[Count][Rows][4];
    for (auto& each : sums)
      for (auto& four : each)
        for (__m512& sum : four) sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < whole; i += 64)
#pragma GCC unroll 4
      for (int part = 0; part < 4; ++part) {
        __m512 loaded[Count];
        for (int c = 0; c < Count; ++c) {
          const float* from = w + c * columns + i + part * 16;
          if constexpr (Rows == 1) _mm_prefetch(reinterpret_cast<const char*>(from + kAhead), _MM_HINT_T0);
          loaded[c] = _mm512_loadu_ps(from);
        }
        for (int r = 0; r < Rows; ++r) {
          const __m512 activations = _mm512_loadu_ps(a + r * stride + i + part * 16);
          for (int c = 0; c < Count; ++c)
            sums[c][r][part] = _mm512_fmadd_ps(loaded[c], activations, sums[c][r][part]);
        }
      }
    for (int64_t i = whole; i < columns; i += 16) {
      const auto which = static_cast<__mmask16>(columns - i >= 16 ? 0xffff : (1u << (columns - i)) - 1);
      for (int r = 0; r < Rows; ++r) {
        const __m512 activations = _mm512_maskz_loadu_ps(which, a + r * stride + i);
        for (int c = 0; c < Count; ++c)
          sums[c][r][0] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(which, w + c * columns + i), activations, sums[c][r][0]);
      }
    }
    for (int c = 0; c < Count; ++c)
      for (int r = 0; r < Rows; ++r) {
        const __m512* each = sums[c][r];
        out[(row + r) * width + first + c] =
            _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(each[0], each[1]), _mm512_add_ps(each[2], each[3])));
      }
  }
};

template <typename Tile>
void multiply_float_rows_tiled(const float* weights, int64_t count, const float* x, int64_t stride, int64_t rows,
                               int64_t columns, float* out, int64_t width) {
  cover_with_tiles(count, rows, Tile{{weights, x, stride, columns, out, width}});
}

#endif

inline MultiplyFloatRows choose_multiply_float_rows(Instructions instructions) {
#if defined(__x86_64__)
  if (instructions >= Instructions::kAvx512) return multiply_float_rows_tiled<FloatTileAvx512>;
  if (instructions == Instructions::kAvx2) return multiply_float_rows_tiled<FloatTileAvx2>;
#endif
  return multiply_float_rows_portable;
}

}  // namespace torchchat

// Products of float32 weights that are near, with a few rows of activations. Weights lie in panels of 16 outputs, column
// by column, so that the numbers of a vector belong to 16 outputs and never have to be added up: for short rows that is
// most of the work. The matrix is copied for it, which is worth its memory where there is little of it.

#pragma once

#include <cstdint>
#include <vector>

#include "quantized_linear.h"

namespace torchchat {

constexpr int kFloatParts = 4;  // sums of an output, each of every fourth column: the same in every form of the product

// panel [columns, 16] and x [rows, stride], of whose rows `columns` count -> out [rows, 16]. A row's products are the same
// bit for bit however many there are.
using MultiplyFloatPanel = void (*)(const float* panel, int64_t columns, const float* x, int64_t stride, int64_t rows,
                                    float* out);

// A matrix [outputs, columns] in panels: [panels, columns, 16]. Outputs beyond the matrix weigh nothing.
inline std::vector<float> float_panels_of(const float* weights, int64_t outputs, int64_t columns) {
  std::vector<float> packed(panels_of(outputs) * columns * kPanelRows);
  for (int64_t output = 0; output < outputs; ++output) {
    float* panel = packed.data() + output / kPanelRows * columns * kPanelRows + output % kPanelRows;
    for (int64_t column = 0; column < columns; ++column) panel[column * kPanelRows] = weights[output * columns + column];
  }
  return packed;
}

inline void multiply_float_panel_portable(const float* panel, int64_t columns, const float* x, int64_t stride,
                                          int64_t rows, float* out) {
  for (int64_t row = 0; row < rows; ++row) {
    float sums[kFloatParts][kPanelRows] = {};
    for (int64_t column = 0; column < columns; ++column)
      for (int64_t i = 0; i < kPanelRows; ++i)
        sums[column % kFloatParts][i] += panel[column * kPanelRows + i] * x[row * stride + column];
    for (int64_t i = 0; i < kPanelRows; ++i)
      out[row * kPanelRows + i] = (sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i]);
  }
}

#if defined(__x86_64__)

template <int Rows>
TORCHCHAT_AVX2 void multiply_float_panel_rows_avx2(const float* panel, int64_t columns, const float* x, int64_t stride,
                                                   float* out) {
  const int64_t whole = columns / kFloatParts * kFloatParts;
  for (int half = 0; half < 2; ++half) {
    const float* weights = panel + half * 8;
    __m256 sums[Rows][kFloatParts];
    for (auto& each : sums)
      for (__m256& sum : each) sum = _mm256_setzero_ps();
    for (int64_t column = 0; column < whole; column += kFloatParts)
#pragma GCC unroll 4
      for (int part = 0; part < kFloatParts; ++part) {
        const __m256 loaded = _mm256_loadu_ps(weights + (column + part) * kPanelRows);
        for (int row = 0; row < Rows; ++row)
          sums[row][part] = _mm256_fmadd_ps(loaded, _mm256_set1_ps(x[row * stride + column + part]), sums[row][part]);
      }
#pragma GCC unroll 4
    for (int part = 0; part < kFloatParts; ++part)
      if (whole + part < columns)
        for (int row = 0; row < Rows; ++row)
          sums[row][part] = _mm256_fmadd_ps(_mm256_loadu_ps(weights + (whole + part) * kPanelRows),
                                            _mm256_set1_ps(x[row * stride + whole + part]), sums[row][part]);
    for (int row = 0; row < Rows; ++row)
      _mm256_storeu_ps(out + row * kPanelRows + half * 8, _mm256_add_ps(_mm256_add_ps(sums[row][0], sums[row][1]),
                                                                        _mm256_add_ps(sums[row][2], sums[row][3])));
  }
}

inline void multiply_float_panel_avx2(const float* panel, int64_t columns, const float* x, int64_t stride, int64_t rows,
                                      float* out) {
  int64_t row = 0;
  for (; row + 3 <= rows; row += 3)
    multiply_float_panel_rows_avx2<3>(panel, columns, x + row * stride, stride, out + row * kPanelRows);
  for (; row < rows; ++row)
    multiply_float_panel_rows_avx2<1>(panel, columns, x + row * stride, stride, out + row * kPanelRows);
}

template <int Rows>
TORCHCHAT_AVX512 void multiply_float_panel_rows_avx512(const float* panel, int64_t columns, const float* x,
                                                       int64_t stride, float* out) {
  const int64_t whole = columns / kFloatParts * kFloatParts;
  __m512 sums[Rows][kFloatParts];
  for (auto& each : sums)
    for (__m512& sum : each) sum = _mm512_setzero_ps();
  for (int64_t column = 0; column < whole; column += kFloatParts)
#pragma GCC unroll 4
    for (int part = 0; part < kFloatParts; ++part) {
      const __m512 loaded = _mm512_loadu_ps(panel + (column + part) * kPanelRows);
      for (int row = 0; row < Rows; ++row)
        sums[row][part] = _mm512_fmadd_ps(loaded, _mm512_set1_ps(x[row * stride + column + part]), sums[row][part]);
    }
#pragma GCC unroll 4
  for (int part = 0; part < kFloatParts; ++part)
    if (whole + part < columns)
      for (int row = 0; row < Rows; ++row)
        sums[row][part] = _mm512_fmadd_ps(_mm512_loadu_ps(panel + (whole + part) * kPanelRows),
                                          _mm512_set1_ps(x[row * stride + whole + part]), sums[row][part]);
  for (int row = 0; row < Rows; ++row)
    _mm512_storeu_ps(out + row * kPanelRows, _mm512_add_ps(_mm512_add_ps(sums[row][0], sums[row][1]),
                                                           _mm512_add_ps(sums[row][2], sums[row][3])));
}

inline void multiply_float_panel_avx512(const float* panel, int64_t columns, const float* x, int64_t stride,
                                        int64_t rows, float* out) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4)
    multiply_float_panel_rows_avx512<4>(panel, columns, x + row * stride, stride, out + row * kPanelRows);
  for (; row + 2 <= rows; row += 2)
    multiply_float_panel_rows_avx512<2>(panel, columns, x + row * stride, stride, out + row * kPanelRows);
  for (; row < rows; ++row)
    multiply_float_panel_rows_avx512<1>(panel, columns, x + row * stride, stride, out + row * kPanelRows);
}

#endif

inline MultiplyFloatPanel choose_multiply_float_panel(Instructions instructions) {
#if defined(__x86_64__)
  if (instructions >= Instructions::kAvx512) return multiply_float_panel_avx512;
  if (instructions == Instructions::kAvx2) return multiply_float_panel_avx2;
#endif
  return multiply_float_panel_portable;
}

}  // namespace torchchat

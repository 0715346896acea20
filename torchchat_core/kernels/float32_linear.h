// The product of one row of float32 weights with one row of activations: limited by how fast the matrix is read.

#pragma once

#include <cstdint>

#include "quantized_linear.h"

namespace torchchat {

using MultiplyFloatRow = float (*)(const float* weights, const float* x, int64_t columns);

inline float multiply_float_row_portable(const float* weights, const float* x, int64_t columns) {
  float sum = 0;
  for (int64_t i = 0; i < columns; ++i) sum += weights[i] * x[i];
  return sum;
}

#if defined(__x86_64__)

TORCHCHAT_AVX2 inline float multiply_float_row_avx2(const float* weights, const float* x, int64_t columns) {
  const int64_t whole = columns / 32 * 32;
  __m256 sums[4] = {};
  for (int64_t i = 0; i < whole; i += 32)
    for (int part = 0; part < 4; ++part)
      sums[part] = _mm256_fmadd_ps(_mm256_loadu_ps(weights + i + part * 8), _mm256_loadu_ps(x + i + part * 8),
                                   sums[part]);
  const __m256 sum = _mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3]));
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four))) +
         multiply_float_row_portable(weights + whole, x + whole, columns - whole);
}

TORCHCHAT_AVX512 inline float multiply_float_row_avx512(const float* weights, const float* x, int64_t columns) {
  constexpr int64_t kAhead = 512;  // elements
  const int64_t whole = columns / 64 * 64;
  __m512 sums[4];
  for (int part = 0; part < 4; ++part) sums[part] = _mm512_setzero_ps();
  for (int64_t i = 0; i < whole; i += 64)
    for (int part = 0; part < 4; ++part) {
      _mm_prefetch(reinterpret_cast<const char*>(weights + i + part * 16 + kAhead), _MM_HINT_T0);
      sums[part] = _mm512_fmadd_ps(_mm512_loadu_ps(weights + i + part * 16), _mm512_loadu_ps(x + i + part * 16),
                                   sums[part]);
    }
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3]))) +
         multiply_float_row_portable(weights + whole, x + whole, columns - whole);
}

#endif

inline MultiplyFloatRow choose_multiply_float_row(Instructions instructions) {
#if defined(__x86_64__)
  if (instructions >= Instructions::kAvx512) return multiply_float_row_avx512;
  if (instructions == Instructions::kAvx2) return multiply_float_row_avx2;
#endif
  return multiply_float_row_portable;
}

}  // namespace torchchat

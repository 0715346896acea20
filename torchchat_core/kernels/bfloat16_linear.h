// One or a few rows of bfloat16 activations times a bfloat16 matrix: limited by how fast the matrix is read.

#pragma once

#include <cstdint>
#include <cstring>

#include "quantized_linear.h"

namespace torchchat {

constexpr int64_t kFewRows = 4;  // up to here the matrix is worth reading as it lies, without any packing

inline float bfloat16_to_float(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// Sums of products of `count` rows of x [count, columns] with one row of weights: out [count].
inline void multiply_row_portable(const uint16_t* weights, const uint16_t* x, int64_t columns, int64_t count, float* out) {
  for (int64_t row = 0; row < count; ++row) {
    float sum = 0;
    for (int64_t i = 0; i < columns; ++i)
      sum += bfloat16_to_float(weights[i]) * bfloat16_to_float(x[row * columns + i]);
    out[row] = sum;
  }
}

#if defined(__x86_64__)

TORCHCHAT_AVX2 inline __m256 load_bfloat16_avx2(const uint16_t* at) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

TORCHCHAT_AVX2 inline void multiply_row_avx2(const uint16_t* weights, const uint16_t* x, int64_t columns, int64_t count,
                                             float* out) {
  const int64_t whole = columns / 16 * 16;
  for (int64_t row = 0; row < count; ++row, x += columns) {
    __m256 even = _mm256_setzero_ps(), odd = _mm256_setzero_ps();
    for (int64_t i = 0; i < whole; i += 16) {
      even = _mm256_fmadd_ps(load_bfloat16_avx2(weights + i), load_bfloat16_avx2(x + i), even);
      odd = _mm256_fmadd_ps(load_bfloat16_avx2(weights + i + 8), load_bfloat16_avx2(x + i + 8), odd);
    }
    float lanes[8];
    _mm256_storeu_ps(lanes, _mm256_add_ps(even, odd));
    float rest = 0;
    multiply_row_portable(weights + whole, x + whole, columns - whole, 1, &rest);
    out[row] = ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7])) + rest;
  }
}

TORCHCHAT_AVX512 inline __m512 load_bfloat16_avx512(const uint16_t* at) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

template <int Rows>
TORCHCHAT_AVX512 inline void multiply_row_avx512_rows(const uint16_t* weights, const uint16_t* x, int64_t columns,
                                                      float* out) {
  const int64_t whole = columns / 32 * 32;
  __m512 even[Rows], odd[Rows];
  for (int row = 0; row < Rows; ++row) even[row] = odd[row] = _mm512_setzero_ps();
  for (int64_t i = 0; i < whole; i += 32) {
    const __m512 first = load_bfloat16_avx512(weights + i), second = load_bfloat16_avx512(weights + i + 16);
    for (int row = 0; row < Rows; ++row) {
      even[row] = _mm512_fmadd_ps(first, load_bfloat16_avx512(x + row * columns + i), even[row]);
      odd[row] = _mm512_fmadd_ps(second, load_bfloat16_avx512(x + row * columns + i + 16), odd[row]);
    }
  }
  for (int row = 0; row < Rows; ++row) {
    float rest = 0;
    multiply_row_portable(weights + whole, x + row * columns + whole, columns - whole, 1, &rest);
    out[row] = _mm512_reduce_add_ps(_mm512_add_ps(even[row], odd[row])) + rest;
  }
}

TORCHCHAT_AVX512 inline void multiply_row_avx512(const uint16_t* weights, const uint16_t* x, int64_t columns,
                                                 int64_t count, float* out) {
  for (; count >= 2; count -= 2, x += 2 * columns, out += 2) multiply_row_avx512_rows<2>(weights, x, columns, out);
  if (count) multiply_row_avx512_rows<1>(weights, x, columns, out);
}

// ---- with products of bfloat16 pairs, which leave the time to wait for the matrix ----------------------------------

#define TORCHCHAT_BFLOAT16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,f16c,fma")))

TORCHCHAT_BFLOAT16 inline __m512 add_pairs(__m512 sum, const uint16_t* a, const uint16_t* b, __mmask32 which) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(which, a)),
                          reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(which, b)));
}

template <int Rows>
TORCHCHAT_BFLOAT16 inline void multiply_row_bfloat16_rows(const uint16_t* weights, const uint16_t* x, int64_t columns,
                                                          float* out) {
  const int64_t whole = columns / 64 * 64;
  __m512 even[Rows], odd[Rows];
  for (int row = 0; row < Rows; ++row) even[row] = odd[row] = _mm512_setzero_ps();
  for (int64_t i = 0; i < whole; i += 64)
    for (int row = 0; row < Rows; ++row) {
      even[row] = add_pairs(even[row], weights + i, x + row * columns + i, ~0u);
      odd[row] = add_pairs(odd[row], weights + i + 32, x + row * columns + i + 32, ~0u);
    }
  for (int64_t i = whole; i < columns; i += 32) {
    const __mmask32 left = columns - i >= 32 ? ~0u : (1u << (columns - i)) - 1;
    for (int row = 0; row < Rows; ++row) even[row] = add_pairs(even[row], weights + i, x + row * columns + i, left);
  }
  for (int row = 0; row < Rows; ++row) out[row] = _mm512_reduce_add_ps(_mm512_add_ps(even[row], odd[row]));
}

TORCHCHAT_BFLOAT16 inline void multiply_row_bfloat16(const uint16_t* weights, const uint16_t* x, int64_t columns,
                                                     int64_t count, float* out) {
  for (; count >= 2; count -= 2, x += 2 * columns, out += 2) multiply_row_bfloat16_rows<2>(weights, x, columns, out);
  if (count) multiply_row_bfloat16_rows<1>(weights, x, columns, out);
}

#endif

using MultiplyRow = void (*)(const uint16_t*, const uint16_t*, int64_t, int64_t, float*);

inline MultiplyRow choose_multiply_row(Instructions instructions) {
#if defined(__x86_64__)
  if (instructions == Instructions::kAvx512Bfloat16) return multiply_row_bfloat16;
  if (instructions == Instructions::kAvx512) return multiply_row_avx512;
  if (instructions == Instructions::kAvx2) return multiply_row_avx2;
#endif
  return multiply_row_portable;
}

}  // namespace torchchat

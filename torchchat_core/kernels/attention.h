// Softmax attention of a few tokens over the used part of a KV cache: limited by how fast keys and values are read.

#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstdint>

#include "exponentials.h"
#include "quantized_linear.h"

namespace torchchat {

// out[i] = the product of the query [size], which is scaled already, with keys[i], for each of `count` keys.
template <typename Scalar>
using ScoreKeys = void (*)(const float* query, const Scalar* keys, int64_t count, int64_t size, float* out);

// out [size] = the sum of values[i] * weights[i] over `count` values.
template <typename Scalar>
using BlendValues = void (*)(const float* weights, const Scalar* values, int64_t count, int64_t size, float* out);

template <typename Scalar>
void score_keys_portable(const float* query, const Scalar* keys, int64_t count, int64_t size, float* out) {
  for (int64_t i = 0; i < count; ++i, keys += size) {
    float sum = 0;
    for (int64_t at = 0; at < size; ++at) sum += query[at] * static_cast<float>(keys[at]);
    out[i] = sum;
  }
}

template <typename Scalar>
void blend_values_portable(const float* weights, const Scalar* values, int64_t count, int64_t size, float* out) {
  std::fill(out, out + size, 0.0f);
  for (int64_t i = 0; i < count; ++i, values += size)
    for (int64_t at = 0; at < size; ++at) out[at] += weights[i] * static_cast<float>(values[at]);
}

#if defined(__x86_64__)

TORCHCHAT_AVX2 inline __m256 load_avx2(const float* at) { return _mm256_loadu_ps(at); }
TORCHCHAT_AVX2 inline __m256 load_avx2(const c10::Half* at) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}
TORCHCHAT_AVX2 inline __m256 load_avx2(const c10::BFloat16* at) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

TORCHCHAT_AVX512 inline __m512 load_avx512(const float* at) { return _mm512_loadu_ps(at); }
TORCHCHAT_AVX512 inline __m512 load_avx512(const c10::Half* at) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
}
TORCHCHAT_AVX512 inline __m512 load_avx512(const c10::BFloat16* at) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

template <typename Scalar>
TORCHCHAT_AVX2 void score_keys_avx2(const float* query, const Scalar* keys, int64_t count, int64_t size, float* out) {
  const int64_t whole = size / 8 * 8;
  for (int64_t i = 0; i < count; ++i, keys += size) {
    __m256 sum = _mm256_setzero_ps();
    for (int64_t at = 0; at < whole; at += 8)
      sum = _mm256_fmadd_ps(_mm256_loadu_ps(query + at), load_avx2(keys + at), sum);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    out[i] = _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
    for (int64_t at = whole; at < size; ++at) out[i] += query[at] * static_cast<float>(keys[at]);
  }
}

template <typename Scalar>
TORCHCHAT_AVX2 void blend_values_avx2(const float* weights, const Scalar* values, int64_t count, int64_t size,
                                      float* out) {
  int64_t at = 0;
  for (; at + 32 <= size; at += 32) {
    __m256 sums[4] = {};
    for (int64_t i = 0; i < count; ++i) {
      const __m256 weight = _mm256_set1_ps(weights[i]);
      for (int part = 0; part < 4; ++part)
        sums[part] = _mm256_fmadd_ps(weight, load_avx2(values + i * size + at + part * 8), sums[part]);
    }
    for (int part = 0; part < 4; ++part) _mm256_storeu_ps(out + at + part * 8, sums[part]);
  }
  for (; at + 8 <= size; at += 8) {
    __m256 sum = _mm256_setzero_ps();
    for (int64_t i = 0; i < count; ++i)
      sum = _mm256_fmadd_ps(_mm256_set1_ps(weights[i]), load_avx2(values + i * size + at), sum);
    _mm256_storeu_ps(out + at, sum);
  }
  for (; at < size; ++at) {
    out[at] = 0;
    for (int64_t i = 0; i < count; ++i) out[at] += weights[i] * static_cast<float>(values[i * size + at]);
  }
}

// The first `count` of 16 numbers, and zeros.
TORCHCHAT_AVX512 inline __m512 load_some_avx512(const float* at, int64_t count) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), at);
}
TORCHCHAT_AVX512 inline __m512 load_some_avx512(const c10::Half* at, int64_t count) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), at));
}
TORCHCHAT_AVX512 inline __m512 load_some_avx512(const c10::BFloat16* at, int64_t count) {
  const __m256i halves = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), at);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// The sum of 16 numbers: of those 8 apart, then 4, 2 and 1.
TORCHCHAT_AVX512 inline float add_up_avx512(__m512 x) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

// The same of 16 vectors at once, in a third of the time: number i of the result is the sum of x[i].
TORCHCHAT_AVX512 inline __m512 add_up_avx512(const __m512 (&x)[16]) {
  __m512 eights[8], fours[4], twos[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)  // lower half: of x[i], upper half: of x[i + 8]
    eights[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x[i], x[i + 8], 0x44), _mm512_shuffle_f32x4(x[i], x[i + 8], 0xEE));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)  // quarters: of x[i], x[i + 8], x[i + 4], x[i + 12]
    fours[i] = _mm512_add_ps(_mm512_shuffle_f32x4(eights[i], eights[i + 4], 0x88),
                             _mm512_shuffle_f32x4(eights[i], eights[i + 4], 0xDD));
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)  // in each quarter: two of its x, two of that 2 further
    twos[i] = _mm512_add_ps(
        _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(fours[i]), _mm512_castps_pd(fours[i + 2]))),
        _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(fours[i]), _mm512_castps_pd(fours[i + 2]))));
  const __m512 ones = _mm512_add_ps(_mm512_shuffle_ps(twos[0], twos[1], 0x88), _mm512_shuffle_ps(twos[0], twos[1], 0xDD));
  const __m512 quarters = _mm512_shuffle_f32x4(ones, ones, 0xD8);  // 0, 4, 8 and 12; in each 0, 2, 1, 3
  return _mm512_shuffle_ps(quarters, quarters, 0xD8);
}

template <typename Scalar>
TORCHCHAT_AVX512 void score_keys_avx512(const float* query, const Scalar* keys, int64_t count, int64_t size,
                                        float* out) {
  constexpr int64_t kKeys = 16;
  const int64_t whole = size / 16 * 16;
  int64_t i = 0;
  for (; i + kKeys <= count; i += kKeys, keys += kKeys * size) {
    __m512 sums[kKeys];
    for (__m512& sum : sums) sum = _mm512_setzero_ps();
    for (int64_t at = 0; at < whole; at += 16) {
      const __m512 part = _mm512_loadu_ps(query + at);
#pragma GCC unroll 16
      for (int64_t key = 0; key < kKeys; ++key) sums[key] = _mm512_fmadd_ps(part, load_avx512(keys + key * size + at), sums[key]);
    }
    if (whole < size) {
      const __m512 part = load_some_avx512(query + whole, size - whole);
#pragma GCC unroll 16
      for (int64_t key = 0; key < kKeys; ++key)
        sums[key] = _mm512_fmadd_ps(part, load_some_avx512(keys + key * size + whole, size - whole), sums[key]);
    }
    _mm512_storeu_ps(out + i, add_up_avx512(sums));
  }
  for (; i < count; ++i, keys += size) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t at = 0; at < whole; at += 16)
      sum = _mm512_fmadd_ps(_mm512_loadu_ps(query + at), load_avx512(keys + at), sum);
    if (whole < size)
      sum = _mm512_fmadd_ps(load_some_avx512(query + whole, size - whole), load_some_avx512(keys + whole, size - whole),
                            sum);
    out[i] = add_up_avx512(sum);
  }
}

// The first `some` of 16 neighbouring numbers of all values, each weighed, as four sums of every fourth value.
template <typename Scalar>
TORCHCHAT_AVX512 inline __m512 blend_column_avx512(const float* weights, const Scalar* values, int64_t count,
                                                   int64_t size, int64_t some) {
  constexpr int64_t kParts = 4;
  __m512 sums[kParts];
  for (__m512& sum : sums) sum = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + kParts <= count; i += kParts)
#pragma GCC unroll 4
    for (int64_t part = 0; part < kParts; ++part)
      sums[part] = _mm512_fmadd_ps(_mm512_set1_ps(weights[i + part]), load_some_avx512(values + (i + part) * size, some),
                                   sums[part]);
#pragma GCC unroll 3
  for (int64_t part = 0; part < kParts - 1; ++part)
    if (i + part < count)
      sums[part] = _mm512_fmadd_ps(_mm512_set1_ps(weights[i + part]), load_some_avx512(values + (i + part) * size, some),
                                   sums[part]);
  return _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3]));
}

template <typename Scalar>
TORCHCHAT_AVX512 void blend_values_avx512(const float* weights, const Scalar* values, int64_t count, int64_t size,
                                          float* out) {
  int64_t at = 0;
  for (; at + 64 <= size; at += 64) {
    __m512 sums[4];
    for (int part = 0; part < 4; ++part) sums[part] = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; ++i) {
      const __m512 weight = _mm512_set1_ps(weights[i]);
      for (int part = 0; part < 4; ++part)
        sums[part] = _mm512_fmadd_ps(weight, load_avx512(values + i * size + at + part * 16), sums[part]);
    }
    for (int part = 0; part < 4; ++part) _mm512_storeu_ps(out + at + part * 16, sums[part]);
  }
  for (; at < size; at += 16) {
    const int64_t some = std::min<int64_t>(16, size - at);
    _mm512_mask_storeu_ps(out + at, static_cast<__mmask16>((1u << some) - 1),
                          blend_column_avx512(weights, values + at, count, size, some));
  }
}

#endif

template <typename Scalar>
ScoreKeys<Scalar> choose_score_keys(Instructions instructions) {
#if defined(__x86_64__)
  if (instructions >= Instructions::kAvx512) return score_keys_avx512<Scalar>;
  if (instructions == Instructions::kAvx2) return score_keys_avx2<Scalar>;
#endif
  return score_keys_portable<Scalar>;
}

template <typename Scalar>
BlendValues<Scalar> choose_blend_values(Instructions instructions) {
#if defined(__x86_64__)
  if (instructions >= Instructions::kAvx512) return blend_values_avx512<Scalar>;
  if (instructions == Instructions::kAvx2) return blend_values_avx2<Scalar>;
#endif
  return blend_values_portable<Scalar>;
}

}  // namespace torchchat

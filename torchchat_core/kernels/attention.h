// Softmax attention of a few tokens over the used part of a KV cache: limited by how fast keys and values are read.

#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

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

template <typename Scalar>
TORCHCHAT_AVX512 void score_keys_avx512(const float* query, const Scalar* keys, int64_t count, int64_t size,
                                        float* out) {
  const int64_t whole = size / 16 * 16;
  for (int64_t i = 0; i < count; ++i, keys += size) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t at = 0; at < whole; at += 16)
      sum = _mm512_fmadd_ps(_mm512_loadu_ps(query + at), load_avx512(keys + at), sum);
    if (whole < size)
      sum = _mm512_fmadd_ps(load_some_avx512(query + whole, size - whole), load_some_avx512(keys + whole, size - whole),
                            sum);
    out[i] = _mm512_reduce_add_ps(sum);
  }
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
  for (; at + 16 <= size; at += 16) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; ++i)
      sum = _mm512_fmadd_ps(_mm512_set1_ps(weights[i]), load_avx512(values + i * size + at), sum);
    _mm512_storeu_ps(out + at, sum);
  }
  if (at < size) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; ++i)
      sum = _mm512_fmadd_ps(_mm512_set1_ps(weights[i]), load_some_avx512(values + i * size + at, size - at), sum);
    _mm512_mask_storeu_ps(out + at, static_cast<__mmask16>((1u << (size - at)) - 1), sum);
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

// e^x for x <= 0, within 2 units in the last place: 2^n times a polynomial on half an octave around 1.
inline __attribute__((always_inline)) float exp_of_negative(float x) {
  constexpr float kSmallest = -87.0f;  // e^x is still a normal number
  const float octaves = std::max(x, kSmallest) * 1.44269504f;
  const float whole = static_cast<float>(static_cast<int32_t>(octaves - 0.5f));
  const float rest = std::max(x, kSmallest) - whole * 0.693359375f + whole * 2.12194440e-4f;  // |rest| <= ln(2) / 2
  float power = 1.0f / 5040;
  power = power * rest + 1.0f / 720;
  power = power * rest + 1.0f / 120;
  power = power * rest + 1.0f / 24;
  power = power * rest + 1.0f / 6;
  power = power * rest + 0.5f;
  power = power * rest * rest + rest + 1.0f;
  return power * std::bit_cast<float>((static_cast<int32_t>(whole) + 127) << 23);
}

// Scores -> weights that sum to 1 (softmax); the largest score is taken off first, so that nothing overflows. What is
// not a number makes all weights that.
inline __attribute__((always_inline)) void scores_to_weights(float* scores, int64_t count) {
  constexpr int64_t kLanes = 16;  // side by side, so that the compiler may take them together
  const int64_t whole = count / kLanes * kLanes;
  float most[kLanes], sums[kLanes] = {}, largest = scores[0], sum = 0;
  std::fill(most, most + kLanes, largest);
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) most[lane] = std::max(most[lane], scores[i + lane]);
  for (float each : most) largest = std::max(largest, each);
  for (int64_t i = whole; i < count; ++i) largest = std::max(largest, scores[i]);
  for (int64_t i = 0; i < count; ++i) scores[i] = exp_of_negative(scores[i] - largest);
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += scores[i + lane];
  for (int64_t i = whole; i < count; ++i) sum += scores[i];
  for (float each : sums) sum += each;
  const float factor = 1.0f / sum;
  for (int64_t i = 0; i < count; ++i) scores[i] *= factor;
}

using ScoresToWeights = void (*)(float* scores, int64_t count);

inline void scores_to_weights_portable(float* scores, int64_t count) { scores_to_weights(scores, count); }

#if defined(__x86_64__)
TORCHCHAT_AVX2 inline void scores_to_weights_avx2(float* scores, int64_t count) { scores_to_weights(scores, count); }
TORCHCHAT_AVX512 inline void scores_to_weights_avx512(float* scores, int64_t count) { scores_to_weights(scores, count); }
#endif

inline ScoresToWeights choose_scores_to_weights(Instructions instructions) {
#if defined(__x86_64__)
  if (instructions >= Instructions::kAvx512) return scores_to_weights_avx512;
  if (instructions == Instructions::kAvx2) return scores_to_weights_avx2;
#endif
  return scores_to_weights_portable;
}

}  // namespace torchchat

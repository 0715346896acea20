// What is made with e^x: weights of scores (softmax), and SiLU.

#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "lanes.h"
#include "quantized_linear.h"

namespace torchchat {

constexpr float kLeastExponent = -87.0f;  // of which the power of e is still a normal number

// e^x for x <= 0, within 2 units in the last place: 2^n times a polynomial on half an octave around 1. Of what is not a
// number, that.
inline __attribute__((always_inline)) float exp_of_negative(float x) {
  const float taken = std::max(kLeastExponent, x);  // the bound, if x is not a number
  const float octaves = taken * 1.44269504f;
  const float whole = static_cast<float>(static_cast<int32_t>(octaves - 0.5f));
  const float rest = taken - whole * 0.693359375f + whole * 2.12194440e-4f;  // |rest| <= ln(2) / 2
  float power = 1.0f / 5040;
  power = power * rest + 1.0f / 720;
  power = power * rest + 1.0f / 120;
  power = power * rest + 1.0f / 24;
  power = power * rest + 1.0f / 6;
  power = power * rest + 0.5f;
  power = power * rest * rest + rest + 1.0f;
  power *= std::bit_cast<float>((static_cast<int32_t>(whole) + 127) << 23);
  return x == x ? power : x;
}

// Numbers that memory for `count` scores has to have: with those behind them no loop has a rest, which would take longest.
inline int64_t room_for_scores(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// Scores -> weights that sum to 1 (softmax); the largest score is taken off first, so that nothing overflows. What is
// not a number makes all weights that. What is behind the scores, up to `room_for_scores`, is written over.
inline __attribute__((always_inline)) void scores_to_weights(float* scores, int64_t count) {
  const int64_t room = room_for_scores(count);
  std::fill(scores + count, scores + room, -std::numeric_limits<float>::infinity());  // too small for any sum
  float most[kLanes], sums[kLanes] = {};
  std::fill(most, most + kLanes, scores[0]);
  for (int64_t i = 0; i < room; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) most[lane] = std::max(most[lane], scores[i + lane]);
  const float largest = largest_of(most);
  for (int64_t i = 0; i < room; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      scores[i + lane] = exp_of_negative(scores[i + lane] - largest);
      sums[lane] += scores[i + lane];
    }
  const float factor = 1.0f / sum_of(sums);
  for (int64_t i = 0; i < room; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) scores[i + lane] *= factor;
}

using ScoresToWeights = void (*)(float* scores, int64_t count);

// out[i] = silu(gates[i]) * ups[i], of 16 numbers, with silu(x) = x / (1 + e^-x).
inline __attribute__((always_inline)) void silu_times(const float* gates, const float* ups, float* out) {
  for (int64_t i = 0; i < kLanes; ++i) {
    const float power = exp_of_negative(-std::abs(gates[i]));
    const float share = gates[i] < 0 ? std::max(gates[i], kLeastExponent) * power : gates[i];
    out[i] = share / (1.0f + power) * ups[i];
  }
}

using SiluTimes = void (*)(const float* gates, const float* ups, float* out);

inline void scores_to_weights_portable(float* scores, int64_t count) { scores_to_weights(scores, count); }
inline void silu_times_portable(const float* gates, const float* ups, float* out) { silu_times(gates, ups, out); }

#if defined(__x86_64__)
TORCHCHAT_AVX2 inline void scores_to_weights_avx2(float* scores, int64_t count) { scores_to_weights(scores, count); }
TORCHCHAT_AVX512 inline void scores_to_weights_avx512(float* scores, int64_t count) { scores_to_weights(scores, count); }
TORCHCHAT_AVX2 inline void silu_times_avx2(const float* gates, const float* ups, float* out) { silu_times(gates, ups, out); }
TORCHCHAT_AVX512 inline void silu_times_avx512(const float* gates, const float* ups, float* out) {
  silu_times(gates, ups, out);
}
#endif

inline ScoresToWeights choose_scores_to_weights(Instructions instructions) {
#if defined(__x86_64__)
  if (instructions >= Instructions::kAvx512) return scores_to_weights_avx512;
  if (instructions == Instructions::kAvx2) return scores_to_weights_avx2;
#endif
  return scores_to_weights_portable;
}

inline SiluTimes choose_silu_times(Instructions instructions) {
#if defined(__x86_64__)
  if (instructions >= Instructions::kAvx512) return silu_times_avx512;
  if (instructions == Instructions::kAvx2) return silu_times_avx2;
#endif
  return silu_times_portable;
}

}  // namespace torchchat

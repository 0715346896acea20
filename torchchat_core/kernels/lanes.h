// Numbers side by side, so that the compiler may take them together, and what becomes of them: by halves, each half onto
// the other, which a vector does in a few steps.

#pragma once

#include <algorithm>
#include <cstdint>

namespace torchchat {

constexpr int64_t kLanes = 16;

inline __attribute__((always_inline)) float sum_of(float (&lanes)[kLanes]) {
  for (int64_t some = kLanes / 2; some > 0; some /= 2)
    for (int64_t lane = 0; lane < some; ++lane) lanes[lane] += lanes[lane + some];
  return lanes[0];
}

inline __attribute__((always_inline)) float largest_of(float (&lanes)[kLanes]) {
  for (int64_t some = kLanes / 2; some > 0; some /= 2)
    for (int64_t lane = 0; lane < some; ++lane) lanes[lane] = std::max(lanes[lane], lanes[lane + some]);
  return lanes[0];
}

}  // namespace torchchat

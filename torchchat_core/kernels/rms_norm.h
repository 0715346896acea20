// Root mean square norm of one row.

#pragma once

#include <cmath>
#include <cstdint>

#include "lanes.h"

namespace torchchat {

// x / sqrt(mean(x^2) + eps) * weight, computed in float32 and rounded once; `out` may be `x`.
template <typename Scalar, typename Weight>
void normalise_row(const Scalar* x, const Weight* weight, int64_t size, float eps, Scalar* out) {
  float sums[kLanes] = {}, sum = 0;
  const int64_t whole = size / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const auto value = static_cast<float>(x[i + lane]);
      sums[lane] += value * value;
    }
  for (int64_t i = whole; i < size; ++i) sum += static_cast<float>(x[i]) * static_cast<float>(x[i]);
  sum += sum_of(sums);
  const float factor = 1.0f / std::sqrt(sum / static_cast<float>(size) + eps);
  for (int64_t i = 0; i < size; ++i)
    out[i] = static_cast<Scalar>(static_cast<float>(x[i]) * factor * static_cast<float>(weight[i]));
}

}  // namespace torchchat

// The integers of ggml's block formats as core's layers store them, with their scales and, where a format has minima,
// centres: what quantization/blocks.py does with PyTorch's operations, at the speed of the memory.

#pragma once

#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>

#include "ggml_blocks.h"

namespace torchchat {

// 2 * n columns of four bits, the first n in the lower halves -> neighbours in one byte, the even one in the lower half.
template <int Bytes>
inline void join_neighbours(const uint8_t* halves, uint8_t* out) {
  for (int i = 0; i < Bytes / 2; ++i) {
    const uint8_t even = halves[2 * i], odd = halves[2 * i + 1];
    out[i] = (even & 15) | odd << 4;
    out[Bytes / 2 + i] = even >> 4 | (odd & 0xF0);
  }
}

struct Q8_0Integers {
  static constexpr int64_t kBytes = 34, kValueBytes = 32, kGroups = 1;
  static constexpr bool kCentres = false;
  static inline void take(const uint8_t* block, uint8_t* values, c10::Half* scales, c10::Half*) {
    std::memcpy(scales, block, 2);
    for (int i = 0; i < 32; ++i) values[i] = block[2 + i] ^ 128;
  }
};

struct Q4_0Integers {
  static constexpr int64_t kBytes = 18, kValueBytes = 16, kGroups = 1;
  static constexpr bool kCentres = false;
  static inline void take(const uint8_t* block, uint8_t* values, c10::Half* scales, c10::Half*) {
    std::memcpy(scales, block, 2);
    join_neighbours<16>(block + 2, values);
  }
};

struct Q4_1Integers {  // scale, minimum, 16 bytes
  static constexpr int64_t kBytes = 20, kValueBytes = 16, kGroups = 1;
  static constexpr bool kCentres = true;
  static inline void take(const uint8_t* block, uint8_t* values, c10::Half* scales, c10::Half* centres) {
    std::memcpy(scales, block, 2);
    centres[0] = static_cast<c10::Half>(8 * half_at(block) + half_at(block + 2));
    join_neighbours<16>(block + 4, values);
  }
};

struct Q4_KIntegers {
  static constexpr int64_t kBytes = 144, kValueBytes = 128, kGroups = 8;
  static constexpr bool kCentres = true;
  static inline void take(const uint8_t* block, uint8_t* values, c10::Half* scales, c10::Half* centres) {
    float steps[8], minima[8];
    six_bit_scales(block + 4, half_at(block), half_at(block + 2), steps, minima);
    for (int i = 0; i < 8; ++i) {
      scales[i] = static_cast<c10::Half>(steps[i]);
      centres[i] = static_cast<c10::Half>(8 * steps[i] - minima[i]);
    }
    for (int pair = 0; pair < 4; ++pair) join_neighbours<32>(block + 16 + 32 * pair, values + 32 * pair);
  }
};

}  // namespace torchchat

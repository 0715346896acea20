// Numbers out of ggml's block formats, equal bit for bit to those of ggml's own code: each a float32 product, in the
// order that ggml-quants.c has. A block begins with, or ends in, its float16 scales.

#pragma once

#include <cstdint>
#include <cstring>

#include "quantized_linear.h"

namespace torchchat {

inline float half_at(const uint8_t* at) {
  uint16_t bits;
  std::memcpy(&bits, at, sizeof bits);
  return half_to_float(bits);
}

struct Q8_0 {  // scale, 32 signed bytes
  static constexpr int64_t kElements = 32, kBytes = 34;
  static inline void unpack(const uint8_t* block, float* out) {
    const float scale = half_at(block);
    for (int i = 0; i < 32; ++i) out[i] = static_cast<float>(static_cast<int8_t>(block[2 + i])) * scale;
  }
};

struct Q4_0 {  // scale, 16 bytes: numbers 0 to 15 in the lower halves, 16 to 31 in the upper ones
  static constexpr int64_t kElements = 32, kBytes = 18;
  static inline void unpack(const uint8_t* block, float* out) {
    const float scale = half_at(block);
    for (int i = 0; i < 16; ++i) out[i] = static_cast<float>((block[2 + i] & 15) - 8) * scale;
    for (int i = 0; i < 16; ++i) out[16 + i] = static_cast<float>((block[2 + i] >> 4) - 8) * scale;
  }
};

// Eight scales and eight minima of six bits, in twelve bytes.
inline void six_bit_scales(const uint8_t* packed, float scale, float minimum, float* scales, float* minima) {
  for (int i = 0; i < 4; ++i) {
    scales[i] = scale * static_cast<float>(packed[i] & 63);
    minima[i] = minimum * static_cast<float>(packed[4 + i] & 63);
    scales[4 + i] = scale * static_cast<float>((packed[8 + i] & 15) | (packed[i] >> 6 << 4));
    minima[4 + i] = minimum * static_cast<float>((packed[8 + i] >> 4) | (packed[4 + i] >> 6 << 4));
  }
}

struct Q4_K {  // scale, minimum, 12 bytes of scales, 128 of numbers: in each 32 two groups
  static constexpr int64_t kElements = 256, kBytes = 144;
  static inline void unpack(const uint8_t* block, float* out) {
    float scales[8], minima[8];
    six_bit_scales(block + 4, half_at(block), half_at(block + 2), scales, minima);
    for (int pair = 0; pair < 4; ++pair, out += 64) {
      const uint8_t* bytes = block + 16 + 32 * pair;
      const float low = scales[2 * pair], high = scales[2 * pair + 1];
      const float below = minima[2 * pair], above = minima[2 * pair + 1];
      for (int i = 0; i < 32; ++i) out[i] = low * static_cast<float>(bytes[i] & 15) - below;
      for (int i = 0; i < 32; ++i) out[32 + i] = high * static_cast<float>(bytes[i] >> 4) - above;
    }
  }
};

struct Q5_K {  // as Q4_K, with the fifth bits of all groups in 32 bytes before the numbers
  static constexpr int64_t kElements = 256, kBytes = 176;
  static inline void unpack(const uint8_t* block, float* out) {
    float scales[8], minima[8];
    six_bit_scales(block + 4, half_at(block), half_at(block + 2), scales, minima);
    const uint8_t* fifth = block + 16;
    for (int pair = 0; pair < 4; ++pair, out += 64) {
      const uint8_t* bytes = block + 48 + 32 * pair;
      const float low = scales[2 * pair], high = scales[2 * pair + 1];
      const float below = minima[2 * pair], above = minima[2 * pair + 1];
      for (int i = 0; i < 32; ++i)
        out[i] = low * static_cast<float>((bytes[i] & 15) | ((fifth[i] >> (2 * pair) & 1) << 4)) - below;
      for (int i = 0; i < 32; ++i)
        out[32 + i] = high * static_cast<float>((bytes[i] >> 4) | ((fifth[i] >> (2 * pair + 1) & 1) << 4)) - above;
    }
  }
};

struct Q6_K {  // 128 bytes of lower bits, 64 of upper ones, 16 signed scales, scale
  static constexpr int64_t kElements = 256, kBytes = 210;
  static inline void unpack(const uint8_t* block, float* out) {
    const float scale = half_at(block + 208);
    for (int half = 0; half < 2; ++half, out += 128) {
      const uint8_t *low = block + 64 * half, *high = block + 128 + 32 * half;
      const auto* scales = reinterpret_cast<const int8_t*>(block + 192 + 8 * half);
      unpack_part<0>(low, high, scale, scales, out);
      unpack_part<1>(low, high, scale, scales, out);
      unpack_part<2>(low, high, scale, scales, out);
      unpack_part<3>(low, high, scale, scales, out);
    }
  }

  template <int Part>
  static inline void unpack_part(const uint8_t* low, const uint8_t* high, float scale, const int8_t* scales, float* out) {
    for (int half = 0; half < 2; ++half) {
      const float factor = scale * static_cast<float>(scales[2 * Part + half]);
      for (int i = 16 * half; i < 16 * half + 16; ++i) {
        const int bits = (low[i + 32 * (Part & 1)] >> (Part / 2 * 4) & 15) | ((high[i] >> (2 * Part) & 3) << 4);
        out[32 * Part + i] = factor * static_cast<float>(bits - 32);
      }
    }
  }
};

// Blocks [0, count) as numbers of the type that `Store` makes of a float32.
template <typename Format, typename Scalar>
inline __attribute__((always_inline)) void unpack_run(const uint8_t* blocks, int64_t count, Scalar* out) {
  float numbers[Format::kElements];
  for (int64_t block = 0; block < count; ++block, out += Format::kElements) {
    Format::unpack(blocks + block * Format::kBytes, numbers);
    for (int64_t i = 0; i < Format::kElements; ++i) out[i] = static_cast<Scalar>(numbers[i]);
  }
}

template <typename Format, typename Scalar>
void unpack_blocks_portable(const uint8_t* blocks, int64_t count, Scalar* out) {
  unpack_run<Format>(blocks, count, out);
}

#if defined(__x86_64__)
template <typename Format, typename Scalar>
TORCHCHAT_AVX2 void unpack_blocks_avx2(const uint8_t* blocks, int64_t count, Scalar* out) {
  unpack_run<Format>(blocks, count, out);  // the same code, for wider registers
}
#endif

template <typename Format, typename Scalar>
void unpack_blocks(const uint8_t* blocks, int64_t count, Scalar* out, Instructions instructions) {
#if defined(__x86_64__)
  if (instructions != Instructions::kPortable) return unpack_blocks_avx2<Format>(blocks, count, out);
#endif
  unpack_blocks_portable<Format>(blocks, count, out);
}

}  // namespace torchchat

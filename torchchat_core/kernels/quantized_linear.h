// Products of quantised weights with activations that are rounded to int8: AVX-512 with VNNI, AVX2, and portable.
//
// Weights lie in panels of 16 rows. A panel holds, group of columns by group, blocks of 16 rows x 32 columns and then
// one float16 scale for each row and, where the weights are asymmetric, one float16 offset for each row. Within a
// block, four neighbouring columns (a quad) of all 16 rows stand together, so that one instruction that multiplies and
// adds bytes in fours takes them all:
//
//   8 bits: byte (quad * 16 + row) * 4 + c is column quad * 4 + c, plus 128                            512 bytes
//   4 bits: byte (quad * 16 + row) * 4 + c has column quad * 4 + c in its lower half, plus 8,
//           and column (quad + 4) * 4 + c in its upper half; quad goes from 0 to 3                      256 bytes
//
// An asymmetric weight is scale * stored + offset, with `stored` unsigned; a symmetric one scale * (stored - 8 or 128).
// Activations are rounded in blocks of 32 to scale * int8. Rows and columns beyond the matrix weigh nothing.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace torchchat {

constexpr int64_t kPanelRows = 16;
constexpr int64_t kBlockColumns = 32;
constexpr int64_t kQuads = kBlockColumns / 4;
constexpr float kSmallest = 1e-30f;  // of the largest activation in a block: what is smaller counts as zero

enum class Instructions { kPortable, kAvx2, kAvx512, kAvx512Bfloat16 };  // each has those before it

inline Instructions best_instructions() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))
    return __builtin_cpu_supports("avx512bf16") ? Instructions::kAvx512Bfloat16 : Instructions::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Instructions::kAvx2;  // f16c is older
#endif
  return Instructions::kPortable;
}

inline std::atomic<Instructions> instructions_in_use{best_instructions()};

struct PanelLayout {
  int bits;         // 4 or 8
  bool asymmetric;  // whether offsets follow the scales
  int64_t blocks;   // of 32 columns
  int64_t group;    // blocks that share one scale

  int64_t block_bytes() const { return kPanelRows * kBlockColumns * bits / 8; }
  int64_t scale_bytes() const { return kPanelRows * 2 * (asymmetric ? 2 : 1); }
  int64_t groups() const { return (blocks + group - 1) / group; }
  int64_t panel_bytes() const { return blocks * block_bytes() + groups() * scale_bytes(); }
  int32_t zero() const { return asymmetric ? 0 : bits == 8 ? 128 : 8; }
};

inline int64_t panels_of(int64_t outputs) { return (outputs + kPanelRows - 1) / kPanelRows; }

// Rows of activations, rounded to int8 block by block.
struct RoundedRows {
  RoundedRows(int64_t rows, int64_t columns)
      : rows(rows),
        blocks((columns + kBlockColumns - 1) / kBlockColumns),
        values(rows * blocks * kBlockColumns),
        scales(rows * blocks),
        counts(rows * blocks) {}

  int64_t rows, blocks;
  std::vector<int8_t> values;   // [rows, blocks, 32]
  std::vector<float> scales;    // [rows, blocks]
  std::vector<int32_t> counts;  // [rows, blocks]: sums of the values
};

inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, exponent = half >> 10 & 31, mantissa = half & 1023;
  if (exponent == 0) {  // zero and subnormal numbers
    const float value = std::ldexp(static_cast<float>(mantissa), -24);
    return sign ? -value : value;
  }
  const uint32_t bits = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | mantissa << 13;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// What is not finite makes what depends on it not a number.
inline void poison_block(int8_t* values, float& scale, int32_t& count) {
  std::memset(values, 0, kBlockColumns);
  scale = std::numeric_limits<float>::quiet_NaN();
  count = 0;
}

// ---- portable -----------------------------------------------------------------------------------------------------

inline void round_block_portable(const float* x, int8_t* values, float& scale, int32_t& count) {
  float largest = 0;
  bool finite = true;
  for (int64_t i = 0; i < kBlockColumns; ++i) {
    largest = std::max(largest, std::abs(x[i]));
    finite = finite && std::isfinite(x[i]);
  }
  if (!finite) return poison_block(values, scale, count);
  scale = largest / 127;
  const float inverse = largest > kSmallest ? 127 / largest : 0;
  count = 0;
  for (int64_t i = 0; i < kBlockColumns; ++i) {
    const auto rounded = static_cast<int8_t>(std::nearbyint(x[i] * inverse));
    values[i] = rounded;
    count += rounded;
  }
}

inline int32_t stored_weight(const uint8_t* block, int bits, int64_t row, int64_t column) {
  const int64_t quad = column / 4, c = column % 4;
  if (bits == 8) return block[(quad * kPanelRows + row) * 4 + c];
  return block[(quad % 4 * kPanelRows + row) * 4 + c] >> (quad / 4 * 4) & 15;
}

// Products of one panel with rows [first, first + count): out [count, 16].
inline void multiply_panel_portable(const PanelLayout& layout, const uint8_t* panel, const RoundedRows& x, int64_t first,
                                    int64_t count, float* out) {
  for (int64_t row = first; row < first + count; ++row, out += kPanelRows) {
    std::fill(out, out + kPanelRows, 0.0f);
    const uint8_t* at = panel;
    for (int64_t begin = 0; begin < layout.blocks; begin += layout.group) {
      const int64_t end = std::min(begin + layout.group, layout.blocks);
      float products[kPanelRows] = {}, total = 0;
      for (int64_t block = begin; block < end; ++block, at += layout.block_bytes()) {
        const int64_t place = row * x.blocks + block;
        const int8_t* values = x.values.data() + place * kBlockColumns;
        for (int64_t lane = 0; lane < kPanelRows; ++lane) {
          int32_t dot = -layout.zero() * x.counts[place];
          for (int64_t column = 0; column < kBlockColumns; ++column)
            dot += stored_weight(at, layout.bits, lane, column) * values[column];
          products[lane] += x.scales[place] * static_cast<float>(dot);
        }
        total += x.scales[place] * static_cast<float>(x.counts[place]);
      }
      const auto* scales = reinterpret_cast<const uint16_t*>(at);
      for (int64_t lane = 0; lane < kPanelRows; ++lane) {
        out[lane] += half_to_float(scales[lane]) * products[lane];
        if (layout.asymmetric) out[lane] += half_to_float(scales[kPanelRows + lane]) * total;
      }
      at += layout.scale_bytes();
    }
  }
}

#if defined(__x86_64__)

// ---- AVX2 ---------------------------------------------------------------------------------------------------------

#define TORCHCHAT_AVX2 __attribute__((target("avx2,fma,f16c")))

TORCHCHAT_AVX2 inline void round_block_avx2(const float* x, int8_t* values, float& scale, int32_t& count) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  __m256 parts[4], largest = _mm256_setzero_ps(), unordered = _mm256_setzero_ps();
  for (int i = 0; i < 4; ++i) {
    parts[i] = _mm256_loadu_ps(x + 8 * i);
    largest = _mm256_max_ps(largest, _mm256_andnot_ps(sign, parts[i]));
    unordered = _mm256_or_ps(unordered, _mm256_cmp_ps(parts[i], parts[i], _CMP_UNORD_Q));
  }
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(largest), _mm256_extractf128_ps(largest, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  const float most = _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
  if (_mm256_movemask_ps(unordered) || !std::isfinite(most)) return poison_block(values, scale, count);
  scale = most / 127;
  const __m256 inverse = _mm256_set1_ps(most > kSmallest ? 127 / most : 0);
  __m256i rounded[4], sum = _mm256_setzero_si256();
  for (int i = 0; i < 4; ++i) {
    rounded[i] = _mm256_cvtps_epi32(_mm256_mul_ps(parts[i], inverse));
    sum = _mm256_add_epi32(sum, rounded[i]);
  }
  const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(rounded[0], rounded[1]),
                                           _mm256_packs_epi32(rounded[2], rounded[3]));  // in fours, out of order
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(values), _mm256_permutevar8x32_epi32(bytes, order));
  __m128i halves = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
  halves = _mm_add_epi32(halves, _mm_shuffle_epi32(halves, 0x4e));
  count = _mm_cvtsi128_si32(_mm_add_epi32(halves, _mm_shuffle_epi32(halves, 0xb1)));
}

// sum + products of unsigned and signed bytes, in fours. `weights` are less than 128 apart from zero: nothing saturates.
TORCHCHAT_AVX2 inline __m256i add_products_avx2(__m256i sum, __m256i weights, __m256i activations) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_sign_epi8(weights, weights), _mm256_sign_epi8(activations, weights));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

template <int Bits>
TORCHCHAT_AVX2 inline void multiply_panel_avx2(const PanelLayout& layout, const uint8_t* panel, const RoundedRows& x,
                                               int64_t first, int64_t count, float* out) {
  const __m256i low_bits = _mm256_set1_epi8(15), centre = _mm256_set1_epi8(Bits == 8 ? -128 : 0);
  // Eight bits are made signed by taking 128 away; what `zero` asks for beyond that is taken from the sums.
  const int32_t correction = (Bits == 8 ? 128 : 0) - layout.zero();
  for (int64_t row = first; row < first + count; ++row, out += kPanelRows) {
    __m256 sums[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    const uint8_t* at = panel;
    for (int64_t begin = 0; begin < layout.blocks; begin += layout.group) {
      const int64_t end = std::min(begin + layout.group, layout.blocks);
      __m256 products[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
      float total = 0;
      for (int64_t block = begin; block < end; ++block, at += layout.block_bytes()) {
        const int64_t place = row * x.blocks + block;
        const auto* quads = reinterpret_cast<const int32_t*>(x.values.data() + place * kBlockColumns);
        __m256i dots[2];
        dots[0] = dots[1] = _mm256_set1_epi32(correction * x.counts[place]);
        for (int quad = 0; quad < (Bits == 8 ? kQuads : kQuads / 2); ++quad) {
          for (int half = 0; half < 2; ++half) {
            const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + quad * 64 + half * 32));
            if constexpr (Bits == 8) {
              dots[half] = add_products_avx2(dots[half], _mm256_xor_si256(bytes, centre), _mm256_set1_epi32(quads[quad]));
            } else {
              const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low_bits);
              dots[half] = add_products_avx2(dots[half], _mm256_and_si256(bytes, low_bits), _mm256_set1_epi32(quads[quad]));
              dots[half] = add_products_avx2(dots[half], upper, _mm256_set1_epi32(quads[quad + 4]));
            }
          }
        }
        const __m256 scale = _mm256_set1_ps(x.scales[place]);
        for (int half = 0; half < 2; ++half)
          products[half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[half]), scale, products[half]);
        total += x.scales[place] * static_cast<float>(x.counts[place]);
      }
      for (int half = 0; half < 2; ++half) {
        const auto* halves = reinterpret_cast<const __m128i*>(at) + half;
        sums[half] = _mm256_fmadd_ps(_mm256_cvtph_ps(_mm_loadu_si128(halves)), products[half], sums[half]);
        if (layout.asymmetric)
          sums[half] = _mm256_fmadd_ps(_mm256_cvtph_ps(_mm_loadu_si128(halves + 2)), _mm256_set1_ps(total), sums[half]);
      }
      at += layout.scale_bytes();
    }
    for (int half = 0; half < 2; ++half) _mm256_storeu_ps(out + 8 * half, sums[half]);
  }
}

// ---- AVX-512 with VNNI --------------------------------------------------------------------------------------------

#define TORCHCHAT_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,f16c,fma")))

template <int Bits>
TORCHCHAT_AVX512 inline void load_block_avx512(const uint8_t* at, __m512i (&weights)[kQuads]) {
  if constexpr (Bits == 8) {
    for (int64_t quad = 0; quad < kQuads; ++quad) weights[quad] = _mm512_loadu_si512(at + quad * 64);
  } else {
    const __m512i low_bits = _mm512_set1_epi8(15);
    for (int64_t quad = 0; quad < kQuads / 2; ++quad) {
      const __m512i both = _mm512_loadu_si512(at + quad * 64);
      weights[quad] = _mm512_and_si512(both, low_bits);
      weights[quad + 4] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low_bits);
    }
  }
}

template <int Bits, int Rows>
TORCHCHAT_AVX512 inline void multiply_panel_avx512_rows(const PanelLayout& layout, const uint8_t* panel,
                                                        const RoundedRows& x, int64_t first, float* out) {
  const int8_t* values = x.values.data() + first * x.blocks * kBlockColumns;
  const float* scales = x.scales.data() + first * x.blocks;
  const int32_t* counts = x.counts.data() + first * x.blocks;
  const int32_t zero = -layout.zero();
  __m512 sums[Rows];
  for (int i = 0; i < Rows; ++i) sums[i] = _mm512_setzero_ps();
  const uint8_t* at = panel;
  for (int64_t begin = 0; begin < layout.blocks; begin += layout.group) {
    const int64_t end = std::min(begin + layout.group, layout.blocks);
    const auto* scale_at = reinterpret_cast<const __m256i*>(at + (end - begin) * layout.block_bytes());
    const __m512 weight_scales = _mm512_cvtph_ps(_mm256_loadu_si256(scale_at));
    for (int64_t block = begin; block < end; ++block, at += layout.block_bytes()) {
      __m512i weights[kQuads];
      load_block_avx512<Bits>(at, weights);
      for (int i = 0; i < Rows; ++i) {
        const int64_t place = i * x.blocks + block;
        const auto* quads = reinterpret_cast<const int32_t*>(values + place * kBlockColumns);
        __m512i even = _mm512_set1_epi32(zero * counts[place]), odd = _mm512_setzero_si512();
        for (int64_t quad = 0; quad < kQuads; quad += 2) {
          even = _mm512_dpbusd_epi32(even, weights[quad], _mm512_set1_epi32(quads[quad]));
          odd = _mm512_dpbusd_epi32(odd, weights[quad + 1], _mm512_set1_epi32(quads[quad + 1]));
        }
        const __m512 scale = _mm512_mul_ps(weight_scales, _mm512_set1_ps(scales[place]));
        sums[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(even, odd)), scale, sums[i]);
      }
    }
    if (layout.asymmetric) {
      const __m512 offsets = _mm512_cvtph_ps(_mm256_loadu_si256(scale_at + 1));
      for (int i = 0; i < Rows; ++i) {
        float total = 0;
        for (int64_t place = i * x.blocks + begin; place < i * x.blocks + end; ++place)
          total += scales[place] * static_cast<float>(counts[place]);
        sums[i] = _mm512_fmadd_ps(offsets, _mm512_set1_ps(total), sums[i]);
      }
    }
    at += layout.scale_bytes();
  }
  for (int i = 0; i < Rows; ++i) _mm512_storeu_ps(out + i * kPanelRows, sums[i]);
}

template <int Bits>
TORCHCHAT_AVX512 inline void multiply_panel_avx512(const PanelLayout& layout, const uint8_t* panel,
                                                   const RoundedRows& x, int64_t first, int64_t count, float* out) {
  int64_t done = 0;  // 12 rows of sums and the 8 registers of a block leave room for what is in between
  for (; done + 12 <= count; done += 12)
    multiply_panel_avx512_rows<Bits, 12>(layout, panel, x, first + done, out + done * kPanelRows);
  for (; done + 4 <= count; done += 4)
    multiply_panel_avx512_rows<Bits, 4>(layout, panel, x, first + done, out + done * kPanelRows);
  for (; done < count; ++done)
    multiply_panel_avx512_rows<Bits, 1>(layout, panel, x, first + done, out + done * kPanelRows);
}

#endif

// ---- which of them ------------------------------------------------------------------------------------------------

using RoundBlock = void (*)(const float*, int8_t*, float&, int32_t&);
using MultiplyPanel = void (*)(const PanelLayout&, const uint8_t*, const RoundedRows&, int64_t, int64_t, float*);

inline RoundBlock choose_round_block(Instructions instructions) {
#if defined(__x86_64__)
  if (instructions != Instructions::kPortable) return round_block_avx2;
#endif
  return round_block_portable;
}

inline MultiplyPanel choose_multiply_panel(Instructions instructions, int bits) {
#if defined(__x86_64__)
  if (instructions >= Instructions::kAvx512) return bits == 8 ? multiply_panel_avx512<8> : multiply_panel_avx512<4>;
  if (instructions == Instructions::kAvx2) return bits == 8 ? multiply_panel_avx2<8> : multiply_panel_avx2<4>;
#endif
  return multiply_panel_portable;
}

// Rounds rows [begin, end) of x [rows, columns].
template <typename Scalar>
void round_rows(const Scalar* x, int64_t columns, int64_t begin, int64_t end, RoundBlock round, RoundedRows& result) {
  float block[kBlockColumns];
  for (int64_t row = begin; row < end; ++row)
    for (int64_t index = 0; index < result.blocks; ++index) {
      const int64_t start = index * kBlockColumns, count = std::min(kBlockColumns, columns - start);
      const Scalar* from = x + row * columns + start;
      for (int64_t i = 0; i < count; ++i) block[i] = static_cast<float>(from[i]);
      std::fill(block + count, block + kBlockColumns, 0.0f);
      const int64_t place = row * result.blocks + index;
      round(block, result.values.data() + place * kBlockColumns, result.scales[place], result.counts[place]);
    }
}

}  // namespace torchchat

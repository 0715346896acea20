// One token in one call of core's C++, by a decoder that is made once for a file: docs/artifacts.md has its parts.
#pragma once

#include <ATen/core/ivalue.h>

#include <array>
#include <mutex>
#include <utility>

#include "backends/aoti_parts.h"

namespace torchchat {

// Rows of a matrix, which may be quantised, as `QuantizedEmbedding` of torchchat_core has them.
class Embedding {
  public:
    // `form` is the format of a quantised one, or null.
    Embedding(const nlohmann::json* form, std::int64_t columns, at::ScalarType dtype, const Weights& weights);
    // [1, columns]
    at::Tensor row(Token token) const;

  private:
    at::Tensor meaning(Token token) const;

    std::int64_t columns_;
    at::ScalarType dtype_;
    std::int64_t bits_ = 0;  // 0: not quantised
    std::int64_t group_size_ = 0;
    // uint8 [rows, columns], or half as many columns of two values each; float16 [rows, groups] twice, the second only
    // where the format is asymmetric. What is not quantised has values alone, of its dtype.
    at::Tensor values_, scales_, centres_;
};

// The angles of positions that were asked for before, and of those up to the next power of two.
class RotaryTable {
  public:
    using Angles = std::pair<at::Tensor, at::Tensor>;  // cosines and signed sines, float32 [positions, head_dim]

    RotaryTable(bool interleaved, double amplitude, const Weights& weights);
    // Of one position. Extended: of a sequence that may grow beyond what a longrope model was trained with.
    Angles of(std::int64_t position, bool extended);

  private:
    Angles made(std::int64_t positions, bool extended) const;

    bool interleaved_;
    double amplitude_;
    std::array<at::Tensor, 2> frequencies_;  // radians per position [head_dim / 2], of short and of extended sequences
    std::mutex lock_;
    std::array<Angles, 2> tables_;
};

class TokenDecoder {
  public:
    // `described` is `decoder` of the manifest's runtime. The file's operators have to be loaded.
    TokenDecoder(const nlohmann::json& described, const Manifest& manifest, const Weights& weights);
    // Logits float32 [1, vocab] of the token behind `held` others, whose keys and values it adds to the caches of all
    // layers, [kv_heads, capacity, head_dim].
    at::Tensor logits(Token token, std::int64_t held, bool extended, const Tensors& keys, const Tensors& values) const;

  private:
    Embedding embedding_;
    double multiplier_;  // of what is embedded
    mutable RotaryTable rotary_;
    c10::IValue decoder_;        // an instance of a class that the operators come with
    torch::jit::Function* run_;  // its method, which stays until the process ends
};

}  // namespace torchchat

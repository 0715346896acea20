// Choosing the next token from logits, step for step as docs/sampling.md specifies and torchchat_core/sampling.py does.
#pragma once

#include <cstdint>
#include <set>
#include <span>
#include <vector>

#include "torchchat/torchchat.h"

namespace torchchat {

// Throws `Error` for a value out of range.
void check_sampling(const SamplingOptions& options);

// What is set in `chosen`, else in `recommended`.
SamplingOptions merged(const SamplingOptions& chosen, const SamplingOptions& recommended);

// A random number in [0, 1) with 53 bits, from seed, stream and step alone: Philox4x32-10 (Salmon et al., "Parallel
// random numbers: as easy as 1, 2, 3", SC11).
double philox_uniform(std::uint64_t seed, std::uint64_t stream, std::uint64_t step);

// Draws the tokens of one answer. `prompt` are the ids that the repetition penalty counts beside those of the answer.
class Sampler {
  public:
    Sampler(const SamplingOptions& options, std::span<const Token> prompt, std::uint64_t stream = 0);

    // The next token for logits [vocab]; it is counted as part of the answer. Throws where the logits hold NaN.
    Token choose(std::span<const float> logits);

  private:
    void penalise_repetition();
    Token pick();

    SamplingOptions options_;
    std::uint64_t seed_, stream_, step_ = 0;
    std::set<Token> seen_;
    std::vector<double> logits_;  // [vocab], kept between steps for its memory
};

}  // namespace torchchat

#include "sampler.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>

#include "error.h"

namespace torchchat {
namespace {

constexpr double out = -std::numeric_limits<double>::infinity();  // of a token that cannot be drawn
constexpr double default_temperature = 0.8;

std::size_t largest(std::span<const double> logits) {
    std::size_t best = 0;
    for (std::size_t token = 0; token < logits.size(); ++token) {
        if (std::isnan(logits[token])) return token;
        if (logits[token] > logits[best]) best = token;
    }
    return best;
}

// All but the k largest logits become -inf; of equal ones, lower ids stay.
void keep_top_k(std::vector<double>& logits, std::size_t k) {
    if (k >= logits.size()) return;
    std::vector<double> ordered = logits;
    std::nth_element(ordered.begin(), ordered.begin() + static_cast<std::ptrdiff_t>(k - 1), ordered.end(),
                     std::greater<>());
    const double least = ordered[k - 1];
    auto equal_ones =
        static_cast<std::ptrdiff_t>(k) - std::ranges::count_if(logits, [least](double logit) { return logit > least; });
    for (double& logit : logits) {
        if (logit > least || (logit == least && equal_ones-- > 0)) continue;
        logit = out;
    }
}

struct Candidate {
    double logit, weight;  // its probability times the sum of all weights
    std::size_t token;

    // Likelier first; of equal ones, lower ids first.
    bool operator<(const Candidate& other) const {
        return logit != other.logit ? logit > other.logit : token < other.token;
    }
};

// Keeps the shortest run of likeliest tokens whose probabilities reach p (Holtzman et al., arXiv:1904.09751).
// Pieces of them are sorted, each twice as long as the one before: mostly the first one suffices.
void keep_top_p(std::vector<double>& logits, double p) {
    constexpr std::ptrdiff_t first_piece = 64;
    const double highest = *std::ranges::max_element(logits);
    double total = 0;
    std::vector<Candidate> candidates;
    for (std::size_t token = 0; token < logits.size(); ++token) {
        if (logits[token] == out) continue;
        const double weight = std::exp(logits[token] - highest);
        total += weight;
        candidates.push_back({logits[token], weight, token});
    }
    double before = 0;
    auto next = candidates.begin();
    for (auto length = first_piece; next != candidates.end() && before < p; length *= 2) {
        const auto end = next + std::min(length, candidates.end() - next);
        std::nth_element(next, end - 1, candidates.end());
        std::sort(next, end);
        for (; next != end && before < p; ++next) before += next->weight / total;
    }
    for (; next != candidates.end(); ++next) logits[next->token] = out;
}

// Keeps tokens with at least p times the highest probability (Nguyen et al., arXiv:2407.01082).
void keep_min_p(std::vector<double>& logits, double p) {
    const double highest = *std::ranges::max_element(logits);
    for (double& logit : logits) {
        if (std::exp(logit - highest) < p) logit = out;
    }
}

// The first token, by rising id, at which the sum of probabilities passes `uniform` in [0, 1).
Token draw(const std::vector<double>& logits, double uniform) {
    const double highest = *std::ranges::max_element(logits);
    std::vector<double> cumulative(logits.size());
    double sum = 0;
    for (std::size_t token = 0; token < logits.size(); ++token) {
        if (logits[token] != out) sum += std::exp(logits[token] - highest);
        cumulative[token] = sum;
    }
    const auto chosen = std::ranges::upper_bound(cumulative, uniform * sum);
    if (chosen != cumulative.end()) return static_cast<Token>(chosen - cumulative.begin());
    const auto last = std::find_if(logits.rbegin(), logits.rend(), [](double logit) { return logit != out; });
    return static_cast<Token>(logits.rend() - last - 1);  // uniform * sum was rounded up to the sum
}

// As people write it: without zeros at the end.
std::string plain(double value) {
    std::array<char, 32> text = {};
    const int size = std::snprintf(text.data(), text.size(), "%g", value);
    return {text.data(), static_cast<std::size_t>(size)};
}

void refuse(const char* name, const std::string& value, const std::string& range) {
    throw Error(std::string(name) + " is " + value + "; it has to be " + range);
}

void check_range(const std::optional<double>& value, const char* name, double least, double most) {
    if (value && !(*value >= least && *value <= most)) {  // NaN is neither
        refuse(name, plain(*value), plain(least) + " to " + plain(most));
    }
}

}  // namespace

void check_sampling(const SamplingOptions& options) {
    check_range(options.temperature, "temperature", 0, 100);
    if (options.top_k && *options.top_k < 0) refuse("top_k", std::to_string(*options.top_k), "0 or more");
    if (options.top_p && !(*options.top_p > 0 && *options.top_p <= 1)) {
        refuse("top_p", plain(*options.top_p), "above 0, at most 1");
    }
    check_range(options.min_p, "min_p", 0, 1);
    check_range(options.repetition_penalty, "repetition_penalty", 0.01, 100);
}

SamplingOptions merged(const SamplingOptions& chosen, const SamplingOptions& recommended) {
    const auto first = [](const auto& a, const auto& b) { return a ? a : b; };
    return {first(chosen.temperature, recommended.temperature),
            first(chosen.top_k, recommended.top_k),
            first(chosen.top_p, recommended.top_p),
            first(chosen.min_p, recommended.min_p),
            first(chosen.repetition_penalty, recommended.repetition_penalty),
            first(chosen.seed, recommended.seed)};
}

double philox_uniform(std::uint64_t seed, std::uint64_t stream, std::uint64_t step) {
    const auto low = [](std::uint64_t value) { return static_cast<std::uint32_t>(value); };
    const auto high = [](std::uint64_t value) { return static_cast<std::uint32_t>(value >> 32); };
    std::uint32_t a = low(step), b = high(step), c = low(stream), d = high(stream);
    std::uint32_t key0 = low(seed), key1 = high(seed);
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t first = std::uint64_t{0xD2511F53} * a, second = std::uint64_t{0xCD9E8D57} * c;
        a = high(second) ^ b ^ key0;
        b = low(second);
        c = high(first) ^ d ^ key1;
        d = low(first);
        key0 += 0x9E3779B9;
        key1 += 0xBB67AE85;
    }
    return static_cast<double>((std::uint64_t{b} << 32 | a) >> 11) * 0x1p-53;
}

Sampler::Sampler(const SamplingOptions& options, std::span<const Token> prompt, std::uint64_t stream)
    : options_(options), seed_(0), stream_(stream) {
    check_sampling(options);
    if (options.seed) {
        seed_ = *options.seed;
    } else {
        std::random_device device;
        seed_ = std::uint64_t{device()} << 32 | device();
    }
    if (options.repetition_penalty.value_or(1) != 1) seen_.insert(prompt.begin(), prompt.end());
}

Token Sampler::choose(std::span<const float> logits) {
    if (logits.empty()) throw Error("the model returned no logits", "export the model again");
    logits_.assign(logits.begin(), logits.end());
    penalise_repetition();
    const Token token = pick();
    if (options_.repetition_penalty.value_or(1) != 1) seen_.insert(token);
    ++step_;
    return token;
}

// Divides positive logits of seen tokens by the penalty, multiplies negative ones (CTRL, arXiv:1909.05858).
void Sampler::penalise_repetition() {
    const double penalty = options_.repetition_penalty.value_or(1);
    if (penalty == 1) return;
    for (const Token token : seen_) {
        if (token < 0 || static_cast<std::size_t>(token) >= logits_.size()) continue;
        double& logit = logits_[static_cast<std::size_t>(token)];
        logit = logit > 0 ? logit / penalty : logit * penalty;
    }
}

Token Sampler::pick() {
    const std::size_t best = largest(logits_);
    const double highest = logits_[best];
    if (!std::isfinite(highest)) {
        throw Error("the model returned " + std::to_string(highest) + " as its highest logit",
                    "its weights are damaged, or its dtype overflows: export it with --dtype fp32 or bf16");
    }
    const double temperature = options_.temperature.value_or(default_temperature);
    if (temperature == 0) return static_cast<Token>(best);
    for (double& logit : logits_) logit = (logit - highest) / temperature;  // which no temperature can overflow
    if (options_.top_k.value_or(0) > 0) keep_top_k(logits_, static_cast<std::size_t>(*options_.top_k));
    if (options_.top_p.value_or(1) < 1) keep_top_p(logits_, *options_.top_p);
    if (options_.min_p.value_or(0) > 0) keep_min_p(logits_, *options_.min_p);
    return draw(logits_, philox_uniform(seed_, stream_, step_));
}

}  // namespace torchchat

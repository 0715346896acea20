#include "generation.h"

#include <sys/resource.h>

#include <algorithm>
#include <chrono>

#include "error.h"
#include "sampler.h"

namespace torchchat {
namespace {

constexpr std::size_t prefill_chunk = 512;  // tokens: bounds the memory of a prefill, and how long Ctrl-C waits

using Clock = std::chrono::steady_clock;

double seconds(Clock::duration duration) {
    return std::chrono::duration<double>(duration).count();
}

std::int64_t peak_memory() {
    rusage usage = {};
    getrusage(RUSAGE_SELF, &usage);
#if defined(__APPLE__)
    return usage.ru_maxrss;
#else
    return std::int64_t{usage.ru_maxrss} * 1024;
#endif
}

std::optional<double> rate(std::int64_t count, double time) {
    return count > 0 && time > 0 ? std::optional(static_cast<double>(count) / time) : std::nullopt;
}

// When things happened in one call of `generate`; what the reader of the text does is not the model's time.
struct Times {
    Clock::time_point started = Clock::now(), prefilled = started, first = started, last = started;
    Clock::duration idle{};
    std::int64_t steps = 0;

    Clock::time_point now() const { return Clock::now() - idle; }
    void count_token() {
        last = now();
        if (steps++ == 0) first = last;
    }
};

std::size_t overlap(std::string_view text, std::string_view stop) {
    for (std::size_t size = std::min(text.size(), stop.size() - 1); size > 0; --size) {
        if (text.ends_with(stop.substr(0, size))) return size;
    }
    return 0;
}

// One answer in the making.
class Generator {
  public:
    Generator(const Tokenizer& tokenizer, const Task& task, const Options& options, const OnText& on_text)
        : decoder_(tokenizer, task.at_start), stops_(options.stop), on_text_(on_text) {}

    void take(Token token) {
        answer.token_ids.push_back(token);
        emit(stops_.push(decoder_.push(token)));
    }
    void finish() {
        if (stops_.found()) return;
        emit(stops_.push(decoder_.finish()));
        if (!stops_.found()) emit(stops_.finish());
    }
    bool stopped() const { return stops_.found(); }
    bool refused() const { return refused_; }

    Answer answer;
    Times times;

  private:
    void emit(const std::string& text) {
        if (text.empty()) return;
        answer.text += text;
        if (!on_text_) return;
        const auto before = Clock::now();
        refused_ = !on_text_(text) || refused_;
        times.idle += Clock::now() - before;
    }

    TextStream decoder_;
    StopMatcher stops_;
    const OnText& on_text_;
    bool refused_ = false;
};

Statistics statistics_of(const Generator& generator, std::size_t prompt, std::size_t reused) {
    const Times& times = generator.times;
    Statistics result;
    result.prompt_tokens = static_cast<std::int64_t>(prompt);
    result.prefilled_tokens = static_cast<std::int64_t>(prompt - reused);
    result.new_tokens = static_cast<std::int64_t>(generator.answer.token_ids.size());
    result.ttft_s = seconds(times.first - times.started);
    result.prefill_tps = rate(result.prefilled_tokens, seconds(times.prefilled - times.started));
    result.decode_tps = rate(times.steps - 1, seconds(times.last - times.first));
    result.peak_rss_bytes = peak_memory();
    return result;
}

}  // namespace

std::size_t TokenSequence::reuse(std::span<const Token> tokens) {
    // An interruption can leave one of the two behind.
    const std::size_t held = std::min(tokens_.size(), static_cast<std::size_t>(session_->length()));
    std::size_t shared = 0;
    while (shared < held && shared + 1 < tokens.size() && tokens_[shared] == tokens[shared]) ++shared;
    session_->truncate(static_cast<std::int64_t>(shared));
    tokens_.resize(shared);
    return shared;
}

std::span<const float> TokenSequence::append(std::span<const Token> tokens) {
    const auto logits = session_->append(tokens);
    tokens_.insert(tokens_.end(), tokens.begin(), tokens.end());
    return logits;
}

std::string StopMatcher::push(const std::string& text) {
    held_ += text;
    std::size_t first = std::string::npos, keep = 0;
    for (const std::string& stop : stops_) {
        first = std::min(first, held_.find(stop));
        keep = std::max(keep, overlap(held_, stop));
    }
    if (first != std::string::npos) {
        found_ = true;
        return held_.substr(0, first);
    }
    std::string certain = held_.substr(0, held_.size() - keep);
    held_.erase(0, certain.size());
    return certain;
}

void check_prompt(std::size_t length, std::int64_t limit) {
    if (length == 0) {
        throw Error("the prompt is empty, and the tokenizer has no token to begin a text with", "give a --prompt");
    }
    if (static_cast<std::int64_t>(length) >= limit) {
        throw Error("the prompt has " + std::to_string(length) + " tokens; with an answer it has to fit into " +
                        std::to_string(limit),
                    "shorten it");
    }
}

void check_options(const Options& options) {
    check_sampling(options.sampling);
    if (options.max_new_tokens && *options.max_new_tokens < 1) {
        throw Error("max_new_tokens is " + std::to_string(*options.max_new_tokens) + "; it has to be 1 or more");
    }
    if (std::ranges::any_of(options.stop, [](const std::string& stop) { return stop.empty(); })) {
        throw Error("a stop string is empty; it would end every answer at once");
    }
}

Answer generate(TokenSequence& sequence, const Tokenizer& tokenizer, const std::set<Token>& end_ids, const Task& task,
                const Options& options, const OnText& on_text, const Cancelled& cancelled) {
    check_options(options);
    check_prompt(task.prompt.size(), sequence.limit());
    const auto is_cancelled = [&] { return cancelled && cancelled(); };
    Generator generator(tokenizer, task, options, on_text);
    Times& times = generator.times;
    const std::size_t reused = sequence.reuse(task.prompt);
    std::span<const float> logits;
    std::size_t done = reused;
    while (done < task.prompt.size() && !is_cancelled()) {
        const auto chunk = task.prompt.subspan(done, std::min(prefill_chunk, task.prompt.size() - done));
        logits = sequence.append(chunk);
        done += chunk.size();
    }
    times.prefilled = times.now();
    Sampler sampler(options.sampling, task.prompt, task.stream);
    std::string& reason = generator.answer.finish_reason = "cancelled";
    while (done == task.prompt.size()) {
        const Token token = sampler.choose(logits);
        times.count_token();
        if (end_ids.contains(token)) {
            reason = "stop";
            break;
        }
        generator.take(token);
        const auto produced = static_cast<std::int64_t>(generator.answer.token_ids.size());
        if (generator.stopped()) {
            reason = "stop";
            break;
        }
        if (produced == options.max_new_tokens ||
            static_cast<std::int64_t>(task.prompt.size()) + produced >= sequence.limit()) {
            reason = "length";
            break;
        }
        if (generator.refused() || is_cancelled()) break;
        logits = sequence.append({&token, 1});
    }
    generator.finish();
    generator.answer.statistics = statistics_of(generator, task.prompt.size(), reused);
    return std::move(generator.answer);
}

}  // namespace torchchat

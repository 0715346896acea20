// Answers of a language model, from a file that `torchchat export` wrote.
//
//     auto model = torchchat::Model::load("model.pt2");
//     auto chat = model.chat();
//     chat.ask("Hello!", {}, [](std::string_view text) { std::cout << text << std::flush; return true; });
//
// Everything throws `torchchat::Error`. A `Model` can be shared by threads, each with its own `Chat` or `Text`.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace torchchat {

using Token = std::int32_t;

// What happened, with the value, in `what()`; what to do about it in `fix()`, which may be empty.
class Error : public std::runtime_error {
  public:
    explicit Error(const std::string& message, std::string fix = {})
        : std::runtime_error(message), fix_(std::move(fix)) {}
    const std::string& fix() const { return fix_; }

  private:
    std::string fix_;
};

// How tokens are chosen: docs/sampling.md. What is not set is as the model's makers recommend, else as said here.
struct SamplingOptions {
    std::optional<double> temperature = {};         // 0.8; 0 always takes the likeliest token
    std::optional<std::int64_t> top_k = {};         // 0: all tokens
    std::optional<double> top_p = {};               // 1: all
    std::optional<double> min_p = {};               // 0: all
    std::optional<double> repetition_penalty = {};  // 1: off
    std::optional<std::uint64_t> seed = {};         // without one, chance decides
};

struct Options {
    SamplingOptions sampling = {};
    std::optional<std::int64_t> max_new_tokens = {};  // unset: until the model ends it or the context is full
    std::vector<std::string> stop = {};               // texts that end the answer, and are no part of it
};

// Counts, seconds and tokens per second of one answer.
struct Statistics {
    std::int64_t prompt_tokens = 0;
    std::int64_t prefilled_tokens = 0;  // of the prompt, those that were not in the KV cache yet
    std::int64_t new_tokens = 0;
    double ttft_s = 0;                  // from the call to the first token
    std::optional<double> prefill_tps;  // unset: too few tokens to say
    std::optional<double> decode_tps;
    std::int64_t peak_rss_bytes = 0;  // of the whole process since it started
};

struct Answer {
    std::string text;
    std::vector<Token> token_ids;
    std::string finish_reason;  // "stop", "length" or "cancelled"
    Statistics statistics;
};

// Is given text as soon as it is certain; false ends the answer.
using OnText = std::function<bool(std::string_view text)>;
// Is asked before every step; true ends the answer.
using Cancelled = std::function<bool()>;

struct LoadOptions {
    // That compute; 0: as the runtime chooses. The number is the process's, of all models of one runtime: to be set
    // while none of them answers.
    int threads = 0;
};

struct LoadedFile;

// A conversation, whose KV cache is kept from turn to turn. Not thread-safe.
class Chat {
  public:
    // Answers the user's message, given the turns before. Throws where the message alone is too long, or where the
    // model's chat template refuses it; the conversation is then as it was before.
    Answer ask(std::string_view message, const Options& options = {}, const OnText& on_text = {},
               const Cancelled& cancelled = {});
    // Text before the first turn; empty: none.
    void set_system(std::string_view text);
    // Forgets all but the system message.
    void reset();
    // Told of what the user should know beside the answer, such as turns that were left out.
    void on_notice(std::function<void(std::string_view)> notice);

    Chat(const Chat&) = delete;
    Chat& operator=(const Chat&) = delete;
    Chat(Chat&&) noexcept;
    Chat& operator=(Chat&&) noexcept;
    ~Chat();

  private:
    friend class Model;
    struct State;
    explicit Chat(std::unique_ptr<State> state);
    std::unique_ptr<State> state_;
};

// A text that the model continues, without a template. What two prompts have in common is computed once.
class Text {
  public:
    Answer complete(std::string_view prompt, const Options& options = {}, const OnText& on_text = {},
                    const Cancelled& cancelled = {});

    Text(const Text&) = delete;
    Text& operator=(const Text&) = delete;
    Text(Text&&) noexcept;
    Text& operator=(Text&&) noexcept;
    ~Text();

  private:
    friend class Model;
    struct State;
    explicit Text(std::unique_ptr<State> state);
    std::unique_ptr<State> state_;
};

// An exported file that is ready to run.
class Model {
  public:
    static Model load(const std::string& path, const LoadOptions& options = {});

    const std::string& name() const;
    const std::string& backend() const;  // "aoti" or "executorch"
    const std::string& dtype() const;
    bool has_chat_template() const;    // without one, a chat is a plain transcript
    std::int64_t max_context() const;  // tokens that a prompt and its answer can have

    Chat chat() const;
    Text text() const;

  private:
    explicit Model(std::shared_ptr<const LoadedFile> file);
    std::shared_ptr<const LoadedFile> file_;
};

// The runtimes that this library was built with: "aoti", "executorch".
std::vector<std::string> backends();

}  // namespace torchchat

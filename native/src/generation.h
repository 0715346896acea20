// The one loop over tokens: a prompt goes in, text comes out. As torchchat_core/generation.py.
#pragma once

#include <memory>
#include <set>
#include <string>
#include <vector>

#include "session.h"
#include "tokenizers/tokenizer.h"

namespace torchchat {

// A session and the ids that it holds, so that what two prompts have in common is computed once.
class TokenSequence {
  public:
    explicit TokenSequence(std::unique_ptr<Session> session) : session_(std::move(session)) {}

    std::int64_t limit() const { return session_->limit(); }
    // Cuts the session to what it shares with `tokens`, their last one excepted; the length that remains.
    std::size_t reuse(std::span<const Token> tokens);
    // Appends tokens; logits [vocab] at the last.
    std::span<const float> append(std::span<const Token> tokens);

  private:
    std::unique_ptr<Session> session_;
    std::vector<Token> tokens_;
};

// Holds text back while it may be the beginning of a stop string; the stop string itself never comes out.
class StopMatcher {
  public:
    explicit StopMatcher(std::vector<std::string> stops) : stops_(std::move(stops)) {}

    // Takes text, gives what is certain of all that was taken.
    std::string push(const std::string& text);
    // What was held back, now that nothing follows.
    std::string finish() const { return held_; }
    bool found() const { return found_; }

  private:
    std::vector<std::string> stops_;
    std::string held_;
    bool found_ = false;
};

struct Task {
    std::span<const Token> prompt;
    bool at_start = false;     // the text begins with the answer, so that a tokenizer's prefix space is taken off
    std::uint64_t stream = 0;  // tells several answers with one seed apart
};

// Answers the prompt. Throws `Error` for an empty one, or one that leaves no room for an answer.
Answer generate(TokenSequence& sequence, const Tokenizer& tokenizer, const std::set<Token>& end_ids, const Task& task,
                const Options& options, const OnText& on_text, const Cancelled& cancelled);

// Throws `Error` for an empty prompt, or one that leaves no room for an answer.
void check_prompt(std::size_t length, std::int64_t limit);

// Throws `Error` for options that are out of range.
void check_options(const Options& options);

}  // namespace torchchat

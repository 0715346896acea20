// A conversation: messages, the prompt that they make, and the cache that is kept from turn to turn. As
// torchchat_core/conversation.py.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "chat_template.h"
#include "generation.h"
#include "tokenizers/splitter.h"

namespace torchchat {

// How a model reads and writes text.
struct TextFormat {
    std::unique_ptr<Tokenizer> tokenizer;
    std::optional<ChatTemplate> chat_template;  // none: the model continues texts, and is given a plain transcript
    std::set<Token> end_ids;                    // each of them ends an answer
    Splitter control;                           // the texts of the control tokens
    std::vector<std::pair<std::string, Token>> numbered;  // the same, by the numbers that stand for them in messages
    std::optional<Token> bos_id;
    bool adds_bos = false;

    // Ids of text that is no chat. With `special`, control-token texts are such.
    std::vector<Token> encode_plain(std::string_view text, bool special) const;
    // A message with a mark and a number in place of every control token's text in it.
    std::string disarmed(std::string_view content) const;
    // Ids of a rendered template, or an end of it: the control tokens that stand in it, and no others.
    std::vector<Token> encode_disarmed(const std::string& text) const;

  private:
    std::string armed(std::string_view text) const;
};

TextFormat make_text_format(std::unique_ptr<Tokenizer> tokenizer, std::optional<ChatTemplate> chat_template,
                            std::set<Token> end_ids, std::optional<Token> bos_id, bool adds_bos);

class Conversation {
  public:
    Conversation(TokenSequence sequence, const TextFormat& format) : sequence_(std::move(sequence)), format_(format) {}

    Answer ask(std::string_view text, Options options, const OnText& on_text, const Cancelled& cancelled);
    void set_system(std::string_view text);
    void reset() { turns_.clear(); }

    std::function<void(std::string_view)> notice;

  private:
    struct Prompt {
        std::string text;
        std::vector<Token> ids;
    };

    Prompt prompt() const;
    Prompt fitting_prompt(const Options& options);
    void settle(const Prompt& prompt, const Answer& answer);

    TokenSequence sequence_;
    const TextFormat& format_;
    std::optional<std::string> system_;
    std::vector<Turn> turns_;
    Prompt settled_;  // up to the end of the last answer
};

}  // namespace torchchat

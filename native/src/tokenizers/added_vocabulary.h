// The tokens of a tokenizer.json that stand beside its model's, and are cut out of the text before it.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "tokenizers/bpe_model.h"
#include "tokenizers/json_steps.h"
#include "tokenizers/splitter.h"
#include "tokenizers/tokenizer.h"

namespace torchchat {

struct AddedToken {
    std::string content;
    std::string piece;  // what its id stands for: the content, normalised where it is found in normalised text
    Token token;
    bool single_word, takes_left, takes_right, normalized, special;
};

class AddedVocabulary {
  public:
    // Of the list "added_tokens" or null. Throws where it is damaged.
    AddedVocabulary(const nlohmann::json* declared, const BpeModel& model, Normalizer normalizer);

    struct Part {
        std::string text;  // normalised, where it is no token
        bool at_start;
        bool is_token;
        Token token;
    };

    // The text cut at added tokens; at special ones where asked for.
    std::vector<Part> split(std::string_view text, bool special) const;

    // Splits a prompt at the control tokens among its parts; the names of control tokens in its texts do not count.
    std::vector<Part> split(std::span<const PromptPart> parts) const;

    const std::vector<AddedToken>& tokens() const { return tokens_; }

  private:
    struct Given {
        std::size_t at;  // offset in bytes of the token's content in the text
        Token token;
    };

    std::vector<Part> split(std::string_view text, bool special, std::span<const Given> given) const;
    std::vector<Part> cut(std::string_view text, bool at_start, const Splitter& words, bool special,
                          std::span<const Given> given) const;

    std::vector<AddedToken> tokens_;
    std::unordered_map<Token, std::size_t> by_id_;
    Splitter raw_, normalised_;  // words to be found before and after the normaliser
    Normalizer normalizer_;
};

}  // namespace torchchat

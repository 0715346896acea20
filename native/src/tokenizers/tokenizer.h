// Text to token ids and back. Each kind is a file beside this one.
#pragma once

#include <map>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "text/utf8.h"
#include "torchchat/torchchat.h"

namespace torchchat {

// A part of a prompt: ordinary text, or a control token.
using PromptPart = std::variant<std::string, Token>;

// Ids are whole numbers from 0 to `vocab_size` - 1. The same for every tokenizer as `ByteTokenizer` in Python.
class Tokenizer {
  public:
    Tokenizer() = default;
    Tokenizer(const Tokenizer&) = delete;
    Tokenizer& operator=(const Tokenizer&) = delete;
    Tokenizer(Tokenizer&&) = delete;
    Tokenizer& operator=(Tokenizer&&) = delete;
    virtual ~Tokenizer() = default;

    // Ids of `text`, without BOS or EOS. With `special`, the texts of control tokens become their ids.
    virtual std::vector<Token> encode(std::string_view text, bool special) const = 0;
    // Encodes a prompt that is given in parts. Each part gets the ids that it has in `encode(text, true)` of the whole,
    // except that the names of control tokens in its texts are ordinary text. The default suits tokenizers that encode
    // each part independently of its neighbors.
    virtual std::vector<Token> encode_parts(std::span<const PromptPart> parts) const;
    // The bytes that one token adds to a text; for control tokens their name. Throws for an id outside the vocabulary.
    virtual std::string token_bytes(Token token) const = 0;

    // The text of a whole sequence; control tokens are left out.
    std::string decode(std::span<const Token> ids) const;
    // `token_bytes`, with U+FFFD for ids beyond the vocabulary: models pad theirs, and sampling may draw such an id.
    std::string text_bytes(Token token) const;
    bool is_control(Token token) const { return control_ids_.contains(token); }

    Token vocab_size = 0;
    std::map<std::string, Token, std::less<>> special_tokens;  // texts of the control tokens
    std::optional<Token> bos_id, eos_id;
    bool adds_bos = false;           // whether a prompt of plain text starts with bos_id
    bool adds_prefix_space = false;  // whether encoding puts a space before text, which decoding takes off

  protected:
    // To be called when `special_tokens` is complete.
    void settle_control_ids();
    // Throws for an id outside the vocabulary.
    void check(Token token) const;

  private:
    std::set<Token> control_ids_;
};

// Text out of token ids, as they come: `decode`, token by token. With `at_start` the text begins with the sequence.
class TextStream {
  public:
    TextStream(const Tokenizer& tokenizer, bool at_start);
    // The text that is complete with `token`; often none.
    std::string push(Token token);
    // U+FFFD where the sequence ended inside a character, else nothing.
    std::string finish() { return decoder_.finish(); }

  private:
    const Tokenizer& tokenizer_;
    Utf8Stream decoder_;
    bool prefix_is_due_;
};

// A tokenizer's files by name: "tokenizer.model" or "tokenizer.json", perhaps "tokenizer_config.json" and others.
using TokenizerFiles = std::map<std::string, std::string_view, std::less<>>;

// The tokenizer of the files. Throws where there is none, or where it is damaged or of another kind.
std::unique_ptr<Tokenizer> read_tokenizer(const TokenizerFiles& files);

// The kinds, in the order in which they are tried; `settings` is tokenizer_config.json's content, or an empty object.
std::unique_ptr<Tokenizer> read_tiktoken(std::string_view content, const nlohmann::json& settings);
std::unique_ptr<Tokenizer> read_sentencepiece(std::string_view content, const nlohmann::json& settings,
                                              const nlohmann::json& legacy_added_tokens);
std::unique_ptr<Tokenizer> read_tokenizer_json(std::string_view content, const nlohmann::json& settings,
                                               const nlohmann::json& special_tokens_map);

}  // namespace torchchat

#include "tokenizers/tokenizer.h"

#include <algorithm>
#include <iterator>
#include <nlohmann/json.hpp>

#include "error.h"
#include "json.h"

namespace torchchat {
namespace {

// SentencePiece models begin with a piece (field 1) that begins with its text (field 1).
bool is_sentencepiece(std::string_view content) {
    return content.size() > 2 && content[0] == '\n' && content[2] == '\n';
}

nlohmann::json optional_object(const TokenizerFiles& files, std::string_view name) {
    const auto found = files.find(name);
    return found == files.end() ? nlohmann::json::object() : json_object(found->second, name);
}

}  // namespace

std::vector<Token> Tokenizer::encode_parts(std::span<const PromptPart> parts) const {
    std::vector<Token> ids;
    for (const PromptPart& part : parts) {
        if (const Token* token = std::get_if<Token>(&part)) {
            ids.push_back(*token);
        } else {
            std::ranges::copy(encode(std::get<std::string>(part), false), std::back_inserter(ids));
        }
    }
    return ids;
}

std::string Tokenizer::decode(std::span<const Token> ids) const {
    TextStream stream(*this, true);
    std::string text;
    for (const Token token : ids) text += stream.push(token);
    return text + stream.finish();
}

std::string Tokenizer::text_bytes(Token token) const {
    return token >= vocab_size ? std::string(replacement) : token_bytes(token);
}

void Tokenizer::settle_control_ids() {
    control_ids_.clear();
    for (const auto& [text, token] : special_tokens) control_ids_.insert(token);
}

void Tokenizer::check(Token token) const {
    if (token < 0 || token >= vocab_size) {
        throw Error("token id " + std::to_string(token) + " is outside the vocabulary, which has 0 to " +
                    std::to_string(vocab_size - 1));
    }
}

TextStream::TextStream(const Tokenizer& tokenizer, bool at_start)
    : tokenizer_(tokenizer), prefix_is_due_(at_start && tokenizer.adds_prefix_space) {}

std::string TextStream::push(Token token) {
    if (tokenizer_.is_control(token)) return {};
    std::string data = tokenizer_.text_bytes(token);
    if (prefix_is_due_ && !data.empty()) {
        prefix_is_due_ = false;
        if (data.front() == ' ') data.erase(0, 1);
    }
    return decoder_.push(data);
}

std::unique_ptr<Tokenizer> read_tokenizer(const TokenizerFiles& files) {
    const nlohmann::json settings = optional_object(files, "tokenizer_config.json");
    if (const auto file = files.find("tokenizer.json"); file != files.end()) {
        return read_tokenizer_json(file->second, settings, optional_object(files, "special_tokens_map.json"));
    }
    for (const auto& [name, content] : files) {
        if (!name.ends_with(".model")) continue;
        if (is_sentencepiece(content)) {
            return read_sentencepiece(content, settings, optional_object(files, "added_tokens.json"));
        }
        return read_tiktoken(content, settings);
    }
    throw Error("the file has no tokenizer that is known: tokenizer.json or tokenizer.model",
                "export the model again with this version of torchchat");
}

}  // namespace torchchat

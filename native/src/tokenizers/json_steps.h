// The steps of a tokenizer.json around its model: what text goes through before it, and what its pieces mean.
#pragma once

#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <unordered_set>
#include <vector>

namespace torchchat {

// A part of the text on its way to the model.
struct TextPart {
    std::string text;
    bool at_start;  // whether it begins where the whole text does
};

using Normalizer = std::function<std::string(std::string)>;
using PreTokenizer = std::function<std::vector<TextPart>(std::vector<TextPart>)>;
using Decoder = std::function<std::vector<std::string>(std::vector<std::string>)>;

// The steps as one. Each throws `Error` for a kind that is not known; null means that there is no such step.
Normalizer read_normalizer(const nlohmann::json* declared);
PreTokenizer read_pre_tokenizer(const nlohmann::json* declared);

// What a piece's bytes are in the middle of a text, and what a sequence of pieces is from its start.
struct PieceReader {
    std::function<std::string(const std::string& piece)> bytes;
    std::function<std::string(const std::vector<std::string>& pieces)> text;
};

// Throws `Error` where the decoder does not work token by token. `literal` are the texts of added tokens.
PieceReader read_decoder(const nlohmann::json* declared, std::unordered_set<std::string> literal);

// The bytes as characters of byte-level vocabularies, and back; text that is not made of such stays as it is.
std::string to_byte_level(std::string_view bytes);
std::string from_byte_level(std::string_view text);

}  // namespace torchchat

// What tokenizer_config.json and its companions say.
#pragma once

#include <map>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>

#include "torchchat/torchchat.h"

namespace torchchat {

struct AddedText {
    std::string text;
    bool is_control = false;
    bool strips_left = false, strips_right = false;  // strips the white space before or after it
};

// The token text under `key` ("bos_token", ...), which is a string or an object with "content"; else nothing.
std::optional<std::string> token_name(const nlohmann::json& settings, std::string_view key);

// The entries of added_tokens_decoder. Throws where one is malformed.
std::map<Token, AddedText> added_tokens(const nlohmann::json& settings);

// The control tokens of added_tokens.json (text -> id). Throws where an entry is malformed.
std::map<Token, AddedText> legacy_added_tokens(const nlohmann::json& content);

// Whether the settings have add_bos_token, and what they say.
std::optional<bool> adds_bos_token(const nlohmann::json& settings);

}  // namespace torchchat

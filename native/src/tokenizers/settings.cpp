#include "tokenizers/settings.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "error.h"
#include "json.h"

namespace torchchat {
namespace {

constexpr std::size_t most_digits = 9;  // of a token id

bool is_id(std::string_view text) {
    return !text.empty() && text.size() <= most_digits &&
           std::ranges::all_of(text, [](char digit) { return digit >= '0' && digit <= '9'; });
}

}  // namespace

std::optional<std::string> token_name(const nlohmann::json& settings, std::string_view key) {
    const nlohmann::json* value = member(settings, key);
    if (value != nullptr && value->is_object()) value = member(*value, "content");
    if (value == nullptr || !value->is_string() || value->get_ref<const std::string&>().empty()) return std::nullopt;
    return value->get<std::string>();
}

std::map<Token, AddedText> added_tokens(const nlohmann::json& settings) {
    std::map<Token, AddedText> found;
    const nlohmann::json* declared = member(settings, "added_tokens_decoder");
    if (declared == nullptr) return found;
    if (!declared->is_object()) throw Error("added_tokens_decoder in tokenizer_config.json is no object");
    for (const auto& [key, value] : declared->items()) {
        const nlohmann::json* content = member(value, "content");
        if (!is_id(key) || content == nullptr || !content->is_string()) {
            throw Error("added_tokens_decoder has " + shown(key) + ": it maps token ids to objects with \"content\"");
        }
        found.emplace(std::stoi(key), AddedText{content->get<std::string>(), flag(value, "special", false),
                                                flag(value, "lstrip", false), flag(value, "rstrip", false)});
    }
    return found;
}

std::map<Token, AddedText> legacy_added_tokens(const nlohmann::json& content) {
    std::map<Token, AddedText> found;
    for (const auto& [text, value] : content.items()) {
        const std::int64_t token = value.is_number_integer() ? value.get<std::int64_t>() : -1;
        if (token < 0 || token >= 1'000'000'000) {
            throw Error("added_tokens.json has " + shown(text) + ": it maps texts to token ids");
        }
        found[static_cast<Token>(token)] = {.text = text, .is_control = true};
    }
    return found;
}

std::optional<bool> adds_bos_token(const nlohmann::json& settings) {
    const nlohmann::json* value = member(settings, "add_bos_token");
    if (value == nullptr || value->is_null()) return std::nullopt;
    return value->is_boolean() && value->get<bool>();
}

}  // namespace torchchat

#include "tokenizers/added_vocabulary.h"

#include <nlohmann/json.hpp>

#include "error.h"
#include "json.h"
#include "text/regex.h"
#include "text/utf8.h"

namespace torchchat {
namespace {

bool is_word_character(std::string_view character) {
    static const Regex word(R"([\p{L}\p{M}\p{N}\p{Pc}])");
    return !word.matches(character).empty();
}

bool ends_with_word(std::string_view text) {
    std::size_t begin = text.size() - 1;
    while (begin > 0 && (static_cast<unsigned char>(text[begin]) & 0xC0) == 0x80) --begin;
    return is_word_character(text.substr(begin));
}

bool starts_with_word(std::string_view text) {
    return is_word_character(text.substr(0, character_size(text[0])));
}

AddedToken read_token(const nlohmann::json& entry) {
    const nlohmann::json* content = member(entry, "content");
    if (content == nullptr || !content->is_string()) {
        throw Error("an added token in tokenizer.json has no \"content\"", "export the model again");
    }
    const bool special = flag(entry, "special", false);
    return {content->get<std::string>(),
            {},
            0,
            flag(entry, "single_word", false),
            flag(entry, "lstrip", false),
            flag(entry, "rstrip", false),
            flag(entry, "normalized", !special),
            special};
}

}  // namespace

AddedVocabulary::AddedVocabulary(const nlohmann::json* declared, const BpeModel& model, Normalizer normalizer)
    : normalizer_(std::move(normalizer)) {
    if (declared == nullptr || declared->is_null()) return;
    if (!declared->is_array()) throw Error("\"added_tokens\" in tokenizer.json is no list", "export the model again");
    std::map<std::string, Token, std::less<>> raw, normalised;
    std::unordered_map<std::string, Token> known;
    Token next = static_cast<Token>(model.vocabulary().size());
    for (const nlohmann::json& entry : *declared) {
        AddedToken added = read_token(entry);
        if (added.content.empty() || known.contains(added.content)) continue;
        const auto in_model = model.find(added.content);
        added.token = in_model ? *in_model : next;
        next = std::max(next, added.token + 1);
        known.emplace(added.content, added.token);
        added.piece = added.normalized && normalizer_ ? normalizer_(well_formed(added.content)) : added.content;
        (added.normalized ? normalised : raw).insert_or_assign(added.piece, added.token);
        by_id_[added.token] = tokens_.size();
        tokens_.push_back(std::move(added));
    }
    raw_ = Splitter(raw);
    normalised_ = Splitter(normalised);
}

std::vector<AddedVocabulary::Part> AddedVocabulary::split(std::string_view text, bool special) const {
    return split(text, special, {});
}

std::vector<AddedVocabulary::Part> AddedVocabulary::split(std::span<const PromptPart> parts) const {
    std::string text;
    std::vector<Given> given;
    for (const PromptPart& part : parts) {
        if (const Token* token = std::get_if<Token>(&part)) {
            given.push_back({text.size(), *token});
            text += tokens_[by_id_.at(*token)].content;
        } else {
            text += well_formed(std::get<std::string>(part));
        }
    }
    return split(text, false, given);
}

std::vector<AddedVocabulary::Part> AddedVocabulary::split(std::string_view text, bool special,
                                                          std::span<const Given> given) const {
    std::vector<Part> result;
    for (Part& part : cut(text, true, raw_, special, given)) {
        if (part.is_token) {
            result.push_back(std::move(part));
            continue;
        }
        const std::string normalised = normalizer_ ? normalizer_(std::move(part.text)) : std::move(part.text);
        for (Part& inner : cut(normalised, part.at_start, normalised_, special, {})) result.push_back(std::move(inner));
    }
    return result;
}

std::vector<AddedVocabulary::Part> AddedVocabulary::cut(std::string_view text, bool at_start, const Splitter& words,
                                                        bool special, std::span<const Given> given) const {
    std::vector<Part> parts;
    std::size_t begin = 0;
    const auto close = [&](std::size_t end) {
        if (end > begin)
            parts.push_back({std::string(text.substr(begin, end - begin)), at_start && begin == 0, false, 0});
    };
    for (std::size_t at = 0; at < text.size();) {
        const bool is_given = !given.empty() && at == given.front().at;
        const Splitter::Word* word = is_given ? nullptr : words.find_at(text, at);
        const bool is_whole = word != nullptr && (given.empty() || at + word->first.size() <= given.front().at);
        if (!is_given && !is_whole) {
            at += character_size(text[at]);
            continue;
        }
        const AddedToken& added = tokens_[by_id_.at(is_given ? given.front().token : word->second)];
        std::size_t start = at, stop = at + (is_given ? added.content.size() : word->first.size());
        at = stop;
        if (is_given) given = given.subspan(1);
        if (added.special && !special && !is_given) continue;
        if (!is_given && added.single_word &&
            ((start > 0 && ends_with_word(text.substr(0, start))) ||
             (stop < text.size() && starts_with_word(text.substr(stop))))) {
            continue;
        }
        if (added.takes_left) start = std::max(without_spaces_at_end(text.substr(0, start)), begin);
        if (added.takes_right) stop += spaces_at_start(text.substr(stop));
        if (start < begin) continue;  // a token before took it as white space
        close(start);
        parts.push_back({std::string(text.substr(start, stop - start)), false, true, added.token});
        begin = stop;
    }
    close(text.size());
    return parts;
}

}  // namespace torchchat

#include "tokenizers/bpe_model.h"

#include <nlohmann/json.hpp>

#include "error.h"
#include "json.h"
#include "text/utf8.h"

namespace torchchat {
namespace {

constexpr std::int64_t largest_id = 10'000'000;

Error damaged(const std::string& what) {
    return Error("tokenizer.json is wrong: " + what, "the file is damaged: copy or export the model again");
}

std::uint64_t pair_of(Token left, Token right) {
    return std::uint64_t{static_cast<std::uint32_t>(left)} << 32 | static_cast<std::uint32_t>(right);
}

// A merge is "left right", or [left, right] in later files.
std::pair<std::string, std::string> merge_parts(const nlohmann::json& merge) {
    if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
        return {merge[0].get<std::string>(), merge[1].get<std::string>()};
    }
    const std::string text = merge.is_string() ? merge.get<std::string>() : "";
    const std::size_t space = text.find(' ');
    if (space == text.npos || text.find(' ', space + 1) != text.npos) throw damaged("a merge is not of two pieces");
    return {text.substr(0, space), text.substr(space + 1)};
}

}  // namespace

BpeModel::BpeModel(const nlohmann::json& declared) {
    const std::string type = text_of(declared, "type", "BPE");
    if (type != "BPE") {
        throw Error("the tokenizer's model is " + shown(type) + "; this program knows BPE",
                    "run the file with torchchat");
    }
    if (const nlohmann::json* unknown = member(declared, "unk_token"); unknown != nullptr && unknown->is_string()) {
        unknown_ = unknown->get<std::string>();
    }
    prefix_ = text_of(declared, "continuing_subword_prefix", "");
    suffix_ = text_of(declared, "end_of_word_suffix", "");
    fuses_unknown_ = flag(declared, "fuse_unk", false);
    byte_fallback_ = flag(declared, "byte_fallback", false);
    ignores_merges_ = flag(declared, "ignore_merges", false);
    read_vocabulary(declared);
    read_merges(declared);
}

void BpeModel::read_vocabulary(const nlohmann::json& declared) {
    const nlohmann::json* listed = member(declared, "vocab");
    if (listed == nullptr || !listed->is_object()) throw damaged("the model has no \"vocab\"");
    vocabulary_.reserve(listed->size());
    for (const auto& [piece, id] : listed->items()) {
        const std::int64_t value = id.is_number_integer() ? id.get<std::int64_t>() : -1;
        if (value < 0 || value > largest_id) throw damaged("the piece " + shown(piece) + " has no id");
        vocabulary_.emplace(piece, static_cast<Token>(value));
    }
}

void BpeModel::read_merges(const nlohmann::json& declared) {
    const nlohmann::json* listed = member(declared, "merges");
    if (listed == nullptr || !listed->is_array()) throw damaged("the model has no \"merges\"");
    merges_.reserve(listed->size());
    std::uint32_t rank = 0;
    for (const auto& merge : *listed) {
        const auto [left, right] = merge_parts(merge);
        if (!right.starts_with(prefix_)) throw damaged("a merge lacks the prefix inside words");
        const auto a = find(left), b = find(right), both = find(left + right.substr(prefix_.size()));
        if (!a || !b || !both) throw damaged("the merge of " + shown(left) + " and " + shown(right) + " has no piece");
        merges_.insert_or_assign(pair_of(*a, *b), Merge{rank++, *both});
    }
}

std::optional<Token> BpeModel::find(const std::string& piece) const {
    const auto found = vocabulary_.find(piece);
    return found == vocabulary_.end() ? std::nullopt : std::optional(found->second);
}

void BpeModel::encode(const std::string& word, std::vector<Token>& ids) const {
    if (word.empty()) return;
    if (const auto whole = ignores_merges_ ? find(word) : std::nullopt) {
        ids.push_back(*whole);
        return;
    }
    std::vector<Symbol> found = symbols(word);
    merge_all(found, [&](std::size_t, const Symbol& left, const Symbol& right) -> std::optional<Merge> {
        const auto merge = merges_.find(pair_of(left.token, right.token));
        return merge == merges_.end() ? std::nullopt : std::optional(merge->second);
    });
    for (const Symbol& symbol : found) ids.push_back(symbol.token);
}

std::vector<Symbol> BpeModel::symbols(std::string_view word) const {
    std::vector<Symbol> found;
    std::optional<Symbol> pending;  // unknown characters that may become one token
    const auto unknown = unknown_ ? find(*unknown_) : std::nullopt;
    const auto flush = [&] {
        if (pending) found.push_back(*pending);
        pending.reset();
    };
    for (std::size_t at = 0; at < word.size();) {
        const std::size_t size = character_size(word[at]);
        std::string piece = (at == 0 ? "" : prefix_) + std::string(word.substr(at, size));
        at += size;
        if (at >= word.size()) piece += suffix_;
        if (const auto token = find(piece)) {
            flush();
            found.push_back({*token, static_cast<std::uint32_t>(size)});
        } else if (byte_fallback_ && add_bytes(piece, found)) {
            continue;
        } else if (unknown_) {
            if (!unknown) throw damaged("the unknown token " + shown(*unknown_) + " has no id");
            if (pending && !fuses_unknown_) flush();
            if (!pending) pending = Symbol{*unknown, 0};
            pending->size += static_cast<std::uint32_t>(size);
        }
    }
    flush();
    return found;
}

bool BpeModel::add_bytes(std::string_view piece, std::vector<Symbol>& word) const {
    constexpr std::string_view digits = "0123456789ABCDEF";
    std::vector<Symbol> found;
    for (const char character : piece) {
        const auto byte = static_cast<unsigned char>(character);
        const auto token = find({'<', '0', 'x', digits[byte >> 4], digits[byte & 15], '>'});
        if (!token) return false;
        found.push_back({*token, 1});
    }
    word.insert(word.end(), found.begin(), found.end());
    return true;
}

}  // namespace torchchat

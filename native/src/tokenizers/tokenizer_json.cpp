// tokenizer.json, as the tokenizers library writes it. Its post-processor, truncation and padding are left out.
#include <algorithm>
#include <nlohmann/json.hpp>

#include "error.h"
#include "json.h"
#include "tokenizers/added_vocabulary.h"
#include "tokenizers/bpe_model.h"
#include "tokenizers/json_steps.h"
#include "tokenizers/settings.h"
#include "tokenizers/tokenizer.h"

namespace torchchat {
namespace {

const nlohmann::json& required(const nlohmann::json& content, std::string_view key) {
    const nlohmann::json* found = member(content, key);
    if (found == nullptr || !found->is_object()) {
        throw Error("tokenizer.json has no " + shown(key),
                    "it is not of the tokenizers library: export the model again");
    }
    return *found;
}

std::unordered_set<std::string> contents(const AddedVocabulary& added) {
    std::unordered_set<std::string> result;
    for (const AddedToken& token : added.tokens()) result.insert(token.content);
    return result;
}

// The name of the first token that a post-processor puts around every text; empty: it puts none.
std::string token_in_front(const nlohmann::json* processor) {
    if (processor == nullptr || !processor->is_object()) return {};
    const std::string type = text_of(*processor, "type", "");
    const auto entries = [&](std::string_view key) -> std::vector<nlohmann::json> {
        const nlohmann::json* listed = member(*processor, key);
        return listed != nullptr && listed->is_array() ? listed->get<std::vector<nlohmann::json>>()
                                                       : std::vector<nlohmann::json>();
    };
    if (type == "Sequence") {
        for (const auto& step : entries("processors")) {
            if (std::string found = token_in_front(&step); !found.empty()) return found;
        }
    }
    if (type == "TemplateProcessing") {
        for (const auto& piece : entries("single")) {
            if (const nlohmann::json* token = member(piece, "SpecialToken")) return text_of(*token, "id", "");
        }
    }
    if (type == "BertProcessing" || type == "RobertaProcessing") {
        const auto cls = entries("cls");
        if (!cls.empty() && cls[0].is_string()) return cls[0].get<std::string>();
    }
    return {};
}

class JsonTokenizer final : public Tokenizer {
  public:
    JsonTokenizer(const nlohmann::json& content, const nlohmann::json& settings, const nlohmann::json& names)
        : model_(required(content, "model")),
          added_(member(content, "added_tokens"), model_, read_normalizer(member(content, "normalizer"))),
          pre_tokenizer_(read_pre_tokenizer(member(content, "pre_tokenizer"))),
          reader_(read_decoder(member(content, "decoder"), contents(added_))) {
        for (const auto& [piece, token] : model_.vocabulary()) pieces_[token] = piece;
        for (const AddedToken& token : added_.tokens()) pieces_[token.token] = token.piece;
        for (const AddedToken& token : added_.tokens()) contents_[token.token] = token.content;
        for (const auto& [token, piece] : pieces_) vocab_size = std::max(vocab_size, token + 1);
        const auto name = [&](std::string_view key) {
            const auto found = token_name(settings, key);
            return found ? found : token_name(names, key);
        };
        const auto bos = name("bos_token"), eos = name("eos_token");
        for (const AddedToken& token : added_.tokens()) {
            const bool named = token.content == bos || token.content == eos;
            if (token.special && (token.content != model_.unknown() || named)) {
                special_tokens.insert_or_assign(token.content, token.token);
            }
        }
        settle_control_ids();
        set_ends(bos, eos, token_in_front(member(content, "post_processor")), settings);
        set_prefix();
    }

    std::vector<Token> encode(std::string_view text, bool special) const override {
        return encode_split(added_.split(well_formed(text), special));
    }

    std::vector<Token> encode_parts(std::span<const PromptPart> parts) const override {
        return encode_split(added_.split(parts));
    }

    std::string token_bytes(Token token) const override {
        check(token);
        const auto piece = pieces_.find(token);
        if (piece == pieces_.end()) return std::string(replacement);
        return is_control(token) ? contents_.at(token) : reader_.bytes(piece->second);
    }

  private:
    std::vector<Token> encode_split(std::vector<AddedVocabulary::Part> parts) const {
        std::vector<Token> ids;
        for (auto& part : parts) {
            if (part.is_token) {
                ids.push_back(part.token);
                continue;
            }
            std::vector<TextPart> words = {{std::move(part.text), part.at_start}};
            if (pre_tokenizer_) words = pre_tokenizer_(std::move(words));
            for (const TextPart& word : words) model_.encode(word.text, ids);
        }
        return ids;
    }

    std::optional<Token> find(const std::optional<std::string>& text) const {
        if (!text) return std::nullopt;
        for (const AddedToken& token : added_.tokens()) {
            if (token.content == *text) return token.token;
        }
        return model_.find(*text);
    }

    void set_ends(const std::optional<std::string>& bos, const std::optional<std::string>& eos,
                  const std::string& in_front, const nlohmann::json& settings) {
        const auto first = in_front.empty() ? std::nullopt : find(in_front);
        bos_id = find(bos);
        if (!bos_id && first && is_control(*first)) bos_id = first;
        eos_id = find(eos);
        adds_bos = adds_bos_token(settings).value_or(first && first == bos_id) && bos_id.has_value();
    }

    void set_prefix() {
        std::string bytes;
        std::vector<std::string> pieces;
        for (const Token token : encode("a", false)) {
            bytes += token_bytes(token);
            pieces.push_back(pieces_.at(token));
        }
        adds_prefix_space = bytes.starts_with(' ') && !reader_.text(pieces).starts_with(' ');
    }

    BpeModel model_;
    AddedVocabulary added_;
    PreTokenizer pre_tokenizer_;
    PieceReader reader_;
    std::unordered_map<Token, std::string> pieces_, contents_;  // of all tokens, of added ones
};

}  // namespace

std::unique_ptr<Tokenizer> read_tokenizer_json(std::string_view content, const nlohmann::json& settings,
                                               const nlohmann::json& special_tokens_map) {
    return std::make_unique<JsonTokenizer>(json_object(content, "tokenizer.json"), settings, special_tokens_map);
}

}  // namespace torchchat

// SentencePiece models: Llama 2, Mistral, Gemma, llama2.c's small ones.
#include <sentencepiece_processor.h>

#include <charconv>
#include <nlohmann/json.hpp>

#include "error.h"
#include "json.h"
#include "tokenizers/settings.h"
#include "tokenizers/splitter.h"
#include "tokenizers/tokenizer.h"

namespace torchchat {
namespace {

constexpr std::string_view piece_space = "\xE2\x96\x81";  // U+2581 stands for a space inside pieces
// In the wire format, fields that come later override those before: normalizer_spec.add_dummy_prefix = false.
constexpr std::string_view no_prefix("\x1A\x02\x18\x00", 4);

using Library = sentencepiece::SentencePieceProcessor;

std::unique_ptr<Library> loaded(const std::string& content) {
    auto library = std::make_unique<Library>();
    if (!library->LoadFromSerializedProto(content).ok()) {
        throw Error("the tokenizer is no SentencePiece model, or a damaged one", "copy or export the model again");
    }
    return library;
}

std::string with_spaces(std::string_view piece) {
    std::string text;
    for (std::size_t at = 0; at < piece.size();) {
        const bool is_space = piece.substr(at, piece_space.size()) == piece_space;
        text += is_space ? ' ' : piece[at];
        at += is_space ? piece_space.size() : 1;
    }
    return text;
}

std::string bytes_of(const Library& library, int token) {
    if (library.IsUnknown(token)) return library.DecodeIds({token});
    const std::string& piece = library.IdToPiece(token);
    if (library.IsByte(token)) {  // <0x0A>
        unsigned value = 0;
        if (piece.size() == 6) std::from_chars(piece.data() + 3, piece.data() + 5, value, 16);
        return std::string(1, static_cast<char>(value));
    }
    if (well_formed(piece) != piece) {
        throw Error("the SentencePiece model has a piece that is no UTF-8", "copy or export the model again");
    }
    return with_spaces(piece);
}

class SentencePieceTokenizer final : public Tokenizer {
  public:
    SentencePieceTokenizer(const std::string& content, const std::map<Token, AddedText>& added,
                           const nlohmann::json& settings)
        : library_(loaded(content)), without_prefix_(loaded(content + std::string(no_prefix))) {
        for (int token = 0; token < library_->GetPieceSize(); ++token) bytes_.push_back(bytes_of(*library_, token));
        std::map<std::string, Token, std::less<>> words, texts, found_by_library;
        collect(added, texts);
        settle_control_ids();
        set_ends(settings);
        for (const auto& [text, token] : special_tokens) {
            names_[token] = text;
            if (token < size() && !library_->IsControl(token)) found_by_library.emplace(text, token);
        }
        words = special_tokens;
        words.insert(texts.begin(), texts.end());
        at_all_ = Splitter(words);
        at_texts_ = Splitter(texts);
        found_by_library_ = Splitter(found_by_library);
        const nlohmann::json* prefix = member(settings, "add_prefix_space");
        wants_prefix_ = prefix == nullptr || !prefix->is_boolean() || prefix->get<bool>();
        const nlohmann::json* legacy = member(settings, "legacy");
        prefix_after_control_ = legacy != nullptr && legacy->is_boolean() && legacy->get<bool>();
        std::string written;
        for (const Token token : encode("a", false)) written += token_bytes(token);
        adds_prefix_space = written.starts_with(' ');
    }

    std::vector<Token> encode(std::string_view raw, bool special) const override {
        std::vector<PromptPart> parts;
        cut(raw, special ? at_all_ : at_texts_, parts);
        return encode_cut(parts);
    }

    std::vector<Token> encode_parts(std::span<const PromptPart> given) const override {
        std::vector<PromptPart> parts;
        for (const PromptPart& part : given) {
            if (const auto* text = std::get_if<std::string>(&part)) {
                cut(*text, at_texts_, parts);
            } else {
                parts.push_back(part);
            }
        }
        return encode_cut(parts);
    }

    std::string token_bytes(Token token) const override {
        check(token);
        if (const auto name = names_.find(token); name != names_.end()) return name->second;
        if (token < size()) return bytes_[static_cast<std::size_t>(token)];
        const auto found = added_.find(token);
        return found == added_.end() ? std::string(replacement) : found->second;
    }

  private:
    static void cut(std::string_view raw, const Splitter& splitter, std::vector<PromptPart>& parts) {
        const std::string text = well_formed(raw);
        for (const auto& part : splitter.split(text)) {
            if (part.is_word) {
                parts.emplace_back(part.token);
            } else {
                parts.emplace_back(std::string(part.text));
            }
        }
    }

    std::vector<Token> encode_cut(std::span<const PromptPart> parts) const {
        std::vector<Token> ids;
        bool prefix = true;
        for (std::size_t at = 0; at < parts.size(); ++at) {
            if (const Token* token = std::get_if<Token>(&parts[at])) {
                ids.push_back(*token);
                prefix = prefix_after_control_ || *token == bos_id;
                continue;
            }
            const auto is_one_of = [](const PromptPart& part, const std::set<Token>& tokens) {
                const Token* token = std::get_if<Token>(&part);
                return token != nullptr && tokens.contains(*token);
            };
            std::string_view text = std::get<std::string>(parts[at]);
            if (at > 0 && is_one_of(parts[at - 1], strips_right_)) text.remove_prefix(spaces_at_start(text));
            if (at + 1 < parts.size() && is_one_of(parts[at + 1], strips_left_)) {
                text = text.substr(0, without_spaces_at_end(text));
            }
            if (!text.empty()) encode_ordinary(text, prefix, ids);
        }
        return ids;
    }

    Token size() const { return static_cast<Token>(bytes_.size()); }

    void collect(const std::map<Token, AddedText>& added, std::map<std::string, Token, std::less<>>& texts) {
        for (Token token = 0; token < size(); ++token) {
            if (library_->IsControl(token)) special_tokens.insert_or_assign(library_->IdToPiece(token), token);
        }
        for (const auto& [token, entry] : added) {
            if (entry.is_control && token != library_->unk_id()) special_tokens.insert_or_assign(entry.text, token);
            if (token >= size()) added_.emplace(token, entry.text);
            if (entry.strips_left) strips_left_.insert(token);
            if (entry.strips_right) strips_right_.insert(token);
        }
        for (const auto& [token, entry] : added) {
            if (!entry.is_control && token != library_->unk_id() && !entry.text.empty() &&
                !special_tokens.contains(entry.text)) {
                texts.insert_or_assign(entry.text, token);
            }
        }
        vocab_size = (added_.empty() ? size() - 1 : std::max(size() - 1, added_.rbegin()->first)) + 1;
    }

    void set_ends(const nlohmann::json& settings) {
        const auto chosen = [&](std::string_view key, int known) -> std::optional<Token> {
            const auto found = special_tokens.find(token_name(settings, key).value_or(""));
            if (found != special_tokens.end()) return found->second;
            return known >= 0 ? std::optional<Token>(known) : std::nullopt;  // the library says -1 for "none"
        };
        bos_id = chosen("bos_token", library_->bos_id());
        eos_id = chosen("eos_token", library_->eos_id());
        adds_bos = adds_bos_token(settings).value_or(true) && bos_id.has_value();
    }

    // Ids of text in which nothing is a control token, whatever the library takes it for.
    void encode_ordinary(std::string_view text, bool prefix, std::vector<Token>& ids) const {
        std::vector<std::string> segments(1);
        for (const auto& part : found_by_library_.split(text)) {
            if (part.is_word) {  // cut after the first character, so that the library does not see the whole
                const std::size_t first = character_size(part.text[0]);
                segments.back() += part.text.substr(0, first);
                segments.emplace_back(part.text.substr(first));
            } else {
                segments.back() += part.text;
            }
        }
        for (std::size_t index = 0; index < segments.size(); ++index) {
            const bool with_prefix = index == 0 && prefix && wants_prefix_;
            std::vector<int> found;
            if (!(with_prefix ? library_ : without_prefix_)->Encode(segments[index], &found).ok()) {
                throw Error("the SentencePiece model cannot encode " + shown(segments[index]));
            }
            ids.insert(ids.end(), found.begin(), found.end());
        }
    }

    std::unique_ptr<Library> library_, without_prefix_;
    std::vector<std::string> bytes_;
    std::map<Token, std::string> names_, added_;
    std::set<Token> strips_left_, strips_right_;  // tokens that strip the white space next to them
    Splitter at_all_, at_texts_;
    Splitter found_by_library_;  // control tokens that are declared as pieces, which the library finds in any text
    bool wants_prefix_ = true, prefix_after_control_ = false;
};

}  // namespace

std::unique_ptr<Tokenizer> read_sentencepiece(std::string_view content, const nlohmann::json& settings,
                                              const nlohmann::json& legacy) {
    std::map<Token, AddedText> added = legacy_added_tokens(legacy);
    for (auto& [token, entry] : added_tokens(settings)) added.insert_or_assign(token, entry);
    return std::make_unique<SentencePieceTokenizer>(std::string(content), added, settings);
}

}  // namespace torchchat

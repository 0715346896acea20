// Meta's Llama 3 `tokenizer.model`: lines of a token in base64 and its rank.
#include <openssl/evp.h>

#include <charconv>
#include <nlohmann/json.hpp>
#include <unordered_map>

#include "error.h"
#include "text/regex.h"
#include "tokenizers/byte_pairs.h"
#include "tokenizers/settings.h"
#include "tokenizers/splitter.h"
#include "tokenizers/tokenizer.h"

namespace torchchat {
namespace {

constexpr Token llama3_ranks = 128'000;
constexpr int llama3_special_tokens = 256;
constexpr std::size_t longest_token = 1024;  // bytes; the longest of Llama 3's has 128

constexpr std::string_view split_pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

// The model's own reference cuts text, and runs of white space or of other characters, at these lengths.
constexpr std::size_t longest_text = 400'000;
constexpr std::size_t longest_run = 25'000;

using Ranks = std::unordered_map<std::string, Token>;

Error damaged(const std::string& what) {
    return Error("the tokenizer's ranks are wrong: " + what, "the file is damaged: copy or export the model again");
}

std::string decoded_base64(std::string_view text) {
    if (text.empty() || text.size() % 4 != 0 || text.size() > 2 * longest_token) throw damaged(shown(text));
    std::string bytes(text.size() / 4 * 3, '\0');
    const int size =
        EVP_DecodeBlock(reinterpret_cast<unsigned char*>(bytes.data()),
                        reinterpret_cast<const unsigned char*>(text.data()), static_cast<int>(text.size()));
    if (size < 0) throw damaged(shown(text) + " is no base64");
    bytes.resize(static_cast<std::size_t>(size) - (text.ends_with("==") ? 2 : text.ends_with("=") ? 1 : 0));
    return bytes;
}

std::vector<std::string> parsed_ranks(std::string_view content) {
    std::vector<std::string> tokens(llama3_ranks);
    std::vector<bool> seen(llama3_ranks);
    Token count = 0;
    while (!content.empty()) {
        std::string_view line = content.substr(0, content.find('\n'));
        content.remove_prefix(std::min(content.size(), line.size() + 1));
        if (line.ends_with('\r')) line.remove_suffix(1);
        if (line.empty()) continue;
        const std::size_t space = line.find(' ');
        const std::string_view number = space == line.npos ? "" : line.substr(space + 1);
        Token rank = -1;
        const auto [end, error] = std::from_chars(number.data(), number.data() + number.size(), rank);
        if (error != std::errc() || end != number.data() + number.size() || number.empty()) {
            throw Error("the tokenizer has the line " + shown(line) + "; it has to be a token in base64 and a rank",
                        "the file is damaged, or of a kind that is not known: export the model again");
        }
        if (rank < 0 || rank >= llama3_ranks || seen[static_cast<std::size_t>(rank)]) {
            throw damaged("rank " + std::string(number) + " is there twice, or not of Llama 3");
        }
        seen[static_cast<std::size_t>(rank)] = true;
        tokens[static_cast<std::size_t>(rank)] = decoded_base64(line.substr(0, space));
        ++count;
    }
    if (count != llama3_ranks) throw damaged("there are " + std::to_string(count) + "; Llama 3 has 128000");
    return tokens;
}

std::vector<std::string> special_token_names() {
    std::vector<std::string> names = {"<|begin_of_text|>",
                                      "<|end_of_text|>",
                                      "<|reserved_special_token_0|>",
                                      "<|reserved_special_token_1|>",
                                      "<|finetune_right_pad_id|>",
                                      "<|step_id|>",
                                      "<|start_header_id|>",
                                      "<|end_header_id|>",
                                      "<|eom_id|>",
                                      "<|eot_id|>",
                                      "<|python_tag|>",
                                      "<|image|>"};
    for (int index = 2; names.size() < llama3_special_tokens; ++index) {
        names.push_back("<|reserved_special_token_" + std::to_string(index) + "|>");
    }
    return names;
}

bool separates(char32_t code) {
    return is_space(code) || (code >= 0x1C && code <= 0x1F);
}

// `text` in pieces of at most `longest_text` characters, none with a longer run than `longest_run`.
std::vector<std::string_view> bounded_pieces(std::string_view text) {
    if (text.size() <= longest_run) return {text};
    std::vector<std::string_view> pieces;
    std::size_t begin = 0, in_window = 0, in_run = 0, at = 0;
    bool space_run = false;
    for (const std::string_view character : characters(text)) {
        const bool is_separator = separates(code_point(character));
        if (in_window == 0 || is_separator != space_run) in_run = 0;
        if (at > begin && (in_window == 0 || in_run == longest_run)) {
            pieces.push_back(text.substr(begin, at - begin));
            begin = at;
            in_run = 0;
        }
        space_run = is_separator;
        ++in_run;
        in_window = (in_window + 1) % longest_text;
        at += character.size();
    }
    pieces.push_back(text.substr(begin));
    return pieces;
}

class TiktokenTokenizer final : public Tokenizer {
  public:
    TiktokenTokenizer(std::vector<std::string> tokens, const nlohmann::json& settings)
        : tokens_(std::move(tokens)), pattern_(split_pattern) {
        for (std::size_t rank = 0; rank < tokens_.size(); ++rank)
            ranks_.emplace(tokens_[rank], static_cast<Token>(rank));
        if (ranks_.size() != tokens_.size()) throw damaged("a token is there twice");
        for (int byte = 0; byte < 256; ++byte) {
            const auto found = ranks_.find(std::string(1, static_cast<char>(byte)));
            if (found == ranks_.end()) throw damaged("there is no token for the byte " + std::to_string(byte));
            of_bytes_.push_back(found->second);
        }
        names_ = special_token_names();
        for (const auto& [token, added] : added_tokens(settings)) {
            const std::int64_t index = std::int64_t{token} - llama3_ranks;
            if (index >= 0 && index < llama3_special_tokens) names_[static_cast<std::size_t>(index)] = added.text;
        }
        for (std::size_t index = 0; index < names_.size(); ++index) {
            special_tokens.insert_or_assign(names_[index], llama3_ranks + static_cast<Token>(index));
        }
        settle_control_ids();
        vocab_size = 0;
        for (const auto& [name, token] : special_tokens) vocab_size = std::max(vocab_size, token + 1);
        splitter_ = Splitter(special_tokens);
        bos_id = named(token_name(settings, "bos_token").value_or("<|begin_of_text|>"));
        eos_id = named(token_name(settings, "eos_token").value_or("<|end_of_text|>"));
        adds_bos = adds_bos_token(settings).value_or(true) && bos_id.has_value();
    }

    std::vector<Token> encode(std::string_view raw, bool special) const override {
        const std::string text = well_formed(raw);
        std::vector<Token> ids;
        if (!special) {
            encode_ordinary(text, ids);
            return ids;
        }
        for (const auto& part : splitter_.split(text)) {
            if (part.is_word) {
                ids.push_back(part.token);
            } else {
                encode_ordinary(part.text, ids);
            }
        }
        return ids;
    }

    std::string token_bytes(Token token) const override {
        check(token);
        if (token < llama3_ranks) return tokens_[static_cast<std::size_t>(token)];
        return names_[static_cast<std::size_t>(token - llama3_ranks)];
    }

  private:
    std::optional<Token> named(const std::string& text) const {
        const auto found = special_tokens.find(text);
        return found == special_tokens.end() ? std::nullopt : std::optional(found->second);
    }

    void encode_ordinary(std::string_view text, std::vector<Token>& ids) const {
        for (const std::string_view piece : bounded_pieces(text)) {
            for (const Span& span : pattern_.matches(piece)) {
                encode_word(piece.substr(span.begin, span.end - span.begin), ids);
            }
        }
    }

    void encode_word(std::string_view word, std::vector<Token>& ids) const {
        if (const auto whole = ranks_.find(std::string(word)); whole != ranks_.end()) {
            ids.push_back(whole->second);
            return;
        }
        std::vector<Symbol> symbols;
        symbols.reserve(word.size());
        for (const char byte : word) symbols.push_back({of_bytes_[static_cast<unsigned char>(byte)], 1});
        merge_all(symbols, [&](std::size_t begin, const Symbol& left, const Symbol& right) -> std::optional<Merge> {
            if (left.size + right.size > longest_token) return std::nullopt;
            const auto found = ranks_.find(std::string(word.substr(begin, left.size + right.size)));
            if (found == ranks_.end()) return std::nullopt;
            return Merge{static_cast<std::uint32_t>(found->second), found->second};
        });
        for (const Symbol& symbol : symbols) ids.push_back(symbol.token);
    }

    std::vector<std::string> tokens_;
    Ranks ranks_;
    std::vector<Token> of_bytes_;
    std::vector<std::string> names_;
    Splitter splitter_;
    Regex pattern_;
};

}  // namespace

std::unique_ptr<Tokenizer> read_tiktoken(std::string_view content, const nlohmann::json& settings) {
    return std::make_unique<TiktokenTokenizer>(parsed_ranks(content), settings);
}

}  // namespace torchchat

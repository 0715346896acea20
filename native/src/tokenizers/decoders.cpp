#include <charconv>
#include <nlohmann/json.hpp>
#include <optional>

#include "error.h"
#include "json.h"
#include "text/utf8.h"
#include "tokenizers/json_steps.h"
#include "tokenizers/pattern.h"

namespace torchchat {
namespace {

constexpr std::string_view anchor = "a";  // a piece before the one in question, which is then not at the start

// The byte of a piece such as <0x0A>.
std::optional<char> byte_of(std::string_view piece) {
    if (piece.size() != 6 || !piece.starts_with("<0x") || piece.back() != '>') return std::nullopt;
    unsigned value = 0;
    const auto [end, error] = std::from_chars(piece.data() + 3, piece.data() + 5, value, 16);
    if (error != std::errc() || end != piece.data() + 5) return std::nullopt;
    if (piece.find_first_of("abcdef", 3) < 5) return std::nullopt;  // capital letters alone
    return static_cast<char>(value);
}

std::vector<std::string> fuse(const std::vector<std::string>& pieces) {
    std::string text;
    for (const std::string& piece : pieces) text += piece;
    return {text};
}

// Byte pieces become text together; where they are no UTF-8, U+FFFD for each.
std::vector<std::string> join_bytes(const std::vector<std::string>& pieces) {
    std::vector<std::string> result;
    std::string bytes;
    const auto flush = [&] {
        if (bytes.empty()) return;
        if (well_formed(bytes) == bytes) {
            result.push_back(bytes);
        } else {
            result.insert(result.end(), bytes.size(), std::string(replacement));
        }
        bytes.clear();
    };
    for (const std::string& piece : pieces) {
        if (const auto byte = byte_of(piece)) {
            bytes += *byte;
        } else {
            flush();
            result.push_back(piece);
        }
    }
    flush();
    return result;
}

std::string without_start(std::string_view text, std::string_view content, std::int64_t most) {
    while (most-- > 0 && !content.empty() && text.starts_with(content)) text.remove_prefix(content.size());
    return std::string(text);
}

template <typename Change>
Decoder for_each(Change change) {
    return [change](std::vector<std::string> pieces) {
        for (std::size_t index = 0; index < pieces.size(); ++index) pieces[index] = change(pieces[index], index);
        return pieces;
    };
}

Error unsteady(const std::string& name) {
    return Error("the tokenizer's decoder " + name + " does not work token by token, or is not known",
                 "run the file with torchchat");
}

Decoder read_step(const nlohmann::json& declared, const std::string& type) {
    if (type == "Fuse") return fuse;
    if (type == "ByteFallback") return join_bytes;
    if (type == "Replace") {
        const nlohmann::json* pattern = member(declared, "pattern");
        if (pattern == nullptr) throw Error("a Replace in tokenizer.json has no \"pattern\"");
        return for_each([found = Pattern::read(*pattern), content = text_of(declared, "content", "")](
                            const std::string& piece, std::size_t) { return found.replaced(piece, content); });
    }
    if (type == "Strip") {
        if (number(declared, "stop", 0, 1'000'000) != 0) throw unsteady("'Strip' at the end");
        return for_each([content = text_of(declared, "content", ""), start = number(declared, "start", 0, 1'000'000)](
                            const std::string& piece, std::size_t) { return without_start(piece, content, start); });
    }
    if (type == "Metaspace") {
        const std::string space = text_of(declared, "replacement", "\xE2\x96\x81");
        const bool prefixed =
            text_of(declared, "prepend_scheme", "always") != "never" && flag(declared, "add_prefix_space", true);
        return for_each([space, prefixed](const std::string& piece, std::size_t index) {
            return Pattern::text(space).replaced(piece, index == 0 && prefixed ? "" : " ");
        });
    }
    throw unsteady(shown(type));
}

std::string concatenated(const std::vector<std::string>& pieces) {
    return fuse(pieces).front();
}

PieceReader byte_level_reader(std::unordered_set<std::string> literal) {
    const auto bytes = [literal = std::move(literal)](const std::string& piece) {
        return literal.contains(piece) ? piece : from_byte_level(piece);  // added tokens are written as they are
    };
    return {bytes, [bytes](const std::vector<std::string>& pieces) {
                std::string text;
                for (const std::string& piece : pieces) text += bytes(piece);
                return text;
            }};
}

PieceReader separate_words() {
    return {[](const std::string& piece) { return " " + piece; },
            [](const std::vector<std::string>& pieces) {
                std::string text;
                for (const std::string& piece : pieces) text += (text.empty() ? "" : " ") + piece;
                return text;
            }};
}

}  // namespace

PieceReader read_decoder(const nlohmann::json* declared, std::unordered_set<std::string> literal) {
    if (declared == nullptr || declared->is_null()) return separate_words();
    std::vector<nlohmann::json> steps = {*declared};
    if (text_of(*declared, "type", "") == "Sequence") {
        const nlohmann::json* listed = member(*declared, "decoders");
        if (listed == nullptr || !listed->is_array()) throw Error("a Sequence in tokenizer.json has no \"decoders\"");
        steps.assign(listed->begin(), listed->end());
    }
    bool with_byte_level = false, with_others = false, with_byte_pieces = false;
    std::vector<Decoder> chain;
    for (const nlohmann::json& step : steps) {
        const std::string type = text_of(step, "type", "");
        with_byte_level |= type == "ByteLevel";
        with_others |= type != "ByteLevel" && type != "Fuse";
        with_byte_pieces |= type == "ByteFallback";
        if (type != "ByteLevel") chain.push_back(read_step(step, type));
    }
    if (with_byte_level && with_others) throw unsteady("'ByteLevel' among others");
    if (with_byte_level) return byte_level_reader(std::move(literal));
    const auto decode = [chain](std::vector<std::string> pieces) {
        for (const Decoder& step : chain) pieces = step(std::move(pieces));
        return concatenated(pieces);
    };
    const std::string before = decode({std::string(anchor)});
    return {[decode, before, with_byte_pieces](const std::string& piece) {
                if (const auto byte = with_byte_pieces ? byte_of(piece) : std::nullopt) return std::string(1, *byte);
                const std::string both = decode({std::string(anchor), piece});
                return both.starts_with(before) ? both.substr(before.size()) : both;
            },
            decode};
}

}  // namespace torchchat

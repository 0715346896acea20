#include <nlohmann/json.hpp>

#include "error.h"
#include "json.h"
#include "tokenizers/json_steps.h"
#include "tokenizers/pattern.h"

namespace torchchat {
namespace {

// How GPT-2 cuts text: contractions, words, numbers, other characters, each with a space before it; white space.
constexpr std::string_view gpt2_pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

enum class Behaviour { removed, isolated, contiguous, merged_with_previous, merged_with_next };

struct Cut {
    Span span;
    bool is_match;
};

std::vector<Cut> cuts(const Pattern& pattern, std::string_view text, bool invert) {
    std::vector<Cut> result;
    std::size_t begin = 0;
    for (const Span& span : pattern.matches(text)) {
        if (span.begin > begin) result.push_back({{begin, span.begin}, invert});
        result.push_back({span, !invert});
        begin = span.end;
    }
    if (begin < text.size()) result.push_back({{begin, text.size()}, invert});
    return result;
}

std::vector<Span> contiguous(const std::vector<Cut>& found) {
    std::vector<Span> spans;
    for (std::size_t index = 0; index < found.size(); ++index) {
        if (index > 0 && found[index].is_match == found[index - 1].is_match) {
            spans.back().end = found[index].span.end;
        } else {
            spans.push_back(found[index].span);
        }
    }
    return spans;
}

std::vector<Span> merged_with_previous(const std::vector<Cut>& found) {
    std::vector<Span> spans;
    bool after_match = false;
    for (const Cut& cut : found) {
        if (cut.is_match && !after_match && !spans.empty()) {
            spans.back().end = cut.span.end;
        } else {
            spans.push_back(cut.span);
        }
        after_match = cut.is_match;
    }
    return spans;
}

std::vector<Span> merged_with_next(const std::vector<Cut>& found) {
    std::vector<Span> spans;
    bool before_match = false;
    for (auto cut = found.rbegin(); cut != found.rend(); ++cut) {
        if (cut->is_match && !before_match && !spans.empty()) {
            spans.back().begin = cut->span.begin;
        } else {
            spans.push_back(cut->span);
        }
        before_match = cut->is_match;
    }
    return {spans.rbegin(), spans.rend()};
}

std::vector<Span> joined(const std::vector<Cut>& found, Behaviour behaviour) {
    switch (behaviour) {
        case Behaviour::contiguous:
            return contiguous(found);
        case Behaviour::merged_with_previous:
            return merged_with_previous(found);
        case Behaviour::merged_with_next:
            return merged_with_next(found);
        case Behaviour::removed:
        case Behaviour::isolated:
            break;
    }
    std::vector<Span> spans;
    for (const Cut& cut : found) {
        if (!cut.is_match || behaviour == Behaviour::isolated) spans.push_back(cut.span);
    }
    return spans;
}

PreTokenizer splitting(Pattern pattern, Behaviour behaviour, bool invert) {
    return [pattern = std::move(pattern), behaviour, invert](const std::vector<TextPart>& parts) {
        std::vector<TextPart> result;
        for (const TextPart& part : parts) {
            for (const Span& span : joined(cuts(pattern, part.text, invert), behaviour)) {
                result.push_back(
                    {part.text.substr(span.begin, span.end - span.begin), part.at_start && span.begin == 0});
            }
        }
        return result;
    };
}

Behaviour read_behaviour(const nlohmann::json& declared) {
    const std::string name = text_of(declared, "behavior", "");
    if (name == "Removed") return Behaviour::removed;
    if (name == "Isolated") return Behaviour::isolated;
    if (name == "Contiguous") return Behaviour::contiguous;
    if (name == "MergedWithPrevious") return Behaviour::merged_with_previous;
    if (name == "MergedWithNext") return Behaviour::merged_with_next;
    throw Error("tokenizer.json has the behaviour " + shown(name) + ", which is not known", "export the model again");
}

PreTokenizer byte_level(const nlohmann::json& declared) {
    PreTokenizer split;
    if (flag(declared, "use_regex", true)) {
        split = splitting(Pattern::expression(gpt2_pattern), Behaviour::isolated, false);
    }
    return [split, prefix = flag(declared, "add_prefix_space", true)](std::vector<TextPart> parts) {
        for (TextPart& part : parts) {
            if (prefix && !part.text.starts_with(' ')) part.text.insert(0, 1, ' ');
        }
        if (split) parts = split(std::move(parts));
        for (TextPart& part : parts) part.text = to_byte_level(part.text);
        return parts;
    };
}

PreTokenizer metaspace(const nlohmann::json& declared) {
    const std::string space = text_of(declared, "replacement", "\xE2\x96\x81");
    std::string scheme = text_of(declared, "prepend_scheme", "always");
    if (!flag(declared, "add_prefix_space", true)) scheme = "never";  // of older files
    if (space.empty()) throw Error("a Metaspace in tokenizer.json has an empty \"replacement\"");
    PreTokenizer split;
    if (flag(declared, "split", true)) split = splitting(Pattern::text(space), Behaviour::merged_with_next, false);
    return [split, space, scheme](std::vector<TextPart> parts) {
        for (TextPart& part : parts) {
            part.text = Pattern::text(" ").replaced(part.text, space);
            const bool wanted = scheme == "always" || (scheme == "first" && part.at_start);
            if (wanted && !part.text.starts_with(space)) part.text = space + part.text;
        }
        return split ? split(std::move(parts)) : parts;
    };
}

PreTokenizer sequence(const nlohmann::json& declared) {
    std::vector<PreTokenizer> steps;
    const nlohmann::json* listed = member(declared, "pretokenizers");
    if (listed == nullptr || !listed->is_array()) throw Error("a Sequence in tokenizer.json has no \"pretokenizers\"");
    for (const auto& step : *listed) steps.push_back(read_pre_tokenizer(&step));
    return [steps](std::vector<TextPart> parts) {
        for (const PreTokenizer& step : steps) {
            if (step) parts = step(std::move(parts));
        }
        return parts;
    };
}

}  // namespace

PreTokenizer read_pre_tokenizer(const nlohmann::json* declared) {
    if (declared == nullptr || declared->is_null()) return nullptr;
    const std::string type = text_of(*declared, "type", "");
    if (type == "Sequence") return sequence(*declared);
    if (type == "ByteLevel") return byte_level(*declared);
    if (type == "Metaspace") return metaspace(*declared);
    if (type == "Split") {
        const nlohmann::json* pattern = member(*declared, "pattern");
        if (pattern == nullptr) throw Error("a Split in tokenizer.json has no \"pattern\"");
        return splitting(Pattern::read(*pattern), read_behaviour(*declared), flag(*declared, "invert", false));
    }
    if (type == "Digits") {
        const bool single = flag(*declared, "individual_digits", false);
        return splitting(Pattern::expression(R"(\p{N})"), single ? Behaviour::isolated : Behaviour::contiguous, false);
    }
    if (type == "Punctuation") {
        return splitting(Pattern::expression(R"([\p{P}$+<=>^`|~])"), read_behaviour(*declared), false);
    }
    if (type == "WhitespaceSplit") return splitting(Pattern::expression(R"(\s)"), Behaviour::removed, false);
    throw Error("the tokenizer has the pre-tokenizer " + shown(type) +
                    "; this program knows Sequence, ByteLevel, "
                    "Metaspace, Split, Digits, Punctuation and WhitespaceSplit",
                "run the file with torchchat");
}

}  // namespace torchchat

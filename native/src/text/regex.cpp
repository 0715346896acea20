#include "text/regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <new>

#include "error.h"
#include "text/utf8.h"

namespace torchchat {
namespace {

constexpr std::uint32_t step_limit = 50'000'000;  // of one search
constexpr std::uint32_t heap_limit = 256 * 1024;  // KiB
constexpr std::size_t longest_pattern = 1 << 16;

// White_Space of Unicode; PCRE2's own \s has U+180E too, which is none since Unicode 6.3.
constexpr std::string_view spaces =
    R"(\t-\r \x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000})";

// The expression with \s and \S spelt out, but for \S inside brackets, which no such list can say.
std::string translated(std::string_view pattern) {
    std::string result;
    bool in_brackets = false;
    for (std::size_t at = 0; at < pattern.size(); ++at) {
        const char character = pattern[at];
        if (character == '\\' && at + 1 < pattern.size()) {
            const char next = pattern[++at];
            if (next == 's') {
                result += in_brackets ? std::string(spaces) : "[" + std::string(spaces) + "]";
            } else if (next == 'S' && !in_brackets) {
                result += "[^" + std::string(spaces) + "]";
            } else {
                result += {character, next};
            }
            continue;
        }
        if (character == '[') in_brackets = true;
        if (character == ']') in_brackets = false;
        result += character;
    }
    return result;
}

struct FreeMatchData {
    void operator()(pcre2_match_data* data) const { pcre2_match_data_free(data); }
};

}  // namespace

struct Regex::Code {
    pcre2_code* compiled = nullptr;
    pcre2_match_context* limits = nullptr;

    Code() = default;
    Code(const Code&) = delete;
    Code& operator=(const Code&) = delete;
    Code(Code&&) = delete;
    Code& operator=(Code&&) = delete;
    ~Code() {
        pcre2_match_context_free(limits);
        pcre2_code_free(compiled);
    }
};

Regex::Regex(std::string_view pattern) {
    if (pattern.size() > longest_pattern) {
        throw Error("a regular expression of the tokenizer has " + std::to_string(pattern.size()) + " bytes",
                    "the file is damaged: export the model again");
    }
    const std::string source = translated(pattern);
    auto code = std::make_shared<Code>();
    int error = 0;
    PCRE2_SIZE place = 0;
    code->compiled = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(source.data()), source.size(),
                                   PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &error, &place, nullptr);
    if (code->compiled == nullptr) {
        throw Error("the tokenizer has the regular expression " + shown(pattern) + ", which PCRE2 does not read",
                    "run the model with torchchat, whose tokenizers library may");
    }
    pcre2_jit_compile(code->compiled, PCRE2_JIT_COMPLETE);  // where it fails, matching goes on without
    code->limits = pcre2_match_context_create(nullptr);
    if (code->limits == nullptr) throw std::bad_alloc();
    pcre2_set_match_limit(code->limits, step_limit);
    pcre2_set_heap_limit(code->limits, heap_limit);
    code_ = std::move(code);
}

std::vector<Span> Regex::matches(std::string_view text) const {
    const std::unique_ptr<pcre2_match_data, FreeMatchData> data(
        pcre2_match_data_create_from_pattern(code_->compiled, nullptr));
    if (!data) throw std::bad_alloc();
    std::vector<Span> found;
    std::size_t from = 0;
    while (from < text.size()) {
        int count = pcre2_match(code_->compiled, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), from,
                                PCRE2_NO_UTF_CHECK, data.get(), code_->limits);
        if (count == PCRE2_ERROR_JIT_STACKLIMIT) {  // the interpreter keeps its stack on the heap
            count = pcre2_match(code_->compiled, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), from,
                                PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, data.get(), code_->limits);
        }
        if (count == PCRE2_ERROR_NOMATCH) break;
        if (count < 0) throw Error("a regular expression of the tokenizer takes too long on this text", "shorten it");
        const PCRE2_SIZE* bounds = pcre2_get_ovector_pointer(data.get());
        if (bounds[1] > bounds[0] && bounds[0] >= from) {
            found.push_back({bounds[0], bounds[1]});
            from = bounds[1];
        } else {  // nothing was taken: go on behind the next character
            from = std::max<std::size_t>(from, bounds[1]);
            if (from < text.size()) from += character_size(text[from]);
        }
    }
    return found;
}

}  // namespace torchchat

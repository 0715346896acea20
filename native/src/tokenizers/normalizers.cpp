#include <utf8proc.h>

#include <cstdlib>
#include <map>
#include <nlohmann/json.hpp>

#include "error.h"
#include "json.h"
#include "text/utf8.h"
#include "tokenizers/json_steps.h"
#include "tokenizers/pattern.h"

namespace torchchat {
namespace {

constexpr int composed = UTF8PROC_STABLE | UTF8PROC_COMPOSE;
constexpr int decomposed = UTF8PROC_STABLE | UTF8PROC_DECOMPOSE;

// One of Unicode's normal forms. Throws where the memory does not suffice.
std::string normal_form(const std::string& text, int options) {
    utf8proc_uint8_t* mapped = nullptr;
    const utf8proc_ssize_t size =
        utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()), static_cast<utf8proc_ssize_t>(text.size()),
                     &mapped, static_cast<utf8proc_option_t>(options));
    const std::unique_ptr<utf8proc_uint8_t, decltype(&std::free)> owner(mapped, &std::free);
    if (size < 0) throw Error(std::string("the text cannot be normalised: ") + utf8proc_errmsg(size));
    return {reinterpret_cast<const char*>(mapped), static_cast<std::size_t>(size)};
}

std::string stripped(std::string_view text, bool left, bool right) {
    const auto parts = characters(text);
    std::size_t begin = 0, end = parts.size();
    while (left && begin < end && is_space(code_point(parts[begin]))) ++begin;
    while (right && end > begin && is_space(code_point(parts[end - 1]))) --end;
    std::string result;
    for (std::size_t index = begin; index < end; ++index) result += parts[index];
    return result;
}

Normalizer sequence(const nlohmann::json& declared) {
    std::vector<Normalizer> steps;
    const nlohmann::json* listed = member(declared, "normalizers");
    if (listed == nullptr || !listed->is_array()) throw Error("a Sequence in tokenizer.json has no \"normalizers\"");
    for (const auto& step : *listed) steps.push_back(read_normalizer(&step));
    return [steps](std::string text) {
        for (const Normalizer& step : steps) {
            if (step) text = step(std::move(text));
        }
        return text;
    };
}

}  // namespace

Normalizer read_normalizer(const nlohmann::json* declared) {
    if (declared == nullptr || declared->is_null()) return nullptr;
    static const std::map<std::string, int, std::less<>> forms = {{"NFC", composed},
                                                                  {"NFD", decomposed},
                                                                  {"NFKC", composed | UTF8PROC_COMPAT},
                                                                  {"NFKD", decomposed | UTF8PROC_COMPAT}};
    const std::string type = text_of(*declared, "type", "");
    if (type == "Sequence") return sequence(*declared);
    if (type == "Prepend") {
        return [before = text_of(*declared, "prepend", "")](const std::string& text) {
            return text.empty() ? text : before + text;
        };
    }
    if (type == "Replace") {
        const nlohmann::json* pattern = member(*declared, "pattern");
        if (pattern == nullptr) throw Error("a Replace in tokenizer.json has no \"pattern\"");
        return [found = Pattern::read(*pattern), content = text_of(*declared, "content", "")](const std::string& text) {
            return found.replaced(text, content);
        };
    }
    if (type == "Strip") {
        return [left = flag(*declared, "strip_left", true), right = flag(*declared, "strip_right", true)](
                   const std::string& text) { return stripped(text, left, right); };
    }
    if (const auto form = forms.find(type); form != forms.end()) {
        return [options = form->second](const std::string& text) { return normal_form(text, options); };
    }
    throw Error("the tokenizer has the normaliser " + shown(type) +
                    "; this program knows Sequence, Prepend, Replace, Strip, NFC, NFD, NFKC and NFKD",
                "run the file with torchchat");
}

}  // namespace torchchat

#include "tokenizers/pattern.h"

#include <nlohmann/json.hpp>

#include "error.h"
#include "json.h"

namespace torchchat {

Pattern Pattern::read(const nlohmann::json& declared) {
    if (const nlohmann::json* literal = member(declared, "String"); literal != nullptr && literal->is_string()) {
        return text(literal->get<std::string>());
    }
    if (const nlohmann::json* source = member(declared, "Regex"); source != nullptr && source->is_string()) {
        return expression(source->get_ref<const std::string&>());
    }
    throw Error("a pattern in tokenizer.json is neither a \"String\" nor a \"Regex\"", "export the model again");
}

std::vector<Span> Pattern::matches(std::string_view text) const {
    if (const Regex* regex = std::get_if<Regex>(&found_)) return regex->matches(text);
    const std::string& literal = std::get<std::string>(found_);
    std::vector<Span> found;
    if (literal.empty()) return found;
    for (std::size_t at = text.find(literal); at != text.npos; at = text.find(literal, at + literal.size())) {
        found.push_back({at, at + literal.size()});
    }
    return found;
}

std::string Pattern::replaced(std::string_view text, std::string_view content) const {
    std::string result;
    std::size_t begin = 0;
    for (const Span& span : matches(text)) {
        result += text.substr(begin, span.begin - begin);
        result += content;
        begin = span.end;
    }
    return result += text.substr(begin);
}

}  // namespace torchchat

// A pattern of a tokenizer.json: a text, or a regular expression.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "text/regex.h"

namespace torchchat {

class Pattern {
  public:
    // Of {"String": text} or {"Regex": expression}. Throws where it is neither.
    static Pattern read(const nlohmann::json& declared);
    static Pattern text(std::string literal) { return Pattern(std::move(literal)); }
    static Pattern expression(std::string_view source) { return Pattern(Regex(source)); }

    std::vector<Span> matches(std::string_view text) const;
    // The text with every match replaced by `content` as it stands.
    std::string replaced(std::string_view text, std::string_view content) const;

  private:
    explicit Pattern(std::variant<std::string, Regex> found) : found_(std::move(found)) {}
    std::variant<std::string, Regex> found_;
};

}  // namespace torchchat

// Regular expressions over UTF-8, by PCRE2.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace torchchat {

struct Span {
    std::size_t begin, end;  // bytes
    bool operator==(const Span&) const = default;
};

// An expression as the tokenizers library and Python write it. Throws `Error` where it is none.
class Regex {
  public:
    explicit Regex(std::string_view pattern);

    // Every match in well-formed text, from left to right; empty ones are left out. Throws `Error` where the
    // expression needs more time or memory than any that splits text.
    std::vector<Span> matches(std::string_view text) const;

  private:
    struct Code;
    std::shared_ptr<const Code> code_;
};

}  // namespace torchchat

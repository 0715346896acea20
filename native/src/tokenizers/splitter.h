// Cuts text at given words.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "torchchat/torchchat.h"

namespace torchchat {

// Of words that begin alike, the longest is taken.
class Splitter {
  public:
    struct Part {
        std::string_view text;
        bool is_word;
        Token token;  // of the word
    };

    Splitter() = default;
    explicit Splitter(const std::map<std::string, Token, std::less<>>& words);

    // The parts of `text` that are not empty.
    std::vector<Part> split(std::string_view text) const;
    // Whether the text begins with one of the words.
    bool matches_start(std::string_view text) const { return find_at(text, 0) != nullptr; }

    using Word = std::pair<std::string, Token>;
    // The word that stands at byte `at` of the text, or null.
    const Word* find_at(std::string_view text, std::size_t at) const;

  private:
    std::vector<std::vector<Word>> by_first_byte_;  // each longest first
};

}  // namespace torchchat

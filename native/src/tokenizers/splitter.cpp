#include "tokenizers/splitter.h"

#include <algorithm>

namespace torchchat {

Splitter::Splitter(const std::map<std::string, Token, std::less<>>& words) : by_first_byte_(256) {
    for (const auto& [text, token] : words) {
        if (!text.empty()) by_first_byte_[static_cast<unsigned char>(text[0])].emplace_back(text, token);
    }
    for (auto& list : by_first_byte_) {
        std::ranges::stable_sort(list, [](const Word& a, const Word& b) { return a.first.size() > b.first.size(); });
    }
}

const Splitter::Word* Splitter::find_at(std::string_view text, std::size_t at) const {
    if (by_first_byte_.empty() || at >= text.size()) return nullptr;
    for (const Word& word : by_first_byte_[static_cast<unsigned char>(text[at])]) {
        if (text.substr(at, word.first.size()) == word.first) return &word;
    }
    return nullptr;
}

std::vector<Splitter::Part> Splitter::split(std::string_view text) const {
    std::vector<Part> parts;
    std::size_t begin = 0;
    const auto close = [&](std::size_t end) {
        if (end > begin) parts.push_back({text.substr(begin, end - begin), false, 0});
    };
    for (std::size_t at = 0; at < text.size();) {
        const Word* word = find_at(text, at);
        if (word == nullptr) {
            ++at;
            continue;
        }
        close(at);
        parts.push_back({text.substr(at, word->first.size()), true, word->second});
        begin = at += word->first.size();
    }
    close(text.size());
    return parts;
}

}  // namespace torchchat

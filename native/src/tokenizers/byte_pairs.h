// Byte-pair encoding: merging neighbours by rank.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "torchchat/torchchat.h"

namespace torchchat {

struct Symbol {
    Token token;
    std::uint32_t size;  // bytes of the word that it stands for
};

struct Merge {
    std::uint32_t rank;  // lower ones first
    Token token;         // that the two become
};

// What two neighbours become, which stand at `begin` of the word with `left` and `right` bytes; nothing: they stay.
using MergeRule = std::function<std::optional<Merge>(std::size_t begin, const Symbol& left, const Symbol& right)>;

// Merges the neighbours of lowest rank, of equal ones the leftmost, until there are none. O(n log n).
void merge_all(std::vector<Symbol>& word, const MergeRule& rule);

}  // namespace torchchat

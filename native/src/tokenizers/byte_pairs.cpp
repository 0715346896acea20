#include "tokenizers/byte_pairs.h"

#include <queue>

namespace torchchat {
namespace {

constexpr std::size_t none = SIZE_MAX;

struct Node {
    Symbol symbol;
    std::size_t begin, previous, next;
};

struct Candidate {
    std::uint32_t rank;
    std::size_t left;
    Token token;
    std::uint32_t size;  // of both together: tells whether one of them has changed since

    bool operator>(const Candidate& other) const { return rank != other.rank ? rank > other.rank : left > other.left; }
};

}  // namespace

void merge_all(std::vector<Symbol>& word, const MergeRule& rule) {
    std::vector<Node> nodes;
    nodes.reserve(word.size());
    std::size_t begin = 0;
    for (std::size_t index = 0; index < word.size(); ++index) {
        nodes.push_back(
            {word[index], begin, index == 0 ? none : index - 1, index + 1 < word.size() ? index + 1 : none});
        begin += word[index].size;
    }
    std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> waiting;
    const auto consider = [&](std::size_t left) {
        if (left == none || nodes[left].next == none) return;
        const Node& a = nodes[left];
        const Node& b = nodes[a.next];
        if (const auto merge = rule(a.begin, a.symbol, b.symbol)) {
            waiting.push({merge->rank, left, merge->token, a.symbol.size + b.symbol.size});
        }
    };
    for (std::size_t left = 0; left + 1 < nodes.size(); ++left) consider(left);
    while (!waiting.empty()) {
        const Candidate best = waiting.top();
        waiting.pop();
        Node& left = nodes[best.left];
        if (left.symbol.size == 0 || left.next == none) continue;
        Node& right = nodes[left.next];
        if (left.symbol.size + right.symbol.size != best.size) continue;
        const auto still = rule(left.begin, left.symbol, right.symbol);
        if (!still || still->token != best.token || still->rank != best.rank) continue;
        left.symbol = {best.token, best.size};
        right.symbol.size = 0;
        left.next = right.next;
        if (left.next != none) nodes[left.next].previous = best.left;
        consider(left.previous);
        consider(best.left);
    }
    word.clear();
    for (std::size_t index = nodes.empty() ? none : 0; index != none; index = nodes[index].next) {
        word.push_back(nodes[index].symbol);
    }
}

}  // namespace torchchat

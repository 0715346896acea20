// The model "BPE" of a tokenizer.json.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "tokenizers/byte_pairs.h"

namespace torchchat {

class BpeModel {
  public:
    // Of the object "model". Throws where it is damaged, or of another kind.
    explicit BpeModel(const nlohmann::json& declared);

    // Appends the ids of one part of a text.
    void encode(const std::string& word, std::vector<Token>& ids) const;
    std::optional<Token> find(const std::string& piece) const;

    const std::unordered_map<std::string, Token>& vocabulary() const { return vocabulary_; }
    const std::optional<std::string>& unknown() const { return unknown_; }

  private:
    std::vector<Symbol> symbols(std::string_view word) const;
    bool add_bytes(std::string_view piece, std::vector<Symbol>& word) const;
    void read_vocabulary(const nlohmann::json& declared);
    void read_merges(const nlohmann::json& declared);

    std::unordered_map<std::string, Token> vocabulary_;
    std::unordered_map<std::uint64_t, Merge> merges_;  // by both ids
    std::optional<std::string> unknown_;
    std::string prefix_, suffix_;  // of pieces inside a word, and at its end
    bool fuses_unknown_ = false, byte_fallback_ = false, ignores_merges_ = false;
};

}  // namespace torchchat

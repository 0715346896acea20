// What a runtime does: logits for tokens, with a KV cache. One interface; each runtime is a file in backends/.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>

#include "torchchat/torchchat.h"

namespace torchchat {

class Artifact;

// One sequence. Not thread-safe.
class Session {
  public:
    Session() = default;
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
    Session(Session&&) = delete;
    Session& operator=(Session&&) = delete;
    virtual ~Session() = default;

    // Appends the tokens, of which there is at least one; logits [vocab] at the last, valid until the next call.
    virtual std::span<const float> append(std::span<const Token> tokens) = 0;
    // Forgets all but the first `length` tokens.
    virtual void truncate(std::int64_t length) = 0;

    virtual std::int64_t length() const = 0;  // tokens held in the KV cache
    virtual std::int64_t limit() const = 0;   // tokens that it can hold
};

// A loaded program. Its sessions keep it alive.
class Backend {
  public:
    Backend() = default;
    Backend(const Backend&) = delete;
    Backend& operator=(const Backend&) = delete;
    Backend(Backend&&) = delete;
    Backend& operator=(Backend&&) = delete;
    virtual ~Backend() = default;

    // A new, empty sequence of at most `limit` tokens.
    virtual std::unique_ptr<Session> session(std::int64_t limit) const = 0;
    // A sequence whose limit is above this is computed in another way from its first token on; unset: none is.
    virtual std::optional<std::int64_t> short_limit() const { return std::nullopt; }
};

}  // namespace torchchat

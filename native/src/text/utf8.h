// UTF-8 as Python reads and writes it.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace torchchat {

inline constexpr std::string_view replacement = "\xEF\xBF\xBD";  // U+FFFD

// Decodes bytes as they come: every maximal part that is no UTF-8 becomes one U+FFFD, as Unicode recommends.
class Utf8Stream {
  public:
    // The whole characters of what was pushed; an unfinished one is held back.
    std::string push(std::string_view bytes);
    // U+FFFD where a character was left unfinished, else nothing.
    std::string finish();

  private:
    std::string held_;
};

// The text with U+FFFD in place of whatever is no UTF-8.
std::string well_formed(std::string_view bytes);

// The length in bytes of the character at the beginning of well-formed text.
inline std::size_t character_size(char first) {
    const auto byte = static_cast<unsigned char>(first);
    return byte < 0x80 ? 1 : byte < 0xE0 ? 2 : byte < 0xF0 ? 3 : 4;
}

// The characters of well-formed text, each as its bytes.
std::vector<std::string_view> characters(std::string_view text);

// The code point of one well-formed character.
char32_t code_point(std::string_view character);

// UTF-8 of a code point below 0x110000.
std::string encoded(char32_t code);

// Whether the character counts as white space: the White_Space property, as Rust and Python's regular expressions.
bool is_space(char32_t code);

// Returns the size in bytes of the white space at the start of well-formed text.
std::size_t spaces_at_start(std::string_view text);

// Returns the size in bytes of well-formed text without the white space at its end.
std::size_t without_spaces_at_end(std::string_view text);

}  // namespace torchchat

// The alphabet of byte-level vocabularies: printable bytes of Latin-1 stand for themselves, the others for the
// characters from U+0100 on, in order.
#include <array>
#include <unordered_map>

#include "text/utf8.h"
#include "tokenizers/json_steps.h"

namespace torchchat {
namespace {

std::array<std::string, 256> alphabet() {
    std::array<std::string, 256> characters;
    char32_t next = 0x100;
    for (char32_t byte = 0; byte < 256; ++byte) {
        const bool printable = (byte >= 0x21 && byte < 0x7F) || (byte >= 0xA1 && byte < 0xAD) || byte >= 0xAE;
        characters[byte] = encoded(printable ? byte : next++);
    }
    return characters;
}

const std::array<std::string, 256>& byte_characters() {
    static const std::array<std::string, 256> characters = alphabet();
    return characters;
}

const std::unordered_map<std::string_view, char>& character_bytes() {
    static const std::unordered_map<std::string_view, char> bytes = [] {
        std::unordered_map<std::string_view, char> found;
        for (int byte = 0; byte < 256; ++byte) {
            found.emplace(byte_characters()[static_cast<std::size_t>(byte)], static_cast<char>(byte));
        }
        return found;
    }();
    return bytes;
}

}  // namespace

std::string to_byte_level(std::string_view bytes) {
    std::string text;
    for (const char byte : bytes) text += byte_characters()[static_cast<unsigned char>(byte)];
    return text;
}

std::string from_byte_level(std::string_view text) {
    std::string bytes;
    for (const std::string_view character : characters(text)) {
        const auto found = character_bytes().find(character);
        if (found == character_bytes().end()) return std::string(text);
        bytes += found->second;
    }
    return bytes;
}

}  // namespace torchchat

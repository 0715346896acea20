#include "text/utf8.h"

#include <cstdint>

namespace torchchat {
namespace {

struct Lead {
    std::size_t size;         // of the character; 0: no character begins so
    unsigned char low, high;  // of the second byte
};

Lead lead_of(unsigned char byte) {
    if (byte < 0x80) return {1, 0, 0};
    if (byte < 0xC2 || byte > 0xF4) return {0, 0, 0};
    if (byte < 0xE0) return {2, 0x80, 0xBF};
    if (byte < 0xF0) {
        return {3, static_cast<unsigned char>(byte == 0xE0 ? 0xA0 : 0x80),
                static_cast<unsigned char>(byte == 0xED ? 0x9F : 0xBF)};
    }
    return {4, static_cast<unsigned char>(byte == 0xF0 ? 0x90 : 0x80),
            static_cast<unsigned char>(byte == 0xF4 ? 0x8F : 0xBF)};
}

// How many bytes at `from` are a character or a beginning of one.
std::size_t valid_size(std::string_view bytes, std::size_t from, const Lead& lead) {
    std::size_t size = 1;
    while (size < lead.size && from + size < bytes.size()) {
        const auto byte = static_cast<unsigned char>(bytes[from + size]);
        const bool fits = size == 1 ? byte >= lead.low && byte <= lead.high : (byte & 0xC0) == 0x80;
        if (!fits) break;
        ++size;
    }
    return size;
}

}  // namespace

std::string Utf8Stream::push(std::string_view bytes) {
    held_ += bytes;
    std::string text;
    std::size_t at = 0;
    while (at < held_.size()) {
        const Lead lead = lead_of(static_cast<unsigned char>(held_[at]));
        const std::size_t size = valid_size(held_, at, lead);
        if (size == lead.size) {
            text.append(held_, at, size);
        } else if (lead.size > 0 && at + size == held_.size()) {
            break;
        } else {
            text += replacement;
        }
        at += size;
    }
    held_.erase(0, at);
    return text;
}

std::string Utf8Stream::finish() {
    const bool unfinished = !held_.empty();
    held_.clear();
    return unfinished ? std::string(replacement) : std::string();
}

std::string well_formed(std::string_view bytes) {
    Utf8Stream stream;
    std::string text = stream.push(bytes);
    return text + stream.finish();
}

std::vector<std::string_view> characters(std::string_view text) {
    std::vector<std::string_view> result;
    for (std::size_t at = 0; at < text.size(); at += result.back().size()) {
        result.push_back(text.substr(at, character_size(text[at])));
    }
    return result;
}

char32_t code_point(std::string_view character) {
    constexpr char32_t lead_bits[] = {0, 0x7F, 0x1F, 0x0F, 0x07};
    char32_t code = static_cast<unsigned char>(character[0]) & lead_bits[character.size()];
    for (const char byte : character.substr(1)) code = code << 6 | (static_cast<unsigned char>(byte) & 0x3F);
    return code;
}

std::string encoded(char32_t code) {
    const auto byte = [](char32_t value) { return static_cast<char>(static_cast<std::uint8_t>(value)); };
    if (code < 0x80) return {byte(code)};
    if (code < 0x800) return {byte(0xC0 | code >> 6), byte(0x80 | (code & 0x3F))};
    if (code < 0x10000) return {byte(0xE0 | code >> 12), byte(0x80 | (code >> 6 & 0x3F)), byte(0x80 | (code & 0x3F))};
    return {byte(0xF0 | code >> 18), byte(0x80 | (code >> 12 & 0x3F)), byte(0x80 | (code >> 6 & 0x3F)),
            byte(0x80 | (code & 0x3F))};
}

bool is_space(char32_t code) {
    return (code >= 0x09 && code <= 0x0D) || code == 0x20 || code == 0x85 || code == 0xA0 || code == 0x1680 ||
           (code >= 0x2000 && code <= 0x200A) || code == 0x2028 || code == 0x2029 || code == 0x202F || code == 0x205F ||
           code == 0x3000;
}

std::size_t spaces_at_start(std::string_view text) {
    std::size_t size = 0;
    while (size < text.size()) {
        const std::string_view character = text.substr(size, character_size(text[size]));
        if (!is_space(code_point(character))) break;
        size += character.size();
    }
    return size;
}

std::size_t without_spaces_at_end(std::string_view text) {
    std::size_t end = 0, at = 0;
    for (const std::string_view character : characters(text)) {
        at += character.size();
        if (!is_space(code_point(character))) end = at;
    }
    return end;
}

}  // namespace torchchat

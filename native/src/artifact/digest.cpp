#include "artifact/digest.h"

#include <openssl/evp.h>

#include <array>
#include <new>

namespace torchchat {

std::string sha256(std::string_view bytes) {
    std::array<unsigned char, 32> digest = {};
    unsigned size = 0;
    if (EVP_Digest(bytes.data(), bytes.size(), digest.data(), &size, EVP_sha256(), nullptr) != 1)
        throw std::bad_alloc();
    constexpr std::string_view digits = "0123456789abcdef";
    std::string text;
    for (const unsigned char byte : digest) text += {digits[byte >> 4], digits[byte & 15]};
    return text;
}

}  // namespace torchchat

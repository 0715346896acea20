#include "error.h"

#include "text/utf8.h"

namespace torchchat {

std::string shown(std::string_view text, std::size_t limit) {
    std::string result = "'";
    for (const char character : text.substr(0, limit)) {
        const auto byte = static_cast<unsigned char>(character);
        result += byte < 0x20 || byte == 0x7F ? '?' : character;
    }
    return well_formed(result) + "'";
}

}  // namespace torchchat

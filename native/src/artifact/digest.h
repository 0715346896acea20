#pragma once

#include <string>
#include <string_view>

namespace torchchat {

// SHA-256 of the bytes, as lower-case hexadecimal digits.
std::string sha256(std::string_view bytes);

}  // namespace torchchat

// What a user is told: what happened with the value, and what to do.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

#include "torchchat/torchchat.h"

namespace torchchat {

// A value of a stranger's file, short enough for a message and without control characters.
std::string shown(std::string_view text, std::size_t limit = 60);

}  // namespace torchchat

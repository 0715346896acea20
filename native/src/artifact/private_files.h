// Who can write a file: notes in the cache folder count only if no other user could have written them. The rule is that
// of torchchat_core/private_cache.py.
#pragma once

#include <filesystem>

namespace torchchat {

// Returns true if `path`, and every folder and symbolic link on the way to it, belongs to the user or root, and nobody
// else can write any of them. A path that does not exist is judged by the folders above it.
bool is_private(const std::filesystem::path& path);

}  // namespace torchchat

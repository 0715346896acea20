// The directory of a ZIP archive, which may stand behind other bytes in one file.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>

namespace torchchat {

struct ZipEntry {
    std::string_view data;  // as it is in the file
    bool stored;            // without compression, so that `data` is the content
    std::uint64_t size;     // of the content
};

// The entries by name. Throws `Error` where `file` holds no archive, or a damaged one: entries outside the file, two of
// one name, or of a size that cannot be. Offsets count from the file's beginning.
std::map<std::string, ZipEntry, std::less<>> read_zip(std::string_view file);

}  // namespace torchchat

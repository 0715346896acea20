// The directory of a ZIP archive, which may stand behind other bytes in one file. As torchchat_core/archive.py.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>

namespace torchchat {

struct ZipEntry {
    std::string_view data;   // as it is in the file
    bool stored;             // neither compressed nor encrypted, so that `data` is the content
    std::uint32_t checksum;  // CRC-32 that the content has to have
    std::uint64_t header;    // offset of its own header, at least 30 bytes before `data`
};

// The entries by name. Throws `Error` where `file` holds no archive, or a damaged one: entries outside the file, two of
// one name, entries that share bytes. Offsets count from the file's beginning.
std::map<std::string, ZipEntry, std::less<>> read_zip(std::string_view file);

// Whether the entry's content has its checksum.
bool is_whole(const ZipEntry& entry);

}  // namespace torchchat

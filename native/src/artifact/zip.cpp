#include "artifact/zip.h"

#include <algorithm>
#include <optional>

#include "error.h"

namespace torchchat {
namespace {

// Names and sizes of the records are those of PKWARE's APPNOTE.TXT.
constexpr std::string_view end_mark("PK\x05\x06", 4), end64_mark("PK\x06\x06", 4), locator_mark("PK\x06\x07", 4);
constexpr std::string_view entry_mark("PK\x01\x02", 4), local_mark("PK\x03\x04", 4);
constexpr std::size_t end_size = 22, locator_size = 20, end64_size = 56, entry_size = 46, local_size = 30;
constexpr std::size_t longest_comment = 0xFFFF;
constexpr std::uint64_t most_entries = 1'000'000;
constexpr std::uint16_t extra_zip64 = 0x0001;

Error damaged(const std::string& what) {
    return Error("the file is damaged: " + what, "copy or export the model again");
}

// Part of the file; throws where it reaches beyond the end.
std::string_view part(std::string_view file, std::uint64_t offset, std::uint64_t size) {
    if (offset > file.size() || size > file.size() - offset) throw damaged("it ends too early, or a part is too large");
    return file.substr(offset, size);
}

std::uint64_t little_endian(std::string_view record, std::size_t offset, std::size_t size) {
    std::uint64_t value = 0;
    for (std::size_t index = 0; index < size; ++index) {
        value |= std::uint64_t{static_cast<unsigned char>(record[offset + index])} << (8 * index);
    }
    return value;
}

struct Directory {
    std::uint64_t offset, size, entries;
};

std::optional<std::size_t> find_end(std::string_view file) {
    if (file.size() < end_size) return std::nullopt;
    const std::size_t lowest = file.size() - std::min(file.size(), end_size + longest_comment);
    for (std::size_t at = file.size() - end_size;; --at) {
        if (file.substr(at, 4) == end_mark && at + end_size + little_endian(file, at + 20, 2) == file.size()) return at;
        if (at == lowest) return std::nullopt;
    }
}

Directory find_directory(std::string_view file) {
    const auto end = find_end(file);
    if (!end) {
        throw Error("the file was not written by torchchat's export, or its end is missing",
                    "copy it again, or export the model with `torchchat export`");
    }
    const std::string_view record = part(file, *end, end_size);
    Directory found = {little_endian(record, 16, 4), little_endian(record, 12, 4), little_endian(record, 10, 2)};
    if (*end >= locator_size && file.substr(*end - locator_size, 4) == locator_mark) {
        const std::uint64_t place = little_endian(file, *end - locator_size + 8, 8);
        const std::string_view wide = part(file, place, end64_size);
        if (!wide.starts_with(end64_mark)) throw damaged("the archive's end record is not where it has to be");
        found = {little_endian(wide, 48, 8), little_endian(wide, 40, 8), little_endian(wide, 32, 8)};
    }
    if (found.entries > most_entries || found.size / entry_size < found.entries) {
        throw damaged("the archive's directory has an impossible size");
    }
    return found;
}

// Of an entry whose 32-bit fields are full, the wide ones from the extra field.
void widen(std::string_view extra, std::uint64_t& size, std::uint64_t& packed, std::uint64_t& offset) {
    while (extra.size() >= 4) {
        const auto kind = little_endian(extra, 0, 2), length = little_endian(extra, 2, 2);
        std::string_view field = part(extra, 4, length);
        extra.remove_prefix(4 + length);
        if (kind != extra_zip64) continue;
        for (std::uint64_t* value : {&size, &packed, &offset}) {
            if (*value != 0xFFFFFFFF) continue;
            *value = little_endian(part(field, 0, 8), 0, 8);
            field.remove_prefix(8);
        }
    }
}

std::string_view data_of(std::string_view file, std::uint64_t offset, std::uint64_t packed) {
    const std::string_view local = part(file, offset, local_size);
    if (!local.starts_with(local_mark)) throw damaged("an entry is not where the directory says");
    const std::uint64_t header = local_size + little_endian(local, 26, 2) + little_endian(local, 28, 2);
    part(file, offset, header);
    return part(file, offset + header, packed);
}

}  // namespace

std::map<std::string, ZipEntry, std::less<>> read_zip(std::string_view file) {
    const Directory directory = find_directory(file);
    std::string_view rest = part(file, directory.offset, directory.size);
    std::map<std::string, ZipEntry, std::less<>> entries;
    for (std::uint64_t index = 0; index < directory.entries; ++index) {
        const std::string_view record = part(rest, 0, entry_size);
        if (!record.starts_with(entry_mark)) throw damaged("the archive's directory is no such");
        const auto name_size = little_endian(record, 28, 2), extra_size = little_endian(record, 30, 2);
        const auto total = entry_size + name_size + extra_size + little_endian(record, 32, 2);
        const std::string_view whole = part(rest, 0, total);
        std::uint64_t size = little_endian(record, 24, 4), packed = little_endian(record, 20, 4);
        std::uint64_t offset = little_endian(record, 42, 4);
        widen(whole.substr(entry_size + name_size, extra_size), size, packed, offset);
        const bool stored = little_endian(record, 10, 2) == 0 && (little_endian(record, 8, 2) & 1) == 0;
        if (stored && size != packed) throw damaged("an entry has two sizes");
        const std::string name(whole.substr(entry_size, name_size));
        if (!entries.emplace(name, ZipEntry{data_of(file, offset, packed), stored, size}).second) {
            throw damaged("two entries are called " + shown(name));
        }
        rest.remove_prefix(total);
    }
    return entries;
}

}  // namespace torchchat

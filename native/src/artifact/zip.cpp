#include "artifact/zip.h"

#include <zlib.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "error.h"

namespace torchchat {
namespace {

// Names and sizes of the records are those of PKWARE's APPNOTE.TXT.
constexpr std::string_view end_mark("PK\x05\x06", 4), end64_mark("PK\x06\x06", 4), locator_mark("PK\x06\x07", 4);
constexpr std::string_view entry_mark("PK\x01\x02", 4), local_mark("PK\x03\x04", 4);
constexpr std::size_t end_size = 22, locator_size = 20, end64_size = 56, entry_size = 46, local_size = 30;
constexpr std::size_t longest_comment = 0xFFFF;
constexpr std::uint64_t most_entries = 1 << 18, largest_directory = 64 << 20;
constexpr std::uint64_t full_16 = 0xFFFF, full_32 = 0xFFFFFFFF;  // "see the 64-bit record"
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

// The last end record, in a file that may have a comment behind it.
std::optional<std::size_t> find_end(std::string_view file) {
    const std::size_t from = file.size() - std::min(file.size(), end_size + longest_comment);
    const std::size_t found = file.substr(from).rfind(end_mark);
    if (found == file.npos || file.size() - from - found < end_size) return std::nullopt;
    return from + found;
}

Directory find_directory(std::string_view file) {
    const auto end = find_end(file);
    if (!end) {
        throw Error("the file was not written by torchchat's export, or its end is missing",
                    "copy it again, or export the model with `torchchat export`");
    }
    const std::string_view record = part(file, *end, end_size);
    Directory found = {little_endian(record, 16, 4), little_endian(record, 12, 4), little_endian(record, 10, 2)};
    const bool wide = found.entries == full_16 || found.size == full_32 || found.offset == full_32;
    if (wide && *end >= locator_size && file.substr(*end - locator_size, 4) == locator_mark) {
        const std::string_view record64 = part(file, little_endian(file, *end - locator_size + 8, 8), end64_size);
        if (!record64.starts_with(end64_mark)) throw damaged("the archive's end record is not where it has to be");
        found = {little_endian(record64, 48, 8), little_endian(record64, 40, 8), little_endian(record64, 32, 8)};
    }
    if (found.entries > most_entries || found.size > largest_directory) {
        throw damaged("the archive's directory has " + std::to_string(found.entries) + " entries in " +
                      std::to_string(found.size) + " bytes");
    }
    return found;
}

// What an entry of the directory says.
struct Record {
    std::string name;
    std::uint64_t size = 0, packed = 0, header = 0;  // bytes of the content, bytes in the file, offset
    std::uint32_t checksum = 0;
    bool stored = false;
};

// Of an entry whose 32-bit fields are full, the wide ones from the extra field.
void widen(std::string_view extra, Record& record) {
    std::vector<std::uint64_t*> wanted;
    for (std::uint64_t* value : {&record.size, &record.packed, &record.header}) {
        if (*value == full_32) wanted.push_back(value);
    }
    while (!wanted.empty() && extra.size() >= 4) {
        const auto kind = little_endian(extra, 0, 2), length = little_endian(extra, 2, 2);
        const std::string_view field = part(extra, 4, length);
        extra.remove_prefix(4 + length);
        if (kind != extra_zip64 || field.size() < 8 * wanted.size()) continue;
        for (std::size_t index = 0; index < wanted.size(); ++index) *wanted[index] = little_endian(field, 8 * index, 8);
        return;
    }
    if (!wanted.empty()) throw damaged("an entry lacks its size or place");
}

// The record that `directory` begins with; it is taken off.
Record take_record(std::string_view& directory) {
    const std::string_view fixed = part(directory, 0, entry_size);
    if (!fixed.starts_with(entry_mark)) throw damaged("the archive's directory is no such");
    const auto name_size = little_endian(fixed, 28, 2), extra_size = little_endian(fixed, 30, 2);
    const std::string_view whole =
        part(directory, 0, entry_size + name_size + extra_size + little_endian(fixed, 32, 2));
    Record record;
    record.name = whole.substr(entry_size, name_size);
    record.size = little_endian(fixed, 24, 4);
    record.packed = little_endian(fixed, 20, 4);
    record.header = little_endian(fixed, 42, 4);
    record.checksum = static_cast<std::uint32_t>(little_endian(fixed, 16, 4));
    widen(whole.substr(entry_size + name_size, extra_size), record);
    const bool encrypted = (little_endian(fixed, 8, 2) & 1) != 0;
    record.stored = little_endian(fixed, 10, 2) == 0 && !encrypted && record.size == record.packed;
    directory.remove_prefix(whole.size());
    return record;
}

// The bytes of an entry behind its own header, which has to have the same name.
std::string_view data_of(std::string_view file, const Record& record) {
    const std::string_view local = part(file, record.header, local_size);
    const auto name_size = little_endian(local, 26, 2), extra_size = little_endian(local, 28, 2);
    if (!local.starts_with(local_mark) || part(file, record.header + local_size, name_size) != record.name) {
        throw damaged("the entry " + shown(record.name) + " is not where the directory says");
    }
    part(file, record.header, local_size + name_size + extra_size);
    return part(file, record.header + local_size + name_size + extra_size, record.packed);
}

// Throws where entries share bytes: a small file could unfold to a huge one.
void check_apart(std::vector<Record>& records) {
    std::ranges::sort(records, {}, &Record::header);
    for (std::size_t index = 1; index < records.size(); ++index) {
        const Record& before = records[index - 1];
        const std::uint64_t room = records[index].header - before.header;
        if (room < local_size || room - local_size < before.packed) {
            throw damaged("the entries " + shown(before.name) + " and " + shown(records[index].name) + " overlap");
        }
    }
}

}  // namespace

std::map<std::string, ZipEntry, std::less<>> read_zip(std::string_view file) {
    const Directory directory = find_directory(file);
    std::string_view rest = part(file, directory.offset, directory.size);
    std::vector<Record> records;
    for (std::uint64_t index = 0; index < directory.entries; ++index) records.push_back(take_record(rest));
    check_apart(records);
    std::map<std::string, ZipEntry, std::less<>> entries;
    for (const Record& record : records) {
        const ZipEntry entry = {data_of(file, record), record.stored, record.checksum, record.header};
        if (!entries.emplace(record.name, entry).second) throw damaged("two entries are called " + shown(record.name));
    }
    return entries;
}

bool is_whole(const ZipEntry& entry) {
    const auto* bytes = reinterpret_cast<const Bytef*>(entry.data.data());
    return crc32_z(0, bytes, entry.data.size()) == entry.checksum;
}

}  // namespace torchchat

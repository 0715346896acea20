#include "artifact/artifact.h"

#include <sys/utsname.h>

#include <algorithm>
#include <filesystem>
#include <future>

#include "artifact/digest.h"
#include "error.h"

namespace torchchat {
namespace {

constexpr std::string_view folder = "torchchat/", manifest_name = "torchchat/manifest.json";
constexpr std::string_view weights_folder = "weights/";  // what entries with weights begin with
constexpr std::size_t largest_manifest = 16 << 20;       // bytes
constexpr std::size_t largest_tokenizer = 256 << 20;     // bytes of all its files
constexpr std::size_t large = 16 << 20;                  // bytes of an entry that is compared once for a file
// What files of each kind end in.
const std::map<std::string, std::string, std::less<>> endings = {
    {"aoti-package", ".pt2"}, {"aoti-dso", ".so"}, {"executorch", ".pte"}};

#if defined(__linux__)
constexpr std::string_view this_system = "linux";
#elif defined(__APPLE__)
constexpr std::string_view this_system = "darwin";
#else
constexpr std::string_view this_system = "unknown";
#endif

std::string this_machine() {
    utsname name = {};
    if (uname(&name) != 0) return {};
    const std::string machine = static_cast<const char*>(name.machine);
    return machine == "arm64" ? "aarch64" : machine;
}

void check_target(const Manifest& manifest) {
    const auto check = [](const std::optional<std::string>& wanted, std::string_view found) {
        if (!wanted || *wanted == found) return;
        throw Error("the file was made for " + shown(*wanted) + " and this is '" + std::string(found) + "'",
                    "export the model again on such a machine");
    };
    check(manifest.system, this_system);
    check(manifest.machine, this_machine());
    if (manifest.device != "cpu") {
        throw Error("the file was made for " + manifest.device + ", and this program runs files for the CPU",
                    "run it with torchchat, or export the model again with --device cpu");
    }
}

std::string lower_case(std::string text) {
    for (char& letter : text) {
        if (letter >= 'A' && letter <= 'Z') letter = static_cast<char>(letter - 'A' + 'a');
    }
    return text;
}

}  // namespace

Artifact::Artifact(const std::string& path) : file_(path), entries_(read_zip(file_.bytes())) {
    find_manifest();
    check_ending();
    check_target(manifest_);
    check_tokenizer_size();
    begin_checks();
}

// Of several manifests the first in the file, as in Python.
void Artifact::find_manifest() {
    const std::pair<const std::string, ZipEntry>* first = nullptr;
    for (const auto& each : entries_) {
        const std::string& name = each.first;
        const bool is_manifest = name == manifest_name || (name.ends_with("/" + std::string(manifest_name)) &&
                                                           std::ranges::count(name, '/') == 2);
        if (is_manifest && (first == nullptr || each.second.header < first->second.header)) first = &each;
    }
    if (first == nullptr) {
        throw Error("the file has no manifest of torchchat: something else wrote it",
                    "export the model with `torchchat export`");
    }
    const auto& [name, entry] = *first;
    if (!entry.stored || entry.data.size() > largest_manifest) {
        throw Error("the file's manifest is compressed or too large", "export the model again");
    }
    if (!is_whole(entry)) {
        throw Error("the file's manifest is not what its checksum says", "copy or export the model again");
    }
    root_ = name.substr(0, name.size() - manifest_name.size());
    manifest_ = parsed_manifest(entry.data);
}

// Machine code must not come in the guise of data. A file without an ending may be of any kind.
void Artifact::check_ending() const {
    const std::string ending = lower_case(std::filesystem::path(path()).extension().string());
    const auto wanted = endings.find(manifest_.kind);
    if (ending.empty() || wanted == endings.end() || wanted->second == ending) return;
    throw Error("the file ends in " + shown(ending) + ", and holds a program of the kind " + shown(manifest_.kind) +
                    ", whose files end in " + wanted->second,
                "do not run it, unless you know who renamed it");
}

std::string_view Artifact::content(std::string_view name) const {
    check(name);
    return place(name);
}

std::string_view Artifact::place(std::string_view name) const {
    std::string entry = root_ + std::string(folder) + std::string(name);
    if (name == "program") {
        if (!manifest_.program) {
            if (manifest_.program_bytes > file_.bytes().size()) {
                throw Error("the program in the file is not whole", "copy or export the model again");
            }
            return file_.bytes().substr(0, manifest_.program_bytes);
        }
        entry = *manifest_.program;
    }
    const auto found = entries_.find(entry);
    if (found == entries_.end()) throw Error("the file lacks " + shown(entry), "copy or export the model again");
    if (!found->second.stored) throw Error(shown(entry) + " in the file is compressed", "export the model again");
    return found->second.data;
}

std::uint64_t Artifact::offset(std::string_view name) const {
    return static_cast<std::uint64_t>(content(name).data() - file_.bytes().data());
}

TokenizerFiles Artifact::tokenizer_files() const {
    TokenizerFiles files;
    for (const std::string& name : manifest_.tokenizer_files) {
        files.emplace(name.substr(tokenizer_folder.size()), content(name));
    }
    return files;
}

void Artifact::check_tokenizer_size() const {
    std::size_t size = 0;
    for (const std::string& name : manifest_.tokenizer_files) size += place(name).size();  // of bytes in one file
    if (size <= largest_tokenizer) return;
    throw Error("the tokenizer's files have " + std::to_string(size) + " bytes; " + std::to_string(largest_tokenizer) +
                    " are the most",
                "the file is damaged: copy or export the model again");
}

// By several threads: hashing gigabytes is most of the time that opening takes.
void Artifact::begin_checks() {
    constexpr std::size_t small = 1 << 20, most_threads = 64;
    identity_ = CheckedFiles::identity(path(), manifest_.digests);
    checked_before_ = checked_files_.has(path(), manifest_.digests);
    std::size_t threads = 0;
    for (const auto& [name, digest] : manifest_.digests) {
        const std::string_view data = place(name);
        const bool skipped = checked_before_ && (name.starts_with(weights_folder) || data.size() >= large);
        const auto holds = [data, skipped, &wanted = digest] { return skipped || sha256(data) == wanted; };
        const bool apart = !skipped && data.size() > small && threads++ < most_threads;
        checks_[name] = std::async(apart ? std::launch::async : std::launch::deferred, holds).share();
    }
    for (const auto& [name, digest] : manifest_.digests) {
        if (place(name).size() <= small) check(name);
    }
}

void Artifact::check(std::string_view name) const {
    const auto found = checks_.find(name);
    if (found == checks_.end()) {
        throw Error("the file has no digest of " + shown(name), "copy or export the model again");
    }
    if (found->second.get()) return;
    throw Error("the file was changed after it was written: " + shown(name) + " is not what its digest says",
                "copy or export the model again");
}

void Artifact::check() const {
    for (const auto& [name, holds] : checks_) check(name);
    if (!checked_before_) checked_files_.add(path(), manifest_.digests, identity_);
}

}  // namespace torchchat

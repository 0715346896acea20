#include "artifact/artifact.h"

#include <sys/utsname.h>

#include <algorithm>
#include <future>

#include "artifact/digest.h"
#include "error.h"

namespace torchchat {
namespace {

constexpr std::string_view folder = "torchchat/", manifest_name = "torchchat/manifest.json";
constexpr std::string_view tokenizer_folder = "tokenizer/";
constexpr std::size_t largest_manifest = 16 << 20;    // bytes
constexpr std::size_t largest_tokenizer = 256 << 20;  // bytes of one file

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
}

}  // namespace

Artifact::Artifact(const std::string& path) : file_(path), entries_(read_zip(file_.bytes())) {
    find_manifest();
    check_target(manifest_);
    check_digests();
}

void Artifact::find_manifest() {
    for (const auto& [name, entry] : entries_) {
        if (!name.ends_with(manifest_name)) continue;
        const std::string root = name.substr(0, name.size() - manifest_name.size());
        if (!root.empty() && root.find('/') != root.size() - 1) continue;  // of one folder at most
        if (!entry.stored || entry.size > largest_manifest) {
            throw Error("the file's manifest is compressed or too large", "export the model again");
        }
        root_ = root;
        manifest_ = parsed_manifest(entry.data);
        return;
    }
    throw Error("the file has no manifest of torchchat: something else wrote it",
                "export the model with `torchchat export`");
}

std::string_view Artifact::content(std::string_view name) const {
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
    for (const auto& [name, digest] : manifest_.digests) {
        if (!name.starts_with(tokenizer_folder)) continue;
        const std::string_view data = content(name);
        if (data.size() > largest_tokenizer) {
            throw Error("the tokenizer's file " + shown(name) + " has " + std::to_string(data.size()) + " bytes",
                        "export the model again");
        }
        files.emplace(name.substr(tokenizer_folder.size()), data);
    }
    return files;
}

// By several threads: hashing gigabytes is most of the time that opening takes.
void Artifact::check_digests() const {
    std::vector<std::future<bool>> checks;
    std::vector<std::string> names;
    for (const auto& [name, digest] : manifest_.digests) {
        const std::string_view data = content(name);
        const auto policy = data.size() > (1 << 20) && checks.size() < 64 ? std::launch::async : std::launch::deferred;
        checks.push_back(std::async(policy, [data, &wanted = digest] { return sha256(data) == wanted; }));
        names.push_back(name);
    }
    for (std::size_t index = 0; index < checks.size(); ++index) {
        if (!checks[index].get()) {
            throw Error(
                "the file was changed after it was written: " + shown(names[index]) + " is not what its digest says",
                "copy or export the model again");
        }
    }
}

}  // namespace torchchat

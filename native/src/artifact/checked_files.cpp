#include "artifact/checked_files.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>

#include "artifact/digest.h"
#include "artifact/private_files.h"

namespace torchchat {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

// A file that was written less long ago may be written again in the same tick of its clock.
constexpr std::chrono::nanoseconds settled = std::chrono::seconds(2);
constexpr std::size_t length_of_name = 32;  // of a note, without its ending

fs::path cache_folder() {
    if (const char* const base = std::getenv("XDG_CACHE_HOME"); base != nullptr && *base != '\0') return base;
    if (const char* const home = std::getenv("HOME"); home != nullptr && *home != '\0')
        return fs::path(home).append(".cache");
    return {};
}

std::int64_t nanoseconds(const timespec& time) {
    return std::int64_t{time.tv_sec} * 1'000'000'000 + time.tv_nsec;
}

std::pair<std::int64_t, std::int64_t> written_and_changed(const struct stat& status) {
#if defined(__APPLE__)
    return {nanoseconds(status.st_mtimespec), nanoseconds(status.st_ctimespec)};
#else
    return {nanoseconds(status.st_mtim), nanoseconds(status.st_ctim)};
#endif
}

// Letter by letter what Python's json.dumps makes of it.
std::string as_text(const Digests& digests) {
    std::string text;
    for (const auto& [name, digest] : digests) {
        text.append(text.empty() ? "{" : ", ");
        text.append(json(name).dump(-1, ' ', /*ensure_ascii=*/true)).append(": ").append(json(digest).dump());
    }
    return text.append("}");  // there is always the program's
}

}  // namespace

CheckedFiles::CheckedFiles() {
    const fs::path caches = cache_folder();
    if (!caches.empty()) folder_ = caches / "torchchat" / "checked";
}

bool CheckedFiles::has(const std::string& path, const Digests& digests) const {
    if (folder_.empty()) return false;
    const fs::path place = note(path);
    if (!is_private(place)) return false;
    std::ifstream file(place, std::ios::binary);
    const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    const json found = json::parse(text, nullptr, /*allow_exceptions=*/false);
    return found.is_object() && found == identity(path, digests);
}

// What cannot be noted is compared again the next time.
void CheckedFiles::add(const std::string& path, const Digests& digests, const json& before) const {
    if (folder_.empty() || before.is_null() || before != identity(path, digests)) return;
    const auto written = std::max(before.at("written").get<std::int64_t>(), before.at("changed").get<std::int64_t>());
    const auto now =
        std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::system_clock::now().time_since_epoch());
    if (now - std::chrono::nanoseconds(written) <= settled) return;
    std::error_code failure;
    fs::create_directories(folder_.parent_path().parent_path(), failure);
    for (const fs::path& folder : {folder_.parent_path(), folder_}) mkdir(folder.c_str(), S_IRWXU);
    const fs::path place = note(path);
    fs::path beside = place;
    beside += std::to_string(getpid());
    std::ofstream file(beside, std::ios::binary);
    file << before.dump();
    file.close();
    fs::permissions(beside, fs::perms::owner_read | fs::perms::owner_write, failure);
    if (file) fs::rename(beside, place, failure);
    if (!file || failure) fs::remove(beside, failure);
}

json CheckedFiles::identity(const std::string& path, const Digests& digests) {
    struct stat status = {};
    std::error_code failure;
    const fs::path place = fs::canonical(path, failure);
    if (failure || stat(path.c_str(), &status) != 0) return nullptr;
    const auto [written, changed] = written_and_changed(status);
    return {{"path", place.string()},
            {"device", std::uint64_t{status.st_dev}},
            {"inode", std::uint64_t{status.st_ino}},
            {"size", std::int64_t{status.st_size}},
            {"written", written},
            {"changed", changed},
            {"digests", sha256(as_text(digests))}};
}

fs::path CheckedFiles::note(const std::string& path) const {
    std::error_code failure;
    const fs::path place = fs::canonical(path, failure);
    return folder_ / (sha256(place.string()).substr(0, length_of_name) + ".json");
}

}  // namespace torchchat

#include "artifact/private_files.h"

#include <grp.h>
#include <pwd.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <string>

namespace torchchat {
namespace {

namespace fs = std::filesystem;

constexpr int most_links = 40;  // symbolic links that lead to each other

// Returns true for the group that many systems create for each user, with no other members.
bool is_private_group(gid_t number) {
    const passwd* const user = getpwuid(getuid());
    if (user == nullptr) return false;
    const std::string name = user->pw_name;
    const group* const found = getgrgid(number);
    if (found == nullptr || name != found->gr_name) return false;
    for (char** member = found->gr_mem; *member != nullptr; ++member) {
        if (name != *member) return false;
    }
    return true;
}

bool has_private_mode(const struct stat& status) {
    if (status.st_uid != 0 && status.st_uid != getuid()) return false;
    if (S_ISLNK(status.st_mode)) return true;                                     // the mode of a link means nothing
    if (S_ISDIR(status.st_mode) && (status.st_mode & S_ISVTX) != 0) return true;  // as /tmp
    if ((status.st_mode & S_IWOTH) != 0) return false;
    return (status.st_mode & S_IWGRP) == 0 || is_private_group(status.st_gid);
}

bool is_private_way(const fs::path& path, int links) {
    fs::path current = path.root_path();
    for (const fs::path& part : path) {
        current = part == ".." ? current.parent_path() : current / part;
        struct stat status = {};
        if (lstat(current.c_str(), &status) != 0) {
            if (errno == ENOENT || errno == ENOTDIR) continue;
            return false;
        }
        if (!has_private_mode(status)) return false;
        if (!S_ISLNK(status.st_mode)) continue;
        std::error_code failure;
        const fs::path target = fs::read_symlink(current, failure);
        if (failure || links == 0 || !is_private_way(current.parent_path() / target, links - 1)) return false;
        current = fs::weakly_canonical(current, failure);
        if (failure) return false;
    }
    return true;
}

}  // namespace

bool is_private(const fs::path& path) {
    std::error_code failure;
    const fs::path absolute = fs::absolute(path, failure);
    return !failure && is_private_way(absolute, most_links);
}

}  // namespace torchchat

#include "artifact/scratch_folder.h"

#include <cstdlib>
#include <fstream>

#include "error.h"

namespace torchchat {

ScratchFolder::ScratchFolder() {
    std::error_code failure;
    const auto root = std::filesystem::temp_directory_path(failure);
    std::string name = (failure ? std::filesystem::path("/tmp") : root) / "torchchat-XXXXXX";
    if (mkdtemp(name.data()) == nullptr) {
        throw Error("no folder can be made in " + shown(root.string(), 300), "set TMPDIR to one that can be written");
    }
    path_ = name;
}

ScratchFolder::~ScratchFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
}

std::string ScratchFolder::write(const std::string& name, std::string_view content) const {
    const auto path = path_ / name;
    std::ofstream file(path, std::ios::binary);
    file.write(content.data(), static_cast<std::streamsize>(content.size()));
    file.close();
    if (!file) {
        throw Error("cannot write " + shown(path.string(), 300), "set TMPDIR to a folder with room");
    }
    return path.string();
}

}  // namespace torchchat

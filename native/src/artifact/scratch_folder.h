// A folder of our own for what libraries can only be given as files.
#pragma once

#include <filesystem>
#include <string>
#include <string_view>

namespace torchchat {

// Is gone, with all that it holds, when this is destroyed.
class ScratchFolder {
  public:
    // Throws `Error` where none can be made.
    ScratchFolder();
    ScratchFolder(const ScratchFolder&) = delete;
    ScratchFolder& operator=(const ScratchFolder&) = delete;
    ScratchFolder(ScratchFolder&&) = delete;
    ScratchFolder& operator=(ScratchFolder&&) = delete;
    ~ScratchFolder();

    // Writes a file; its path. Throws `Error` where that fails.
    std::string write(const std::string& name, std::string_view content) const;
    std::filesystem::path operator/(const std::string& name) const { return path_ / name; }

  private:
    std::filesystem::path path_;
};

}  // namespace torchchat

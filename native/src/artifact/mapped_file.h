// A file in memory, as the system maps it.
#pragma once

#include <string>
#include <string_view>

namespace torchchat {

class MappedFile {
  public:
    // Throws `Error` where the file cannot be read, or is empty.
    explicit MappedFile(const std::string& path);
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;
    MappedFile(MappedFile&&) = delete;
    MappedFile& operator=(MappedFile&&) = delete;
    ~MappedFile();

    std::string_view bytes() const { return {static_cast<const char*>(address_), size_}; }
    const std::string& path() const { return path_; }

  private:
    std::string path_;
    void* address_ = nullptr;
    std::size_t size_ = 0;
};

}  // namespace torchchat

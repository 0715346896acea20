#include "artifact/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <system_error>

#include "error.h"

namespace torchchat {
namespace {

std::string reason() {
    return std::generic_category().message(errno);
}

struct Descriptor {
    int number;
    explicit Descriptor(const std::string& path) : number(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {}
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;
    Descriptor(Descriptor&&) = delete;
    Descriptor& operator=(Descriptor&&) = delete;
    ~Descriptor() {
        if (number >= 0) close(number);
    }
};

}  // namespace

MappedFile::MappedFile(const std::string& path) : path_(path) {
    const Descriptor file(path);
    if (file.number < 0) throw Error("cannot open " + shown(path, 300) + ": " + reason());
    struct stat status = {};
    if (fstat(file.number, &status) != 0) throw Error("cannot read " + shown(path, 300) + ": " + reason());
    if (!S_ISREG(status.st_mode)) throw Error(shown(path, 300) + " is no file");
    size_ = static_cast<std::size_t>(status.st_size);
    if (size_ == 0) throw Error(shown(path, 300) + " is empty", "copy or export the model again");
    address_ = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file.number, 0);
    if (address_ == MAP_FAILED) throw Error("cannot map " + shown(path, 300) + ": " + reason());
}

MappedFile::~MappedFile() {
    if (address_ != nullptr && address_ != MAP_FAILED) munmap(address_, size_);
}

}  // namespace torchchat

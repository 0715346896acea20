#include "backends/runtimes.h"

#include <dlfcn.h>

#include <array>
#include <filesystem>

#include "error.h"

namespace torchchat {
namespace {

struct Known {
    const char* name;
    const char* module;  // its file; null: this library was built without it
    const char* option;  // of CMake
    const char* needs;
};

#ifndef TORCHCHAT_AOTI
#define TORCHCHAT_AOTI nullptr
#endif
#ifndef TORCHCHAT_EXECUTORCH
#define TORCHCHAT_EXECUTORCH nullptr
#endif
constexpr std::array known = {Known{"aoti", TORCHCHAT_AOTI, "TORCHCHAT_AOTI", "libtorch"},
                              Known{"executorch", TORCHCHAT_EXECUTORCH, "TORCHCHAT_EXECUTORCH", "ExecuTorch"}};

// The folder that this library lies in.
std::filesystem::path own_folder() {
    Dl_info info = {};
    if (dladdr(&known, &info) == 0 || info.dli_fname == nullptr) return {};
    return std::filesystem::path(info.dli_fname).parent_path();
}

const RuntimeModule& loaded(const Known& runtime) {
    const std::string path = (own_folder() / runtime.module).string();
    void* const module = dlopen(path.c_str(), RTLD_LAZY | RTLD_LOCAL);  // never closed: runtimes do not bear that
    const void* const found = module == nullptr ? nullptr : dlsym(module, "torchchat_runtime");
    if (found == nullptr) {
        throw Error(
            std::string("the runtime ") + runtime.name + " cannot be loaded: " + shown(dlerror(), 300),
            std::string("put ") + runtime.needs + " where it was when torchchat-run was built, or build it again");
    }
    return *static_cast<const RuntimeModule*>(found);
}

}  // namespace

std::vector<std::string> backends() {
    std::vector<std::string> names;
    for (const Known& runtime : known) {
        if (runtime.module != nullptr) names.emplace_back(runtime.name);
    }
    return names;
}

const RuntimeModule& runtime_called(const std::string& name) {
    for (const Known& runtime : known) {
        if (name != runtime.name) continue;
        if (runtime.module != nullptr) return loaded(runtime);
        throw Error("the file is for the runtime " + name + ", and this program was built without it",
                    std::string("build it with -D") + runtime.option + "=ON, where " + runtime.needs + " is");
    }
    throw Error("there is no runtime " + shown(name));
}

}  // namespace torchchat

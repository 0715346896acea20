// What this build says of the runtimes that it was made without.
#include "error.h"
#include "session.h"

namespace torchchat {

std::vector<std::string> backends() {
    std::vector<std::string> names;
#ifdef TORCHCHAT_AOTI
    names.emplace_back("aoti");
#endif
#ifdef TORCHCHAT_EXECUTORCH
    names.emplace_back("executorch");
#endif
    return names;
}

#ifndef TORCHCHAT_AOTI
std::shared_ptr<const Backend> load_aoti(std::shared_ptr<const Artifact> /*artifact*/, int /*threads*/) {
    throw Error("the file is for AOTInductor, and this program was built without it",
                "build it with -DTORCHCHAT_AOTI=ON, where libtorch is");
}
#endif

#ifndef TORCHCHAT_EXECUTORCH
std::shared_ptr<const Backend> load_executorch(std::shared_ptr<const Artifact> /*artifact*/, int /*threads*/) {
    throw Error("the file is for ExecuTorch, and this program was built without it",
                "build it with -DTORCHCHAT_EXECUTORCH=ON, where ExecuTorch is");
}
#endif

}  // namespace torchchat

// The runtimes, each a module beside this library that is loaded when a file first needs it: a program that only shows
// its help, or runs files of the other kind, does without libtorch, whose loading takes longer than a small model's.
#pragma once

#include <memory>
#include <string>

#include "session.h"

namespace torchchat {

// What a module shows under the name `torchchat_runtime`.
struct RuntimeModule {
    // Throws `Error` where the file is of another machine or runtime. `threads` compute; 0: as the runtime chooses.
    std::shared_ptr<const Backend> (*load)(std::shared_ptr<const Artifact> artifact, int threads);
};

// The runtime that is called so. Throws `Error` where this library was built without it, or where it cannot be loaded.
const RuntimeModule& runtime_called(const std::string& name);

}  // namespace torchchat

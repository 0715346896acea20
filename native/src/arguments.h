// The command line of torchchat-run.
#pragma once

#include <optional>
#include <stdexcept>
#include <string>

#include "torchchat/torchchat.h"

namespace torchchat {

// A command line that cannot be meant so. Exit status 2.
class UsageError : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

struct Arguments {
    std::string file;
    std::optional<std::string> prompt, system;
    bool chat = false, raw = false, json = false, help = false, version = false;
    int threads = 0;
    Options options;
};

// Throws `UsageError`, and `Error` for a number out of its range.
Arguments parsed_arguments(int count, char** values);

extern const char* const usage;

}  // namespace torchchat

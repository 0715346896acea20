// What a file of AOTInductor is made of: weights, compiled programs, and the decoder of one token.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/inductor/aoti_runner/model_container_runner_cpu.h>

#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "artifact/artifact.h"
#include "artifact/scratch_folder.h"

namespace torchchat {

using Tensors = std::vector<at::Tensor>;
using Weights = std::map<std::string, at::Tensor, std::less<>>;

inline constexpr std::int64_t largest_size = std::int64_t{1} << 40;

Error unusable(const std::string& what);
// The first line of what a library said.
std::string first_line(std::string_view text);
at::ScalarType dtype_of(const std::string& name);

// All weights by name, mapped to the file: what is not used is not read. But packed ones, of which every token reads
// all, are copied to large pages where the file's operators can do that.
Weights weights_of(const Artifact& artifact);
// Those that a list of names in the manifest says, in its order. Throws where `weights` lacks one.
Tensors named_weights(const nlohmann::json& owner, std::string_view key, const Weights& weights);

// A compiled program, with the weights that it takes behind its other inputs.
class Program {
  public:
    // `inputs` is the number of inputs before the weights. `folder` is where the library is put under `name` while it
    // is loaded. Throws where the library takes another number of inputs than it would be given.
    Program(const Artifact& artifact, const std::string& name, const nlohmann::json& declared, std::size_t inputs,
            const Weights& weights, const ScratchFolder& folder);
    // The first output.
    at::Tensor run(Tensors inputs) const;

  private:
    Tensors weights_;
    mutable std::unique_ptr<torch::inductor::AOTIModelContainerRunnerCpu> runner_;  // thread-safe, and not const
};

}  // namespace torchchat

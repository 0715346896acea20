#include "backends/aoti_parts.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/from_blob.h>
#include <sys/mman.h>
#include <unistd.h>

#include <filesystem>

#include "error.h"
#include "json.h"

namespace torchchat {
namespace {

constexpr std::size_t most_dimensions = 8;

std::vector<std::int64_t> shape_of(const nlohmann::json& declared) {
    const nlohmann::json* listed = member(declared, "shape");
    if (listed == nullptr || !listed->is_array() || listed->size() > most_dimensions) {
        throw unusable("a weight has no shape");
    }
    std::vector<std::int64_t> shape;
    for (const auto& length : *listed) shape.push_back(number({{"length", length}}, "length", 0, largest_size));
    return shape;
}

// Packed weights, of which every token reads all, on large pages, which are read faster; where the file's operators
// have that. The file's own pages are let go.
at::Tensor in_weight_memory(const at::Tensor& mapped) {
    const auto found = c10::Dispatcher::singleton().findSchema({"torchchat::in_weight_memory", ""});
    if (!found || mapped.scalar_type() != at::kByte || mapped.dim() != 1 || mapped.numel() == 0) return mapped;
    at::Tensor copied = found->typed<at::Tensor(const at::Tensor&)>().call(mapped);
    const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
    const auto begin = reinterpret_cast<std::uintptr_t>(mapped.const_data_ptr());
    const std::uintptr_t first = begin / page * page;
    madvise(reinterpret_cast<void*>(first), begin + mapped.nbytes() - first, MADV_DONTNEED);  // advice: it may fail
    return copied;
}

// Mapped to the file: what is not used is not read.
at::Tensor weight(const Artifact& artifact, const std::string& name, const nlohmann::json& declared) {
    const std::string_view data = artifact.content(text_of(declared, "entry", ""));
    const auto shape = shape_of(declared);
    const at::ScalarType dtype = dtype_of(text_of(declared, "dtype", ""));
    std::uint64_t bytes = at::elementSize(dtype);
    for (const std::int64_t length : shape) {
        if (length != 0 && bytes > static_cast<std::uint64_t>(largest_size) / static_cast<std::uint64_t>(length)) {
            throw unusable("the weight " + shown(name) + " is too large");
        }
        bytes *= static_cast<std::uint64_t>(length);
    }
    if (bytes != data.size() || reinterpret_cast<std::uintptr_t>(data.data()) % at::elementSize(dtype) != 0) {
        throw unusable("the weight " + shown(name) + " has another size than its shape");
    }
    void* const place = const_cast<char*>(data.data());  // which is never written to
    return in_weight_memory(at::from_blob(place, shape, at::TensorOptions(dtype)));
}

// The library under a name of its own: a link to the file where it is its beginning.
std::string put_library(const Artifact& artifact, const std::string& name, const std::string& entry,
                        const ScratchFolder& folder) {
    const std::string_view content = artifact.content(entry);
    if (entry != "program" || artifact.offset(entry) != 0) return folder.write(name + ".so", content);
    const auto link = folder / (name + ".so");
    std::error_code failure;
    std::filesystem::create_symlink(std::filesystem::absolute(artifact.path()), link, failure);
    return failure ? folder.write(name + ".so", content) : link.string();
}

// Returns the number of tensors that a specification of torch.utils._pytree describes.
std::size_t leaves_of(const nlohmann::json& node) {
    const nlohmann::json* type = member(node, "type");
    if (type == nullptr || type->is_null()) return 1;
    std::size_t leaves = 0;
    if (const nlohmann::json* children = member(node, "children_spec"); children != nullptr) {
        for (const auto& child : *children) leaves += leaves_of(child);
    }
    return leaves;
}

// Returns the number of inputs of a compiled program, weights included.
std::size_t inputs_of(torch::inductor::AOTIModelContainerRunner& runner) {
    const std::vector<std::string> specification = runner.get_call_spec();
    if (specification.empty()) throw unusable("its program does not describe its inputs");
    const auto versioned = nlohmann::json::parse(specification.front(), nullptr, /*allow_exceptions=*/false);
    if (!versioned.is_array() || versioned.size() != 2) throw unusable("its program does not describe its inputs");
    return leaves_of(versioned[1]);
}

}  // namespace

Error unusable(const std::string& what) {
    return Error("the file cannot be run: " + what, "export the model again, with the PyTorch that this program has");
}

std::string first_line(std::string_view text) {
    return shown(text.substr(0, text.find('\n')), 300);
}

at::ScalarType dtype_of(const std::string& name) {
    static const std::map<std::string, at::ScalarType> known = {
        {"fp32", at::kFloat}, {"bf16", at::kBFloat16}, {"fp16", at::kHalf}, {"uint8", at::kByte},
        {"int8", at::kChar},  {"int32", at::kInt},     {"int64", at::kLong}};
    const auto found = known.find(name);
    if (found == known.end()) throw unusable("it has the dtype " + shown(name));
    return found->second;
}

Weights weights_of(const Artifact& artifact) {
    Weights weights;
    const nlohmann::json* tensors = member(artifact.manifest().runtime, "tensors");
    if (tensors == nullptr || !tensors->is_object()) throw unusable("its manifest names no tensors");
    for (const auto& [name, declared] : tensors->items()) weights.emplace(name, weight(artifact, name, declared));
    return weights;
}

Tensors named_weights(const nlohmann::json& owner, std::string_view key, const Weights& weights) {
    const nlohmann::json* listed = member(owner, key);
    if (listed == nullptr || !listed->is_array()) throw unusable("a program names no weights");
    Tensors found;
    for (const auto& each : *listed) {
        const auto place = weights.find(each.is_string() ? each.get_ref<const std::string&>() : "");
        if (place == weights.end()) throw unusable("a program takes a weight that the file lacks");
        found.push_back(place->second);
    }
    return found;
}

Program::Program(const Artifact& artifact, const std::string& name, const nlohmann::json& declared, std::size_t inputs,
                 const Weights& weights, const ScratchFolder& folder)
    : weights_(named_weights(declared, "weights", weights)) {
    const std::string library = put_library(artifact, name, text_of(declared, "library", ""), folder);
    const std::string calls = text_of(declared, "calls", "");
    if (!calls.empty()) folder.write(name + ".json", artifact.content(calls));
    try {
        runner_ = std::make_unique<torch::inductor::AOTIModelContainerRunnerCpu>(library);
    } catch (const std::exception& error) {
        throw unusable("its program cannot be loaded: " + first_line(error.what()));
    }
    const std::size_t takes = inputs_of(*runner_), gets = inputs + weights_.size();
    if (takes != gets) {
        throw unusable("its program " + shown(name) + " takes " + std::to_string(takes) + " inputs, but the file has " +
                       std::to_string(weights_.size()) + " weights for it, which makes " + std::to_string(gets) +
                       " inputs");
    }
}

at::Tensor Program::run(Tensors inputs) const {
    inputs.insert(inputs.end(), weights_.begin(), weights_.end());
    try {
        Tensors outputs = runner_->run(inputs);
        if (outputs.empty()) throw unusable("its program returned nothing");
        return std::move(outputs.front());
    } catch (const Error&) {
        throw;
    } catch (const std::exception& error) {
        throw unusable("its program failed: " + first_line(error.what()));
    }
}

}  // namespace torchchat

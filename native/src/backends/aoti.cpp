// Files that AOTInductor compiled, run by libtorch. docs/artifacts.md describes their programs and inputs.
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/InferenceMode.h>
#include <dlfcn.h>
#include <sys/mman.h>
#include <torch/csrc/inductor/aoti_runner/model_container_runner_cpu.h>
#include <torch/headeronly/version.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <sstream>

#include "artifact/artifact.h"
#include "artifact/scratch_folder.h"
#include "backends/runtimes.h"
#include "error.h"
#include "json.h"

namespace torchchat {
namespace {

using Runner = torch::inductor::AOTIModelContainerRunnerCpu;
using Tensors = std::vector<at::Tensor>;

constexpr std::int64_t first_capacity = 256;  // positions of a KV cache, which doubles as the sequence grows
constexpr std::int64_t largest_size = std::int64_t{1} << 40;
constexpr std::size_t most_dimensions = 8;

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

// ---- what the file asks of the machine and of libtorch ----------------------------------------------------------

std::string release(std::string_view version) {
    const std::size_t first = version.find('.');
    return std::string(version.substr(0, version.find('.', first == version.npos ? first : first + 1)));
}

void check_machine(const Manifest& manifest, const nlohmann::json& target) {
    const std::string made = release(text_of(manifest.runtime, "torch", ""));
    if (made != release(TORCH_VERSION)) {
        throw Error("the file was compiled for PyTorch " + made + ", and this program has " TORCH_VERSION,
                    "export the model again, or build torchchat-run with PyTorch " + made);
    }
    const std::string wanted = text_of(target, "instructions", "DEFAULT"), here = at::get_cpu_capability();
    constexpr std::array order = {"DEFAULT", "AVX2", "AVX512"};  // each includes those before it
    const auto place = [&](const std::string& name) { return std::ranges::find(order, name) - order.begin(); };
    const auto count = static_cast<std::ptrdiff_t>(order.size());
    if (wanted != "DEFAULT" && (place(wanted) == count || place(here) == count || place(here) < place(wanted))) {
        throw Error("the file needs a processor with " + shown(wanted) + ", and this one has " + here,
                    "export the model on a machine like this one");
    }
}

std::optional<std::string> schema_of(const std::string& name) {
    const auto found = c10::Dispatcher::singleton().findSchema({name, ""});
    if (!found) return std::nullopt;
    std::ostringstream text;
    text << found->schema();
    return text.str();
}

// Torchchat's own operators, which come with the file.
void load_operators(const Artifact& artifact, const ScratchFolder& folder) {
    const nlohmann::json* operators = member(artifact.manifest().runtime, "operators");
    if (operators == nullptr || !operators->is_object() || operators->empty()) return;
    const bool absent =
        std::ranges::any_of(operators->items(), [](const auto& each) { return !schema_of(each.key()); });
    if (absent) {
        const std::string kernels = text_of(artifact.manifest().runtime, "kernels", "");
        const std::string library = folder.write("kernels.so", artifact.content(kernels));
        // Never closed: what it registers is called until the program ends.
        if (dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL) == nullptr) {
            throw unusable("its operators cannot be loaded: " + first_line(dlerror()));
        }
    }
    for (const auto& [name, schema] : operators->items()) {
        if (!schema.is_string() || schema_of(name) != schema.get_ref<const std::string&>()) {
            throw unusable("it calls the operator " + shown(name) + ", which is not there or another one");
        }
    }
}

// ---- weights and programs ---------------------------------------------------------------------------------------

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

std::map<std::string, at::Tensor> weights_of(const Artifact& artifact) {
    std::map<std::string, at::Tensor> weights;
    const nlohmann::json* tensors = member(artifact.manifest().runtime, "tensors");
    if (tensors == nullptr || !tensors->is_object()) throw unusable("its manifest names no tensors");
    for (const auto& [name, declared] : tensors->items()) weights.emplace(name, weight(artifact, name, declared));
    return weights;
}

// A compiled program, with the weights that it takes behind its other inputs.
class Program {
  public:
    Program(const Artifact& artifact, const std::string& name, const nlohmann::json& declared,
            const std::map<std::string, at::Tensor>& weights, const ScratchFolder& folder) {
        const nlohmann::json* listed = member(declared, "weights");
        if (listed == nullptr || !listed->is_array()) throw unusable("a program names no weights");
        for (const auto& each : *listed) {
            const auto found = weights.find(each.is_string() ? each.get<std::string>() : "");
            if (found == weights.end()) throw unusable("a program takes a weight that the file lacks");
            weights_.push_back(found->second);
        }
        const std::string library = put_library(artifact, name, text_of(declared, "library", ""), folder);
        const std::string calls = text_of(declared, "calls", "");
        if (!calls.empty()) folder.write(name + ".json", artifact.content(calls));
        try {
            runner_ = std::make_unique<Runner>(library);
        } catch (const std::exception& error) {
            throw unusable("its program cannot be loaded: " + first_line(error.what()));
        }
    }

    at::Tensor run(Tensors inputs) const {
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

  private:
    // The library under a name of its own: a link to the file where it is its beginning.
    static std::string put_library(const Artifact& artifact, const std::string& name, const std::string& entry,
                                   const ScratchFolder& folder) {
        const std::string_view content = artifact.content(entry);
        if (entry != "program" || artifact.offset(entry) != 0) return folder.write(name + ".so", content);
        const auto link = folder / (name + ".so");
        std::error_code failure;
        std::filesystem::create_symlink(std::filesystem::absolute(artifact.path()), link, failure);
        return failure ? folder.write(name + ".so", content) : link.string();
    }

    Tensors weights_;
    mutable std::unique_ptr<Runner> runner_;  // whose `run` is thread-safe, and not const
};

// ---- sessions ---------------------------------------------------------------------------------------------------

class AotiBackend final : public Backend, public std::enable_shared_from_this<AotiBackend> {
  public:
    explicit AotiBackend(std::shared_ptr<const Artifact> artifact) : artifact_(std::move(artifact)) {
        const Manifest& manifest = artifact_->manifest();
        const nlohmann::json& runtime = manifest.runtime;
        check_machine(manifest, manifest.target);
        const nlohmann::json* cache = member(runtime, "cache");
        if (cache == nullptr) throw unusable("its manifest describes no KV cache");
        layers = number(*cache, "layers", 1, 100'000);
        kv_heads = number(*cache, "kv_heads", 1, 100'000);
        head_dim = number(*cache, "head_dim", 1, 100'000);
        dtype = dtype_of(manifest.dtype);
        vocab_size = manifest.vocab_size;
        const nlohmann::json* original = member(runtime, "original_context");
        if (original != nullptr && !original->is_null()) {
            original_context = number(runtime, "original_context", 1, largest_size);
        }
        const ScratchFolder folder;  // libraries are loaded by path, and stay when their files are gone
        load_operators(*artifact_, folder);
        const auto weights = weights_of(*artifact_);
        const nlohmann::json* programs = member(runtime, "programs");
        const nlohmann::json* any = programs == nullptr ? nullptr : member(*programs, "any");
        if (any == nullptr) throw unusable("it has no program for several tokens");
        several = std::make_unique<Program>(*artifact_, "any", *any, weights, folder);
        const nlohmann::json* decode = member(*programs, "decode");
        if (decode != nullptr) single = std::make_unique<Program>(*artifact_, "decode", *decode, weights, folder);
    }

    std::unique_ptr<Session> session(std::int64_t limit) const override;
    std::optional<std::int64_t> short_limit() const override { return original_context; }

    std::int64_t layers = 0, kv_heads = 0, head_dim = 0, vocab_size = 0;
    at::ScalarType dtype = at::kFloat;
    std::optional<std::int64_t> original_context;  // that longrope models were trained with
    std::unique_ptr<Program> several, single;      // for any number of tokens; for one, faster, where there is one

  private:
    std::shared_ptr<const Artifact> artifact_;  // which the weights are mapped to
};

class AotiSession final : public Session {
  public:
    AotiSession(std::shared_ptr<const AotiBackend> backend, std::int64_t limit)
        : backend_(std::move(backend)),
          limit_(limit),
          extended_(backend_->original_context && limit > *backend_->original_context) {}

    std::span<const float> append(std::span<const Token> tokens) override {
        const auto count = static_cast<std::int64_t>(tokens.size());
        if (count == 0 || count > limit_ - length_) {
            throw Error("the sequence would have " + std::to_string(length_ + count) + " tokens; its limit is " +
                        std::to_string(limit_));
        }
        const c10::InferenceMode inference;
        make_room(length_ + count);
        at::Tensor ids = at::empty({count}, at::kLong), place = at::empty({2}, at::kLong);
        std::ranges::copy(tokens, ids.mutable_data_ptr<std::int64_t>());
        place.mutable_data_ptr<std::int64_t>()[0] = length_;
        place.mutable_data_ptr<std::int64_t>()[1] = extended_ ? 1 : 0;
        Tensors inputs = {ids, place};
        const bool alone = count == 1 && backend_->single;
        if (!alone) {
            inputs.push_back(at::empty({1}, at::kLong));  // rows whose logits are wanted
            inputs.back().mutable_data_ptr<std::int64_t>()[0] = count - 1;
        }
        inputs.insert(inputs.end(), keys_.begin(), keys_.end());
        inputs.insert(inputs.end(), values_.begin(), values_.end());
        logits_ = (alone ? backend_->single : backend_->several)->run(std::move(inputs)).contiguous();
        if (logits_.scalar_type() != at::kFloat || logits_.numel() != backend_->vocab_size) {
            throw unusable("its program returned no logits");
        }
        length_ += count;
        return {logits_.const_data_ptr<float>(), static_cast<std::size_t>(backend_->vocab_size)};
    }

    void truncate(std::int64_t length) override { length_ = std::clamp<std::int64_t>(length, 0, length_); }
    std::int64_t length() const override { return length_; }
    std::int64_t limit() const override { return limit_; }

  private:
    void make_room(std::int64_t needed) {
        if (needed <= capacity_) return;
        std::int64_t capacity = std::max(first_capacity, capacity_);
        while (capacity < needed) capacity *= 2;
        capacity = std::min(capacity, limit_);
        for (Tensors* held : {&keys_, &values_}) {
            held->resize(static_cast<std::size_t>(backend_->layers));
            for (at::Tensor& each : *held) {
                at::Tensor larger = at::empty({backend_->kv_heads, capacity, backend_->head_dim}, backend_->dtype);
                if (length_ > 0) larger.narrow(1, 0, length_).copy_(each.narrow(1, 0, length_));
                each = larger;
            }
        }
        capacity_ = capacity;
    }

    std::shared_ptr<const AotiBackend> backend_;
    std::int64_t limit_, length_ = 0, capacity_ = 0;
    bool extended_;
    Tensors keys_, values_;  // of each layer [kv_heads, capacity, head_dim]
    at::Tensor logits_;
};

std::unique_ptr<Session> AotiBackend::session(std::int64_t limit) const {
    return std::make_unique<AotiSession>(shared_from_this(), limit);
}

std::shared_ptr<const Backend> load(std::shared_ptr<const Artifact> artifact, int threads) {
    if (threads > 0) at::set_num_threads(threads);
    try {
        return std::make_shared<const AotiBackend>(std::move(artifact));
    } catch (const c10::Error& error) {
        throw unusable(first_line(error.what_without_backtrace()));
    }
}

}  // namespace
}  // namespace torchchat

extern "C" const torchchat::RuntimeModule torchchat_runtime = {torchchat::load};

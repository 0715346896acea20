// Files that AOTInductor compiled, run by libtorch. docs/artifacts.md describes their programs and inputs.
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>
#include <dlfcn.h>
#include <torch/headeronly/version.h>

#include <algorithm>
#include <array>
#include <mutex>
#include <sstream>

#include "artifact/scratch_folder.h"
#include "backends/aoti_parts.h"
#include "backends/runtimes.h"
#include "backends/token_decoder.h"
#include "error.h"
#include "json.h"

namespace torchchat {
namespace {

constexpr std::int64_t first_capacity = 256;  // positions of a KV cache, which doubles as the sequence grows

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

// Torchchat's own operators, which come with the file. A process has them once: a second file takes those of the first.
void load_operators(const Artifact& artifact, const ScratchFolder& folder) {
    static std::mutex lock;
    static std::optional<std::int64_t> loaded;  // their version
    const nlohmann::json* operators = member(artifact.manifest().runtime, "operators");
    if (operators == nullptr || !operators->is_object() || operators->empty()) return;
    const std::lock_guard guard(lock);
    const std::int64_t version = number(artifact.manifest().runtime, "interface", 1, largest_size);
    if (loaded && *loaded != version) {
        throw Error("the file calls version " + std::to_string(version) +
                        " of torchchat's operators, and a file with " + std::to_string(*loaded) + " was loaded before",
                    "export both with one torchchat, or run them in two processes");
    }
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
    loaded = version;
}

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
        const auto cache_tensors = static_cast<std::size_t>(2 * layers);
        // The tokens, the length, and the rows whose logits are wanted; a program for one token has one row.
        several = std::make_unique<Program>(*artifact_, "any", *any, 3 + cache_tensors, weights, folder);
        const nlohmann::json* described = member(runtime, "decoder");
        const nlohmann::json* decode = member(*programs, "decode");
        if (described != nullptr && member(*described, "hidden_size") != nullptr) {
            decoder = std::make_unique<TokenDecoder>(*described, manifest, weights);
        } else if (decode != nullptr) {
            single = std::make_unique<Program>(*artifact_, "decode", *decode, 2 + cache_tensors, weights, folder);
        }
    }

    std::unique_ptr<Session> session(std::int64_t limit) const override;
    std::optional<std::int64_t> short_limit() const override { return original_context; }

    std::int64_t layers = 0, kv_heads = 0, head_dim = 0, vocab_size = 0;
    at::ScalarType dtype = at::kFloat;
    std::optional<std::int64_t> original_context;  // that longrope models were trained with
    std::unique_ptr<Program> several;              // for any number of tokens
    std::unique_ptr<TokenDecoder> decoder;         // for one, several times as fast; where the file has no parts of it,
    std::unique_ptr<Program> single;               // its program for one, if any

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
        logits_ = count == 1 && backend_->decoder
                      ? backend_->decoder->logits(tokens.front(), length_, extended_, keys_, values_)
                      : by_program(tokens);
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
    at::Tensor by_program(std::span<const Token> tokens) const {
        const auto count = static_cast<std::int64_t>(tokens.size());
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
        return (alone ? backend_->single : backend_->several)->run(std::move(inputs)).contiguous();
    }

    void make_room(std::int64_t needed) {
        if (needed <= capacity_) return;
        std::int64_t capacity = std::max(first_capacity, capacity_);
        while (capacity < needed) capacity *= 2;
        capacity = std::min(capacity, limit_);
        try {
            grow(capacity);
        } catch (const c10::Error& error) {
            throw Error("the KV cache cannot have room for " + std::to_string(capacity) +
                            " tokens: " + first_line(error.what_without_backtrace()),
                        "free memory, or export the model again with a smaller --max-seq-length");
        }
    }

    void grow(std::int64_t capacity) {
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

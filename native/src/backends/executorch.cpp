// Files of ExecuTorch. docs/artifacts.md describes their methods and inputs.
#include <executorch/extension/threadpool/threadpool.h>
#include <executorch/runtime/core/data_loader.h>
#include <executorch/runtime/executor/method.h>
#include <executorch/runtime/executor/program.h>
#include <executorch/runtime/platform/platform.h>
#include <executorch/runtime/platform/runtime.h>

#include <algorithm>
#include <array>
#include <cstdlib>

#include "artifact/artifact.h"
#include "backends/product_threads.h"
#include "backends/runtimes.h"
#include "error.h"

namespace {

thread_local std::string last_message;  // of the errors that ExecuTorch writes, the first, which says most

}  // namespace

// ExecuTorch's own writes to standard error. It is weak, so that programs can replace it.
extern "C" void et_pal_emit_log_message(et_timestamp_t, et_pal_log_level_t level, const char*, const char*, std::size_t,
                                        const char* message, std::size_t length) {
    const bool is_error = level == kError || level == kFatal;
    if (is_error && last_message.empty()) last_message.assign(message, length);
}

namespace torchchat {
namespace {

namespace et = executorch::runtime;
using et::MemoryAllocator;
using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::aten::TensorImpl;

constexpr const char* method_name = "forward";
constexpr std::size_t largest_buffer = std::size_t{1} << 40;  // bytes

Error unusable(const std::string& what, et::Error code) {
    const std::string reason = last_message.empty() ? "code " + std::to_string(static_cast<int>(code)) : last_message;
    return Error("the file cannot be run: " + what + ": " + shown(reason, 200),
                 "export the model again, with the ExecuTorch that this program has");
}

// The pool is the whole process's. Its function is marked as experimental, and is the only one that makes it larger.
void set_threads(int threads) {
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
    auto* pool = executorch::extension::threadpool::get_threadpool();
    if (pool != nullptr) pool->_unsafe_reset_threadpool(static_cast<std::uint32_t>(threads));
#pragma GCC diagnostic pop
}

// ---- memory -----------------------------------------------------------------------------------------------------

// The program's bytes where they are mapped, without a copy.
class MappedLoader final : public et::DataLoader {
  public:
    explicit MappedLoader(std::string_view bytes) : bytes_(bytes) {}

    et::Result<et::FreeableBuffer> load(std::size_t offset, std::size_t size, const SegmentInfo&) const override {
        if (offset > bytes_.size() || size > bytes_.size() - offset) return et::Error::InvalidArgument;
        return et::FreeableBuffer(bytes_.data() + offset, size, nullptr);
    }
    et::Result<std::size_t> size() const override { return bytes_.size(); }
    et::Error load_into(std::size_t offset, std::size_t size, const SegmentInfo&, void* buffer) const override {
        if (offset > bytes_.size() || size > bytes_.size() - offset) return et::Error::InvalidArgument;
        std::copy_n(bytes_.data() + offset, size, static_cast<char*>(buffer));
        return et::Error::Ok;
    }

  private:
    std::string_view bytes_;
};

// Memory in pieces as they are asked for, given back together.
class PieceAllocator final : public MemoryAllocator {
  public:
    PieceAllocator() : MemoryAllocator(0, nullptr) {}

    void* allocate(std::size_t size, std::size_t alignment) override {
        if (size > largest_buffer || alignment > 4096) return nullptr;
        auto piece = std::make_unique_for_overwrite<std::uint8_t[]>(size + alignment);  // no zeros: each step asks anew
        void* place = piece.get();
        std::size_t room = size + alignment;
        place = std::align(alignment, size, place, room);
        pieces_.push_back(std::move(piece));
        return place;
    }
    void reset() override { pieces_.clear(); }

  private:
    std::vector<std::unique_ptr<std::uint8_t[]>> pieces_;
};

struct Free {
    void operator()(std::uint8_t* memory) const { std::free(memory); }
};

// ---- sessions ---------------------------------------------------------------------------------------------------

class ExecutorchBackend final : public Backend, public std::enable_shared_from_this<ExecutorchBackend> {
  public:
    explicit ExecutorchBackend(std::shared_ptr<const Artifact> artifact)
        : artifact_(std::move(artifact)), loader_(artifact_->content("program")), program_(loaded(loader_)) {
        const auto meta = program_->method_meta(method_name);
        if (!meta.ok()) throw unusable("it has no method 'forward'", meta.error());
        check(*meta);
    }

    std::unique_ptr<Session> session(std::int64_t limit) const override;

    const et::Program& program() const { return *program_; }
    std::int64_t vocab_size() const { return artifact_->manifest().vocab_size; }
    std::int64_t step() const { return step_; }

  private:
    static et::Result<et::Program> loaded(MappedLoader& loader) {
        auto program = et::Program::load(&loader, et::Program::Verification::InternalConsistency);
        if (!program.ok()) throw unusable("it is no program that ExecuTorch can load", program.error());
        return program;
    }

    // Tokens [1, n] and their position [1] in; logits [1, vocab] out.
    void check(const et::MethodMeta& meta) {
        const auto tokens = meta.input_tensor_meta(0), position = meta.input_tensor_meta(1);
        const auto logits = meta.output_tensor_meta(0);
        const bool fits = meta.num_inputs() == 2 && meta.num_outputs() == 1 && tokens.ok() && position.ok() &&
                          logits.ok() && tokens->sizes().size() == 2 && tokens->sizes()[0] == 1 &&
                          tokens->sizes()[1] > 0 && tokens->scalar_type() == ScalarType::Long &&
                          position->sizes().size() == 1 && position->sizes()[0] == 1 &&
                          logits->scalar_type() == ScalarType::Float && logits->sizes().size() == 2 &&
                          logits->sizes()[1] == vocab_size();
        if (!fits) throw unusable("its method takes and gives other things than the manifest says", et::Error::Ok);
        step_ = tokens->sizes()[1];
    }

    std::shared_ptr<const Artifact> artifact_;
    MappedLoader loader_;
    et::Result<et::Program> program_;
    std::int64_t step_ = 0;  // tokens that one call takes
};

// A method of its own, which holds the KV cache.
class ExecutorchSession final : public Session {
  public:
    ExecutorchSession(std::shared_ptr<const ExecutorchBackend> backend, std::int64_t limit)
        : backend_(std::move(backend)),
          limit_(limit),
          planned_(planned_memory()),
          manager_(&allocator_, &planned_, &temporary_),
          method_(loaded()) {}

    std::span<const float> append(std::span<const Token> tokens) override {
        const auto count = static_cast<std::int64_t>(tokens.size());
        if (count == 0 || count > limit_ - length_) {
            throw Error("the sequence would have " + std::to_string(length_ + count) + " tokens; its limit is " +
                        std::to_string(limit_));
        }
        const std::int64_t before = length_;
        try {
            for (std::int64_t done = 0; done < count;) {
                const auto size = static_cast<std::size_t>(std::min(backend_->step(), count - done));
                run(tokens.subspan(static_cast<std::size_t>(done), size));
                done += static_cast<std::int64_t>(size);
            }
        } catch (...) {
            length_ = before;
            throw;
        }
        return logits();
    }

    void truncate(std::int64_t length) override { length_ = std::clamp<std::int64_t>(length, 0, length_); }
    std::int64_t length() const override { return length_; }
    std::int64_t limit() const override { return limit_; }

  private:
    et::HierarchicalAllocator planned_memory() {
        const auto meta = backend_->program().method_meta(method_name);
        if (!meta.ok()) throw unusable("it has no method 'forward'", meta.error());
        for (std::size_t index = 0; index < meta->num_memory_planned_buffers(); ++index) {
            const auto size = meta->memory_planned_buffer_size(index);
            if (!size.ok() || *size < 0 || static_cast<std::size_t>(*size) > largest_buffer) {
                throw unusable("it needs an impossible amount of memory", size.error());
            }
            const auto bytes = static_cast<std::size_t>(*size);
            buffers_.emplace_back(static_cast<std::uint8_t*>(std::calloc(std::max<std::size_t>(bytes, 1), 1)));
            if (!buffers_.back()) throw std::bad_alloc();
            spans_.emplace_back(buffers_.back().get(), bytes);
        }
        return et::HierarchicalAllocator({spans_.data(), spans_.size()});
    }

    et::Result<et::Method> loaded() {
        last_message.clear();
        auto method = backend_->program().load_method(method_name, &manager_);
        if (!method.ok()) throw unusable("its method cannot be loaded", method.error());
        return method;
    }

    void run(std::span<const Token> tokens) {
        std::vector<std::int64_t> ids(tokens.begin(), tokens.end());
        std::array<std::int64_t, 1> position = {length_};
        std::array<SizesType, 2> ids_size = {1, static_cast<SizesType>(ids.size())};
        std::array<SizesType, 1> position_size = {1};
        std::array<TensorImpl::DimOrderType, 2> order = {0, 1};
        TensorImpl ids_tensor(ScalarType::Long, 2, ids_size.data(), ids.data(), order.data());
        TensorImpl position_tensor(ScalarType::Long, 1, position_size.data(), position.data(), order.data());
        last_message.clear();
        et::Error code = method_->set_input(executorch::aten::Tensor(&ids_tensor), 0);
        if (code == et::Error::Ok) code = method_->set_input(executorch::aten::Tensor(&position_tensor), 1);
        const SerialProducts serial;
        if (code == et::Error::Ok) code = method_->execute();
        temporary_.reset();
        if (code != et::Error::Ok) throw unusable("ExecuTorch stopped", code);
        length_ += static_cast<std::int64_t>(ids.size());
    }

    // Of the last position.
    std::span<const float> logits() const {
        const auto& tensor = method_->get_output(0).toTensor();
        const auto vocab = static_cast<std::size_t>(backend_->vocab_size());
        const auto size = static_cast<std::size_t>(tensor.numel());
        if (size < vocab) throw unusable("its method returned no logits", et::Error::Ok);
        return {tensor.const_data_ptr<float>() + (size - vocab), vocab};
    }

    std::shared_ptr<const ExecutorchBackend> backend_;
    std::int64_t limit_, length_ = 0;
    // Zeros, which the system gives without writing them: a KV cache that is not filled takes no memory.
    std::vector<std::unique_ptr<std::uint8_t, Free>> buffers_;
    std::vector<et::Span<std::uint8_t>> spans_;
    PieceAllocator allocator_, temporary_;
    et::HierarchicalAllocator planned_;
    et::MemoryManager manager_;
    et::Result<et::Method> method_;
};

std::unique_ptr<Session> ExecutorchBackend::session(std::int64_t limit) const {
    return std::make_unique<ExecutorchSession>(shared_from_this(), limit);
}

std::shared_ptr<const Backend> load(std::shared_ptr<const Artifact> artifact, int threads) {
    et::runtime_init();
    last_message.clear();
    if (threads > 0) set_threads(threads);
    make_pool_products_serial();
    return std::make_shared<const ExecutorchBackend>(std::move(artifact));
}

}  // namespace
}  // namespace torchchat

extern "C" const torchchat::RuntimeModule torchchat_runtime = {torchchat::load};

// The public interface over the layers below.
#include <algorithm>
#include <future>

#include "artifact/artifact.h"
#include "backends/runtimes.h"
#include "conversation.h"
#include "error.h"
#include "generation.h"
#include "sampler.h"

namespace torchchat {

struct LoadedFile {
    std::shared_ptr<const Artifact> artifact;
    TextFormat format;
    std::string backend_name;
    std::shared_ptr<const Backend> backend;

    const Manifest& manifest() const { return artifact->manifest(); }
    Options complete(const Options& chosen) const {
        Options options = chosen;
        options.sampling = merged(chosen.sampling, manifest().sampling);
        return options;
    }
};

struct Chat::State {
    std::shared_ptr<const LoadedFile> file;
    Conversation conversation;
};

struct Text::State {
    std::shared_ptr<const LoadedFile> file;
    TokenSequence sequence;

    // Another sequence, where this one is not of the limit that a prompt and an answer of so many tokens need.
    void make_room(std::int64_t prompt, const std::optional<std::int64_t>& answer) {
        const std::int64_t longest = file->manifest().max_seq_length;
        const std::int64_t limit = std::min(file->backend->short_limit().value_or(longest), longest);
        const bool fits = prompt < limit && answer.value_or(longest) <= limit - prompt;
        if (const std::int64_t wanted = fits ? limit : longest; wanted != sequence.limit()) {
            sequence = TokenSequence(file->backend->session(wanted));
        }
    }
};

namespace {

TextFormat text_format(const Artifact& artifact) {
    const Manifest& manifest = artifact.manifest();
    auto tokenizer = read_tokenizer(artifact.tokenizer_files());
    for (auto token = static_cast<Token>(manifest.vocab_size); token < tokenizer->vocab_size; ++token) {
        if (tokenizer->is_control(token)) continue;  // a padding token that was added later does no harm
        throw Error("the tokenizer has " + std::to_string(tokenizer->vocab_size) + " tokens, the model only " +
                        std::to_string(manifest.vocab_size),
                    "the tokenizer is another model's: export the model again with the right one");
    }
    std::optional<ChatTemplate> chat_template;
    if (!manifest.chat_pieces.is_null()) chat_template = ChatTemplate(manifest.chat_pieces);
    return make_text_format(std::move(tokenizer), std::move(chat_template), manifest.end_ids, manifest.bos_id,
                            manifest.adds_bos);
}

std::string backend_of(const std::string& kind) {
    if (kind == "aoti-package" || kind == "aoti-dso") return "aoti";
    if (kind == "executorch") return "executorch";
    throw Error("the file is of the kind " + shown(kind) + ", which this program does not run",
                "use a newer torchchat-run");
}

}  // namespace

Model::Model(std::shared_ptr<const LoadedFile> file) : file_(std::move(file)) {}

Model Model::load(const std::string& path, const LoadOptions& options) {
    if (options.threads < 0 || options.threads > 4096) {
        throw Error("threads is " + std::to_string(options.threads) + "; it has to be from 1 to 4096, or 0");
    }
    auto file = std::make_shared<LoadedFile>();
    file->artifact = std::make_shared<const Artifact>(path);
    file->backend_name = backend_of(file->manifest().kind);
    // The runtime's libraries are loaded while the file's digests are computed and its tokenizer is read.
    auto runtime = std::async(std::launch::async, runtime_called, file->backend_name);
    file->format = text_format(*file->artifact);
    file->artifact->check();
    file->backend = runtime.get().load(file->artifact, options.threads);
    return Model(std::move(file));
}

const std::string& Model::name() const {
    return file_->manifest().model;
}
const std::string& Model::backend() const {
    return file_->backend_name;
}
const std::string& Model::dtype() const {
    return file_->manifest().dtype;
}
bool Model::has_chat_template() const {
    return file_->format.chat_template.has_value();
}
std::int64_t Model::max_context() const {
    return file_->manifest().max_seq_length;
}

Chat Model::chat() const {
    TokenSequence sequence(file_->backend->session(max_context()));
    return Chat(std::make_unique<Chat::State>(Chat::State{file_, Conversation(std::move(sequence), file_->format)}));
}

Text Model::text() const {
    return Text(
        std::make_unique<Text::State>(Text::State{file_, TokenSequence(file_->backend->session(max_context()))}));
}

Chat::Chat(std::unique_ptr<State> state) : state_(std::move(state)) {}
Chat::Chat(Chat&&) noexcept = default;
Chat& Chat::operator=(Chat&&) noexcept = default;
Chat::~Chat() = default;

Answer Chat::ask(std::string_view message, const Options& options, const OnText& on_text, const Cancelled& cancelled) {
    return state_->conversation.ask(message, state_->file->complete(options), on_text, cancelled);
}

void Chat::set_system(std::string_view text) {
    state_->conversation.set_system(text);
}
void Chat::reset() {
    state_->conversation.reset();
}
void Chat::on_notice(std::function<void(std::string_view)> notice) {
    state_->conversation.notice = std::move(notice);
}

Text::Text(std::unique_ptr<State> state) : state_(std::move(state)) {}
Text::Text(Text&&) noexcept = default;
Text& Text::operator=(Text&&) noexcept = default;
Text::~Text() = default;

Answer Text::complete(std::string_view prompt, const Options& options, const OnText& on_text,
                      const Cancelled& cancelled) {
    const TextFormat& format = state_->file->format;
    const std::vector<Token> ids = format.encode_plain(prompt, true);
    const Task task = {.prompt = ids, .at_start = prompt.empty()};
    state_->make_room(static_cast<std::int64_t>(ids.size()), options.max_new_tokens);
    return generate(state_->sequence, *format.tokenizer, format.end_ids, task, state_->file->complete(options), on_text,
                    cancelled);
}

}  // namespace torchchat

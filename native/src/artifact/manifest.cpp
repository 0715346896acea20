#include <algorithm>

#include "artifact/artifact.h"
#include "error.h"
#include "json.h"
#include "sampler.h"
#include "text/utf8.h"

namespace torchchat {
namespace {

constexpr std::int64_t largest = std::int64_t{1} << 60;
constexpr std::int64_t longest_sequence = std::int64_t{1} << 31;
constexpr std::int64_t largest_vocabulary = 10'000'000;
constexpr std::size_t longest_text = 1 << 20, longest_name = 150, most_tokenizer_files = 16, most_names = 1 << 17;

Error malformed(const std::string& what) {
    return Error("the file's manifest is malformed: " + what, "copy or export the model again");
}

const nlohmann::json& object_of(const nlohmann::json& content, std::string_view key) {
    const nlohmann::json* found = member(content, key);
    if (found == nullptr || !found->is_object()) throw malformed(shown(key) + " is no object");
    return *found;
}

std::string required_text(const nlohmann::json& content, std::string_view key) {
    const nlohmann::json* found = member(content, key);
    if (found == nullptr || !found->is_string()) throw malformed(shown(key) + " is no text");
    const auto& text = found->get_ref<const std::string&>();
    if (text.size() > longest_text) throw malformed(shown(key) + " has " + std::to_string(text.size()) + " bytes");
    return text;
}

std::string one_of(const nlohmann::json& content, std::string_view key, std::initializer_list<std::string_view> known) {
    std::string text = required_text(content, key);
    if (std::ranges::find(known, text) != known.end()) return text;
    throw malformed(shown(key) + " is " + shown(text) + ", which is not known");
}

std::optional<std::string> optional_text(const nlohmann::json& content, std::string_view key) {
    const nlohmann::json* found = member(content, key);
    if (found == nullptr || found->is_null()) return std::nullopt;
    return required_text(content, key);
}

bool is_digest(std::string_view text) {
    return text.size() == 64 && text.find_first_not_of("0123456789abcdef") == text.npos;
}

void read_digests(const nlohmann::json& content, Manifest& manifest) {
    for (const auto& [name, value] : object_of(content, "digests").items()) {
        if (!value.is_string() || !is_digest(value.get_ref<const std::string&>())) {
            throw malformed("the digest of " + shown(name) + " is none");
        }
        manifest.digests.emplace(name, value.get<std::string>());
    }
    if (!manifest.digests.contains("program")) throw malformed("there is no digest of the program");
    if (manifest.digests.size() > most_names) {
        throw malformed("it has " + std::to_string(manifest.digests.size()) + " digests");
    }
}

// A name that a file can have on every system, and that no system hides.
bool is_file_name(std::string_view name) {
    constexpr std::string_view forbidden = "/\\<>:\"|?*";
    const auto plain = [](char letter) { return static_cast<unsigned char>(letter) >= 0x20; };
    return !name.empty() && name.front() != '.' && characters(name).size() <= longest_name &&
           std::ranges::all_of(name, plain) && name.find_first_of(forbidden) == name.npos;
}

void read_tokenizer_files(const nlohmann::json& tokenizer, Manifest& manifest) {
    const nlohmann::json* files = member(tokenizer, "files");
    if (files == nullptr || !files->is_array()) throw malformed("it names no files of the tokenizer");
    for (const auto& file : *files) {
        const std::string name = file.is_string() ? file.get<std::string>() : "";
        if (!name.starts_with(tokenizer_folder) ||
            !is_file_name(std::string_view(name).substr(tokenizer_folder.size()))) {
            throw malformed("it names " + shown(name) + ", which is no file of a tokenizer");
        }
        manifest.tokenizer_files.push_back(name);
    }
    const std::set<std::string> different(manifest.tokenizer_files.begin(), manifest.tokenizer_files.end());
    if (files->size() > most_tokenizer_files || different.size() < files->size()) {
        throw malformed("it names " + std::to_string(files->size()) + " files of the tokenizer; " +
                        std::to_string(most_tokenizer_files) + " different ones are the most");
    }
}

void read_tokens(const nlohmann::json& content, Manifest& manifest) {
    const nlohmann::json* bos = member(content, "bos_id");
    if (bos != nullptr && !bos->is_null()) {
        manifest.bos_id = static_cast<Token>(number(content, "bos_id", 0, manifest.vocab_size - 1));
    }
    const nlohmann::json* adds = member(content, "adds_bos");
    if (adds == nullptr || !adds->is_boolean()) throw malformed("\"adds_bos\" is not true or false");
    manifest.adds_bos = adds->get<bool>() && manifest.bos_id.has_value();
    const nlohmann::json* ends = member(content, "end_ids");
    if (ends == nullptr || !ends->is_array()) throw malformed("\"end_ids\" is no list");
    for (const auto& end : *ends) {
        manifest.end_ids.insert(static_cast<Token>(number({{"end_ids", end}}, "end_ids", 0, manifest.vocab_size - 1)));
    }
}

const std::set<std::string, std::less<>> sampling_names = {"temperature", "top_p", "top_k", "min_p",
                                                           "repetition_penalty"};

std::optional<double> recommended(const nlohmann::json& sampling, std::string_view key) {
    const nlohmann::json* value = member(sampling, key);
    if (value == nullptr) return std::nullopt;
    if (!value->is_number()) throw malformed("the sampling has a " + shown(key) + " that is no number");
    return value->get<double>();
}

void read_sampling(const nlohmann::json& content, Manifest& manifest) {
    const nlohmann::json& sampling = object_of(content, "sampling");
    for (const auto& [name, value] : sampling.items()) {
        if (!sampling_names.contains(name))
            throw malformed("the sampling names " + shown(name) + ", which is no option");
    }
    SamplingOptions& found = manifest.sampling;
    found.temperature = recommended(sampling, "temperature");
    found.top_p = recommended(sampling, "top_p");
    found.min_p = recommended(sampling, "min_p");
    found.repetition_penalty = recommended(sampling, "repetition_penalty");
    if (sampling.contains("top_k")) found.top_k = number(sampling, "top_k", 0, largest);
    check_sampling(found);
}

void check_format(const nlohmann::json& content) {
    if (text_of(content, "format", "") != "torchchat") throw malformed("it is not torchchat's");
    const std::int64_t version = number(content, "format_version", 0, largest);
    if (version != 1) {
        throw Error("the file is of format version " + std::to_string(version) + "; this program reads version 1",
                    "use a newer torchchat-run, or export the model again");
    }
}

}  // namespace

Manifest parsed_manifest(std::string_view text) {
    const nlohmann::json content = json_object(text, "the file's manifest");
    check_format(content);
    Manifest manifest;
    manifest.kind = required_text(content, "kind");
    manifest.model = required_text(content, "model");
    manifest.dtype = one_of(content, "dtype", {"fp32", "bf16", "fp16"});
    const nlohmann::json& config = object_of(content, "config");
    const std::int64_t longest = number(config, "max_context", 1, longest_sequence);
    manifest.max_seq_length = number(content, "max_seq_length", 1, longest);
    manifest.vocab_size = number(content, "vocab_size", 1, largest_vocabulary);
    if (number(config, "vocab_size", 1, largest_vocabulary) != manifest.vocab_size) {
        throw malformed("\"vocab_size\" is not that of its config");
    }
    const nlohmann::json& target = object_of(content, "target");
    manifest.device = one_of(target, "device", {"cpu", "cuda", "mps"});
    manifest.system = optional_text(target, "system");
    manifest.machine = optional_text(target, "machine");
    const nlohmann::json& program = object_of(content, "program");
    manifest.program = optional_text(program, "entry");
    manifest.program_bytes = static_cast<std::uint64_t>(number(program, "bytes", 0, largest));
    read_digests(content, manifest);
    manifest.runtime = object_of(content, "runtime");
    manifest.target = target;
    const nlohmann::json* tokenizer = member(content, "tokenizer");
    if (tokenizer == nullptr || tokenizer->is_null()) {
        throw Error("the file holds no tokenizer", "export the model again, with a tokenizer");
    }
    read_tokenizer_files(*tokenizer, manifest);
    read_tokens(content, manifest);
    read_sampling(content, manifest);
    const nlohmann::json* pieces = member(content, "chat_pieces");
    if (pieces != nullptr) manifest.chat_pieces = *pieces;
    if (optional_text(content, "chat_template") && manifest.chat_pieces.is_null()) {
        throw Error("the file has a chat template without the pieces that this program reads of it",
                    "export the model again with this version of torchchat");
    }
    return manifest;
}

}  // namespace torchchat

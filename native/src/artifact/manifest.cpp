#include <algorithm>
#include <cmath>

#include "artifact/artifact.h"
#include "error.h"
#include "json.h"
#include "sampler.h"

namespace torchchat {
namespace {

constexpr std::int64_t largest = std::int64_t{1} << 60;
constexpr std::int64_t longest_sequence = std::int64_t{1} << 31;
constexpr std::int64_t largest_vocabulary = 10'000'000;

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
    return found->get<std::string>();
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
}

void read_tokens(const nlohmann::json& content, Manifest& manifest) {
    const nlohmann::json* bos = member(content, "bos_id");
    if (bos != nullptr && !bos->is_null()) {
        manifest.bos_id = static_cast<Token>(number(content, "bos_id", 0, manifest.vocab_size - 1));
    }
    manifest.adds_bos = flag(content, "adds_bos", false) && manifest.bos_id.has_value();
    const nlohmann::json* ends = member(content, "end_ids");
    if (ends == nullptr || !ends->is_array()) throw malformed("\"end_ids\" is no list");
    for (const auto& end : *ends) {
        manifest.end_ids.insert(static_cast<Token>(number({{"end_ids", end}}, "end_ids", 0, manifest.vocab_size - 1)));
    }
}

std::optional<double> recommended(const nlohmann::json& sampling, std::string_view key) {
    const nlohmann::json* value = member(sampling, key);
    if (value == nullptr || value->is_null()) return std::nullopt;
    if (!value->is_number()) throw malformed("the sampling has a " + shown(key) + " that is no number");
    return value->get<double>();
}

void read_sampling(const nlohmann::json& content, Manifest& manifest) {
    const nlohmann::json& sampling = object_of(content, "sampling");
    SamplingOptions& found = manifest.sampling;
    found.temperature = recommended(sampling, "temperature");
    found.top_p = recommended(sampling, "top_p");
    found.min_p = recommended(sampling, "min_p");
    found.repetition_penalty = recommended(sampling, "repetition_penalty");
    if (const auto k = recommended(sampling, "top_k")) {
        if (!(*k >= 0 && *k <= static_cast<double>(largest))) throw malformed("the sampling's top_k is out of range");
        found.top_k = static_cast<std::int64_t>(*k);
    }
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
    manifest.dtype = required_text(content, "dtype");
    manifest.max_seq_length = number(content, "max_seq_length", 1, longest_sequence);
    manifest.vocab_size = number(content, "vocab_size", 1, largest_vocabulary);
    const nlohmann::json& target = object_of(content, "target");
    manifest.device = required_text(target, "device");
    manifest.system = optional_text(target, "system");
    manifest.machine = optional_text(target, "machine");
    const nlohmann::json& program = object_of(content, "program");
    manifest.program = optional_text(program, "entry");
    manifest.program_bytes = static_cast<std::uint64_t>(number(program, "bytes", 0, largest));
    read_digests(content, manifest);
    manifest.runtime = object_of(content, "runtime");
    manifest.config = object_of(content, "config");
    manifest.target = target;
    const nlohmann::json* tokenizer = member(content, "tokenizer");
    if (tokenizer == nullptr || tokenizer->is_null()) {
        throw Error("the file holds no tokenizer", "export the model again, with a tokenizer");
    }
    read_tokens(content, manifest);
    read_sampling(content, manifest);
    const nlohmann::json* pieces = member(content, "chat_pieces");
    if (pieces != nullptr) manifest.chat_pieces = *pieces;
    return manifest;
}

}  // namespace torchchat

// Runs one part of the library for the tests: a line of JSON on standard input asks, a line on standard output answers.
#include <fstream>
#include <iostream>
#include <iterator>
#include <nlohmann/json.hpp>

#include "artifact/artifact.h"
#include "conversation.h"
#include "json.h"
#include "sampler.h"
#include "tokenizers/tokenizer.h"

namespace {

using nlohmann::json;
using namespace torchchat;

std::string bytes_of(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

// {"files": {name: path}}: the tokenizer that later questions are about.
class Tokenizers {
  public:
    json open(const json& question) {
        contents_.clear();
        TokenizerFiles files;
        for (const auto& [name, path] : question.at("files").items()) contents_[name] = bytes_of(path);
        for (const auto& [name, content] : contents_) files.emplace(name, content);
        format_ = make_text_format(read_tokenizer(files), std::nullopt, {}, std::nullopt, false);
        const Tokenizer& found = *format_.tokenizer;
        return {{"vocab_size", found.vocab_size},
                {"special_tokens", found.special_tokens},
                {"bos_id", found.bos_id ? json(*found.bos_id) : json()},
                {"eos_id", found.eos_id ? json(*found.eos_id) : json()},
                {"adds_bos", found.adds_bos},
                {"adds_prefix_space", found.adds_prefix_space}};
    }
    json encode(const json& question) const {
        json all = json::array();
        for (const auto& text : question.at("texts")) {
            all.push_back(format_.tokenizer->encode(text.get_ref<const std::string&>(), question.at("special")));
        }
        return all;
    }
    json encode_disarmed(const json& question) const {
        json all = json::array();
        for (const auto& text : question.at("texts")) {
            all.push_back(format_.encode_disarmed(question.value("before", "[") +
                                                  format_.disarmed(text.get_ref<const std::string&>()) +
                                                  question.value("after", "]")));
        }
        return all;
    }
    json decode(const json& question) const {
        json all = json::array();
        for (const auto& ids : question.at("ids")) {
            all.push_back(format_.tokenizer->decode(ids.get<std::vector<Token>>()));
        }
        return all;
    }
    json token_bytes() const {
        json all = json::array();
        for (Token token = 0; token < format_.tokenizer->vocab_size; ++token) {
            const std::string bytes = format_.tokenizer->token_bytes(token);
            all.push_back(std::vector<std::uint8_t>(bytes.begin(), bytes.end()));
        }
        return all;
    }

  private:
    std::map<std::string, std::string> contents_;
    TextFormat format_;
};

SamplingOptions sampling_of(const json& declared) {
    SamplingOptions options;
    const auto set = [&](const char* name, auto& place) {
        if (declared.contains(name))
            place = declared.at(name).get<typename std::decay_t<decltype(place)>::value_type>();
    };
    set("temperature", options.temperature);
    set("top_k", options.top_k);
    set("top_p", options.top_p);
    set("min_p", options.min_p);
    set("repetition_penalty", options.repetition_penalty);
    return options;
}

// {"logits": path of float32 [steps, vocab], "vocab", "seeds", "stream", "prompt", ...}: ids for each seed.
json sample(const json& question) {
    const std::string bytes = bytes_of(question.at("logits"));
    std::vector<float> logits(bytes.size() / sizeof(float));
    std::memcpy(logits.data(), bytes.data(), logits.size() * sizeof(float));
    const std::size_t vocab = question.at("vocab");
    const auto prompt = question.at("prompt").get<std::vector<Token>>();
    json all = json::array();
    for (const auto& seed : question.at("seeds")) {
        SamplingOptions options = sampling_of(question);
        options.seed = seed.get<std::uint64_t>();
        Sampler sampler(options, prompt, question.at("stream").get<std::uint64_t>());
        json ids = json::array();
        for (std::size_t at = 0; at + vocab <= logits.size(); at += vocab) {
            ids.push_back(sampler.choose(std::span(logits).subspan(at, vocab)));
        }
        all.push_back(ids);
    }
    return all;
}

json render(const json& question) {
    const ChatTemplate chat(question.at("pieces"));
    std::vector<Turn> turns;
    for (const auto& turn : question.at("turns")) {
        turns.push_back(
            {turn.at(0), turn.at(1).is_null() ? std::nullopt : std::optional(turn.at(1).get<std::string>())});
    }
    const json& system = question.at("system");
    return chat.render(system.is_null() ? std::nullopt : std::optional(system.get<std::string>()), turns);
}

json stop(const json& question) {
    StopMatcher matcher(question.at("stops").get<std::vector<std::string>>());
    json all = json::array();
    for (const auto& text : question.at("texts")) {
        all.push_back(matcher.push(text));
        if (matcher.found()) return all;
    }
    all.push_back(matcher.finish());
    return all;
}

json answer(const json& question, Tokenizers& tokenizers) {
    const std::string asked = question.at("do");
    if (asked == "open") return tokenizers.open(question);
    if (asked == "encode") return tokenizers.encode(question);
    if (asked == "encode_disarmed") return tokenizers.encode_disarmed(question);
    if (asked == "decode") return tokenizers.decode(question);
    if (asked == "token_bytes") return tokenizers.token_bytes();
    if (asked == "sample") return sample(question);
    if (asked == "uniform") return philox_uniform(question.at("seed"), question.at("stream"), question.at("step"));
    if (asked == "render") return render(question);
    if (asked == "stop") return stop(question);
    if (asked == "artifact") {
        const Artifact artifact(question.at("path").get<std::string>());
        artifact.check();
        json files = json::object();
        for (const auto& [name, content] : artifact.tokenizer_files()) files[name] = content.size();
        return {{"kind", artifact.manifest().kind}, {"program", artifact.content("program").size()}, {"files", files}};
    }
    throw Error("there is no question " + asked);
}

}  // namespace

int main() {
    Tokenizers tokenizers;
    for (std::string line; std::getline(std::cin, line);) {
        json reply;
        try {
            reply["answer"] = answer(json::parse(line), tokenizers);
        } catch (const Error& error) {
            reply["error"] = error.what();
        }
        std::cout << reply.dump(-1, ' ', false, json::error_handler_t::replace) << std::endl;
    }
}

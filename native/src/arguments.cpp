#include "arguments.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <functional>
#include <limits>
#include <map>
#include <type_traits>
#include <vector>

namespace torchchat {

const char* const usage =
    R"(usage: torchchat-run FILE [--prompt TEXT | --chat] [options]

Runs a model that `torchchat export` wrote, a .pt2, .so or .pte file. Without --prompt and --chat, standard input is the
prompt; where that is a terminal, a chat begins.

  --prompt TEXT            one answer to TEXT, or its continuation where the model has no chat template
  --chat                   a conversation; without a terminal, one message per line
  --system TEXT            a system message
  --raw                    continue the prompt as it stands, also where the model has a chat template
  --max-new-tokens N       length of an answer; default 200, in a chat until the model ends it
  --temperature X          randomness; 0 always takes the likeliest token; default: the model's own, else 0.8
  --top-k N  --top-p X  --min-p X
                           only the N likeliest tokens; only those that together have probability X; only those with
                           at least the share X of the likeliest one's
  --repetition-penalty X   above 1 makes tokens that already occurred less likely
  --seed N                 the same seed gives the same text, the same as in torchchat
  --stop TEXT              ends the answer; can be given several times
  --threads N              that compute
  --json                   print one JSON object for each answer: text, token_ids, finish_reason, stats
  --help, --version

Exit status: 0 done; 1 failed; 2 wrong usage; 130 interrupted.
)";

namespace {

template <typename Number>
Number parsed(const std::string& name, const std::string& text) {
    constexpr bool is_whole = std::is_integral_v<Number>;
    const bool is_negative = std::is_unsigned_v<Number> && text.size() > 1 && text.front() == '-';
    Number value{};
    const auto [end, error] = std::from_chars(text.data() + (is_negative ? 1 : 0), text.data() + text.size(), value);
    if (end != text.data() + text.size() || error == std::errc::invalid_argument) {
        throw UsageError(name + " needs a " + (is_whole ? "whole " : "") + "number, not '" + text + "'");
    }
    if constexpr (!is_whole) {
        return error == std::errc() ? value : std::strtod(text.c_str(), nullptr);  // infinite, or nearly 0
    } else if (is_negative || error != std::errc()) {
        throw Error(name + " is " + text + "; it has to be " + std::to_string(std::numeric_limits<Number>::min()) +
                    " to " + std::to_string(std::numeric_limits<Number>::max()));
    } else {
        return value;
    }
}

using Setter = std::function<void(Arguments&, const std::string& name, const std::string& value)>;

template <typename Number>
Setter number_option(std::function<std::optional<Number>&(Arguments&)> place) {
    return [place](Arguments& arguments, const std::string& name, const std::string& value) {
        place(arguments) = parsed<Number>(name, value);
    };
}

const std::map<std::string, Setter>& valued() {
    static const std::map<std::string, Setter> setters = {
        {"--prompt", [](Arguments& a, const std::string&, const std::string& value) { a.prompt = value; }},
        {"--system", [](Arguments& a, const std::string&, const std::string& value) { a.system = value; }},
        {"--stop", [](Arguments& a, const std::string&, const std::string& value) { a.options.stop.push_back(value); }},
        {"--threads",
         [](Arguments& a, const std::string& name, const std::string& value) {
             a.threads = parsed<int>(name, value);
             if (a.threads < 1) throw UsageError("--threads has to be 1 or more");
         }},
        {"--max-new-tokens",
         number_option<std::int64_t>([](Arguments & a) -> auto& { return a.options.max_new_tokens; })},
        {"--temperature", number_option<double>([](Arguments & a) -> auto& { return a.options.sampling.temperature; })},
        {"--top-k", number_option<std::int64_t>([](Arguments & a) -> auto& { return a.options.sampling.top_k; })},
        {"--top-p", number_option<double>([](Arguments & a) -> auto& { return a.options.sampling.top_p; })},
        {"--min-p", number_option<double>([](Arguments & a) -> auto& { return a.options.sampling.min_p; })},
        {"--repetition-penalty",
         number_option<double>([](Arguments & a) -> auto& { return a.options.sampling.repetition_penalty; })},
        {"--seed", number_option<std::uint64_t>([](Arguments & a) -> auto& { return a.options.sampling.seed; })},
    };
    return setters;
}

const std::map<std::string, bool Arguments::*>& switches() {
    static const std::map<std::string, bool Arguments::*> found = {
        {"--chat", &Arguments::chat}, {"--raw", &Arguments::raw}, {"--json", &Arguments::json},
        {"--help", &Arguments::help}, {"-h", &Arguments::help},   {"--version", &Arguments::version}};
    return found;
}

void check(const Arguments& arguments) {
    if (arguments.file.empty()) throw UsageError("there is no FILE");
    if (arguments.chat && arguments.prompt) throw UsageError("--prompt and --chat exclude each other");
    if (arguments.chat && arguments.raw) throw UsageError("--raw is for one prompt, and --chat has turns");
}

}  // namespace

Arguments parsed_arguments(int count, char** values) {
    const std::vector<std::string> given(values + std::min(count, 1), values + count);
    Arguments arguments;
    bool options_ended = false;
    for (std::size_t index = 0; index < given.size(); ++index) {
        std::string name = given[index];
        if (name == "--" && !options_ended) {
            options_ended = true;
            continue;
        }
        if (options_ended || !name.starts_with("-") || name == "-") {
            if (!arguments.file.empty()) throw UsageError("there are two files: " + arguments.file + " and " + name);
            arguments.file = name;
            continue;
        }
        if (const auto found = switches().find(name); found != switches().end()) {
            arguments.*(found->second) = true;
            continue;
        }
        std::optional<std::string> value;
        if (const std::size_t equals = name.find('='); equals != name.npos) {
            value = name.substr(equals + 1);
            name.erase(equals);
        }
        const auto found = valued().find(name);
        if (switches().contains(name)) throw UsageError(name + " takes no value");
        if (found == valued().end()) throw UsageError("there is no option " + name);
        if (!value) {
            if (++index == given.size()) throw UsageError(name + " needs a value");
            value = given[index];
        }
        found->second(arguments, name, *value);
    }
    if (!arguments.help && !arguments.version) check(arguments);
    return arguments;
}

}  // namespace torchchat

#include "conversation.h"

#include <algorithm>

#include "error.h"
#include "text/utf8.h"

namespace torchchat {
namespace {

constexpr std::string_view mark = "\xEE\x83\xBF";  // U+E0FF, of the private use area
constexpr char32_t first_number = 0xF0000;         // of the supplementary private use area
constexpr const char* transcript_stop = "\nUser:";

std::string without_marks(std::string_view text) {
    std::string result(text);
    for (std::size_t at = result.find(mark); at != result.npos; at = result.find(mark, at)) {
        result.erase(at, mark.size());
    }
    return result;
}

}  // namespace

TextFormat make_text_format(std::unique_ptr<Tokenizer> tokenizer, std::optional<ChatTemplate> chat_template,
                            std::set<Token> end_ids, std::optional<Token> bos_id, bool adds_bos) {
    TextFormat format;
    format.tokenizer = std::move(tokenizer);
    format.chat_template = std::move(chat_template);
    format.end_ids = std::move(end_ids);
    format.bos_id = bos_id;
    format.adds_bos = adds_bos;
    std::map<std::string, Token, std::less<>> numbers;
    for (const auto& [text, token] : format.tokenizer->special_tokens) {
        numbers.emplace(text, static_cast<Token>(format.numbered.size()));
        format.numbered.emplace_back(text, token);
    }
    format.control = Splitter(numbers);
    return format;
}

std::vector<Token> TextFormat::encode_plain(std::string_view text, bool special) const {
    std::vector<Token> ids = tokenizer->encode(text, special);
    if (adds_bos && bos_id) ids.insert(ids.begin(), *bos_id);
    return ids;
}

std::string TextFormat::disarmed(std::string_view content) const {
    if (numbered.empty()) return std::string(content);
    const std::string clean = without_marks(content);
    std::string result;
    for (const auto& part : control.split(clean)) {
        if (part.is_word) {
            result += std::string(mark) + encoded(first_number + static_cast<char32_t>(part.token));
        } else {
            result += part.text;
        }
    }
    return result;
}

std::string TextFormat::armed(std::string_view text) const {
    std::string result;
    for (std::size_t at = 0; at < text.size();) {
        const std::size_t size = character_size(text[at]);
        const std::size_t next = at + size;
        if (text.substr(at, size) == mark && next < text.size()) {
            const std::string_view number = text.substr(next, character_size(text[next]));
            const std::size_t index = static_cast<std::size_t>(code_point(number)) - first_number;
            if (index < numbered.size()) {
                result += numbered[index].first;
                at = next + number.size();
                continue;
            }
        }
        result += text.substr(at, size);
        at = next;
    }
    return result;
}

std::vector<Token> TextFormat::encode_disarmed(const std::string& text) const {
    const auto parts = control.split(text);
    if (text.find(mark) == text.npos) {
        std::vector<Token> ids = tokenizer->encode(text, true);
        std::vector<Token> expected, found;
        for (const auto& part : parts) {
            if (part.is_word) expected.push_back(numbered[static_cast<std::size_t>(part.token)].second);
        }
        std::ranges::copy_if(ids, std::back_inserter(found), [&](Token token) { return tokenizer->is_control(token); });
        if (found == expected) return ids;
    }
    // Only if a message contains the text of a control token, or normalization creates one.
    std::vector<PromptPart> prompt;
    for (const auto& part : parts) {
        if (part.is_word) {
            prompt.emplace_back(numbered[static_cast<std::size_t>(part.token)].second);
        } else {
            prompt.emplace_back(armed(part.text));
        }
    }
    return tokenizer->encode_parts(prompt);
}

void Conversation::set_system(std::string_view text) {
    system_ = text.empty() ? std::nullopt : std::optional(well_formed(text));
}

// What is held of the last turn is taken as it was generated, and only what follows is encoded: encoding the whole
// text again could cut the answer into other tokens than the model chose, and the cache would be of no use from there.
Conversation::Prompt Conversation::prompt() const {
    if (!format_.chat_template) {
        std::string text = transcript(system_, turns_);
        return {text, format_.encode_plain(text, false)};
    }
    std::vector<Turn> turns;
    for (const Turn& turn : turns_) {
        turns.push_back({format_.disarmed(turn.user),
                         turn.assistant ? std::optional(format_.disarmed(*turn.assistant)) : std::nullopt});
    }
    const auto system = system_ ? std::optional(format_.disarmed(*system_)) : std::nullopt;
    Prompt prompt{format_.chat_template->render(system, turns), {}};
    if (!settled_.text.empty() && prompt.text.starts_with(settled_.text)) {
        const std::string rest = prompt.text.substr(settled_.text.size());
        if (format_.control.matches_start(rest) && rest.find(mark) == rest.npos) {
            prompt.ids = settled_.ids;
            std::ranges::copy(format_.encode_disarmed(rest), std::back_inserter(prompt.ids));
            return prompt;
        }
    }
    prompt.ids = format_.encode_disarmed(prompt.text);
    return prompt;
}

// When the context is full, so many of the oldest turns go that half of it is free: what is left is computed anew, and
// that should not happen on every turn.
Conversation::Prompt Conversation::fitting_prompt(const Options& options) {
    const std::int64_t limit = sequence_.limit();
    const std::int64_t room = std::min(options.max_new_tokens.value_or(limit), limit / 4);
    Prompt whole = prompt();
    if (static_cast<std::int64_t>(whole.ids.size()) + room <= limit || turns_.size() < 2) {
        check_prompt(whole.ids.size(), limit);
        return whole;
    }
    const std::vector<Turn> all = turns_;
    const auto without = [&](std::size_t dropped) {
        turns_.assign(all.begin() + static_cast<std::ptrdiff_t>(dropped), all.end());
        return prompt();
    };
    std::size_t low = 1, high = all.size() - 1;
    while (low < high) {
        const std::size_t middle = low + (high - low) / 2;
        if (static_cast<std::int64_t>(without(middle).ids.size()) <= limit / 2) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    Prompt fitting = without(low);
    check_prompt(fitting.ids.size(), limit);
    if (notice) {
        notice("the context of " + std::to_string(limit) + " tokens is full: the oldest " + std::to_string(2 * low) +
               " messages were left out");
    }
    return fitting;
}

Answer Conversation::ask(std::string_view text, Options options, const OnText& on_text, const Cancelled& cancelled) {
    const std::vector<Turn> before = turns_;
    turns_.push_back({well_formed(text), std::nullopt});
    std::string said;  // stays said where the reader, or the runtime, throws
    const OnText note = [&](std::string_view piece) {
        said += piece;
        return !on_text || on_text(piece);
    };
    try {
        const Prompt prompt = fitting_prompt(options);
        if (!format_.chat_template) options.stop.emplace_back(transcript_stop);
        Answer answer =
            generate(sequence_, *format_.tokenizer, format_.end_ids, {.prompt = prompt.ids}, options, note, cancelled);
        if (answer.text.empty() && answer.finish_reason == "cancelled") {
            turns_ = before;  // interrupted before the first word: as if it had not been asked
        } else {
            turns_.back().assistant = answer.text;
        }
        settle(prompt, answer);
        return answer;
    } catch (...) {
        if (said.empty()) {
            turns_ = before;
        } else {
            turns_.back().assistant = said;
        }
        throw;
    }
}

void Conversation::settle(const Prompt& prompt, const Answer& answer) {
    if (answer.token_ids.empty()) return;
    TextStream stream(*format_.tokenizer, false);
    std::string text;
    for (const Token token : answer.token_ids) text += stream.push(token);
    text += stream.finish();
    if (text != answer.text) return;  // a stop string was cut off
    settled_ = {prompt.text + answer.text, prompt.ids};
    settled_.ids.insert(settled_.ids.end(), answer.token_ids.begin(), answer.token_ids.end());
}

}  // namespace torchchat

#include "chat_template.h"

#include <ctime>
#include <nlohmann/json.hpp>

#include "error.h"
#include "json.h"
#include "text/utf8.h"

namespace torchchat {
namespace {

Error malformed(const std::string& what) {
    return Error("the file's chat_pieces are malformed: " + what, "export the model again");
}

// White space of Python's str.isspace().
bool is_python_space(char32_t code) {
    return is_space(code) || (code >= 0x1C && code <= 0x1F);
}

std::string today(const std::string& format) {
    const std::time_t now = std::time(nullptr);
    std::tm parts = {};
    if (localtime_r(&now, &parts) == nullptr) throw Error("the system does not tell the date");
    std::string text(256, '\0');
    text.resize(std::strftime(text.data(), text.size(), format.c_str(), &parts));
    return text;
}

}  // namespace

ChatTemplate::ChatTemplate(const nlohmann::json& declared) {
    const nlohmann::json* with = member(declared, "with_system");
    const nlohmann::json* without = member(declared, "without_system");
    if (with == nullptr || without == nullptr) throw malformed("with_system or without_system is missing");
    with_system_ = read_parts(*with);
    without_system_ = read_parts(*without);
    const nlohmann::json* unless = member(declared, "unless");
    if (unless == nullptr) return;
    for (const auto& [role, texts] : unless->items()) {
        if (!texts.is_array()) throw malformed("unless names no list");
        for (const auto& text : texts) {
            if (!text.is_string()) throw malformed("unless lists no texts");
            unless_[role].push_back(text.get<std::string>());
        }
    }
}

ChatTemplate::Parts ChatTemplate::read_parts(const nlohmann::json& declared) {
    Parts parts;
    for (const char* name : {"only", "first", "middle", "last"}) {
        const nlohmann::json* part = member(declared, name);
        if (part == nullptr) throw malformed(std::string(name) + " is missing");
        parts.emplace(name, read_part(*part));
    }
    return parts;
}

ChatTemplate::Part ChatTemplate::read_part(const nlohmann::json& declared) {
    if (declared.is_object()) return {{}, text_of(declared, "refused", "")};
    if (!declared.is_array()) throw malformed("a part is no list of pieces");
    Part part;
    for (const auto& piece : declared) part.pieces.push_back(read_piece(piece));
    return part;
}

ChatTemplate::Piece ChatTemplate::read_piece(const nlohmann::json& declared) {
    if (declared.is_string()) return declared.get<std::string>();
    if (const nlohmann::json* format = member(declared, "date"); format != nullptr && format->is_string()) {
        return Date{format->get<std::string>()};
    }
    const std::string role = text_of(declared, "role", ""), trim = text_of(declared, "trim", "none");
    if (trim != "none" && trim != "left" && trim != "right" && trim != "both") throw malformed("trim " + shown(trim));
    const bool left = trim == "left" || trim == "both", right = trim == "right" || trim == "both";
    if (role == "system") return Slot{Role::system, left, right};
    if (role == "user") return Slot{Role::user, left, right};
    if (role == "assistant") return Slot{Role::assistant, left, right};
    throw malformed("a piece is of the role " + shown(role));
}

std::string ChatTemplate::render(const std::optional<std::string>& system, const std::vector<Turn>& turns) const {
    const Parts& parts = system ? with_system_ : without_system_;
    if (system) check_content("system", *system);
    std::string prompt;
    for (std::size_t index = 0; index < turns.size(); ++index) {
        const bool first = index == 0, last = index + 1 == turns.size();
        check_content("user", turns[index].user);
        if (turns[index].assistant) check_content("assistant", *turns[index].assistant);
        write(parts.find(first ? (last ? "only" : "first") : (last ? "last" : "middle"))->second, system, turns[index],
              prompt);
    }
    return prompt;
}

void ChatTemplate::check_content(std::string_view role, const std::string& content) const {
    const auto found = unless_.find(role);
    if (found == unless_.end()) return;
    for (const std::string& text : found->second) {
        if (text.empty() ? stripped(content).empty() : content.find(text) != content.npos) {
            throw Error("a message of the " + std::string(role) + (text.empty() ? " is empty" : " has " + shown(text)) +
                            ", of which the model's chat template makes something that this program cannot",
                        "run the file with torchchat");
        }
    }
}

void ChatTemplate::write(const Part& part, const std::optional<std::string>& system, const Turn& turn,
                         std::string& prompt) {
    if (part.refusal) throw Error("the model's chat template cannot be used so: " + *part.refusal);
    for (const Piece& piece : part.pieces) {
        if (const auto* text = std::get_if<std::string>(&piece)) {
            prompt += *text;
        } else if (const auto* date = std::get_if<Date>(&piece)) {
            prompt += today(date->format);
        } else {
            const auto& slot = std::get<Slot>(piece);
            const std::optional<std::string> content = slot.role == Role::system      ? system
                                                       : slot.role == Role::assistant ? turn.assistant
                                                                                      : turn.user;
            if (content) prompt += stripped(*content, slot.trims_left, slot.trims_right);
        }
    }
}

std::string transcript(const std::optional<std::string>& system, const std::vector<Turn>& turns) {
    std::string text;
    if (system) text += std::string(stripped(*system)) + "\n";
    for (const Turn& turn : turns) {
        text += "User: " + std::string(stripped(turn.user)) + "\n";
        if (turn.assistant) text += "Assistant: " + std::string(stripped(*turn.assistant)) + "\n";
    }
    return text + "Assistant:";
}

std::string_view stripped(std::string_view text, bool left, bool right) {
    const auto parts = characters(text);
    std::size_t begin = 0, end = text.size();
    std::size_t first = 0, last = parts.size();
    while (left && first < last && is_python_space(code_point(parts[first]))) begin += parts[first++].size();
    while (right && last > first && is_python_space(code_point(parts[last - 1]))) end -= parts[--last].size();
    return text.substr(begin, end - begin);
}

}  // namespace torchchat

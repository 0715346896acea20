// The prompt that a conversation makes, from the pieces that the exporter found in the model's Jinja template.
// docs/artifacts.md describes them.
#pragma once

#include <map>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace torchchat {

struct Turn {
    std::string user;
    std::optional<std::string> assistant;  // not there yet in the last turn
};

class ChatTemplate {
  public:
    // Of the manifest's "chat_pieces". Throws where that is malformed.
    explicit ChatTemplate(const nlohmann::json& declared);

    // The prompt for an answer to the last turn. Throws `Error` where the template refuses such a conversation, or
    // where what it makes of it cannot be put together from pieces.
    std::string render(const std::optional<std::string>& system, const std::vector<Turn>& turns) const;

  private:
    enum class Role { system, user, assistant };
    struct Slot {
        Role role;
        bool trims_left, trims_right;
    };
    struct Date {
        std::string format;  // of strftime
    };
    using Piece = std::variant<std::string, Slot, Date>;
    struct Part {
        std::vector<Piece> pieces;
        std::optional<std::string> refusal;  // why there is none
    };
    using Parts = std::map<std::string, Part, std::less<>>;  // "only", "first", "middle", "last"

    static Parts read_parts(const nlohmann::json& declared);
    static Part read_part(const nlohmann::json& declared);
    static Piece read_piece(const nlohmann::json& declared);
    void check_content(std::string_view role, const std::string& content) const;
    static void write(const Part& part, const std::optional<std::string>& system, const Turn& turn,
                      std::string& prompt);

    Parts with_system_, without_system_;
    std::map<std::string, std::vector<std::string>, std::less<>> unless_;  // role -> texts that messages must not hold
};

// A conversation for a model that knows no chat template.
std::string transcript(const std::optional<std::string>& system, const std::vector<Turn>& turns);

// The text without white space, as Python's str.strip() has it, at the ends that are named.
std::string_view stripped(std::string_view text, bool left = true, bool right = true);

}  // namespace torchchat

// JSON of strangers: every access is checked.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

namespace torchchat {

// The value that `text` is. Throws `Error`, naming `place`, where it is no JSON, or is nested or named without bounds.
nlohmann::json parsed_json(std::string_view text, std::string_view place);
// As `parsed_json`; it has to be an object.
nlohmann::json json_object(std::string_view text, std::string_view place);

// The value under `key`, or null where `object` is none or has none.
const nlohmann::json* member(const nlohmann::json& object, std::string_view key);

// A value of an object; `otherwise` where there is none, or null. Throws `Error` for one of another type.
bool flag(const nlohmann::json& object, std::string_view key, bool otherwise);
std::string text_of(const nlohmann::json& object, std::string_view key, std::string_view otherwise);
// The whole number under `key`, which has to be there and from `least` to `most`.
std::int64_t number(const nlohmann::json& object, std::string_view key, std::int64_t least, std::int64_t most);

}  // namespace torchchat

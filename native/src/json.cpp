#include "json.h"

#include <nlohmann/json.hpp>

#include "error.h"

namespace torchchat {
namespace {

constexpr int deepest = 64;

Error of_wrong_type(std::string_view key, std::string_view wanted) {
    return Error("the entry " + shown(key) + " has to be " + std::string(wanted),
                 "the file is damaged, or made by a later version: export the model again");
}

const nlohmann::json* present(const nlohmann::json& object, std::string_view key) {
    const nlohmann::json* value = member(object, key);
    return value == nullptr || value->is_null() ? nullptr : value;
}

}  // namespace

nlohmann::json parsed_json(std::string_view text, std::string_view place) {
    bool too_deep = false;
    const auto bounded = [&](int depth, nlohmann::json::parse_event_t, nlohmann::json&) {
        too_deep = too_deep || depth > deepest;
        return !too_deep;  // what is refused is left out, and the rest read on
    };
    nlohmann::json value = nlohmann::json::parse(text, bounded, /*allow_exceptions=*/false);
    if (too_deep) {
        throw Error(std::string(place) + " is JSON that is nested more than " + std::to_string(deepest) + " deep",
                    "the file is damaged: copy or export the model again");
    }
    if (value.is_discarded()) {
        throw Error(std::string(place) + " is no JSON", "the file is damaged: copy or export the model again");
    }
    return value;
}

nlohmann::json json_object(std::string_view text, std::string_view place) {
    nlohmann::json value = parsed_json(text, place);
    if (!value.is_object()) throw Error(std::string(place) + " is no JSON object", "export the model again");
    return value;
}

const nlohmann::json* member(const nlohmann::json& object, std::string_view key) {
    if (!object.is_object()) return nullptr;
    const auto found = object.find(key);
    return found == object.end() ? nullptr : &*found;
}

bool flag(const nlohmann::json& object, std::string_view key, bool otherwise) {
    const nlohmann::json* value = present(object, key);
    if (value == nullptr) return otherwise;
    if (!value->is_boolean()) throw of_wrong_type(key, "true or false");
    return value->get<bool>();
}

std::string text_of(const nlohmann::json& object, std::string_view key, std::string_view otherwise) {
    const nlohmann::json* value = present(object, key);
    if (value == nullptr) return std::string(otherwise);
    if (!value->is_string()) throw of_wrong_type(key, "a text");
    return value->get<std::string>();
}

std::int64_t number(const nlohmann::json& object, std::string_view key, std::int64_t least, std::int64_t most) {
    const nlohmann::json* value = present(object, key);
    const bool fits = value != nullptr && value->is_number_integer() &&
                      !(value->is_number_unsigned() && value->get<std::uint64_t>() > INT64_MAX) &&
                      value->get<std::int64_t>() >= least && value->get<std::int64_t>() <= most;
    if (!fits) {
        throw of_wrong_type(key, "a whole number from " + std::to_string(least) + " to " + std::to_string(most));
    }
    return value->get<std::int64_t>();
}

}  // namespace torchchat

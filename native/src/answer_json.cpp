#include "answer_json.h"

#include <nlohmann/json.hpp>

namespace torchchat {

std::string answer_json(const Answer& answer) {
    const auto optional = [](const std::optional<double>& value) {
        return value ? nlohmann::json(*value) : nlohmann::json(nullptr);
    };
    const Statistics& statistics = answer.statistics;
    const nlohmann::json content = {{"text", answer.text},
                                    {"token_ids", answer.token_ids},
                                    {"finish_reason", answer.finish_reason},
                                    {"stats",
                                     {{"prompt_tokens", statistics.prompt_tokens},
                                      {"prefilled_tokens", statistics.prefilled_tokens},
                                      {"new_tokens", statistics.new_tokens},
                                      {"ttft_s", statistics.ttft_s},
                                      {"prefill_tps", optional(statistics.prefill_tps)},
                                      {"decode_tps", optional(statistics.decode_tps)},
                                      {"peak_rss_bytes", statistics.peak_rss_bytes}}}};
    return content.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

}  // namespace torchchat

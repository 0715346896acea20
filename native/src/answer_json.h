// An answer as `--json` prints it.
#pragma once

#include <string>

#include "torchchat/torchchat.h"

namespace torchchat {

// One line: text, token_ids, finish_reason, stats; as answer_json in torchchat_core/cli/answers.py.
std::string answer_json(const Answer& answer);

}  // namespace torchchat

// Ids of answers to one prompt with the seeds 0, 1, 2, ..., a line of JSON each: seeds FILE COUNT LENGTH
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>

#include "artifact/artifact.h"
#include "generation.h"
#include "session.h"

int main(int count, char** values) {
    if (count != 4) return 2;
    try {
        using namespace torchchat;
        const auto artifact = std::make_shared<const Artifact>(values[1]);
        const Manifest& manifest = artifact->manifest();
        const auto tokenizer = read_tokenizer(artifact->tokenizer_files());
        const auto backend = manifest.kind == "executorch" ? load_executorch(artifact, 0) : load_aoti(artifact, 0);
        TokenSequence sequence(backend->session(manifest.max_seq_length));
        const std::vector<Token> prompt = {1, 403, 407};
        for (std::uint64_t seed = 0; seed < std::stoull(values[2]); ++seed) {
            Options options;
            options.sampling = {.temperature = 0.9, .top_p = 0.95, .seed = seed};
            options.max_new_tokens = std::stoll(values[3]);
            const Answer answer = generate(sequence, *tokenizer, manifest.end_ids, {.prompt = prompt}, options, {}, {});
            std::cout << nlohmann::json(answer.token_ids).dump() << "\n";
        }
    } catch (const std::exception& error) {
        std::cerr << error.what() << "\n";
        return 1;
    }
}

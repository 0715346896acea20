// Ids of answers to one prompt with the seeds 0, 1, 2, ..., a line of them each: seeds FILE PROMPT COUNT LENGTH
#include <iostream>
#include <string>

#include "torchchat/torchchat.h"

int main(int count, char** values) {
    if (count != 5) return 2;
    try {
        auto text = torchchat::Model::load(values[1]).text();
        torchchat::Options options;
        options.sampling = {.temperature = 0.9, .top_p = 0.95};
        options.max_new_tokens = std::stoll(values[4]);
        for (std::uint64_t seed = 0; seed < std::stoull(values[3]); ++seed) {
            options.sampling.seed = seed;
            for (const torchchat::Token token : text.complete(values[2], options).token_ids) std::cout << token << " ";
            std::cout << "\n";
        }
    } catch (const std::exception& error) {
        std::cerr << error.what() << "\n";
        return 1;
    }
}

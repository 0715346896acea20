// A conversation of four turns: the tokens of each prompt, and those of them that were not in the KV cache yet.
#include <iostream>
#include <string>

#include "torchchat/torchchat.h"

int main(int count, char** values) {
    if (count != 2) return 2;
    try {
        const auto model = torchchat::Model::load(values[1]);
        auto chat = model.chat();
        torchchat::Options options;
        options.max_new_tokens = 40;
        options.sampling.temperature = 0;
        for (const char* message : {"What is a plugin?", "And a recipe?", "And a session?", "Thanks."}) {
            const auto answer = chat.ask(message, options);
            std::cout << answer.statistics.prompt_tokens << " " << answer.statistics.prefilled_tokens << "\n";
        }
    } catch (const std::exception& error) {
        std::cerr << error.what() << "\n";
        return 1;
    }
}

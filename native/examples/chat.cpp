// A conversation in 40 lines: each line of standard input is a message.
#include <torchchat/torchchat.h>

#include <exception>
#include <iostream>
#include <string>

int main(int count, char** values) {
    if (count != 2) {
        std::cerr << "usage: chat MODEL, a file that `torchchat export` wrote\n";
        return 2;
    }
    try {
        const auto model = torchchat::Model::load(values[1]);
        auto chat = model.chat();
        chat.set_system("Answer in one sentence.");

        torchchat::Options options;
        options.max_new_tokens = 200;
        options.sampling.temperature = 0.7;
        options.sampling.seed = 1;  // the same answers each time

        const auto write = [](std::string_view text) {
            std::cout << text << std::flush;
            return true;  // false would end the answer
        };
        for (std::string message; std::getline(std::cin, message);) {
            const auto answer = chat.ask(message, options, write);
            std::cout << "\n(" << answer.statistics.new_tokens << " tokens)\n";
        }
    } catch (const torchchat::Error& error) {
        std::cerr << "error: " << error.what() << "\n";
        if (!error.fix().empty()) std::cerr << "try: " << error.fix() << "\n";
        return 1;
    } catch (const std::exception& error) {
        std::cerr << "error: " << error.what() << "\n";
        return 1;
    }
}

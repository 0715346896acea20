// What strangers' files go through: archive, manifest, chat pieces and tokenizers. The first byte of the input chooses.
// With libFuzzer it is a target; else it reads the files that are named on the command line.
#include <cstdint>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>

#include "artifact/artifact.h"
#include "artifact/zip.h"
#include "chat_template.h"
#include "json.h"
#include "tokenizers/tokenizer.h"

namespace {

using namespace torchchat;

constexpr std::string_view sample = "Once upon\n\n a \xF0\x9F\x98\x80 time</s><|eot_id|> 123";

void read_and_use(std::string_view name, std::string_view content) {
    const auto tokenizer = read_tokenizer({{std::string(name), content}});
    for (const bool special : {false, true}) {
        const auto ids = tokenizer->encode(sample, special);
        static_cast<void>(tokenizer->decode(ids));
    }
}

void take(std::string_view input) {
    if (input.empty()) return;
    const std::string_view content = input.substr(1);
    try {
        switch (input[0]) {
            case 'z':
                static_cast<void>(read_zip(content));
                break;
            case 'm':
                static_cast<void>(parsed_manifest(content));
                break;
            case 'c':
                static_cast<void>(ChatTemplate(parsed_json(content, "pieces")).render("s", {{"u", "a"}, {"v", {}}}));
                break;
            case 'j':
                read_and_use("tokenizer.json", content);
                break;
            case 's':
                read_and_use("tokenizer.model", content);
                break;
            default:
                break;
        }
    } catch (const Error&) {  // as it should be
    }
}

}  // namespace

#ifdef TORCHCHAT_FUZZ_FILES
int main(int count, char** values) {
    for (int index = 1; index < count; ++index) {
        std::ifstream file(values[index], std::ios::binary);
        const std::string input((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
        take(input);
    }
}
#else
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    take({reinterpret_cast<const char*>(data), size});
    return 0;
}
#endif

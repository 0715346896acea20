// torchchat-run: an exported model on the command line.
#include <unistd.h>

#include <array>
#include <charconv>
#include <csignal>
#include <iostream>
#include <iterator>
#include <utility>

#include "answer_json.h"
#include "arguments.h"
#include "chat_template.h"
#include "generation.h"
#include "text/utf8.h"
#include "torchchat/torchchat.h"

namespace {

using namespace torchchat;

constexpr int failed = 1, wrong_usage = 2, interrupted_status = 130;
constexpr std::int64_t default_length = 200;  // of one answer, in tokens

volatile std::sig_atomic_t pressed = 0;  // how often Ctrl-C was

// Handles Ctrl-C for as long as it lives.
class OnInterrupt {
  public:
    explicit OnInterrupt(void (*handler)(int)) {
        pressed = 0;
        struct sigaction action = {};
        action.sa_handler = handler;
        sigaction(SIGINT, &action, &before_);
    }
    OnInterrupt(const OnInterrupt&) = delete;
    OnInterrupt& operator=(const OnInterrupt&) = delete;
    OnInterrupt(OnInterrupt&&) = delete;
    OnInterrupt& operator=(OnInterrupt&&) = delete;
    ~OnInterrupt() { sigaction(SIGINT, &before_, nullptr); }

  private:
    struct sigaction before_ = {};
};

// The first press only ends the answer; a second one ends the program.
void end_answer(int) {
    if (pressed != 0) _exit(interrupted_status);
    pressed = 1;
}

// The terminal has dropped the line already; a new one begins, as in shells.
void begin_line(int) {
    const ssize_t written = write(STDERR_FILENO, "\n> ", 3);
    static_cast<void>(written);
}

bool was_pressed() {
    return pressed != 0;
}

// Text without the control characters that would move a terminal's cursor or change its settings.
std::string printable(std::string_view text) {
    std::string result;
    for (std::size_t at = 0; at < text.size(); ++at) {
        const auto byte = static_cast<unsigned char>(text[at]);
        const bool high_control =
            byte == 0xC2 && at + 1 < text.size() && static_cast<unsigned char>(text[at + 1]) < 0xA0;
        if (high_control) ++at;  // U+0080 to U+009F
        if (high_control || byte == 0x7F || (byte < 0x20 && byte != '\t' && byte != '\n')) continue;
        result += text[at];
    }
    return result;
}

bool show(std::string_view text) {
    static const bool terminal = isatty(STDOUT_FILENO) != 0;
    std::cout << (terminal ? printable(text) : std::string(text)) << std::flush;
    return std::cout.good();  // a reader that went away ends the answer
}

std::string rounded(double value, int digits) {
    std::array<char, 64> text = {};
    const auto [end, error] =
        std::to_chars(text.data(), text.data() + text.size(), value, std::chars_format::fixed, digits);
    return {text.data(), error == std::errc() ? end : text.data()};
}

void show_statistics(const Answer& answer) {
    if (isatty(STDERR_FILENO) == 0) return;
    const Statistics& statistics = answer.statistics;
    std::cerr << statistics.new_tokens << " tokens";
    if (statistics.decode_tps) std::cerr << " · " << rounded(*statistics.decode_tps, 1) << " tokens/s";
    std::cerr << " · first after " << rounded(statistics.ttft_s, 2) << " s"
              << (answer.finish_reason == "cancelled" ? " · interrupted"
                  : answer.finish_reason == "length"  ? " · cut at the limit"
                                                      : "")
              << "\n";
}

void report(const Error& error) {
    std::cerr << "error: " << printable(error.what()) << "\n";
    if (!error.fix().empty()) std::cerr << "try: " << printable(error.fix()) << "\n";
}

// The text, where it is UTF-8.
const std::string& checked(const std::string& text, std::string_view what) {
    if (well_formed(text) == text) return text;
    throw Error(std::string(what) + " is not UTF-8 text", "convert it to UTF-8");
}

// Returns the text of a file or pipe without a byte order mark, with lines that end with '\n'. Throws if it is not
// UTF-8.
std::string written_text(std::string_view content, std::string_view what) {
    if (content.starts_with("\xEF\xBB\xBF")) content.remove_prefix(3);
    const std::string read(content);
    if (checked(read, what).find('\0') != std::string::npos) {  // as in UTF-16
        throw Error(std::string(what) + " is not UTF-8 text", "convert it to UTF-8");
    }
    std::string text;
    for (std::size_t at = 0; at < read.size(); ++at) {
        if (read[at] == '\r' && at + 1 < read.size() && read[at + 1] == '\n') continue;
        text += read[at] == '\r' ? '\n' : read[at];
    }
    return text;
}

std::string read_prompt() {
    const std::string content((std::istreambuf_iterator<char>(std::cin)), std::istreambuf_iterator<char>());
    std::string text = written_text(content, "the prompt");
    if (text.ends_with('\n')) text.pop_back();
    return text;
}

int answer_once(const Model& model, const Arguments& arguments, const std::string& prompt) {
    Options options = arguments.options;
    if (!options.max_new_tokens) options.max_new_tokens = default_length;
    const OnText on_text = arguments.json ? OnText() : OnText(show);
    const OnInterrupt interrupt(end_answer);
    Answer answer;
    if (model.has_chat_template() && !arguments.raw) {
        Chat chat = model.chat();
        if (arguments.system) chat.set_system(*arguments.system);
        answer = chat.ask(prompt, options, on_text, was_pressed);
    } else {
        if (!arguments.system.value_or("").empty()) {
            throw Error("--system needs a model with a chat template, and no --raw",
                        "put what the model should know into --prompt");
        }
        bool shown = arguments.json;  // the prompt, which is shown with the first text: by then it is known to fit
        const auto show_prompt = [&] { return std::exchange(shown, true) || show(prompt); };
        const OnText with_prompt = [&](std::string_view piece) { return show_prompt() && show(piece); };
        Text text = model.text();
        answer = text.complete(prompt, options, arguments.json ? OnText() : with_prompt, was_pressed);
        show_prompt();
    }
    if (arguments.json) {
        std::cout << answer_json(answer) << "\n" << std::flush;
    } else {
        show("\n");
        show_statistics(answer);
    }
    return answer.finish_reason == "cancelled" ? interrupted_status : 0;
}

// A line from the user; false at the end of input.
bool read_line(std::string& line, bool terminal) {
    if (!terminal) return static_cast<bool>(std::getline(std::cin, line));
    std::cerr << "> " << std::flush;
    const OnInterrupt interrupt(begin_line);
    return static_cast<bool>(std::getline(std::cin, line));
}

void greet(const Model& model) {
    std::cerr << model.name() << " on " << model.backend() << ", " << model.dtype()
              << ". Ctrl-C ends an answer; /reset forgets the conversation; /bye or Ctrl-D leaves.\n";
    if (!model.has_chat_template()) std::cerr << "This model has no chat template: it is given a plain transcript.\n";
}

int converse(const Model& model, const Arguments& arguments) {
    const bool terminal = isatty(STDIN_FILENO) != 0;
    Chat chat = model.chat();
    chat.on_notice([](std::string_view text) { std::cerr << "notice: " << text << "\n"; });
    if (arguments.system) chat.set_system(*arguments.system);
    if (terminal) greet(model);
    std::size_t number = 0;
    for (std::string line; read_line(line, terminal);) {
        const std::string what = "line " + std::to_string(++number) + " of standard input";
        const std::string message(stripped(terminal ? well_formed(line) : written_text(line, what)));
        if (message.empty()) continue;
        if (message == "/bye" || message == "/exit" || message == "/quit") break;
        if (message == "/reset" || message == "/clear") {
            chat.reset();
            std::cerr << "The conversation is empty.\n";
            continue;
        }
        try {
            const OnInterrupt interrupt(end_answer);
            const Answer answer =
                chat.ask(message, arguments.options, arguments.json ? OnText() : OnText(show), was_pressed);
            if (arguments.json) {
                std::cout << answer_json(answer) << "\n" << std::flush;
            } else {
                show(terminal ? "\n" : "\n\n");
                show_statistics(answer);
            }
            if (!std::cout) return failed;
            if (answer.finish_reason == "cancelled" && !terminal) return interrupted_status;
        } catch (const Error& error) {
            report(error);  // and the conversation goes on, where somebody can go on
            if (!terminal) return failed;
        }
    }
    if (terminal) std::cerr << "\n";
    return 0;
}

int run(const Arguments& arguments) {
    check_options(arguments.options);  // before a model is loaded
    if (arguments.prompt) checked(*arguments.prompt, "the prompt");
    if (arguments.system) checked(*arguments.system, "the system message");
    const bool terminal = isatty(STDIN_FILENO) != 0;
    const bool chat = arguments.chat || (!arguments.prompt && terminal && !arguments.json && !arguments.raw);
    const Model model = Model::load(arguments.file, {.threads = arguments.threads});
    if (chat) return converse(model, arguments);
    return answer_once(model, arguments, arguments.prompt ? *arguments.prompt : read_prompt());
}

}  // namespace

int main(int count, char** values) {
    std::ios::sync_with_stdio(false);
    try {
        const Arguments arguments = parsed_arguments(count, values);
        if (arguments.help) {
            std::cout << usage;
            return 0;
        }
        if (arguments.version) {
            std::cout << "torchchat-run " TORCHCHAT_VERSION "; runtimes:";
            for (const std::string& name : backends()) std::cout << " " << name;
            std::cout << "\n";
            return 0;
        }
        const int status = run(arguments);
        if (!std::cout.flush()) throw Error("the answer cannot be written to standard output");
        return status;
    } catch (const UsageError& error) {
        std::cerr << "error: " << error.what() << "\ntry: torchchat-run --help\n";
        return wrong_usage;
    } catch (const Error& error) {
        report(error);
    } catch (const std::bad_alloc&) {
        std::cerr << "error: the memory does not suffice\n";
    } catch (const std::exception& error) {  // of a library
        std::cerr << "error: " << error.what() << "\n";
    }
    return failed;
}

// A file that `torchchat export` wrote: its manifest, and where its entries lie. docs/artifacts.md specifies it.
#pragma once

#include <future>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "artifact/checked_files.h"
#include "artifact/mapped_file.h"
#include "artifact/zip.h"
#include "tokenizers/tokenizer.h"

namespace torchchat {

inline constexpr std::string_view tokenizer_folder =
    "tokenizer/";  // what entries with the tokenizer's files begin with

// What the manifest says, checked.
struct Manifest {
    std::string kind;  // "aoti-package", "aoti-dso", "executorch"
    std::string model, dtype;
    std::int64_t max_seq_length = 0;  // tokens that a sequence may have
    std::int64_t vocab_size = 0;
    std::string device;                          // that it was made for
    std::optional<std::string> system, machine;  // of the target; unset: any
    std::optional<std::string> program;          // entry of the runtime's code; unset: the file's first bytes
    std::uint64_t program_bytes = 0;
    Digests digests;                           // of entries below "torchchat/", and of "program"
    std::vector<std::string> tokenizer_files;  // entries below "torchchat/"
    std::optional<Token> bos_id;
    bool adds_bos = false;
    std::set<Token> end_ids;
    SamplingOptions sampling;    // as the model's makers recommend
    nlohmann::json chat_pieces;  // null: the model has no chat template
    nlohmann::json runtime, target;
};

class Artifact {
  public:
    // Opens the file and begins to compare digests, large entries' by other threads. Throws `Error` for a file that
    // something else made, that is damaged, was changed, is of a later format, of a kind that its ending does not
    // announce, or was made for another kind of machine.
    explicit Artifact(const std::string& path);

    const Manifest& manifest() const { return manifest_; }
    const std::string& path() const { return file_.path(); }
    // Waits until every digest is compared, those of large entries once for a file. Throws where one does not hold.
    void check() const;
    // The content of an entry below "torchchat/", or "program", whose digest holds. Throws where there is none.
    std::string_view content(std::string_view name) const;
    // Its offset in the file.
    std::uint64_t offset(std::string_view name) const;
    // The tokenizer's files by their own names.
    TokenizerFiles tokenizer_files() const;

  private:
    void find_manifest();
    void check_ending() const;
    void begin_checks();
    void check(std::string_view name) const;
    std::string_view place(std::string_view name) const;  // of an entry whose digest may not be compared yet
    void check_tokenizer_size() const;

    MappedFile file_;
    std::map<std::string, ZipEntry, std::less<>> entries_;
    std::string root_;  // folder that the entries of "torchchat/" are in, with its slash, or nothing
    Manifest manifest_;
    CheckedFiles checked_files_;
    nlohmann::json identity_;  // when the comparing began
    bool checked_before_ = false;
    std::map<std::string, std::shared_future<bool>, std::less<>> checks_;  // whether each digest holds
};

// The manifest that `text` is. Throws `Error` where it is malformed.
Manifest parsed_manifest(std::string_view text);

}  // namespace torchchat

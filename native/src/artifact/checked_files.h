// Which files were compared with their digests before: a start does not read gigabytes of weights again. The notes are
// those of torchchat_core/artifact_checks.py, which says what is in them; docs/artifacts.md says what they are good
// for.
#pragma once

#include <filesystem>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <string>

namespace torchchat {

using Digests = std::map<std::string, std::string, std::less<>>;  // names of entries -> SHA-256

class CheckedFiles {
  public:
    // In the user's cache folder. Where there is none, nothing is noted.
    CheckedFiles();

    // Returns true if all of the file was compared, it has been the same file since, and no other user could have
    // written the note.
    bool has(const std::string& path, const Digests& digests) const;
    // Notes that all of it was compared between `before`, which is what `identity` was then, and now.
    void add(const std::string& path, const Digests& digests, const nlohmann::json& before) const;

    // What another file, or the same one after it was written to, differs in; null where that cannot be told.
    static nlohmann::json identity(const std::string& path, const Digests& digests);

  private:
    std::filesystem::path note(const std::string& path) const;

    std::filesystem::path folder_;  // empty: nothing is noted
};

}  // namespace torchchat

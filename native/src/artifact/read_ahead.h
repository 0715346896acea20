// Pages of a mapped file, made present before they are used: while a runtime is loaded, not while the first prompt
// waits.
#pragma once

#include <atomic>
#include <string_view>
#include <thread>
#include <vector>

namespace torchchat {

class ReadAhead {
  public:
    // Of the parts, one after the other, by a thread of its own; as far as they fit into half of the memory.
    explicit ReadAhead(std::vector<std::string_view> parts);
    ReadAhead(const ReadAhead&) = delete;
    ReadAhead& operator=(const ReadAhead&) = delete;
    ReadAhead(ReadAhead&&) = delete;
    ReadAhead& operator=(ReadAhead&&) = delete;
    // Stops where it is.
    ~ReadAhead();

  private:
    void read(std::string_view part) const;

    std::atomic<bool> stopped_ = false;
    std::thread thread_;
};

}  // namespace torchchat

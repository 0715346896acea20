#include "artifact/read_ahead.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>

namespace torchchat {
namespace {

constexpr std::size_t step = 16 << 20;  // bytes of one call, which nothing interrupts

#if defined(MADV_POPULATE_READ)
constexpr int advice = MADV_POPULATE_READ;  // reads them, and maps them: later no page is missed
#else
constexpr int advice = MADV_WILLNEED;
#endif

std::size_t page_size() {
    return static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
}

std::size_t memory() {
    const long pages = sysconf(_SC_PHYS_PAGES);
    return pages < 0 ? 0 : static_cast<std::size_t>(pages) * page_size();
}

}  // namespace

ReadAhead::ReadAhead(std::vector<std::string_view> parts)
    : thread_([this, parts = std::move(parts)] {
          std::size_t room = memory() / 2;
          for (const std::string_view part : parts) {
              if (part.size() > room) return;
              room -= part.size();
              read(part);
          }
      }) {}

ReadAhead::~ReadAhead() {
    stopped_ = true;
    thread_.join();
}

void ReadAhead::read(std::string_view part) const {
    const auto begin = reinterpret_cast<std::uintptr_t>(part.data()), end = begin + part.size();
    for (auto at = begin / page_size() * page_size(); at < end && !stopped_; at += step) {
        // Advice: where the system does not take it, the pages come when they are used.
        madvise(reinterpret_cast<void*>(at), std::min(step, end - at), advice);
    }
}

}  // namespace torchchat

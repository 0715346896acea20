// Work that several threads do together, stage by stage.

#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <vector>

#include "waiting.h"

namespace torchchat {

// Of what a stage reads, a thread takes so many bytes at once. A memory that is read in long runs is faster, and what is
// taken last is what others wait for.
constexpr int64_t kLeastPiece = 1 << 16, kLargestPiece = 1 << 18, kPiecesOfAThread = 8;
// How long a thread keeps its core while it waits: longer than a piece takes, and shorter than the time after which
// sleeping costs less. A core that sleeps is one on which the thread that is waited for can go on, if something else
// has taken its own.
constexpr std::chrono::microseconds kPatience{50};

struct Share {
  int64_t first, last;
};

// The part of `count` things that a thread does.
inline Share share_of(int64_t count, int64_t thread, int64_t threads) {
  return {count * thread / threads, count * (thread + 1) / threads};
}

// How far the work of each stage is. A stage begins when the one before is done, whoever has done it: nobody waits for a
// thread that does nothing because something else has its core. A thread first takes pieces of its own part of a stage
// and then of the others' parts.
class Stages {
 public:
  // One thread's way through the stages.
  struct Place {
    int64_t thread, threads, stage = 0, count_before = 0;
  };

  Stages(int64_t stages, int64_t threads) : taken_(stages * threads), done_(stages) {}

  // Calls `work(first, last)` for pieces of [0, count) until all are taken, and `prepare()` before the first piece of
  // this thread. What they read was written in earlier stages, and is not written to before this one is done. Every
  // thread comes here with the same stages in the same order. `bytes_of_each`: what is read for one of the things.
  template <typename Prepare, typename Work>
  void take(Place& place, int64_t count, int64_t bytes_of_each, Prepare prepare, Work work) {
    finish(place);
    const int64_t stage = place.stage++, threads = place.threads;
    place.count_before = count;
    std::atomic<int32_t>& done = done_[stage].number;
    if (done.load(std::memory_order_relaxed) == count) return;
    const int64_t bytes = std::clamp(count * bytes_of_each / (kPiecesOfAThread * threads), kLeastPiece, kLargestPiece);
    const auto piece = static_cast<int32_t>(std::max<int64_t>(1, bytes / std::max<int64_t>(1, bytes_of_each)));
    int32_t own = 0;
    for (int64_t i = 0; i < threads; ++i) {
      const int64_t owner = (place.thread + i) % threads;
      const Share share = share_of(count, owner, threads);
      std::atomic<int32_t>& taken = taken_[stage * threads + owner].number;
      for (;;) {
        const int64_t first = share.first + taken.fetch_add(piece, std::memory_order_relaxed);
        if (first >= share.last) break;
        const int64_t last = std::min(first + piece, share.last);
        if (own == 0) prepare();
        work(first, last);
        own += static_cast<int32_t>(last - first);
      }
    }
    if (own > 0 && done.fetch_add(own, std::memory_order_acq_rel) + own == count) done.notify_all();
  }

  // Returns when the stages so far are done.
  void finish(const Place& place) const {
    if (place.stage == 0) return;
    const std::atomic<int32_t>& done = done_[place.stage - 1].number;
    for (int32_t seen; (seen = done.load(std::memory_order_acquire)) != place.count_before;)
      wait_while(done, seen, kPatience);
  }

 private:
  struct alignas(64) Counter {  // alone in its line of the cache
    std::atomic<int32_t> number{0};
  };
  std::vector<Counter> taken_;  // [stages, threads]
  std::vector<Counter> done_;  // [stages]
};

}  // namespace torchchat

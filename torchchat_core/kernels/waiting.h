// Waiting for another thread to change a number.

#pragma once

#include <atomic>
#include <chrono>
#include <thread>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace torchchat {

inline void pause() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#endif
}

// Returns when `number` is not `seen` any more. For as long as `patience` the thread stays awake; then it sleeps until it
// is told. Where it is `polite`, others that have something to do may have its core meanwhile.
template <typename Number>
void wait_while(const std::atomic<Number>& number, Number seen, std::chrono::microseconds patience, bool polite = false) {
  if (number.load(std::memory_order_acquire) != seen) return;
  const auto until = std::chrono::steady_clock::now() + patience;
  do {
    for (int i = 0; i < 32; ++i, pause())
      if (number.load(std::memory_order_acquire) != seen) return;
    if (polite) std::this_thread::yield();
  } while (std::chrono::steady_clock::now() < until);
  number.wait(seen, std::memory_order_acquire);
}

}  // namespace torchchat

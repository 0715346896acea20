// Waiting for another thread to change a number.

#pragma once

#include <atomic>
#include <chrono>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace torchchat {

inline void pause() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#endif
}

// Returns when `number` is not `seen` any more, or after `patience`, in which the thread keeps its core: whether it is.
template <typename Number>
bool look_for_change(const std::atomic<Number>& number, Number seen, std::chrono::microseconds patience) {
  if (number.load(std::memory_order_acquire) != seen) return true;
  const auto until = std::chrono::steady_clock::now() + patience;
  do {
    for (int i = 0; i < 32; ++i, pause())
      if (number.load(std::memory_order_acquire) != seen) return true;
  } while (std::chrono::steady_clock::now() < until);
  return false;
}

// Returns when `number` is not `seen` any more; after `patience` the thread sleeps until it is told.
template <typename Number>
void wait_while(const std::atomic<Number>& number, Number seen, std::chrono::microseconds patience) {
  if (!look_for_change(number, seen, patience)) number.wait(seen, std::memory_order_acquire);
}

}  // namespace torchchat

// Parallel loops on the engine's own threads (crew.h) instead of OpenMP's. At the end of every loop, OpenMP waits for all of
// its threads, even for one that was preempted by another process; here a loop ends when its work is done. Loops that are
// too small never wake another thread.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/ThreadLocalState.h>
#include <omp.h>

#if __has_include(<dlfcn.h>)
#include <dlfcn.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>

#include "crew.h"
#include "stages.h"

namespace torchchat {

// Costs are counted in multiplications.
constexpr int64_t kCostPerThread = 1 << 21;  // work that is worth waking a thread: about 50 microseconds
constexpr int64_t kMinChunkCost = 1 << 18;   // work of the smallest chunk of a loop
constexpr int64_t kCostPerByte = 8;          // reading a byte of weights

// The number of threads that the calling thread may use while `SerialPyTorch` restricts PyTorch to one of them; else 0.
inline thread_local int64_t engine_threads = 0;
inline thread_local bool is_in_loop = false;

// Returns the number of threads that PyTorch may use, but at most `worth`, and 1 inside a parallel loop.
inline int64_t threads_for(int64_t worth) {
  if (is_in_loop || omp_in_parallel()) return 1;
  return std::clamp<int64_t>(worth, 1, engine_threads > 0 ? engine_threads : at::get_num_threads());
}

// Sets MKL's number of threads for the calling thread and returns the previous one. Does nothing without MKL.
inline int set_mkl_threads(int threads) {
#if __has_include(<dlfcn.h>)
  using Setter = int (*)(int);
  static const auto setter = reinterpret_cast<Setter>(dlsym(RTLD_DEFAULT, "MKL_Set_Num_Threads_Local"));
  return setter == nullptr ? 0 : setter(threads);
#else
  return threads;
#endif
}

// While this object exists, PyTorch's operations run only on the calling thread; the engine's own loops use the number of
// threads that PyTorch had. Other calling threads are not affected.
class SerialPyTorch {
 public:
  // at::get_num_threads() also makes PyTorch initialize this thread's number now instead of later.
  SerialPyTorch() : engine_threads_(engine_threads), openmp_threads_(at::get_num_threads()) {
    if (engine_threads == 0) engine_threads = openmp_threads_;
    omp_set_num_threads(1);
    mkl_threads_ = set_mkl_threads(1);
  }
  ~SerialPyTorch() {
    set_mkl_threads(mkl_threads_);
    omp_set_num_threads(openmp_threads_);
    engine_threads = engine_threads_;
  }
  SerialPyTorch(const SerialPyTorch&) = delete;
  SerialPyTorch& operator=(const SerialPyTorch&) = delete;

 private:
  int64_t engine_threads_;
  int openmp_threads_, mkl_threads_;
};

// The chunks of [0, count). The caller owns `work` and waits until all chunks are done; a thread that arrives later finds
// no chunk and does not access it.
template <typename Work>
class LoopJob : public Job {
 public:
  LoopJob(int64_t count, int64_t chunk, const Work& work) : count_(count), chunk_(chunk), work_(work) {}

  void run(int64_t thread) override {
    int64_t done = 0;
    for (int64_t first; (first = next_.fetch_add(chunk_, std::memory_order_relaxed)) < count_; done += chunk_)
      run_chunk(first, std::min(first + chunk_, count_));
    if (done > 0 && done_.fetch_add(done, std::memory_order_acq_rel) + done >= count_) done_.notify_all();
    if (thread != 0) return;
    for (int64_t seen; (seen = done_.load(std::memory_order_acquire)) < count_;) wait_while(done_, seen, kPatience);
  }

  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  void run_chunk(int64_t first, int64_t last) {
    is_in_loop = true;
    try {
      work_(first, last);
    } catch (...) {
      const std::lock_guard lock(mutex_);
      error_ = std::current_exception();
    }
    is_in_loop = false;
  }

  const int64_t count_, chunk_;
  const Work& work_;
  std::atomic<int64_t> next_{0}, done_{0};  // `done_` may exceed `count_`, because the last chunk counts as a full one
  std::mutex mutex_;
  std::exception_ptr error_;
};

// Calls `work(first, last)` for chunks of [0, count). Every chunk except the last has `chunk` elements, regardless of the
// number of threads. Throws what `work` throws.
template <typename Work>
void for_chunks(int64_t count, int64_t chunk, int64_t threads, const Work& work) {
  if (threads > 1 && count > chunk && !is_in_loop) {
    const auto job = std::make_shared<LoopJob<Work>>(count, chunk, work);
    run_together(job, std::min(threads, (count + chunk - 1) / chunk), nullptr);
    job->rethrow();
    return;
  }
  for (int64_t first = 0; first < count; first += chunk) work(first, std::min(first + chunk, count));
}

// Calls `work(first, last)` for chunks of [0, count), on as many threads as the cost of `cost_per_element` is worth.
template <typename Work>
void for_range(int64_t count, int64_t cost_per_element, const Work& work) {
  if (count <= 0) return;
  const int64_t cost = std::max<int64_t>(1, cost_per_element), threads = threads_for(count * cost / kCostPerThread);
  const int64_t min_chunk = (kMinChunkCost + cost - 1) / cost, chunks = threads * kPiecesOfAThread;
  for_chunks(count, threads == 1 ? count : std::max(min_chunk, (count + chunks - 1) / chunks), threads, work);
}

// Lets the chunks of a loop call PyTorch with the thread-local state of the thread that made this object, each on one
// thread.
class PyTorchInTasks {
 public:
  template <typename Work>
  void operator()(const Work& work) const {
    const at::ThreadLocalStateGuard modes(state_);
    const SerialPyTorch serial;
    work();
  }

 private:
  at::ThreadLocalState state_;
};

}  // namespace torchchat

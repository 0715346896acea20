// Loops that the engine's own threads (crew.h) run together, in the place of OpenMP's. OpenMP waits at the end of every
// loop for all of its threads, also for one that another process has pushed from its core; here a loop ends when its work
// is done. Loops that are too small for it never wake another thread.

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

constexpr int64_t kWorkOfAThread = 1 << 21;  // multiplications that are worth waking a thread: some 50 microseconds
constexpr int64_t kLeastWork = 1 << 18;      // multiplications of the smallest piece of a loop
constexpr int64_t kWorkOfAByte = 8;          // reading a byte of weights takes as long as so many multiplications

// The threads that the calling thread may use while `SerialPyTorch` keeps PyTorch to one of them; else 0.
inline thread_local int64_t engine_threads = 0;
inline thread_local bool is_in_loop = false;

// Returns as many threads as PyTorch may use, but no more than `worth`, and one inside of PyTorch's own.
inline int64_t threads_at_most(int64_t worth) {
  if (is_in_loop || omp_in_parallel()) return 1;
  return std::clamp<int64_t>(worth, 1, engine_threads > 0 ? engine_threads : at::get_num_threads());
}

// Sets the threads of MKL for the calling thread and returns the number before; does nothing where there is no MKL.
inline int set_mkl_threads(int threads) {
#if __has_include(<dlfcn.h>)
  using Setter = int (*)(int);
  static const auto setter = reinterpret_cast<Setter>(dlsym(RTLD_DEFAULT, "MKL_Set_Num_Threads_Local"));
  return setter == nullptr ? 0 : setter(threads);
#else
  return threads;
#endif
}

// As long as this exists, PyTorch's operations run on the calling thread alone; the engine's own loops keep the number of
// threads that PyTorch had. Only the calling thread is affected.
class SerialPyTorch {
 public:
  // Asking PyTorch for its number lets it initialize the number of this thread, which it would otherwise do later.
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

// The pieces of [0, count). `Work` belongs to the caller, who waits until all pieces are done; a thread that comes later
// finds none and does not touch it.
template <typename Work>
class LoopJob : public Job {
 public:
  LoopJob(int64_t count, int64_t piece, const Work& work) : count_(count), piece_(piece), work_(work) {}

  void run(int64_t thread) override {
    int64_t done = 0;
    for (int64_t first; (first = next_.fetch_add(piece_, std::memory_order_relaxed)) < count_; done += piece_)
      run_piece(first, std::min(first + piece_, count_));
    if (done > 0 && done_.fetch_add(done, std::memory_order_acq_rel) + done >= count_) done_.notify_all();
    if (thread != 0) return;
    for (int64_t seen; (seen = done_.load(std::memory_order_acquire)) < count_;) wait_while(done_, seen, kPatience);
  }

  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  void run_piece(int64_t first, int64_t last) {
    is_in_loop = true;
    try {
      work_(first, last);
    } catch (...) {
      const std::lock_guard lock(mutex_);
      error_ = std::current_exception();
    }
    is_in_loop = false;
  }

  const int64_t count_, piece_;
  const Work& work_;
  std::atomic<int64_t> next_{0}, done_{0};  // the latter may end beyond `count`: the last piece counts as a whole one
  std::mutex mutex_;
  std::exception_ptr error_;
};

// Calls `work(first, last)` for pieces of [0, count), of which each but the last has `piece` elements however many threads
// there are. Throws what `work` throws.
template <typename Work>
void for_pieces(int64_t count, int64_t piece, int64_t threads, const Work& work) {
  if (threads > 1 && count > piece && !is_in_loop) {
    const auto job = std::make_shared<LoopJob<Work>>(count, piece, work);
    run_together(job, std::min(threads, (count + piece - 1) / piece), nullptr);
    job->rethrow();
    return;
  }
  for (int64_t first = 0; first < count; first += piece) work(first, std::min(first + piece, count));
}

// The same, by as many threads as the work is worth; an element takes `work_of_each` multiplications.
template <typename Work>
void for_range(int64_t count, int64_t work_of_each, const Work& work) {
  if (count <= 0) return;
  const int64_t each = std::max<int64_t>(1, work_of_each), threads = threads_at_most(count * each / kWorkOfAThread);
  const int64_t least = (kLeastWork + each - 1) / each, pieces = threads * kPiecesOfAThread;
  for_pieces(count, threads == 1 ? count : std::max(least, (count + pieces - 1) / pieces), threads, work);
}

// Lets the pieces of a loop call PyTorch with the modes of the thread that made this, and without threads of its own.
class PyTorchInPieces {
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

// Runs many short jobs, and says how many of them a thread was given twice.

#include <atomic>
#include <chrono>
#include <cstdio>
#include <memory>
#include <thread>

#include "crew.h"

struct Counted : torchchat::Job {
  std::atomic<int> runs[3] = {};

  void run(int64_t thread) override { runs[thread].fetch_add(1); }
};

int main() {
  constexpr int kJobs = 300000, kShared = 1000;
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  int twice = 0, shared = 0;
  for (int i = 0; i < kJobs || (shared < kShared && std::chrono::steady_clock::now() < end); ++i) {
    if (i >= kJobs) std::this_thread::yield();  // the machine is busy, and the others did not have their turn yet
    const auto job = std::make_shared<Counted>();
    torchchat::run_together(job, 3, job.get());
    torchchat::wait_for_crew(job.get());
    for (auto& each : job->runs) twice += each > 1;
    shared += job->runs[1] + job->runs[2] > 0;
  }
  std::printf("%d twice, %d shared\n", twice, shared);
  return twice == 0 && shared > 0 ? 0 : 1;
}

// Forks while a thread of the crew is in a job: the child has no such thread, and does not wait for it.

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <memory>
#include <thread>

#include "crew.h"

// Its first thread goes on when the second is there; that one stays for a while.
struct Lasting : torchchat::Job {
  std::atomic<bool> joined{false};

  void run(int64_t thread) override {
    joined = joined || thread == 1;
    if (thread == 1) std::this_thread::sleep_for(std::chrono::milliseconds(500));
    while (!joined) std::this_thread::yield();
  }
};

int main() {
  const auto job = std::make_shared<Lasting>();
  torchchat::run_together(job, 2, job.get());
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);
    torchchat::wait_for_crew(job.get());
    const auto own = std::make_shared<Lasting>();  // which needs a second thread
    torchchat::run_together(own, 2, own.get());
    torchchat::wait_for_crew(own.get());
    _exit(own->joined ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  torchchat::wait_for_crew(job.get());
  std::printf("the child ended with %d\n", status);
  return status == 0 ? 0 : 1;
}

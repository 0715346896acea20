// Threads that are there for one job after the other.
//
// OpenMP's would not do: it returns when all of its threads have come to the end, also those that had no part in the work
// because something else had their core, which takes milliseconds; and between two tokens its threads keep their cores.

#include "crew.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>

#include "waiting.h"

namespace torchchat {
namespace {

// How long a thread looks for the next job before it sleeps: longer than a token takes on its way through Python.
constexpr std::chrono::microseconds kPatienceForJobs{300};

class Crew {
 public:
  void run(const std::shared_ptr<Job>& job, int64_t threads, const void* owner) {
    const std::unique_lock alone(in_use_, std::try_to_lock);
    if (threads > 1 && alone.owns_lock()) {  // of two models that decode at once, one has the crew
      grow(threads - 1);
      publish({job, owner, threads});
      round_.notify_all();
      job->run(0);
      take_back();
    } else {
      job->run(0);
    }
  }

  void wait_for(const void* owner) {
    const std::lock_guard lock(growing_);
    for (Member& member : members_)
      while (member.visits.load(std::memory_order_acquire) == owner) member.visits.wait(owner, std::memory_order_acquire);
  }

 private:
  struct Published {
    std::shared_ptr<Job> job;
    const void* owner = nullptr;
    int64_t threads = 0;
  };

  struct Member {
    std::atomic<const void*> visits{nullptr};  // the owner of the job that it is in
  };

  // The round changes together with the job: who has seen one has seen the other, and takes no job twice.
  void publish(Published next) {
    const std::lock_guard lock(mutex_);
    std::swap(published_, next);
    round_.fetch_add(1, std::memory_order_release);
  }

  void take_back() {
    Published done;  // is let go of behind the lock
    const std::lock_guard lock(mutex_);
    std::swap(published_, done);
  }

  void grow(int64_t count) {
    const std::lock_guard lock(growing_);
    while (static_cast<int64_t>(members_.size()) < count) {
      Member& member = members_.emplace_back();
      const auto thread = static_cast<int64_t>(members_.size());
      try {
        std::thread([this, &member, thread, seen = round_.load()] { serve(member, thread, seen); }).detach();
      } catch (const std::system_error&) {  // no more threads are to be had; those that there are do the work
        members_.pop_back();
        return;
      }
    }
  }

  void serve(Member& member, int64_t thread, uint32_t seen) {
    for (;;) {
      wait_while(round_, seen, kPatienceForJobs, true);
      std::shared_ptr<Job> job;
      {
        const std::lock_guard lock(mutex_);
        seen = round_.load(std::memory_order_relaxed);
        if (!published_.job || thread >= published_.threads) continue;
        job = published_.job;
        member.visits.store(published_.owner, std::memory_order_relaxed);
      }
      job->run(thread);
      job.reset();
      member.visits.store(nullptr, std::memory_order_release);
      member.visits.notify_all();
    }
  }

  std::mutex in_use_, mutex_, growing_;
  Published published_;
  std::atomic<uint32_t> round_{0};
  std::deque<Member> members_;
};

std::atomic<Crew*> current_crew{nullptr};

// Never destroyed: its threads are there until the process ends. A child of the process has none of them, and gets a crew
// of its own; the one that it was born with says of threads that they are in jobs.
Crew& crew() {
  static const int followed = pthread_atfork(nullptr, nullptr, [] { current_crew.store(nullptr); });
  (void)followed;
  Crew* found = current_crew.load(std::memory_order_acquire);
  if (found == nullptr) {
    auto* made = new Crew;
    if (current_crew.compare_exchange_strong(found, made)) return *made;
    delete made;
  }
  return *found;
}

}  // namespace

void run_together(std::shared_ptr<Job> job, int64_t threads, const void* owner) { crew().run(job, threads, owner); }

void wait_for_crew(const void* owner) { crew().wait_for(owner); }

}  // namespace torchchat

// The threads of the decoder: crew.cpp.

#pragma once

#include <cstdint>
#include <memory>

namespace torchchat {

struct Job {
  virtual ~Job() = default;

  // What thread `thread` does, from 0, once. The call for thread 0, which is made in any case, returns when all work is
  // done; the others may come late or never, and then find nothing to do.
  virtual void run(int64_t thread) = 0;
};

// Runs the job by up to so many threads, of which this is the first, and returns when its work is done. Some of the others
// may still be on their way out of it then, with the job in their hands. `owner` is what a job refers to without owning
// it.
void run_together(std::shared_ptr<Job> job, int64_t threads, const void* owner);

// Returns when no thread is in a job of this owner any more, and may look at it.
void wait_for_crew(const void* owner);

}  // namespace torchchat

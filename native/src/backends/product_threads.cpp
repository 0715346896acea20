#include "backends/product_threads.h"

#include <dlfcn.h>
#include <executorch/extension/threadpool/threadpool.h>

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace torchchat {
namespace {

constexpr std::chrono::seconds patience{1};  // that the threads of the pool wait for each other

// Sets the threads of MKL's products that the calling thread asks for; the number before. Null: there is no MKL.
using Setting = int (*)(int threads);

Setting product_threads() {
    static const auto setting = reinterpret_cast<Setting>(dlsym(RTLD_DEFAULT, "MKL_Set_Num_Threads_Local"));
    return setting;
}

// Where threads wait until all of them are there.
class Meeting {
  public:
    explicit Meeting(std::size_t expected) : expected_(expected) {}

    // Whether everyone came in time.
    bool wait() {
        std::unique_lock lock(mutex_);
        if (++here_ == expected_) complete_.notify_all();
        return complete_.wait_for(lock, patience, [this] { return here_ >= expected_; });
    }

  private:
    std::size_t expected_, here_ = 0;
    std::mutex mutex_;
    std::condition_variable complete_;
};

}  // namespace

SerialProducts::SerialProducts() : before_(product_threads() == nullptr ? 0 : product_threads()(1)) {}

SerialProducts::~SerialProducts() {
    if (product_threads() != nullptr) product_threads()(before_);
}

void make_pool_products_serial() {
    auto* const pool = executorch::extension::threadpool::get_threadpool();
    const std::size_t threads = pool == nullptr ? 0 : pool->get_thread_count();
    if (product_threads() == nullptr || threads < 2) return;
    Meeting meeting(threads);
    const auto caller = std::this_thread::get_id();
    const auto task = [&](std::size_t) {
        // After the meeting no thread comes again: each of them has had one task.
        if (meeting.wait() && std::this_thread::get_id() != caller) product_threads()(1);
    };
    pool->run(task, threads);
}

}  // namespace torchchat

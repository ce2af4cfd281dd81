// A pool of std::threads with what kernels use of XLA's.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace distaff {

class StdPool {
 public:
  explicit StdPool(int count) {
    for (int i = 0; i < count; ++i) threads_.emplace_back([this] { work(); });
  }
  ~StdPool() {
    {
      const std::lock_guard lock(mutex_);
      ending_ = true;
    }
    changed_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  // What a kernel is given: copied freely, as XLA's is.
  struct Handle {
    StdPool* pool;
    int64_t num_threads() const { return static_cast<int64_t>(pool->threads_.size()); }
    void Schedule(std::function<void()> task) const {
      {
        const std::lock_guard lock(pool->mutex_);
        pool->tasks_.push_back(std::move(task));
      }
      pool->changed_.notify_one();
    }
  };
  Handle handle() { return {this}; }

 private:
  void work() {
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [this] { return ending_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      const auto task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      task();
      lock.lock();
    }
  }

  std::vector<std::thread> threads_;
  std::deque<std::function<void()>> tasks_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool ending_ = false;
};

}  // namespace distaff

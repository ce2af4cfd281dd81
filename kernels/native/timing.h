// How often each kernel ran and how long it took: two looks at the clock a call, always on.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

namespace distaff {

struct Timer {
  explicit Timer(std::string kernel) : name(std::move(kernel)) { all().push_back(this); }

  static std::vector<Timer*>& all() {
    static std::vector<Timer*> timers;
    return timers;
  }

  std::string name;
  std::atomic<int64_t> calls{0}, nanoseconds{0};
};

// Counts the time from its construction to its end for a timer.
class Timed {
 public:
  explicit Timed(Timer& timer) : timer_(timer), began_(std::chrono::steady_clock::now()) {}
  ~Timed() {
    const auto spent = std::chrono::steady_clock::now() - began_;
    timer_.calls.fetch_add(1, std::memory_order_relaxed);
    timer_.nanoseconds.fetch_add(std::chrono::duration_cast<std::chrono::nanoseconds>(spent).count(),
                                 std::memory_order_relaxed);
  }
  Timed(const Timed&) = delete;

 private:
  Timer& timer_;
  std::chrono::steady_clock::time_point began_;
};

}  // namespace distaff

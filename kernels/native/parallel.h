// Splitting a kernel's work over XLA's own intra-op thread pool.
//
// Work is cut into more chunks than there are threads, and whoever is free takes the next one. The calling thread works
// too, so a helper that wakes late (or never, on a busy machine) costs nothing but its share.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <utility>

#include "xla/ffi/api/ffi.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace distaff {

inline void relax_cpu() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Threads {
 public:
  explicit Threads(xla::ffi::ThreadPool pool) : pool_(pool), count_(static_cast<int>(pool.num_threads())) {}

  // How many threads may work at the same time, the caller included.
  int count() const { return count_ < 1 ? 1 : count_; }

  // Calls work(i) for every i in [0, chunks), on several threads, and returns when all calls are done.
  template <typename Work>
  void run(int64_t chunks, Work&& work) {
    if (chunks <= 1 || count() == 1) {
      for (int64_t i = 0; i < chunks; ++i) work(i);
      return;
    }
    struct Shared {
      std::atomic<int64_t> next{0};
      std::atomic<int64_t> done{0};
    };
    // Helpers may look at the counters after run() has returned; they touch `work` only while a chunk is theirs.
    auto shared = std::make_shared<Shared>();
    auto* body = &work;
    auto drain = [shared, body, chunks] {
      for (int64_t i; (i = shared->next.fetch_add(1, std::memory_order_relaxed)) < chunks;) {
        (*body)(i);
        shared->done.fetch_add(1, std::memory_order_release);
      }
    };
    const int64_t helpers = std::min<int64_t>(count() - 1, chunks - 1);
    for (int64_t i = 0; i < helpers; ++i) pool_.Schedule(decltype(drain)(drain));
    drain();
    for (int spins = 0; shared->done.load(std::memory_order_acquire) < chunks; ++spins) {
      if (spins < 4096) {
        relax_cpu();
      } else {
        std::this_thread::yield();  // the thread of the last chunk has lost its core
      }
    }
  }

 private:
  xla::ffi::ThreadPool pool_;
  int count_;
};

}  // namespace distaff

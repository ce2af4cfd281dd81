// Splitting a kernel's work over XLA's own intra-op thread pool.
//
// Work is cut into more chunks than there are threads. Each thread has a range of chunks and takes them in order (so
// that memory is read in long runs); whoever is done takes from the ranges of others. The calling thread works too, so a
// helper that wakes late (or never, on a busy machine) costs nothing but its share.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

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

// `Pool` is a handle with `num_threads()` and `Schedule(function)`: XLA's, or that of the native tests.
template <typename Pool>
class BasicThreads {
 public:
  explicit BasicThreads(Pool pool) : pool_(pool), count_(static_cast<int>(pool.num_threads())) {}

  // How many threads may work at the same time, the caller included.
  int count() const { return count_ < 1 ? 1 : count_; }

  // Calls work(i) for every i in [0, chunks), on several threads, and returns when all calls are done.
  template <typename Work>
  void run(int64_t chunks, Work&& work) {
    if (chunks <= 1 || count() == 1) {
      for (int64_t i = 0; i < chunks; ++i) work(i);
      return;
    }
    // Helpers may look at this after run() has returned; they touch `work` only while a chunk is theirs.
    struct Shared {
      struct alignas(64) Range {
        std::atomic<int64_t> next;
        int64_t end;
      };
      Shared(int64_t chunks, int64_t threads) : ranges(threads) {
        for (int64_t i = 0; i < threads; ++i) {
          ranges[i].next = chunks * i / threads;
          ranges[i].end = chunks * (i + 1) / threads;
        }
      }
      std::vector<Range> ranges;
      std::atomic<int64_t> joined{1};
      alignas(64) std::atomic<int64_t> done{0};
    };
    const int64_t threads = std::min<int64_t>(count(), chunks);
    auto shared = std::make_shared<Shared>(chunks, threads);
    auto* body = &work;
    const auto help = [shared, body, threads](int64_t own) {
      int64_t done = 0;  // counted for all at the end: a counter that threads share costs more than a small chunk
      for (int64_t offset = 0; offset < threads; ++offset) {
        auto& range = shared->ranges[(own + offset) % threads];
        for (int64_t i; (i = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end; ++done) (*body)(i);
      }
      shared->done.fetch_add(done, std::memory_order_release);
    };
    for (int64_t i = 1; i < threads; ++i) {
      pool_.Schedule([shared, help] { help(shared->joined.fetch_add(1, std::memory_order_relaxed)); });
    }
    help(0);
    for (int spins = 0; shared->done.load(std::memory_order_acquire) < chunks; ++spins) {
      if (spins < 4096) {
        relax_cpu();
      } else {
        std::this_thread::yield();  // the thread of the last chunk has lost its core
      }
    }
  }

 private:
  Pool pool_;
  int count_;
};

using Threads = BasicThreads<xla::ffi::ThreadPool>;

}  // namespace distaff

// Every chunk is worked on once, whatever the threads do, and by callers at the same time.
#include <atomic>
#include <cstdio>
#include <thread>
#include <vector>

#include "parallel.h"
#include "std_pool.h"

namespace distaff {

int test_threads() {
  StdPool pool(3);
  std::atomic<int> wrong{0};
  const auto use = [&] {
    BasicThreads threads(pool.handle());
    for (int64_t chunks = 0; chunks < 200; ++chunks) {
      std::vector<int> counts(chunks, 0);  // not atomic: two threads in one chunk would be a race
      threads.run(chunks, [&](int64_t i) { ++counts[i]; });
      for (const int count : counts) wrong += count != 1;
    }
  };
  std::thread other(use);
  use();
  other.join();
  if (wrong != 0) std::printf("threads: %d chunks not run once\n", wrong.load());
  return wrong;
}

}  // namespace distaff

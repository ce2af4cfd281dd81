// parallel.h: every chunk is worked on once, whatever the threads do, and by callers at the same time.
#include <thread>
#include <vector>

#include "parallel.h"
#include "std_pool.h"
#include "threads.h"

int main() {
  distaff::StdPool pool(3);
  const auto use = [&] {
    distaff::BasicThreads threads(pool.handle());
    for (int chunks = 0; chunks < 200; ++chunks) {
      std::vector<int> counts(chunks, 0);  // not atomic: two threads in one chunk would be a race
      threads.run(chunks, [&](int64_t i) { ++counts[i]; });
      for (const int count : counts) CHECK(count == 1, "a chunk of %d ran %d times", chunks, count);
    }
  };
  std::thread other(use);
  use();
  other.join();
}

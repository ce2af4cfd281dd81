// Threads for kernels in tests: as kernels/native/parallel.h has them, but made for each call.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

struct TestThreads {
  int threads;

  int count() const { return threads; }

  template <class Work>
  void run(int64_t chunks, Work&& work) {
    std::atomic<int64_t> next{0};
    const auto drain = [&] {
      for (int64_t i; (i = next.fetch_add(1)) < chunks;) work(i);
    };
    std::vector<std::thread> helpers;
    for (int i = 1; i < threads; ++i) helpers.emplace_back(drain);
    drain();
    for (std::thread& helper : helpers) helper.join();
  }
};

#define CHECK(condition, ...)                                                 \
  do {                                                                        \
    if (!(condition)) {                                                       \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition);    \
      std::fprintf(stderr, __VA_ARGS__);                                      \
      std::fputc('\n', stderr);                                               \
      std::exit(1);                                                           \
    }                                                                         \
  } while (false)

// Runs the native kernels on random calls, with memory of exactly the size that they may touch. Sanitizers do most of
// the checking; results are compared with plain loops too.
#include <cstdio>

namespace distaff {
int test_threads();
int test_matmul();
}  // namespace distaff

int main() {
  const int wrong = distaff::test_threads() + distaff::test_matmul();
  std::printf("%d wrong\n", wrong);
  return wrong == 0 ? 0 : 1;
}

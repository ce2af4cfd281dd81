// The FFI target distaff_roofline: runs one of the loops of roofline.h on one thread or all. The result is only there so
// that the work is done; benchmarks take its time.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "parallel.h"
#include "registry.h"
#include "roofline_driver.h"

namespace distaff {

namespace ffi = xla::ffi;

namespace {

// Reads `data` if rounds is 0, or else multiplies with what its first four bytes hold.
ffi::Error run(ffi::ThreadPool pool, ffi::AnyBuffer data, ffi::Result<ffi::Buffer<ffi::F32>> out, int32_t kind,
               int64_t rounds, bool one_thread) {
  if (kind < 0 || kind > 2 || rounds < 0 || out->element_count() != 1) {
    return ffi::Error::InvalidArgument("distaff_roofline: kind is 0 to 2, rounds not negative, the result one float32");
  }
  int32_t word;
  if (data.size_bytes() < sizeof word) return ffi::Error::InvalidArgument("distaff_roofline: data is at least 4 bytes");
  const RooflineKernels& kernels = roofline_kernels(cpu_level());
  const auto* bytes = static_cast<const uint8_t*>(data.untyped_data());
  std::memcpy(&word, bytes, sizeof word);
  const int64_t size = static_cast<int64_t>(data.size_bytes()) / 256 * 256;
  constexpr int64_t kChunk = 256 * 1024, kRoundsAtOnce = 64 * 1024;
  const int64_t total_work = rounds > 0 ? rounds : size, at_once = rounds > 0 ? kRoundsAtOnce : kChunk;
  const int64_t chunks = (total_work + at_once - 1) / at_once;
  std::atomic<float> total{0};
  const auto work = [&](int64_t i) {
    const float found = rounds > 0 ? kernels.multiply(kind, std::min(kRoundsAtOnce, rounds - i * kRoundsAtOnce), word)
                                   : kernels.read(bytes + i * kChunk, std::min(kChunk, size - i * kChunk));
    total.fetch_add(found, std::memory_order_relaxed);
  };
  if (!one_thread) Threads(pool).run(chunks, work);
  for (int64_t i = 0; one_thread && i < chunks; ++i) work(i);
  out->typed_data()[0] = total;
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(distaff_roofline, run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int32_t>("kind")
                                  .Attr<int64_t>("rounds")
                                  .Attr<bool>("one_thread"));
DISTAFF_REGISTER(distaff_roofline);

}  // namespace distaff

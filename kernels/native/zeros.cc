// The FFI target distaff_zeros: memory that will be read in random places. With pages of 4 KiB a good part of that time
// goes into translating addresses, so the system is asked for huge ones, before it gives any.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "parallel.h"
#include "registry.h"

namespace distaff {

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;

// Asks for huge pages where they fit whole. A system without them gives others, which hold the same.
void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  const auto address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage, end = (address + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

ffi::Error run(ffi::ThreadPool pool, ffi::Result<ffi::AnyBuffer> out) {
  auto* data = static_cast<char*>(out->untyped_data());
  const auto bytes = static_cast<int64_t>(out->size_bytes());
  prefer_huge_pages(data, bytes);
  Threads(pool).run((bytes + kHugePage - 1) / kHugePage, [&](int64_t i) {
    memset(data + i * kHugePage, 0, std::min(kHugePage, bytes - i * kHugePage));
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(distaff_zeros, run, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Ret<ffi::AnyBuffer>());
DISTAFF_REGISTER(distaff_zeros);

}  // namespace distaff

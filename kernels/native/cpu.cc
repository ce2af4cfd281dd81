#include "cpu.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace distaff {
namespace {

constexpr const char* kNames[] = {"generic", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"};

#if defined(__x86_64__)
// Linux hands out the tile registers' state only to those who ask.
bool amx_allowed() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool has_amx() {
  unsigned a = 7, b = 0, c = 0, d = 0;
  asm volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
  return (d & kBf16) && (d & kTile) && (d & kInt8);
}
#endif

CpuLevel detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return CpuLevel::kGeneric;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return CpuLevel::kAvx2;
  }
  if (!__builtin_cpu_supports("avx512vnni")) return CpuLevel::kAvx512;
  if (!__builtin_cpu_supports("avx512bf16")) return CpuLevel::kAvx512Vnni;
  if (!has_amx() || !amx_allowed()) return CpuLevel::kAvx512Bf16;
  return CpuLevel::kAmx;
#else
  return CpuLevel::kGeneric;
#endif
}

CpuLevel allowed() {
  const CpuLevel found = detect();
  const char* wanted = std::getenv("DISTAFF_CPU_LEVEL");
  if (wanted == nullptr) return found;
  for (int level = 0; level <= static_cast<int>(found); ++level) {
    if (std::strcmp(wanted, kNames[level]) == 0) return static_cast<CpuLevel>(level);
  }
  return found;
}

}  // namespace

CpuLevel cpu_level() {
  static const CpuLevel level = allowed();
  return level;
}

std::vector<const char*> cpu_feature_names() {
  return {kNames, kNames + static_cast<int>(cpu_level()) + 1};
}

}  // namespace distaff

// What this processor can do. Kernels are compiled once for each level (with target attributes) and chosen at run time.
//
// The environment variable DISTAFF_CPU_LEVEL (generic, avx2, avx512, avx512_vnni, avx512_bf16, amx) lowers the level, so
// that a test can run the code of an older processor.
#pragma once

#include <vector>

namespace distaff {

enum class CpuLevel {
  kGeneric,     // plain C++, whatever the compiler makes of it
  kAvx2,        // AVX2, FMA, F16C
  kAvx512,      // F, BW, DQ, VL
  kAvx512Vnni,  // and VNNI
  kAvx512Bf16,  // and BF16
  kAmx,         // and AMX tiles for BF16 and INT8
};

// The highest level that processor, operating system and DISTAFF_CPU_LEVEL allow; read once.
CpuLevel cpu_level();

// Names of the levels up to cpu_level(), lowest first.
std::vector<const char*> cpu_feature_names();

}  // namespace distaff

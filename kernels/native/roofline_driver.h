// Which loops of roofline.h a processor runs.
#pragma once

#include "cpu.h"
#include "roofline.h"

namespace distaff {

inline const RooflineKernels& roofline_kernels(CpuLevel level) {
#if defined(__x86_64__)
  constexpr const RooflineKernels* kLevels[] = {&kRooflineGeneric,    &kRooflineAvx2,       &kRooflineAvx512,
                                                &kRooflineAvx512Vnni, &kRooflineAvx512Bf16, &kRooflineAmx};
  return *kLevels[static_cast<int>(level)];
#else
  (void)level;
  return kRooflineGeneric;
#endif
}

}  // namespace distaff

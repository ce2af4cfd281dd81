// AMX: eight tile registers of up to 16 rows of 64 bytes, and their products. Registers are named by constants.
#pragma once

#include "level.h"

namespace distaff {
namespace {

struct MatrixUnit {
  static constexpr int kRows = 16;

  // Registers 0 to 4 have `rows` rows, 5 to 7 have 16; all become zero.
  static void configure(int64_t rows) {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {0, 0, 0, 0, 0, 16, 16, 16};
    } config;
    for (int i = 0; i < 5; ++i) config.rows[i] = static_cast<uint8_t>(rows);
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  static void release() { asm volatile("tilerelease"); }

  // (GCC's intrinsics paste the text of a register's number, so a template's constant cannot name one.)
  template <int kTile>
  static void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kTile>
  static void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kSum, int kA, int kB>
  static void dot_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kA), "i"(kB));
  }
  // A is signed and B unsigned.
  template <int kSum, int kA, int kB>
  static void dot_int8() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kA), "i"(kB));
  }
};

}  // namespace
}  // namespace distaff

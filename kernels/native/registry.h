// The list of FFI handlers that this module offers to Python: a kernel's file adds itself with DISTAFF_REGISTER.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace distaff {

using Handler = std::pair<std::string, XLA_FFI_Handler*>;

inline std::vector<Handler>& handlers() {
  static std::vector<Handler> all;
  return all;
}

struct Registration {
  Registration(const char* name, XLA_FFI_Handler* handler) { handlers().emplace_back(name, handler); }
};

}  // namespace distaff

// `symbol` is what XLA_FFI_DEFINE_HANDLER_SYMBOL defined; its name is also the target's.
#define DISTAFF_REGISTER(symbol) static const ::distaff::Registration symbol##_registration(#symbol, symbol)

// Memory that a thread keeps from call to call, so that kernels do not allocate.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace distaff {

class Scratch {
 public:
  // At least `size` bytes, aligned to a cache line, with anything in them; what an earlier call returned is gone.
  template <typename T>
  T* get(int64_t size) {
    if (size > size_) {
      memory_.reset();
      size_ = size + size / 4;
      memory_.reset(static_cast<std::byte*>(::operator new(size_, std::align_val_t{kAlignment})));
    }
    return reinterpret_cast<T*>(memory_.get());
  }

 private:
  static constexpr std::size_t kAlignment = 64;
  struct Free {
    void operator()(std::byte* memory) const { ::operator delete(memory, std::align_val_t{kAlignment}); }
  };
  std::unique_ptr<std::byte, Free> memory_;
  int64_t size_ = 0;
};

}  // namespace distaff

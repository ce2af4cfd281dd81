// The FFI handlers of sampling: rows of logits are shared out to threads.
#include "sampling.h"

#include <algorithm>
#include <optional>
#include <string>

#include "parallel.h"
#include "registry.h"
#include "sampling_rows.h"
#include "timing.h"
#include "xla/ffi/api/ffi.h"

namespace distaff::sampling {
namespace {

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;

constexpr int kFloats = 7, kInts = 4;  // parameters of a row, as in SamplingRows

Timer timer("sampling");

ffi::Error bad(const char* what) { return ffi::Error::InvalidArgument(std::string("sampling: ") + what); }

// Calls work(row, memory) for every row of logits.
template <class Work>
ffi::Error each_row(ffi::ThreadPool pool, Floats logits, int64_t other_rows, Work&& work) {
  const Timed timed(timer);
  const auto shape = logits.dimensions();
  if (shape.size() != 2 || shape[1] < 1) return bad("logits must be [S, V]");
  if (shape[0] != other_rows) return bad("there are not as many rows of one argument as of another");
  const Kernels& kernels = kernels_of(cpu_level());
  Threads threads(pool);
  threads.run(shape[0], [&](int64_t row) {
    thread_local std::optional<Row> memory;
    thread_local int64_t size = 0;
    if (size != shape[1]) memory.emplace(kernels, size = shape[1]);
    work(row, *memory, logits.typed_data() + row * shape[1]);
  });
  return ffi::Error::Success();
}

ffi::Error greedy(ffi::ThreadPool pool, Floats logits, ffi::Result<Ints> tokens) {
  return each_row(pool, logits, tokens->element_count(), [&](int64_t i, Row& row, const float* mine) {
    tokens->typed_data()[i] = row.greedy(mine);
  });
}

ffi::Error draw(ffi::ThreadPool pool, Floats logits, Floats floats, Ints ints, ffi::Result<Ints> tokens) {
  const int64_t count = tokens->element_count();
  if (static_cast<int64_t>(floats.element_count()) != count * kFloats ||
      static_cast<int64_t>(ints.element_count()) != count * kInts) {
    return bad("parameters must be float32 [S, 7] and int32 [S, 4]");
  }
  return each_row(pool, logits, count, [&](int64_t i, Row& row, const float* mine) {
    const float* f = floats.typed_data() + i * kFloats;
    const Parameters parameters{f[0], f[1], f[2], f[6], ints.typed_data()[i * kInts + 2]};
    tokens->typed_data()[i] = row.draw(mine, parameters);
  });
}

ffi::Error logprobs(ffi::ThreadPool pool, Floats logits, Ints tokens, ffi::Result<Floats> logprob,
                    ffi::Result<Ints> rank, ffi::Result<Floats> top_logprobs, ffi::Result<Ints> top_tokens) {
  const auto shape = top_tokens->dimensions();
  if (shape.size() != 2 || logits.dimensions().size() != 2 || shape[1] > logits.dimensions()[1]) {
    return bad("more top tokens are wanted than there are");
  }
  const int64_t top = shape[1], size = logits.dimensions()[1];
  if (logprob->element_count() != tokens.element_count() || rank->element_count() != tokens.element_count() ||
      top_logprobs->element_count() != top_tokens->element_count()) {
    return bad("results of log-probabilities do not fit");
  }
  return each_row(pool, logits, tokens.element_count(), [&](int64_t i, Row& row, const float* mine) {
    const int32_t token = static_cast<int32_t>(std::clamp<int64_t>(tokens.typed_data()[i], 0, size - 1));
    row.logprobs(mine, token, top, logprob->typed_data() + i, rank->typed_data() + i,
                 top_logprobs->typed_data() + i * top, top_tokens->typed_data() + i * top);
  });
}

}  // namespace
}  // namespace distaff::sampling

namespace {
namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;

XLA_FFI_DEFINE_HANDLER_SYMBOL(distaff_greedy_tokens, distaff::sampling::greedy,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Ret<Ints>());
DISTAFF_REGISTER(distaff_greedy_tokens);

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    distaff_draw_tokens, distaff::sampling::draw,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<Floats>().Arg<Ints>().Ret<Ints>());
DISTAFF_REGISTER(distaff_draw_tokens);

XLA_FFI_DEFINE_HANDLER_SYMBOL(distaff_token_logprobs, distaff::sampling::logprobs,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()    // logits [S, V]
                                  .Arg<Ints>()      // tokens [S]
                                  .Ret<Floats>()    // log-probabilities [S]
                                  .Ret<Ints>()      // ranks [S]
                                  .Ret<Floats>()    // [S, top]
                                  .Ret<Ints>());    // [S, top]
DISTAFF_REGISTER(distaff_token_logprobs);
}  // namespace

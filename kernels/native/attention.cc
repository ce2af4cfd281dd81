// The FFI handlers of paged attention: checks a call's buffers and hands it to the kernels of this processor.
#include "attention.h"

#include <cstring>
#include <optional>
#include <string>

#include "attention_plan.h"
#include "parallel.h"
#include "registry.h"
#include "timing.h"
#include "xla/ffi/api/ffi.h"

namespace distaff::attention {
namespace {

namespace ffi = xla::ffi;
using Buffer = ffi::AnyBuffer;

std::string shape(const Buffer& buffer) {
  std::string text = "[";
  for (int64_t d : buffer.dimensions()) {
    if (text.size() > 1) text += ',';
    text += std::to_string(d);
  }
  return text + "]";
}

std::optional<Storage> storage_of(const Buffer& buffer) {
  const ffi::DataType type = buffer.element_type();
  if (type == ffi::F32) return Storage::kFloat32;
  if (type == ffi::BF16 || type == ffi::U16) return Storage::kBfloat16;
  if (type == ffi::S8) return Storage::kInt8;
  return std::nullopt;
}

const float* floats(const Buffer& buffer) {
  return buffer.element_count() == 0 ? nullptr : buffer.typed_data<float>();
}

// What keeps the indices of a batch from being followed, or "".
std::string wrong_index(const Call& call, int64_t num_pages, int64_t table_positions) {
  if (call.starts[0] != 0) return "starts do not begin at 0";
  for (int64_t r = 0; r < call.requests; ++r) {
    if (call.starts[r + 1] < call.starts[r]) return "starts fall";
  }
  const int64_t live = call.starts[call.requests], slots = num_pages * call.page_size;
  if (live > call.tokens) return "starts go past the tokens";
  const int64_t most = std::min(call.pages_per_request * call.page_size, table_positions);
  for (int64_t t = 0; t < live; ++t) {
    if (call.slots[t] < 0 || call.slots[t] >= slots) return "a slot is outside of the pool";
    if (call.positions[t] < 0 || call.positions[t] >= most) return "a position is past the tables";
  }
  for (int64_t r = 0; r < call.requests; ++r) {
    if (call.starts[r + 1] == call.starts[r]) continue;
    const int64_t first = call.starts[r], last = call.starts[r + 1] - 1;
    if (call.positions[last] - call.positions[first] != last - first) return "positions of a request are not in a row";
    const int64_t pages = call.positions[last] / call.page_size + 1;
    const int32_t* table = call.tables + r * call.pages_per_request;
    bool inside = true;
    for (int64_t i = 0; i < pages; ++i) inside &= table[i] >= 0 && table[i] < num_pages;
    if (!inside) return "a page is outside of the pool";
  }
  return "";
}

ffi::Error bad(std::string message) { return ffi::Error::InvalidArgument("paged attention: " + message); }

Timer timer("paged_attention");

struct Options {
  float scale, softcap;
  int64_t window;
  bool interleaved;
};

ffi::Error run(ffi::ThreadPool pool, Buffer q, Buffer k, const Buffer* v, Buffer k_pages, const Buffer* v_pages,
               Buffer layer, Buffer positions, Buffer slots, Buffer starts, Buffer tables, Buffer slopes, Buffer sinks,
               Buffer cosines, Buffer sines, Options options, Buffer output, Buffer new_k, const Buffer* new_v) {
  const Timed timed(timer);
  const Buffer& value_pages = v_pages == nullptr ? k_pages : *v_pages;
  const auto keys = k_pages.dimensions(), values = value_pages.dimensions(), queries = q.dimensions();
  if (queries.size() != 3 || keys.size() != 5 || values.size() != 5 || tables.dimensions().size() != 2 || starts.element_count() < 1) {
    return bad("q" + shape(q) + ", k_pages" + shape(k_pages) + ", tables" + shape(tables) + " have wrong ranks");
  }
  const auto q_type = storage_of(q), k_type = storage_of(k), v_type = storage_of(v == nullptr ? k : *v),
             keys_type = storage_of(k_pages), values_type = storage_of(value_pages);
  if (!q_type || !k_type || !v_type || !keys_type || !values_type) {
    return bad("only float32 and bfloat16 are served, and int8 in pools");
  }
  if (q_type == Storage::kInt8 || k_type == Storage::kInt8 || v_type == Storage::kInt8) return bad("rows in int8");
  if ((keys_type == Storage::kInt8) != (values_type == Storage::kInt8)) return bad("one pool alone is int8");
  Call call{};
  call.tokens = queries[0];
  call.requests = static_cast<int64_t>(starts.element_count()) - 1;
  call.heads = static_cast<int>(queries[1]);
  call.kv_heads = static_cast<int>(keys[3]);
  call.page_size = static_cast<int>(keys[2]);
  call.pages_per_request = tables.dimensions()[1];
  const int64_t beside = keys_type == Storage::kInt8 ? 4 : 0;  // bytes after a head's values
  const int64_t key_size = keys[4] - beside, value_size = values.back() - beside;
  if (key_size < 1 || value_size < 1 || key_size > kMostValues || value_size > kMostValues) {
    return bad("heads of 1 to " + std::to_string(kMostValues) + " values are served");
  }
  const int64_t rows = call.tokens * call.kv_heads, pool_rows = keys[1] * keys[2] * keys[3];
  const bool fits = values[0] == keys[0] && values[1] == keys[1] && values[2] == keys[2] &&
                    values[3] == keys[3] && queries[2] == key_size && call.kv_heads > 0 && call.page_size > 0 &&
                    call.heads % call.kv_heads == 0 && static_cast<int64_t>(k.element_count()) == rows * key_size &&
                    (v == nullptr || static_cast<int64_t>(v->element_count()) == rows * value_size) &&
                    static_cast<int64_t>(output.element_count()) == call.tokens * call.heads * value_size &&
                    static_cast<int64_t>(positions.element_count()) >= call.tokens &&
                    static_cast<int64_t>(slots.element_count()) >= call.tokens &&
                    tables.dimensions()[0] == call.requests && layer.element_count() == 1;
  if (!fits) return bad("q" + shape(q) + ", k" + shape(k) + ", k_pages" + shape(k_pages) + " and the batch do not fit");
  const int64_t index = layer.typed_data<int32_t>()[0];
  if (index < 0 || index >= keys[0]) return bad("layer " + std::to_string(index) + " of " + std::to_string(keys[0]));
  if (new_k.untyped_data() != k_pages.untyped_data() ||
      (new_v != nullptr && new_v->untyped_data() != v_pages->untyped_data())) {
    return bad("the pools are not updated in place");
  }
  const auto at_layer = [&](Buffer pages, Storage storage, int64_t size) {
    Pool pool{pages.untyped_data(), storage, static_cast<int>(size)};
    pool.data = static_cast<char*>(pool.data) + index * pool_rows * pool.head_bytes();
    return pool;
  };
  call.positions = positions.typed_data<int32_t>();
  call.slots = slots.typed_data<int32_t>();
  call.starts = starts.typed_data<int32_t>();
  call.tables = tables.typed_data<int32_t>();
  call.q = {q.untyped_data(), *q_type};
  call.k = {k.untyped_data(), *k_type};
  call.v = {v == nullptr ? nullptr : v->untyped_data(), *v_type};
  call.keys = at_layer(k_pages, *keys_type, key_size);
  call.values = at_layer(value_pages, *values_type, value_size);
  call.output = output.untyped_data();
  call.scale = options.scale;
  call.softcap = options.softcap;
  call.window = options.window;
  call.interleaved = options.interleaved;
  call.slopes = floats(slopes);
  call.sinks = floats(sinks);
  call.cosines = floats(cosines);
  call.sines = floats(sines);
  int64_t table_positions = INT64_MAX;
  if (call.cosines != nullptr) {
    if (cosines.dimensions().size() != 2) return bad("rotary tables" + shape(cosines) + " are not [P, size]");
    table_positions = cosines.dimensions()[0];
    call.rotary_size = static_cast<int>(cosines.dimensions()[1]);
    if (call.rotary_size > key_size) return bad("rotary tables" + shape(cosines) + " are too wide");
    if (sines.element_count() != cosines.element_count()) return bad("the rotary tables differ in size");
  }
  if (std::string wrong = wrong_index(call, keys[1], table_positions); !wrong.empty()) return bad(wrong);

  Threads threads(pool);
  attend(call, kernels_of(cpu_level()), threads);
  const int64_t live = call.starts[call.requests], width = call.heads * value_size * (*q_type == Storage::kFloat32 ? 4 : 2);
  std::memset(static_cast<char*>(call.output) + live * width, 0, (call.tokens - live) * width);
  return ffi::Error::Success();
}

ffi::Error two_pools(ffi::ThreadPool pool, Buffer q, Buffer k, Buffer k_pages, Buffer layer, Buffer positions,
                     Buffer slots, Buffer starts, Buffer tables, Buffer slopes, Buffer sinks, Buffer cosines,
                     Buffer sines, Buffer v, Buffer v_pages, ffi::Result<Buffer> output, ffi::Result<Buffer> new_k,
                     ffi::Result<Buffer> new_v, float scale, float softcap, int32_t window, int32_t interleaved) {
  const Buffer returned = *new_v;
  return run(pool, q, k, &v, k_pages, &v_pages, layer, positions, slots, starts, tables, slopes, sinks, cosines, sines,
             {scale, softcap, window, interleaved != 0}, *output, *new_k, &returned);
}

ffi::Error one_pool(ffi::ThreadPool pool, Buffer q, Buffer k, Buffer k_pages, Buffer layer, Buffer positions,
                    Buffer slots, Buffer starts, Buffer tables, Buffer slopes, Buffer sinks, Buffer cosines,
                    Buffer sines, ffi::Result<Buffer> output, ffi::Result<Buffer> new_k, float scale, float softcap,
                    int32_t window, int32_t interleaved) {
  return run(pool, q, k, nullptr, k_pages, nullptr, layer, positions, slots, starts, tables, slopes, sinks, cosines,
             sines, {scale, softcap, window, interleaved != 0}, *output, *new_k, nullptr);
}

template <class Binding>
auto common_arguments(Binding binding) {
  return std::move(binding)
      .template Arg<Buffer>()   // q [T, H, D]
      .template Arg<Buffer>()   // k [T, KV, D]
      .template Arg<Buffer>()   // k_pages [L, P, page, KV, D]
      .template Arg<Buffer>()   // layer int32 []
      .template Arg<Buffer>()   // positions int32 [T]
      .template Arg<Buffer>()   // slots int32 [T]
      .template Arg<Buffer>()   // starts int32 [R + 1]
      .template Arg<Buffer>()   // tables int32 [R, NP]
      .template Arg<Buffer>()   // slopes float32 [H], or nothing
      .template Arg<Buffer>()   // sinks float32 [H], or nothing
      .template Arg<Buffer>()   // cosines float32 [P, size], or nothing
      .template Arg<Buffer>();  // sines float32 [P, size], or nothing
}

template <class Binding>
auto attributes(Binding binding) {
  return std::move(binding)
      .template Attr<float>("scale")
      .template Attr<float>("softcap")
      .template Attr<int32_t>("window")
      .template Attr<int32_t>("interleaved");
}

}  // namespace
}  // namespace distaff::attention

namespace {
namespace ffi = xla::ffi;

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    distaff_paged_attention, distaff::attention::two_pools,
    distaff::attention::attributes(distaff::attention::common_arguments(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>())
                                       .Arg<ffi::AnyBuffer>()    // v [T, KV, Dv]
                                       .Arg<ffi::AnyBuffer>()    // v_pages [L, P, page, KV, Dv]
                                       .Ret<ffi::AnyBuffer>()    // output [T, H, Dv]
                                       .Ret<ffi::AnyBuffer>()    // k_pages
                                       .Ret<ffi::AnyBuffer>()));  // v_pages
DISTAFF_REGISTER(distaff_paged_attention);

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    distaff_paged_attention_one_pool, distaff::attention::one_pool,
    distaff::attention::attributes(distaff::attention::common_arguments(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>())
                                       .Ret<ffi::AnyBuffer>()     // output [T, H, D]
                                       .Ret<ffi::AnyBuffer>()));  // k_pages
DISTAFF_REGISTER(distaff_paged_attention_one_pool);
}  // namespace

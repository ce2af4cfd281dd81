// Ragged paged attention on a CPU: what a call is, how it is cut into pieces of work, and the kernels that do a piece.
//
// A call writes the keys and values of a step's tokens into their pages and then attends with every token, causally.
// Requests with one new token are *decode* work, bound by reading their pages; longer ones are *prefill* work, small
// matrix products of a block of queries with blocks of keys and values. Both keep an online softmax (Milakov and
// Gimelshein 2018; FlashAttention, Dao et al. 2022), and long contexts of few decode requests are split over threads
// and merged (Flash-Decoding, Dao et al. 2023).
#pragma once

#include <stdint.h>

namespace distaff::attention {

enum class Storage { kFloat32, kBfloat16 };  // bfloat16 as its bits

// Rows of heads: a token's are one after the other.
struct Rows {
  const void* data;
  Storage storage;
};

// The pages of one layer: tokens of kv_heads rows of `size` values, page after page.
struct Pool {
  void* data;
  Storage storage;
  int size;
};

struct Call {
  int64_t tokens, requests;
  int heads, kv_heads, page_size;
  int64_t pages_per_request;
  const int32_t* positions;  // [tokens]
  const int32_t* slots;      // [tokens]
  const int32_t* starts;     // [requests + 1]
  const int32_t* tables;     // [requests, pages_per_request]
  Rows q, k, v;              // v.data is null where keys are values too
  Pool keys, values;
  void* output;  // [tokens, heads, values.size], stored as q is
  float scale;
  float softcap;        // 0: none
  int64_t window;       // 0: none
  const float* slopes;  // [heads] or null
  const float* sinks;   // [heads] or null
  const float* cosines;  // [positions, rotary_size] or null
  const float* sines;
  int rotary_size;
  bool interleaved;

  int groups() const { return heads / kv_heads; }
  // The first position that a query at `position` sees.
  int64_t first_seen(int64_t position) const {
    return window == 0 || position < window ? 0 : position + 1 - window;
  }
};

// The most query heads for each key-value head that decode kernels take; more of them make a matrix product.
constexpr int kDecodeGroups = 8;

// The widest key that a rotary embedding may be applied to.
constexpr int kMostTurned = 1024;

// `count` tokens of one request from `token` on, against the keys at positions begin .. end - 1.
struct Piece {
  int64_t request;
  int64_t token;
  int count;
  int head, heads;  // the query heads that it computes: for decode all, for prefill those of one key-value head
  int64_t begin, end;
  float* partial;  // if not null, results stay there for `merge` as [heads][2 + values.size]; only for one token
  int64_t cost;    // for the order of work
  bool decode;
};

struct Kernels {
  // Writes keys and values of tokens first .. end - 1 into their slots.
  void (*write)(const Call& call, int64_t first, int64_t end);
  // Floats of scratch, aligned to 64 bytes, that a prefill piece of `count` tokens or fewer needs, or any decode piece.
  int64_t (*scratch)(const Call& call, int count);
  void (*decode)(const Call& call, const Piece& piece, float* scratch);
  void (*prefill)(const Call& call, const Piece& piece, float* scratch);
  // The output of a split token from the partial results of `count` pieces like `piece`, one after the other.
  void (*merge)(const Call& call, const Piece& piece, float* partials, int count);
};

}  // namespace distaff::attention

namespace distaff {
namespace generic { extern const attention::Kernels kAttention; }
namespace avx2 { extern const attention::Kernels kAttention; }
namespace avx512 { extern const attention::Kernels kAttention; }
namespace avx512_bf16 { extern const attention::Kernels kAttention; }
}  // namespace distaff

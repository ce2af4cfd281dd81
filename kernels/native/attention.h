// Ragged paged attention on a CPU: what a call is, how it is cut into pieces of work, and the kernels that do a piece.
//
// A call writes the keys and values of a step's tokens into their pages and then attends with every token, causally.
// Requests with one new token are *decode* work, bound by reading their pages; longer ones are *prefill* work, small
// matrix products of a block of queries with blocks of keys and values. Both keep an online softmax (Milakov and
// Gimelshein 2018; FlashAttention, Dao et al. 2022), and long contexts of few decode requests are split over threads
// and merged (Flash-Decoding, Dao et al. 2023).
#pragma once

#include "level.h"

namespace distaff::attention {

// bfloat16 as its bits; int8 only in pools, where after a head's values comes what one step of them is, in float32.
enum class Storage { kFloat32, kBfloat16, kInt8 };

// Rows of heads: a token's are one after the other.
struct Rows {
  const void* data;
  Storage storage;
};

// The pages of one layer: tokens of kv_heads heads of `size` values, page after page.
struct Pool {
  void* data;
  Storage storage;
  int size;

  DISTAFF_INLINE int64_t head_bytes() const {
    return storage == Storage::kInt8 ? size + 4 : int64_t{size} * (storage == Storage::kFloat32 ? 4 : 2);
  }
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

  DISTAFF_INLINE int groups() const { return heads / kv_heads; }
  // The first position that a query at `position` sees.
  DISTAFF_INLINE int64_t first_seen(int64_t position) const {
    return window == 0 || position < window ? 0 : position + 1 - window;
  }
};

// The most query heads for each key-value head that decode kernels take; more of them make a matrix product.
constexpr int kDecodeGroups = 8;

// The most values of a head.
constexpr int kMostValues = 1024;

// `count` tokens of one request from `token` on, against the keys at positions begin .. end - 1.
struct Piece {
  int64_t request;
  int64_t token;
  int count;
  int head, heads;  // the query heads that it computes: for decode all, for prefill those of one key-value head
  int64_t begin, end;
  bool decode;
  int64_t cost;    // for the order of work
  float* partial;  // if not null, results stay there for `merge`, as [count][heads][2 + values.size]
};

struct Kernels {
  // Writes keys and values of tokens first .. end - 1 into their slots.
  void (*write)(const Call& call, int64_t first, int64_t end);
  // Floats of scratch, aligned to 64 bytes, that a piece needs.
  int64_t (*scratch)(const Call& call, const Piece& piece);
  // Does a piece, and asks for the first keys of the `next` one, or null.
  void (*attend)(const Call& call, const Piece& piece, const Piece* next, float* scratch);
  // The output of `count` pieces like `piece`, whose partial results lie one after the other.
  void (*merge)(const Call& call, const Piece& piece, int64_t count);
};

}  // namespace distaff::attention

namespace distaff {
extern const attention::Kernels kAttentionGeneric, kAttentionAvx2, kAttentionAvx512, kAttentionAvx512Vnni,
    kAttentionAvx512Bf16;
}  // namespace distaff

// Routed experts: tokens grouped by expert, and each group multiplied by its expert's record in the panels of gemm.h.
//
// A pair is a token and an expert that it chose. Pairs are sorted by expert, then by token. Two calls compute a layer:
//   1. each token is quantized once, its codes are copied to its pairs, and these are multiplied by gate and up;
//   2. the pairs' silu(gate) * up is quantized with the record of each pair's expert and multiplied by down; a token's
//      pairs are then added up in float32, in the order of its slots.
// torch computes silu(gate) * up in between, so it rounds as the reference does. A pair's outputs are those of a linear
// layer with its expert's record: they depend on no other token and not on the number of threads.
#pragma once

#include <omp.h>

#include <atomic>
#include <memory>
#include <vector>

#include "gemm_two_level.h"
#include "quantize.h"
#include "record.h"

namespace morphoquant {

// Each field is 8 bytes wide. M tokens, K input channels, N output channels, E experts, R modality rows.
struct ExpertsRequest {
  const void* x;  // first call: [M, K] of dtype; second: [pairs, K]; rows x_stride elements apart
  int64_t x_stride;
  int64_t dtype;
  int64_t tokens;           // M
  int64_t channels;         // K
  const int32_t* modality;  // [M]
  const void* ids;          // [M, slots]: experts; one outside [0, E) makes no pair
  int64_t wide_ids;         // whether they are int64, not int32
  int64_t slots;
  const float* slot_weights;  // [M, slots] in the second call, null in the first
  int64_t experts;            // E
  const uint8_t* activation;  // block of the one input, or of each expert, activation_stride bytes apart
  int64_t activation_stride;
  int64_t activation_bytes;     // room for a block; its header has its size
  const uint8_t* weight;        // block of each expert, weight_bytes long
  int64_t weight_bytes;
  const float* absorbed_bias;  // [E, R, N]
  int64_t rows;                // R
  int64_t outputs;             // N
  int64_t threads;
  // Written by the first call, read by the second
  int32_t* place;  // [M, slots]: the pair of a slot, or -1
  int32_t* token;  // [pairs]
  int32_t* start;  // [E + 1]: first pair of each expert, then the number of pairs
  void* y;         // first call: [pairs, N] of dtype; second: [M, N]
};

// Outputs that a thread adds up at a time.
constexpr int64_t kCombineOutputs = 512;

inline int64_t expert_of(const ExpertsRequest& r, int64_t slot) {
  const int64_t id = r.wide_ids ? static_cast<const int64_t*>(r.ids)[slot] : static_cast<const int32_t*>(r.ids)[slot];
  return id >= 0 && id < r.experts ? id : -1;
}

// Sorts the pairs by expert.
inline void sort_pairs(const ExpertsRequest& r) {
  std::fill(r.start, r.start + r.experts + 1, 0);
  for (int64_t slot = 0; slot < r.tokens * r.slots; ++slot) {
    const int64_t expert = expert_of(r, slot);
    if (expert >= 0) ++r.start[expert + 1];
  }
  for (int64_t expert = 0; expert < r.experts; ++expert) r.start[expert + 1] += r.start[expert];
  std::vector<int32_t> next(r.start, r.start + r.experts);
  for (int64_t slot = 0; slot < r.tokens * r.slots; ++slot) {
    const int64_t expert = expert_of(r, slot);
    r.place[slot] = expert < 0 ? -1 : next[expert]++;
    if (expert >= 0) r.token[r.place[slot]] = static_cast<int32_t>(slot / r.slots);
  }
}

// An expert's call, without its workspace; false if one of its blocks does not fit.
inline bool read_expert(const ExpertsRequest& r, int64_t expert, Call& c) {
  Request own{};
  own.x = r.x;
  own.x_stride = r.x_stride;
  own.dtype = r.dtype;
  own.tokens = r.start[expert + 1] - r.start[expert];
  own.channels = r.channels;
  own.activation = r.activation + expert * r.activation_stride;
  own.activation_bytes = reinterpret_cast<const int64_t*>(own.activation)[1];
  if (own.activation_bytes > r.activation_bytes) return false;
  own.weight = r.weight + expert * r.weight_bytes;
  own.weight_bytes = r.weight_bytes;
  own.absorbed_bias = r.absorbed_bias + expert * r.rows * r.outputs;
  own.rows = r.rows;
  own.outputs = r.outputs;
  // The pairs alone make enough units for the threads.
  own.threads = 1;
  return read(own, true, c);
}

// The calls of all experts that have pairs, their workspace, and their units of work.
class Group {
 public:
  // False if a block does not fit.
  bool read(const ExpertsRequest& r) {
    for (int64_t expert = 0; expert < r.experts; ++expert) {
      if (r.start[expert] == r.start[expert + 1]) continue;
      Call c;
      if (!read_expert(r, expert, c)) return false;
      if (!calls.empty() && (c.group_size != calls[0].group_size || c.two_level != calls[0].two_level)) return false;
      calls.push_back(c);
    }
    reserve(r);
    return true;
  }

  // The products that this thread takes from the queue.
  void multiply(WorkQueue& queue) const {
    for (Range taken = queue.take(); taken.begin < taken.end; taken = queue.take()) {
      size_t call = std::upper_bound(first_unit.begin(), first_unit.end(), taken.begin) - first_unit.begin() - 1;
      for (int64_t unit = taken.begin; unit < taken.end; ++call) {
        const int64_t end = std::min(taken.end, first_unit[call + 1]);
        gemm(calls[call], {unit - first_unit[call], end - first_unit[call]});
        unit = end;
      }
    }
  }

  std::vector<Call> calls;
  std::vector<int64_t> first_unit;  // of each call, then their number
  std::unique_ptr<float[]> products;  // [pairs, N] in the second call

 private:
  void reserve(const ExpertsRequest& r) {
    const int64_t pairs = r.start[r.experts], groups = pairs ? r.channels / calls[0].group_size : 0;
    codes_.reset(new int8_t[pairs * r.channels]);
    integers_.reset(new int32_t[pairs * (groups + 2)]);
    int32_t *token_row = integers_.get(), *modality = token_row + pairs, *offset = modality + pairs;
    if (r.slot_weights) products.reset(new float[pairs * r.outputs]);
    const int64_t y_size = r.outputs * element_size(r.dtype), x_size = r.x_stride * element_size(r.dtype);
    first_unit.push_back(0);
    int64_t pair = 0;
    for (Call& c : calls) {
      c.codes = codes_.get() + pair * r.channels;
      c.unsigned_codes = takes_bytes(c.two_level, c.tokens);
      c.token_row = token_row + pair;
      c.modality = modality + pair;
      c.offset = offset + pair * groups;
      c.y = static_cast<char*>(r.y) + pair * y_size;
      if (r.slot_weights) {
        c.x = static_cast<const char*>(r.x) + pair * x_size;
        c.y = products.get() + pair * r.outputs;
        c.y_dtype = kFloat32;
      }
      for (int64_t end = pair + c.tokens; pair < end; ++pair) modality[pair] = r.modality[r.token[pair]];
      first_unit.push_back(first_unit.back() + gemm_units(c));
    }
  }

  std::unique_ptr<int8_t[]> codes_;
  std::unique_ptr<int32_t[]> integers_;
};

// Copies a token's codes and offsets from the pair `from` to the pair of a slot; its expert may take code + 128.
inline void copy_codes(const ExpertsRequest& r, const Call& first, int64_t from, int64_t slot) {
  const int64_t pair = r.place[slot], expert = expert_of(r, slot), groups = r.channels / first.group_size;
  if (pair != from) {
    first.token_row[pair] = first.token_row[from];
    std::copy_n(first.offset + from * groups, groups, first.offset + pair * groups);
  }
  const int8_t flip = takes_bytes(first.two_level, r.start[expert + 1] - r.start[expert]) ? -128 : 0;
  const int8_t* codes = first.codes + from * r.channels;
  int8_t* copy = first.codes + pair * r.channels;
  for (int64_t k = 0; k < r.channels; ++k) copy[k] = codes[k] ^ flip;
}

// The first call's quantization: this thread's share of the tokens. Each token is quantized once, in the place of its
// last pair. False if a token's modality is not a row.
template <int64_t D>
inline bool quantize_tokens(const ExpertsRequest& r, const Group& group, int64_t thread, int64_t threads) {
  const Call& first = group.calls[0];
  Call own = first;
  own.unsigned_codes = false;
  for (int64_t token = r.tokens * thread / threads; token < r.tokens * (thread + 1) / threads; ++token) {
    const auto* x = static_cast<const typename Element<D>::Type*>(r.x) + token * r.x_stride;
    own.modality = r.modality + token;
    const int64_t row = token_row<D>(own, x, 0);
    if (row < 0) return false;
    int64_t last = (token + 1) * r.slots - 1;
    while (last >= token * r.slots && r.place[last] < 0) --last;
    if (last < token * r.slots) continue;
    const int64_t from = r.place[last];
    first.token_row[from] = static_cast<int32_t>(row);
    if (own.channel_order) {
      quantize_channels<D, false>(own, x, from, row, 0, r.channels);
    } else {
      quantize_channels<D, true>(own, x, from, row, 0, r.channels);
    }
    for (int64_t slot = token * r.slots; slot <= last; ++slot) {
      if (r.place[slot] >= 0) copy_codes(r, first, from, slot);
    }
  }
  return true;
}

// The second call's quantization, each expert's pairs with its record: this thread's share of them.
inline bool quantize_pairs(const Group& group, int64_t thread, int64_t threads) {
  bool valid = true;
  for (const Call& c : group.calls) {
    // Another thread begins at the next expert: most have fewer pairs than there are threads.
    thread = (thread + 1) % threads;
    valid = quantize(c, thread, threads) && valid;
  }
  return valid;
}

inline bool quantize_group(const ExpertsRequest& r, const Group& group, int64_t thread, int64_t threads) {
  if (r.slot_weights) return quantize_pairs(group, thread, threads);
  if (r.dtype == kFloat32) return quantize_tokens<kFloat32>(r, group, thread, threads);
  if (r.dtype == kBFloat16) return quantize_tokens<kBFloat16>(r, group, thread, threads);
  return quantize_tokens<kFloat16>(r, group, thread, threads);
}

// y = sum of slot weight * product over a token's slots, in their order: this thread's share.
template <int64_t D>
inline void combine_as(const ExpertsRequest& r, const float* products, int64_t thread, int64_t threads) {
  const int64_t parts = (r.outputs + kCombineOutputs - 1) / kCombineOutputs, units = r.tokens * parts;
  for (int64_t unit = units * thread / threads; unit < units * (thread + 1) / threads; ++unit) {
    const int64_t token = unit / parts, begin = unit % parts * kCombineOutputs;
    auto* y = static_cast<typename Element<D>::Type*>(r.y) + token * r.outputs;
    for (int64_t n = begin; n < std::min(begin + kCombineOutputs, r.outputs); n += 8) {
      __m256 sum = _mm256_setzero_ps();
      for (int64_t slot = token * r.slots; slot < (token + 1) * r.slots; ++slot) {
        if (r.place[slot] < 0) continue;
        const __m256 product = load_part<kFloat32>(products + r.place[slot] * r.outputs + n, r.outputs - n);
        sum = _mm256_fmadd_ps(_mm256_set1_ps(r.slot_weights[slot]), product, sum);
      }
      store_part<D>(y + n, sum, r.outputs - n);
    }
  }
}

inline void combine(const ExpertsRequest& r, const float* products, int64_t thread, int64_t threads) {
  if (r.dtype == kFloat32) return combine_as<kFloat32>(r, products, thread, threads);
  if (r.dtype == kBFloat16) return combine_as<kBFloat16>(r, products, thread, threads);
  combine_as<kFloat16>(r, products, thread, threads);
}

// Return codes as those of morphoquant_linear.
inline int run_experts(const ExpertsRequest& r) {
  if (!r.slot_weights) sort_pairs(r);
  Group group;
  if (!group.read(r)) return 2;
  std::atomic<bool> valid{true};
  WorkQueue queue(group.first_unit.back(), r.threads);
#pragma omp parallel num_threads(static_cast<int>(r.threads))
  {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    if (!group.calls.empty() && !quantize_group(r, group, thread, threads)) {
      valid.store(false, std::memory_order_relaxed);
    }
#pragma omp barrier
    if (valid.load(std::memory_order_relaxed)) {
      group.multiply(queue);
      if (r.slot_weights) {
#pragma omp barrier
        combine(r, group.products.get(), thread, threads);
      }
    }
  }
  return valid.load() ? 0 : 1;
}

}  // namespace morphoquant

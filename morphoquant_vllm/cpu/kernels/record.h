// The Request that Python passes, and its conversion to the kernels' Call.
//
// Each record is one block of bytes, so a call passes few tensors. A header of 8 integers describes the block; its
// fields follow, each at the next multiple of 64 bytes. cpu/layout.py writes both. Headers are compared with the
// tensors' sizes before the rest of a block is read.
#pragma once

#include <algorithm>

#include "call.h"

namespace morphoquant {

// Each field is 8 bytes wide.
struct Request {
  const void* x;  // [M, K] of dtype; rows x_stride elements apart
  int64_t x_stride;
  int64_t dtype;
  int64_t tokens;                  // M
  int64_t channels;                // K
  const int32_t* modality;         // [M]
  const uint8_t* activation;       // block of the activation record
  int64_t activation_bytes;
  int64_t threads;
  int8_t* codes;                   // [M, K], the output of act_quant; null in linear
  // Null in act_quant
  const uint8_t* weight;           // block of the weight record
  int64_t weight_bytes;
  const float* absorbed_bias;      // [R, N]
  int64_t rows;                    // R of absorbed_bias
  int64_t outputs;                 // N of absorbed_bias
  const void* bias;                // [N] of bias_dtype, or null
  int64_t bias_dtype;
  void* y;                         // [M, N] of dtype, contiguous
};

constexpr int64_t kHeader = 8;
constexpr int64_t kActivationMagic = 0x314143514d, kWeightMagic = 0x315457514d;  // "MQCA1", "MQWT1"
constexpr int64_t kLargest = int64_t{1} << 24;

inline int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Iterates over the fields of a block.
struct Parts {
  const uint8_t* at;
  template <class T>
  const T* next(int64_t count) {
    const auto* part = reinterpret_cast<const T*>(at);
    at += aligned(count * static_cast<int64_t>(sizeof(T)));
    return part;
  }
};

// Header of a block if its magic number, its size and its `sizes` dimensions are plausible, else null.
inline const int64_t* header(const uint8_t* block, int64_t bytes, int64_t magic, int sizes) {
  const auto* head = reinterpret_cast<const int64_t*>(block);
  if (bytes < kHeader * 8 || head[0] != magic || head[1] != bytes) return nullptr;
  for (int i = 2; i < 2 + sizes; ++i) {
    if (head[i] < 0 || head[i] > kLargest) return nullptr;
  }
  return head;
}

// Fields of the activation record; false if the block is not one for K channels.
inline bool read_activation(const Request& r, Call& c) {
  const int64_t* head = header(r.activation, r.activation_bytes, kActivationMagic, 5);
  if (!head || head[2] != r.channels || r.channels < 32 || r.channels % 32 || head[3] < 1) return false;
  c.rows = head[3];
  c.massive_sets = head[4];
  c.massive_channels = head[5];
  Parts parts{r.activation + kHeader * 8};
  c.inverse = parts.next<float>(c.rows * c.channels);
  c.centre = parts.next<float>(c.rows * c.channels);
  c.mask = parts.next<uint8_t>(c.rows * c.channels);
  c.gain = parts.next<float>(c.rows);
  c.channel_order = head[6] ? nullptr : parts.next<int32_t>(c.channels);
  c.massive_channel = parts.next<int32_t>(c.massive_sets * c.massive_channels);
  c.massive_low = parts.next<float>(c.massive_sets * c.massive_channels);
  c.massive_high = parts.next<float>(c.massive_sets * c.massive_channels);
  return parts.at - r.activation == r.activation_bytes;
}

// Fields of the weight record; false if the block is not one for K channels and N outputs.
inline bool read_weight(const Request& r, Call& c) {
  const int64_t* head = header(r.weight, r.weight_bytes, kWeightMagic, 5);
  if (!head || head[2] != r.channels || head[3] != r.outputs || r.rows != c.rows) return false;
  c.group_size = head[4];
  if ((c.group_size != 32 && c.group_size != 64 && c.group_size != 128) || r.channels % c.group_size) return false;
  const int64_t blocks = (r.outputs + kBlock - 1) / kBlock;
  Parts parts{r.weight + kHeader * 8};
  c.two_level = head[5] != 0;
  c.weight_bits = head[6];
  if (c.weight_bits != 4 && (c.weight_bits != 8 || c.two_level)) return false;
  c.weight = parts.next<uint8_t>(blocks * r.channels * 2 * c.weight_bits);
  const int64_t scales = blocks * (r.channels / c.group_size) * kBlock;
  c.scale = parts.next<uint8_t>(scales * (c.two_level ? 1 : 2));
  if (c.two_level) {
    c.channel_scale = parts.next<float>(blocks * kBlock);
    c.level_start = parts.next<int32_t>(blocks * kBlock);
  }
  return parts.at - r.weight == r.weight_bytes;
}

// False if a block does not fit the tensors' sizes.
inline bool read(const Request& r, bool multiply, Call& c) {
  c = Call{};
  c.x = r.x;
  c.x_stride = r.x_stride;
  c.dtype = r.dtype;
  c.tokens = r.tokens;
  c.channels = r.channels;
  c.modality = r.modality;
  c.codes = r.codes;
  c.threads = r.threads;
  if (!read_activation(r, c)) return false;
  if (!multiply) return true;
  c.absorbed_bias = r.absorbed_bias;
  c.bias = r.bias;
  c.bias_dtype = r.bias_dtype;
  c.outputs = r.outputs;
  c.y = r.y;
  c.y_dtype = r.dtype;
  return read_weight(r, c);
}

}  // namespace morphoquant

// The arguments of one call of the kernels: pointers into torch tensors. record.h fills them from Python's Request.
//
// M tokens, K input channels, N output channels, G group size along K, R modality rows, B sets of J massive intervals.
// K is a multiple of G, and G is one of the sizes that record.h accepts.
#pragma once

#include <cstdint>

namespace morphoquant {

enum Dtype : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct Call {
  const void* x;      // [M, K] of dtype; rows x_stride elements apart
  int64_t x_stride;
  int64_t dtype;      // of x
  int64_t tokens;     // M
  int64_t channels;   // K
  const int32_t* modality;  // [M]
  // Activation record
  const float* inverse;          // [R, K]
  const float* centre;           // [R, K]
  const uint8_t* mask;           // [R, K], 0 or 1
  const float* gain;             // [R]
  int64_t rows;                  // R
  const int32_t* channel_order;  // [K], or null if channels come in order
  const int32_t* massive_channel;  // [B, J]
  const float* massive_low;        // [B, J]
  const float* massive_high;       // [B, J]
  int64_t massive_sets;            // B
  int64_t massive_channels;        // J
  // Workspace; act_quant needs no sums
  int8_t* codes;       // [M, K], in permuted channel order
  bool unsigned_codes;  // whether they are stored as code + 128
  int32_t* token_row;  // [M]
  int32_t* offset;     // [M, K/G]: -8 * sum of the group's codes, -128 * sum for 8-bit weights; null in act_quant
  int64_t threads;
  // Weight record; unused by act_quant
  const uint8_t* weight;       // panels of [K/8, 2, 64], of [K/8, 2, 128] for 8-bit weights: see gemm.h
  int64_t weight_bits;         // 4 or 8
  const uint8_t* scale;        // panels of [K/G, 2, 16]: bfloat16, or the levels of two-level scales, a byte each
  bool two_level;
  const float* channel_scale;  // [N rounded up to 16] with two-level scales
  const int32_t* level_start;  // [N rounded up to 16] with two-level scales: see gemm_two_level.h
  const float* absorbed_bias;  // [R, N]
  const void* bias;            // [N] of bias_dtype, or null
  int64_t bias_dtype;
  int64_t outputs;     // N
  int64_t group_size;  // G
  void* y;             // [M, N] of y_dtype, contiguous
  int64_t y_dtype;
};

// Adjacent outputs in the weight record.
constexpr int64_t kBlock = 16;
// Blocks of a panel; the last may have one.
constexpr int64_t kPanel = 2;

}  // namespace morphoquant

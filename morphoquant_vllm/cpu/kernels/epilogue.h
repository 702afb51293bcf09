// The epilogue after the integer product: gain, absorbed bias, the source layer's bias, the cast to the dtype of y.
#pragma once

#include <algorithm>

#include "vector.h"

namespace morphoquant {

// Tokens whose absorbed biases and outputs are prefetched before a panel is computed. With more tokens, they are
// prefetched while outputs are written.
constexpr int64_t kFetchTokens = 24;

inline int64_t element_size(int64_t dtype) { return dtype == kFloat32 ? 4 : 2; }

// Prefetches the memory that the epilogue of token m reads and writes: it is not in the cache yet.
template <int Blocks>
inline void fetch_outputs(const Call& c, int64_t block, int64_t m) {
  const int64_t n = block * kBlock;
  const auto* absorbed = reinterpret_cast<const char*>(c.absorbed_bias + c.token_row[m] * c.outputs + n);
  auto* y = static_cast<char*>(c.y) + (m * c.outputs + n) * element_size(c.y_dtype);
  for (int64_t byte = 0; byte < Blocks * kBlock * 4; byte += 64) __builtin_prefetch(absorbed + byte);
  for (int64_t byte = 0; byte < Blocks * kBlock * element_size(c.y_dtype); byte += 64) __builtin_prefetch(y + byte, 1);
}

template <int Blocks>
inline void fetch_for_epilogue(const Call& c, int64_t block, int64_t first, int64_t last) {
  for (int64_t m = first; m < std::min(first + kFetchTokens, last); ++m) fetch_outputs<Blocks>(c, block, m);
}

// The source layer's bias of outputs [n, n + 8) as float32.
inline __m256 own_bias(const Call& c, int64_t n, int64_t count) {
  if (!c.bias) return _mm256_setzero_ps();
  if (c.bias_dtype == kFloat32) return load_part<kFloat32>(static_cast<const float*>(c.bias) + n, count);
  const auto* bias = static_cast<const uint16_t*>(c.bias) + n;
  return c.bias_dtype == kBFloat16 ? load_part<kBFloat16>(bias, count) : load_part<kFloat16>(bias, count);
}

// gain * sum + absorbed_bias (+ bias), cast to the dtype of y, for tokens [first, last) and `Blocks` blocks.
template <int64_t T, int Blocks>
inline void epilogue_as(const Call& c, int64_t block, int64_t first, int64_t last, const float* out) {
  constexpr int kEights = Blocks * kBlock / 8;
  const int64_t n0 = block * kBlock;
  const bool whole = n0 + Blocks * kBlock <= c.outputs;
  __m256 bias[kEights], scale[kEights];
  for (int i = 0; i < kEights; ++i) {
    const int64_t n = n0 + i * 8;
    bias[i] = n < c.outputs ? own_bias(c, n, c.outputs - n) : _mm256_setzero_ps();
    scale[i] = c.two_level ? _mm256_loadu_ps(c.channel_scale + n) : _mm256_setzero_ps();
  }
  for (int64_t m = first; m < last; ++m, out += Blocks * kBlock) {
    if (m + kFetchTokens < last) fetch_outputs<Blocks>(c, block, m + kFetchTokens);
    const int64_t row = c.token_row[m];
    const __m256 gain = _mm256_set1_ps(c.gain[row]);
    const float* absorbed = c.absorbed_bias + row * c.outputs + n0;
    auto* y = static_cast<typename Element<T>::Type*>(c.y) + m * c.outputs + n0;
    const auto value = [&](int i, __m256 own_absorbed) {
      __m256 sum = _mm256_loadu_ps(out + i * 8);
      // With two-level scales the sums are integers.
      if (c.two_level) sum = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_castps_si256(sum)), scale[i]);
      return _mm256_add_ps(_mm256_fmadd_ps(gain, sum, own_absorbed), bias[i]);
    };
    if (whole) {
#pragma GCC unroll 8
      for (int i = 0; i < kEights; i += 2) {
        Element<T>::store(y + i * 8, value(i, _mm256_loadu_ps(absorbed + i * 8)),
                          value(i + 1, _mm256_loadu_ps(absorbed + i * 8 + 8)));
      }
      continue;
    }
    for (int64_t n = 0; n0 + n < c.outputs && n < Blocks * kBlock; n += 8) {
      const int64_t count = c.outputs - n0 - n;
      store_part<T>(y + n, value(static_cast<int>(n / 8), load_part<kFloat32>(absorbed + n, count)), count);
    }
  }
}

template <int Blocks>
inline void epilogue(const Call& c, int64_t block, int64_t first, int64_t last, const float* out) {
  if (c.y_dtype == kFloat32) return epilogue_as<kFloat32, Blocks>(c, block, first, last, out);
  if (c.y_dtype == kBFloat16) return epilogue_as<kBFloat16, Blocks>(c, block, first, last, out);
  epilogue_as<kFloat16, Blocks>(c, block, first, last, out);
}

}  // namespace morphoquant

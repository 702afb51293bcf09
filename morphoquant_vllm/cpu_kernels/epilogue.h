// What follows the integer product: gain, absorbed bias, the layer's own bias, the dtype of y.
#pragma once

#include <algorithm>

#include "vector.h"

namespace morphoquant {

// gain * sum + absorbed_bias (+ bias), cast to the dtype of y, for tokens [first, last) and `Blocks` blocks.
template <int64_t T, int Blocks>
inline void epilogue_as(const Call& c, int64_t block, int64_t first, int64_t last, const float* out) {
  const int64_t n0 = block * kBlock;
  for (int64_t v = 0; v < Blocks * kBlock && n0 + v < c.outputs; v += 8) {
    const int64_t n = n0 + v, count = std::min<int64_t>(8, c.outputs - n);
    __m256 bias = _mm256_setzero_ps();
    if (c.bias) {
      if (c.bias_dtype == kFloat32) {
        bias = load_part<kFloat32>(static_cast<const float*>(c.bias) + n, count);
      } else if (c.bias_dtype == kBFloat16) {
        bias = load_part<kBFloat16>(static_cast<const uint16_t*>(c.bias) + n, count);
      } else {
        bias = load_part<kFloat16>(static_cast<const uint16_t*>(c.bias) + n, count);
      }
    }
    for (int64_t m = first; m < last; ++m) {
      const int64_t row = c.token_row[m];
      __m256 sum = _mm256_loadu_ps(out + (m - first) * Blocks * kBlock + v);
      // With two-level scales the sums are integers.
      if (c.two_level) {
        sum = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_castps_si256(sum)), _mm256_loadu_ps(c.channel_scale + n));
      }
      const __m256 absorbed = load_part<kFloat32>(c.absorbed_bias + row * c.outputs + n, count);
      const __m256 value = _mm256_add_ps(_mm256_fmadd_ps(_mm256_set1_ps(c.gain[row]), sum, absorbed), bias);
      store_part<T>(static_cast<typename Element<T>::Type*>(c.y) + m * c.outputs + n, value, count);
    }
  }
}

template <int Blocks>
inline void epilogue(const Call& c, int64_t block, int64_t first, int64_t last, const float* out) {
  if (c.dtype == kFloat32) return epilogue_as<kFloat32, Blocks>(c, block, first, last, out);
  if (c.dtype == kBFloat16) return epilogue_as<kBFloat16, Blocks>(c, block, first, last, out);
  epilogue_as<kFloat16, Blocks>(c, block, first, last, out);
}

}  // namespace morphoquant

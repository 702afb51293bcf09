// Weight-only 8 bit, for lm_head: y[m, n] = scale[n] * sum_k codes[n, k] * x[m, k], in float32, cast to the dtype of x.
//
// Reading the codes takes most of the time, so they are read from memory once for as many tokens as the second-level
// cache holds. The order of additions depends on K alone: not on M, nor on the number of threads.
#pragma once

#include <omp.h>

#include <algorithm>

#include "dot.h"
#include "vector.h"

namespace morphoquant {

// M tokens, K channels (a multiple of 16), N outputs. Checked by cpu/head.py; fields as in call.h.
struct HeadCall {
  const void* x;        // [M, K] of dtype; rows x_stride elements apart
  int64_t x_stride;
  int64_t dtype;        // of x and y
  int64_t tokens;       // M
  int64_t channels;     // K
  const int8_t* codes;  // [N, K]
  const float* scale;   // [N]
  int64_t outputs;      // N
  float* floats;        // workspace [M, K]: x in float32
  int64_t threads;
  void* y;              // [M, N], contiguous
};
static_assert(sizeof(HeadCall) == 11 * 8, "as cpu/head.py packs it");

// 256 KiB of x are multiplied with an output's codes before the next output's are read.
constexpr int64_t kHeadFloats = 65536;

// This thread's share of x as float32.
template <int64_t T>
inline void to_floats(const HeadCall& c, int64_t thread, int64_t threads) {
  for (int64_t m = c.tokens * thread / threads; m < c.tokens * (thread + 1) / threads; ++m) {
    const auto* x = static_cast<const typename Element<T>::Type*>(c.x) + m * c.x_stride;
    for (int64_t k = 0; k < c.channels; k += 8) {
      _mm256_storeu_ps(c.floats + m * c.channels + k, Element<T>::load(x + k));
    }
  }
}

// y of `Tokens` tokens x `Outputs` outputs, at most 8.
template <class D, int64_t T, int Tokens, int Outputs>
inline void head_tile(const HeadCall& c, int64_t token, int64_t output) {
  const int8_t* codes = c.codes + output * c.channels;
  const float* x = c.floats + token * c.channels;
  typename D::Floats sums[Tokens][Outputs];
#pragma GCC unroll 16
  for (int m = 0; m < Tokens; ++m) {
#pragma GCC unroll 16
    for (int n = 0; n < Outputs; ++n) sums[m][n] = D::zero();
  }
  for (int64_t k = 0; k < c.channels; k += D::kWidth) {
    typename D::Floats values[Tokens];
#pragma GCC unroll 16
    for (int m = 0; m < Tokens; ++m) values[m] = D::load_floats(x + m * c.channels + k);
#pragma GCC unroll 16
    for (int n = 0; n < Outputs; ++n) {
      const auto weights = D::load_int8(codes + n * c.channels + k);
#pragma GCC unroll 16
      for (int m = 0; m < Tokens; ++m) sums[m][n] = D::multiply_add(weights, values[m], sums[m][n]);
    }
  }
  auto* y = static_cast<typename Element<T>::Type*>(c.y);
  for (int m = 0; m < Tokens; ++m) {
    float out[8] = {};
    for (int n = 0; n < Outputs; ++n) {
      float lanes[D::kWidth];
      D::store_floats(lanes, sums[m][n]);
      for (int step = D::kWidth / 2; step; step /= 2) {
        for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
      }
      out[n] = lanes[0] * c.scale[output + n];
    }
    store_part<T>(y + (token + m) * c.outputs + output, _mm256_loadu_ps(out), Outputs);
  }
}

// `Outputs` outputs for tokens [first, last).
template <class D, int64_t T, int Outputs>
inline void head_outputs(const HeadCall& c, int64_t output, int64_t first, int64_t last) {
  int64_t m = first;
  if constexpr (Outputs == D::kHeadOutputs) {
    for (; m + D::kHeadTokens <= last; m += D::kHeadTokens) head_tile<D, T, D::kHeadTokens, Outputs>(c, m, output);
  }
  for (; m < last; ++m) head_tile<D, T, 1, Outputs>(c, m, output);
}

// This thread's share of the outputs.
template <class D, int64_t T>
inline void head(const HeadCall& c, int64_t thread, int64_t threads) {
  const int64_t chunk = std::max<int64_t>(D::kHeadTokens, kHeadFloats / c.channels / D::kHeadTokens * D::kHeadTokens);
  // Shares are multiples of 8 outputs, so only the last thread has a remainder.
  const int64_t eights = (c.outputs + 7) / 8;
  const int64_t begin = eights * thread / threads * 8, end = std::min(eights * (thread + 1) / threads * 8, c.outputs);
  for (int64_t first = 0; first < c.tokens; first += chunk) {
    const int64_t last = std::min(first + chunk, c.tokens);
    int64_t n = begin;
    if (last - first == 1) {
      // One token: with more outputs at a time, additions do not wait for each other.
      for (; n + 8 <= end; n += 8) head_tile<D, T, 1, 8>(c, first, n);
    }
    for (; n + D::kHeadOutputs <= end; n += D::kHeadOutputs) head_outputs<D, T, D::kHeadOutputs>(c, n, first, last);
    for (; n < end; ++n) head_outputs<D, T, 1>(c, n, first, last);
  }
}

template <int64_t T>
inline void run_head(const HeadCall& c) {
#pragma omp parallel num_threads(static_cast<int>(c.threads))
  {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    to_floats<T>(c, thread, threads);
#pragma omp barrier
    head<Dot, T>(c, thread, threads);
  }
}

}  // namespace morphoquant

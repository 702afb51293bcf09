// lm_head of tokens in bfloat16: y[m, n] = scale[n] * sum_k weight[n, k] * x[m, k] in float32, cast once. Weights are
// either bfloat16 with scale 1, read from the embedding itself, or int8, which bfloat16 holds exactly.
//
// vdpbf16ps multiplies pairs of bfloat16. Up to 8 tokens take about as long as reading the weights, and each weight is
// read from memory once for a chunk of tokens. The order of additions depends on K alone: not on M, nor on the number
// of threads. The instruction treats subnormal numbers as 0.
#pragma once

#include <algorithm>
#include <type_traits>

#include "work_queue.h"
#include "vector.h"

namespace morphoquant {

// M tokens, K channels (a multiple of 32), N outputs. Checked by cpu/head.py.
struct HeadBFloat16Call {
  const uint16_t* x;   // [M, K]; rows x_stride elements apart
  int64_t x_stride;
  int64_t tokens;      // M
  int64_t channels;    // K
  const void* weight;  // [N, K], int8 with scales, else bfloat16
  const float* scale;  // [N], or null
  int64_t outputs;     // N
  int64_t threads;
  uint16_t* y;         // [M, N], contiguous
};
static_assert(sizeof(HeadBFloat16Call) == 9 * 8, "as cpu/head.py packs it");

// Compiled into every AVX512 build if the compiler supports the instruction and the pragma (clang ignores it). Called
// if the processor has the instruction.
#if defined(__AVX512VNNI__) && __GNUC__ >= 10 && !defined(__clang__)
inline bool has_head_bfloat16() { return __builtin_cpu_supports("avx512bf16"); }

#pragma GCC push_options
#pragma GCC target("avx512bf16")

// Outputs whose sums are kept before they are cast: a multiple of the outputs of every tile.
constexpr int kHeadStep = 24;
// Largest number of tokens of a tile, and of a chunk for which weights are read from memory once.
constexpr int kHeadTileTokens = 8, kHeadChunk = 128;
// Elements of x, tokens times channels, that stay in the first-level cache during a step. More are split into strips of
// kHeadStrip, whose sums are stored. Strips are not needed for int8 weights, whose fewer bytes leave time to load x.
constexpr int64_t kHeadWhole = 12288, kHeadStrip = 8192;

// 32 weights as bfloat16.
inline __m512bh head_weights(const uint16_t* p) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p)); }
inline __m512bh head_weights(const int8_t* p) {
  const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const auto floats = [](__m128i eight_bit) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(eight_bit)); };
  return _mm512_cvtne2ps_pbh(floats(_mm256_extracti128_si256(codes, 1)), floats(_mm256_castsi256_si128(codes)));
}

// Sums of 16 lanes of 8 vectors.
inline __m256 sums_of_lanes(const __m512 (&v)[8]) {
  __m256 half[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) half[i] = _mm256_add_ps(_mm512_castps512_ps256(v[i]), _mm512_extractf32x8_ps(v[i], 1));
  const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
  const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(half[4], half[5]), _mm256_hadd_ps(half[6], half[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

// Adds `channels` channels of `Outputs` outputs and `Tokens` tokens to the lanes of sums, which begin at zero. `next`
// is the start of the next tile's weights, which are prefetched meanwhile; `row` is the stride between outputs.
template <class Weight, int Tokens, int Outputs>
inline void head_bfloat16_tile(const Weight* weight, const Weight* next, int64_t row, const uint16_t* x,
                               int64_t x_stride, int64_t channels, bool first, __m512 (*all)[Tokens]) {
  __m512 sums[Outputs][Tokens];
#pragma GCC unroll 16
  for (int n = 0; n < Outputs; ++n) {
#pragma GCC unroll 16
    for (int m = 0; m < Tokens; ++m) sums[n][m] = first ? _mm512_setzero_ps() : all[n][m];
  }
  for (int64_t k = 0; k < channels; k += 32) {
    __m512bh rows[Outputs];
#pragma GCC unroll 16
    for (int n = 0; n < Outputs; ++n) {
      rows[n] = head_weights(weight + n * row + k);
      __builtin_prefetch(next + n * row + k, 0, 2);
    }
#pragma GCC unroll 16
    for (int m = 0; m < Tokens; ++m) {
      const auto values = reinterpret_cast<__m512bh>(_mm512_loadu_si512(x + m * x_stride + k));
#pragma GCC unroll 16
      for (int n = 0; n < Outputs; ++n) sums[n][m] = _mm512_dpbf16_ps(sums[n][m], rows[n], values);
    }
  }
#pragma GCC unroll 16
  for (int n = 0; n < Outputs; ++n) {
#pragma GCC unroll 16
    for (int m = 0; m < Tokens; ++m) all[n][m] = sums[n][m];
  }
}

// `count` outputs, at most kHeadStep, for `Tokens` tokens.
template <class Weight, int Tokens>
inline void head_bfloat16_step(const HeadBFloat16Call& c, int64_t token, int64_t output, int64_t count) {
  constexpr int kOutputs = Tokens > 3 ? 3 : 8;
  const auto* weight = static_cast<const Weight*>(c.weight) + output * c.channels;
  const uint16_t* x = c.x + token * c.x_stride;
  __m512 all[kHeadStep][Tokens];
  const bool whole = sizeof(Weight) == 1 || Tokens * c.channels <= kHeadWhole;
  const int64_t strip = whole ? c.channels : kHeadStrip / Tokens / 32 * 32;
  for (int64_t begin = 0; begin < c.channels; begin += strip) {
    const int64_t channels = std::min(strip, c.channels - begin);
    const auto tile = [&](auto outputs, int64_t n) {
      const Weight* at = weight + n * c.channels + begin;
      // After a strip's last tile, the first tile of the next strip or of the next step follows.
      const bool last = n + outputs() == count;
      const Weight* next = last && begin + strip < c.channels ? weight + begin + strip : at + outputs() * c.channels;
      head_bfloat16_tile<Weight, Tokens, outputs()>(at, next, c.channels, x + begin, c.x_stride, channels, begin == 0,
                                                    all + n);
    };
    int64_t n = 0;
    for (; n + kOutputs <= count; n += kOutputs) tile(std::integral_constant<int, kOutputs>(), n);
    for (; n < count; ++n) tile(std::integral_constant<int, 1>(), n);
  }
  float out[kHeadStep * 8];
  for (int64_t n = 0; n < count; ++n) {
    __m512 padded[8];
#pragma GCC unroll 16
    for (int m = 0; m < 8; ++m) padded[m] = m < Tokens ? all[n][m < Tokens ? m : 0] : _mm512_setzero_ps();
    const __m256 sum = sums_of_lanes(padded);
    _mm256_storeu_ps(out + n * 8, c.scale ? _mm256_mul_ps(sum, _mm256_set1_ps(c.scale[output + n])) : sum);
  }
  for (int m = 0; m < Tokens; ++m) {
    uint16_t* y = c.y + (token + m) * c.outputs + output;
    for (int64_t n = 0; n < count; n += 8) {
      float eight[8] = {};
      for (int64_t i = n; i < std::min<int64_t>(n + 8, count); ++i) eight[i - n] = out[i * 8 + m];
      store_part<kBFloat16>(y + n, _mm256_loadu_ps(eight), count - n);
    }
  }
}

// Outputs [begin, end) for all tokens; `begin` is a multiple of kHeadStep.
template <class Weight>
inline void head_bfloat16(const HeadBFloat16Call& c, int64_t begin, int64_t end) {
  for (int64_t first = 0; first < c.tokens; first += kHeadChunk) {
    const int64_t last = std::min(first + kHeadChunk, c.tokens);
    for (int64_t output = begin; output < end; output += kHeadStep) {
      const int64_t count = std::min<int64_t>(kHeadStep, end - output);
      const int64_t tiles = (last - first + kHeadTileTokens - 1) / kHeadTileTokens;
      int64_t m = first;
      for (int64_t index = 0; index < tiles; ++index) {
        const int64_t size = (last - m + tiles - index - 1) / (tiles - index);
        switch (size) {
          case 1: head_bfloat16_step<Weight, 1>(c, m, output, count); break;
          case 2: head_bfloat16_step<Weight, 2>(c, m, output, count); break;
          case 3: head_bfloat16_step<Weight, 3>(c, m, output, count); break;
          case 4: head_bfloat16_step<Weight, 4>(c, m, output, count); break;
          case 5: head_bfloat16_step<Weight, 5>(c, m, output, count); break;
          case 6: head_bfloat16_step<Weight, 6>(c, m, output, count); break;
          case 7: head_bfloat16_step<Weight, 7>(c, m, output, count); break;
          case 8: head_bfloat16_step<Weight, 8>(c, m, output, count); break;
        }
        m += size;
      }
    }
  }
}

inline void run_head_bfloat16(const HeadBFloat16Call& c) {
  WorkQueue queue((c.outputs + kHeadStep - 1) / kHeadStep, c.threads);
#pragma omp parallel num_threads(static_cast<int>(c.threads))
  for (Range taken = queue.take(); taken.begin < taken.end; taken = queue.take()) {
    const auto outputs = c.scale ? head_bfloat16<int8_t> : head_bfloat16<uint16_t>;
    outputs(c, taken.begin * kHeadStep, std::min(taken.end * kHeadStep, c.outputs));
  }
}

#pragma GCC pop_options
#else
inline bool has_head_bfloat16() { return false; }
inline void run_head_bfloat16(const HeadBFloat16Call&) {}
#endif

}  // namespace morphoquant

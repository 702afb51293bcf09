// The integer GEMM: codes int8 [M, K] times int4 weights, in exact int32 per group, float32 over the groups.
//
// Weight record: blocks of 16 outputs. In each, 64 bytes hold 8 channels of the 16 outputs: byte 4 n + i has q + 8 of
// output n and channel 8 j + i in its low nibble, of channel 8 j + 4 + i in its high one. So a load and two masks give
// the operands of two dot products over 4 channels.
//
// A panel is some blocks side by side. It goes over K in strips that stay in the first-level cache, and over the
// tokens in tiles whose sums stay in registers. With many tokens the strip's nibbles are unpacked once for all tiles.
// The order of float additions depends on nothing but K and G: not on M, nor on the number of threads.
#pragma once

#include <algorithm>

#include "dot.h"
#include "vector.h"

namespace morphoquant {

// A strip's channels: a multiple of every G. 512 channels of 32 outputs are 16 KiB unpacked.
constexpr int64_t kStrip = 512;
// Most tokens for which a panel keeps its float sums (24 KiB for 32 outputs).
constexpr int64_t kMostTokens = 192;

inline int64_t blocks_of(const Call& c) { return (c.outputs + kBlock - 1) / kBlock; }

// Sums of `Tokens` tokens x `Blocks` blocks over channels [begin, end), added to out [tokens, Blocks * 16].
// Weights are the panel's nibbles, or where `unpacked` is given, bytes [channels / 4, Blocks, 64] from `begin` on.
template <class D, int Tokens, int Blocks>
inline void tile(const Call& c, int64_t block, const uint8_t* unpacked, int64_t token, int64_t begin, int64_t end,
                 float* out) {
  constexpr int kParts = kBlock / D::kWidth;
  constexpr int kVectors = Blocks * kParts;
  const int64_t groups = c.channels / c.group_size;
  const int64_t block_bytes = c.channels * 8;
  const uint8_t* packed = c.weight + block * block_bytes;
  const uint16_t* scale = c.scale + block * groups * kBlock;
  const int8_t* codes = c.codes + token * c.channels;
  const int32_t* offset = c.offset + token * groups;
  typename D::Floats sums[Tokens][kVectors];
#pragma GCC unroll 16
  for (int m = 0; m < Tokens; ++m) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      sums[m][v] = begin ? D::load_floats(out + (m * kVectors + v) * D::kWidth) : D::zero();
    }
  }
  for (int64_t first = begin; first < end; first += c.group_size) {
    const int64_t group = first / c.group_size;
    typename D::Ints ints[Tokens][kVectors];
#pragma GCC unroll 16
    for (int m = 0; m < Tokens; ++m) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) ints[m][v] = D::broadcast(offset[m * groups + group]);
    }
    for (int64_t chunk = first; chunk < first + c.group_size; chunk += 32) {
      typename D::Ints part[Tokens][kVectors];
#pragma GCC unroll 16
      for (int m = 0; m < Tokens; ++m) {
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) part[m][v] = D::start(ints[m][v]);
      }
#pragma GCC unroll 4
      for (int64_t k = chunk; k < chunk + 32; k += 8) {
        typename D::Ints low[kVectors], high[kVectors];
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) {
          if (unpacked) {
            const uint8_t* p = unpacked + (k - begin) / 4 * (Blocks * 64) + v * D::kWidth * 4;
            low[v] = D::load(p);
            high[v] = D::load(p + Blocks * 64);
          } else {
            const auto nibbles = D::load(packed + v / kParts * block_bytes + k * 8 + v % kParts * D::kWidth * 4);
            low[v] = D::low_nibbles(nibbles);
            high[v] = D::high_nibbles(nibbles);
          }
        }
#pragma GCC unroll 16
        for (int m = 0; m < Tokens; ++m) {
          // One load each: a broadcast from memory needs no arithmetic port.
          int32_t first_quad, second_quad;
          std::memcpy(&first_quad, codes + m * c.channels + k, 4);
          std::memcpy(&second_quad, codes + m * c.channels + k + 4, 4);
#pragma GCC unroll 16
          for (int v = 0; v < kVectors; ++v) part[m][v] = D::dot(part[m][v], low[v], D::broadcast(first_quad));
#pragma GCC unroll 16
          for (int v = 0; v < kVectors; ++v) part[m][v] = D::dot(part[m][v], high[v], D::broadcast(second_quad));
        }
      }
#pragma GCC unroll 16
      for (int m = 0; m < Tokens; ++m) {
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) ints[m][v] = D::finish(ints[m][v], part[m][v]);
      }
    }
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      const auto factor =
          D::load_bfloat16(scale + (v / kParts * groups + group) * kBlock + v % kParts * D::kWidth);
#pragma GCC unroll 16
      for (int m = 0; m < Tokens; ++m) sums[m][v] = D::scaled_add(sums[m][v], ints[m][v], factor);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < Tokens; ++m) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) D::store_floats(out + (m * kVectors + v) * D::kWidth, sums[m][v]);
  }
}

// Nibbles of the panel's channels [begin, end) as bytes [channels / 4, Blocks, 64].
template <class D, int Blocks>
inline void unpack(const Call& c, int64_t block, int64_t begin, int64_t end, uint8_t* unpacked) {
  for (int64_t k = begin; k < end; k += 8, unpacked += 2 * Blocks * 64) {
    for (int b = 0; b < Blocks; ++b) {
      for (int i = 0; i < 64; i += 4 * D::kWidth) {
        const auto nibbles = D::load(c.weight + (block + b) * c.channels * 8 + k * 8 + i);
        D::store(unpacked + b * 64 + i, D::low_nibbles(nibbles));
        D::store(unpacked + (Blocks + b) * 64 + i, D::high_nibbles(nibbles));
      }
    }
  }
}

// gain * sum + absorbed_bias (+ bias), cast to the dtype of y, for tokens [first, last) and `Blocks` blocks.
template <int64_t T, int Blocks>
inline void finish(const Call& c, int64_t block, int64_t first, int64_t last, const float* out) {
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
      const __m256 sum = _mm256_loadu_ps(out + (m - first) * Blocks * kBlock + v);
      const __m256 absorbed = load_part<kFloat32>(c.absorbed_bias + row * c.outputs + n, count);
      const __m256 value = _mm256_add_ps(_mm256_fmadd_ps(_mm256_set1_ps(c.gain[row]), sum, absorbed), bias);
      store_part<T>(static_cast<typename Element<T>::Type*>(c.y) + m * c.outputs + n, value, count);
    }
  }
}

// One panel of `Blocks` blocks for tokens [first, last), at most kMostTokens; no tile is larger than `Tokens`.
template <class D, int Tokens, int Blocks>
inline void panel(const Call& c, int64_t block, int64_t first, int64_t last) {
  alignas(64) float out[(Tokens > 2 ? kMostTokens : 2) * Blocks * kBlock];
  alignas(64) uint8_t bytes[Tokens > 2 ? kStrip * Blocks * kBlock : 64];
  const bool unpacks = Tokens > 2 && last - first > 2 * Tokens;
  for (int64_t begin = 0; begin < c.channels; begin += kStrip) {
    const int64_t end = std::min(begin + kStrip, c.channels);
    if (unpacks) unpack<D, Blocks>(c, block, begin, end, bytes);
    const uint8_t* unpacked = unpacks ? bytes : nullptr;
    for (int64_t m = first; m < last;) {
      float* sums = out + (m - first) * Blocks * kBlock;
      if constexpr (Tokens > 2) {
        if constexpr (Tokens > 4) {
          if (last - m >= Tokens && last - m != 8) {
            tile<D, Tokens, Blocks>(c, block, unpacked, m, begin, end, sums);
            m += Tokens;
            continue;
          }
        }
        if (last - m >= 4) {
          tile<D, 4, Blocks>(c, block, unpacked, m, begin, end, sums);
          m += 4;
          continue;
        }
      }
      if (last - m >= 2) {
        tile<D, 2, Blocks>(c, block, unpacked, m, begin, end, sums);
        m += 2;
        continue;
      }
      tile<D, 1, Blocks>(c, block, unpacked, m, begin, end, sums);
      m += 1;
    }
  }
  if (c.dtype == kFloat32) {
    finish<kFloat32, Blocks>(c, block, first, last, out);
  } else if (c.dtype == kBFloat16) {
    finish<kBFloat16, Blocks>(c, block, first, last, out);
  } else {
    finish<kFloat16, Blocks>(c, block, first, last, out);
  }
}

// This thread's share of the panels and of the chunks of tokens; the last panel may be narrower.
template <class D, int Tokens, int Blocks>
inline void panels(const Call& c, int64_t thread, int64_t threads) {
  const int64_t blocks = blocks_of(c);
  const int64_t wide = (blocks + Blocks - 1) / Blocks;
  const int64_t chunks = (c.tokens + kMostTokens - 1) / kMostTokens;
  // Chunks of one size, a multiple of every tile.
  const int64_t chunk = ((c.tokens + chunks - 1) / chunks + 11) / 12 * 12;
  const int64_t units = wide * chunks;
  for (int64_t unit = units * thread / threads; unit < units * (thread + 1) / threads; ++unit) {
    const int64_t first = unit % chunks * chunk, last = std::min(first + chunk, c.tokens);
    int64_t block = unit / chunks * Blocks;
    if (first >= last) continue;
    if (block + Blocks <= blocks) {
      panel<D, Tokens, Blocks>(c, block, first, last);
      continue;
    }
    for (; block < blocks; ++block) panel<D, Tokens, 1>(c, block, first, last);
  }
}

// One or two tokens are bound by reading the weights: wide panels, unless too few for the threads. More tokens share
// what was unpacked.
inline void gemm(const Call& c, int64_t thread, int64_t threads) {
  const bool narrow = blocks_of(c) < 2 * Dot::kWideBlocks * threads;
  if (c.tokens > 2) return panels<Dot, Dot::kTileTokens, Dot::kTileBlocks>(c, thread, threads);
  if (narrow) return panels<Dot, 2, 1>(c, thread, threads);
  panels<Dot, 2, Dot::kWideBlocks>(c, thread, threads);
}

}  // namespace morphoquant

// The integer GEMM of two-level scales for many tokens, which share the unpacked weights.
//
// A weight times its group's level is a byte: q in [-8, 7], level 1 to 16. So a strip is unpacked once to bytes q *
// level, and groups need no further work: one int32 sum runs over the whole K. These bytes are the signed operand of
// vpdpbusd, and codes are the unsigned one, as code + 128. Sums start at -128 * (sum of q * level), which is computed
// when the record is made. The integers, and so the outputs, equal those of gemm.h for few tokens.
#pragma once

#include "gemm.h"

namespace morphoquant {

// Bytes of a strip of 512 channels of 32 outputs are 16 KiB.
template <class D, int Blocks>
inline void unpack(const Call& c, const Place& place, int64_t begin, int64_t end, int8_t* bytes) {
  for (int64_t k = begin; k < end; k += 8) {
    const uint8_t* packed = place.weight + k / 8 * place.weight_stride;
    const uint8_t* levels = place.scale + k / c.group_size * place.scale_stride;
    for (int v = 0; v < Blocks * kBlock / D::kWidth; ++v, bytes += 4 * D::kWidth) {
      const auto level = D::load_level_words(levels + v * D::kWidth);
      const auto nibbles = D::load(packed + v * 4 * D::kWidth);
      D::store(reinterpret_cast<uint8_t*>(bytes), D::levelled_bytes(D::low_nibbles(nibbles), level));
      D::store(reinterpret_cast<uint8_t*>(bytes) + Blocks * 64, D::levelled_bytes(D::high_nibbles(nibbles), level));
    }
    bytes += Blocks * 64;
  }
}

// Sums of `Tokens` tokens x `Blocks` blocks over `channels` channels of bytes, added to out [tokens, Blocks * 16].
template <class D, int Tokens, int Blocks>
inline void byte_tile(const uint8_t* codes, int64_t stride, const int8_t* bytes, int64_t channels, Fetch fetch,
                      int32_t* out) {
  constexpr int kVectors = Blocks * kBlock / D::kWidth;
  typename D::Ints sums[Tokens][kVectors];
#pragma GCC unroll 16
  for (int m = 0; m < Tokens; ++m) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      sums[m][v] = D::load(reinterpret_cast<const uint8_t*>(out + (m * kVectors + v) * D::kWidth));
    }
  }
  for (int64_t k = 0; k < channels; k += 8) {
    fetch.next();
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half, bytes += Blocks * 64) {
      typename D::Ints weights[kVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        weights[v] = D::load(reinterpret_cast<const uint8_t*>(bytes) + v * D::kWidth * 4);
      }
#pragma GCC unroll 16
      for (int m = 0; m < Tokens; ++m) {
        const auto four = quad<D>(reinterpret_cast<const int8_t*>(codes) + m * stride + k + half * 4);
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) sums[m][v] = D::dot(sums[m][v], four, weights[v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < Tokens; ++m) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      D::store(reinterpret_cast<uint8_t*>(out + (m * kVectors + v) * D::kWidth), sums[m][v]);
    }
  }
}

template <class D, int Blocks>
inline void byte_panel(const Call& c, int64_t block, int64_t first, int64_t last) {
  alignas(64) float out[kMostTokens * Blocks * kBlock];
  alignas(64) int8_t bytes[kStrip * Blocks * kBlock];
  auto* sums = reinterpret_cast<int32_t*>(out);
  const Place place = place_of(c, block);
  for (int64_t m = 0; m < last - first; ++m) {
    std::memcpy(sums + m * Blocks * kBlock, c.level_start + block * kBlock, Blocks * kBlock * sizeof(int32_t));
  }
  fetch_for_epilogue<Blocks>(c, block, first, last);
  for (int64_t begin = 0; begin < c.channels; begin += kStrip) {
    const int64_t end = std::min(begin + kStrip, c.channels);
    unpack<D, Blocks>(c, place, begin, end, bytes);
    tiles<D>(place, first, last, begin, end, [&](auto tokens, int64_t m, Fetch fetch) {
      const auto* codes = reinterpret_cast<const uint8_t*>(c.codes) + m * c.channels + begin;
      byte_tile<D, tokens(), Blocks>(codes, c.channels, bytes, end - begin, fetch, sums + (m - first) * Blocks * kBlock);
    });
  }
  epilogue<Blocks>(c, block, first, last, out);
}

// Smallest number of tokens for which unpacking a strip is faster.
constexpr int64_t kByteTokens = 25;

// Whether a call multiplies bytes q * level; codes are then stored as code + 128.
inline bool takes_bytes(bool two_level, int64_t tokens) {
  return two_level && !Dot::kNarrowSums && tokens >= kByteTokens;
}

inline void gemm(const Call& c, Range units) {
  if constexpr (!Dot::kNarrowSums) {
    if (takes_bytes(c.two_level, c.tokens)) return panels(c, units, byte_panel<Dot, Dot::kTileBlocks>, byte_panel<Dot, 1>);
  }
  if (c.two_level) return gemm_groups<Levelled<Dot>, 4>(c, units);
  if (c.weight_bits == 8) return gemm_groups<Scaled<Dot>, 8>(c, units);
  gemm_groups<Scaled<Dot>, 4>(c, units);
}

}  // namespace morphoquant

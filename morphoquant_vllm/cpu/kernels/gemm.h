// The integer GEMM: codes int8 [M, K] times int4 weights, in exact int32 per group, float32 over the groups.
//
// Weight record: panels of 2 blocks of 16 outputs; the last panel may have one. In a panel, 64 bytes hold 8 channels of
// a block. Byte 4 n + i holds q + 8 of output n: channel 8 j + i in its low nibble, channel 8 j + 4 + i in the high one.
// So a load, a shift and two masks give the operands of two dot products over 4 channels. They use ports that dot
// products do not need. A panel's blocks are adjacent for each 8 channels, so a panel is one stream of memory.
//
// Of 8-bit weights, 128 bytes hold 8 channels of a block: q + 128 of channels 8 j + i, then of channels 8 j + 4 + i. They
// are operands as they are, or, if dot products sum in 16 bits, their nibbles are: 16 * high + low = q + 128.
//
// A panel goes over K in strips that stay in the first-level cache, and over the tokens in tiles whose sums stay in
// registers. Meanwhile the next strip is prefetched. The order of float additions depends only on K and G: not on M,
// nor on the number of threads.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "dot.h"
#include "epilogue.h"
#include "work_queue.h"

namespace morphoquant {

// Channels of a strip, a multiple of every G. 512 channels of 32 outputs are 8 KiB. With exactly two tiles a shorter
// strip is faster: the first tile has less of the next strip to prefetch.
constexpr int64_t kStrip = 512, kStripOfTwo = 256;
// Largest number of tokens for which a panel keeps its float sums (24 KiB for 32 outputs).
constexpr int64_t kMostTokens = 192;
// Prefetch distance of weights that are used once (bytes), and of scales (groups).
constexpr int64_t kFetchNear = 4096, kFetchFar = 8192, kFetchGroups = 16;
// Up to this many tokens, the first-level cache keeps up with one tile that reads a stream.
constexpr int64_t kNearTokens = 2;

inline int64_t blocks_of(const Call& c) { return (c.outputs + kBlock - 1) / kBlock; }

// Addresses of a block's weights and scales in its panel, and the strides to the next 8 channels and the next group.
struct Place {
  const uint8_t* weight;
  int64_t weight_stride;
  const uint8_t* scale;  // bfloat16, or levels
  int64_t scale_stride;
};

inline Place place_of(const Call& c, int64_t block) {
  const int64_t first = block / kPanel * kPanel, width = std::min(kPanel, blocks_of(c) - first);
  const int64_t bytes = kBlock * (c.two_level ? 1 : 2), octets = kBlock * c.weight_bits;
  return {c.weight + first * c.channels * octets / 8 + (block - first) * octets, width * octets,
          c.scale + (first * (c.channels / c.group_size) + block - first) * bytes, width * bytes};
}

// Memory to prefetch while a tile is computed: `bytes` from `at` on for every 8 channels. It goes into the first-level
// cache if time allows, else into the second-level cache, which takes more requests at a time.
struct Fetch {
  const uint8_t* at;
  int64_t bytes;
  bool near;

  [[gnu::always_inline]] inline void next() {
    if (near) {
      __builtin_prefetch(at);
      if (bytes > 64) __builtin_prefetch(at + 64);
    } else {
      __builtin_prefetch(at, 0, 2);
      if (bytes > 64) __builtin_prefetch(at + 64, 0, 2);
    }
    at += bytes;
  }
  // The same for weights of 8 bits: up to 256 bytes.
  [[gnu::always_inline]] inline void next_wide() {
    for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(at + line, 0, 2);
    at += bytes;
  }
};

// Four codes of a token, for every output.
template <class D>
[[gnu::always_inline]] inline typename D::Ints quad(const int8_t* codes) {
  int32_t four;
  std::memcpy(&four, codes, 4);
  return D::broadcast(four);
}

// Dot products of 8 channels of `Tokens` tokens and `Vectors` vectors of outputs. Those of the first 4 channels are
// added to sums, those of the others to more_sums, which may be the same array.
template <class D, int Tokens, int Vectors>
[[gnu::always_inline]] inline void octet(const uint8_t* weights, const int8_t* codes, int64_t codes_stride,
                                         typename D::Ints (&sums)[Tokens][Vectors],
                                         typename D::Ints (&more_sums)[Tokens][Vectors]) {
  typename D::Ints low[Vectors], high[Vectors];
#pragma GCC unroll 16
  for (int v = 0; v < Vectors; ++v) {
    const auto nibbles = D::load(weights + v * D::kWidth * 4);
    low[v] = D::low_nibbles(nibbles);
    high[v] = D::high_nibbles(nibbles);
  }
#pragma GCC unroll 16
  for (int m = 0; m < Tokens; ++m) {
    const auto four = quad<D>(codes + m * codes_stride);
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) sums[m][v] = D::dot(sums[m][v], low[v], four);
  }
#pragma GCC unroll 16
  for (int m = 0; m < Tokens; ++m) {
    const auto four = quad<D>(codes + m * codes_stride + 4);
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) more_sums[m][v] = D::dot(more_sums[m][v], high[v], four);
  }
}

// The integers of one group of 8-bit weights, from `first` on; ints begin with the offsets.
template <class D, int Tokens, int Vectors>
[[gnu::always_inline]] inline void wide_group(const Call& c, const Place& place, const int8_t* codes, int64_t first,
                                              Fetch& fetch, typename D::Ints (&ints)[Tokens][Vectors]) {
  // Vectors of a block, and bytes of a vector's four channels.
  constexpr int kOfBlock = kBlock / D::kWidth, kBytes = 4 * D::kWidth;
  for (int64_t chunk = first; chunk < first + c.group_size; chunk += 32) {
    // Sums in 16 bits hold 32 channels of nibbles.
    typename D::Ints low[Tokens][Vectors], high[Tokens][Vectors];
    if constexpr (D::kNarrowSums) {
      for (int m = 0; m < Tokens; ++m) {
        for (int v = 0; v < Vectors; ++v) low[m][v] = high[m][v] = D::zero_ints();
      }
    }
    for (int64_t k = chunk; k < chunk + 32; k += 4) {
      const uint8_t* weights = place.weight + k / 8 * place.weight_stride + k % 8 / 4 * 64;
      if (!D::kNarrowSums && k % 8 == 0) fetch.next_wide();
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) {
        const auto bytes = D::load(weights + v / kOfBlock * 128 + v % kOfBlock * kBytes);
#pragma GCC unroll 16
        for (int m = 0; m < Tokens; ++m) {
          const auto four = quad<D>(codes + m * c.channels + k);
          if constexpr (D::kNarrowSums) {
            low[m][v] = D::dot(low[m][v], D::low_nibbles(bytes), four);
            high[m][v] = D::dot(high[m][v], D::high_nibbles(bytes), four);
          } else {
            ints[m][v] = D::dot(ints[m][v], bytes, four);
          }
        }
      }
    }
    if constexpr (D::kNarrowSums) {
      for (int m = 0; m < Tokens; ++m) {
        for (int v = 0; v < Vectors; ++v) {
          ints[m][v] = D::add(D::widened_add(ints[m][v], low[m][v]), D::times16(D::widened_add(D::zero_ints(), high[m][v])));
        }
      }
    }
  }
}

// Adds up group sums: sum * scale in float32, or with levels sum * level in exact int32.
template <class D>
struct Scaled {
  using Sums = typename D::Floats;
  static Sums zero() { return D::zero(); }
  static Sums load(const float* p) { return D::load_floats(p); }
  static void store(float* p, Sums v) { D::store_floats(p, v); }
  static auto factor(const uint8_t* p, int v) {
    return D::load_bfloat16(reinterpret_cast<const uint16_t*>(p) + v * D::kWidth);
  }
  static Sums add(Sums sum, typename D::Ints ints, typename D::Floats scale) { return D::scaled_add(sum, ints, scale); }
};
template <class D>
struct Levelled {
  using Sums = typename D::Ints;
  static Sums zero() { return D::zero_ints(); }
  static Sums load(const float* p) { return D::load(reinterpret_cast<const uint8_t*>(p)); }
  static void store(float* p, Sums v) { D::store(reinterpret_cast<uint8_t*>(p), v); }
  static auto factor(const uint8_t* p, int v) { return D::load_levels(p + v * D::kWidth); }
  static Sums add(Sums sum, typename D::Ints ints, typename D::Ints level) { return D::levelled_add(sum, ints, level); }
};

// Sums of `Tokens` tokens x `Blocks` blocks over channels [begin, end), added to out [tokens, Blocks * 16].
template <class D, class Groups, int Bits, int Tokens, int Blocks>
inline void tile(const Call& c, const Place& place, int64_t token, int64_t begin, int64_t end, Fetch fetch, float* out) {
  constexpr int kVectors = Blocks * kBlock / D::kWidth;
  const int64_t groups = c.channels / c.group_size;
  const int8_t* codes = c.codes + token * c.channels;
  const int32_t* offset = c.offset + token * groups;
  const uint8_t* weights = place.weight + begin / 8 * place.weight_stride;
  typename Groups::Sums sums[Tokens][kVectors];
#pragma GCC unroll 16
  for (int m = 0; m < Tokens; ++m) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      sums[m][v] = begin ? Groups::load(out + (m * kVectors + v) * D::kWidth) : Groups::zero();
    }
  }
  int64_t group = begin / c.group_size;
  for (int64_t first = begin; first < end; first += c.group_size, ++group) {
    __builtin_prefetch(place.scale + (group + kFetchGroups) * place.scale_stride, 0, 2);
    typename D::Ints ints[Tokens][kVectors];
#pragma GCC unroll 16
    for (int m = 0; m < Tokens; ++m) {
      const auto start = D::broadcast(offset[m * groups + group]);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) ints[m][v] = start;
    }
    if constexpr (Bits == 8) {
      wide_group<D>(c, place, codes, first, fetch, ints);
    } else if constexpr (D::kNarrowSums) {
      for (int64_t chunk = first; chunk < first + c.group_size; chunk += 32) {
        typename D::Ints part[Tokens][kVectors];
#pragma GCC unroll 16
        for (int m = 0; m < Tokens; ++m) {
#pragma GCC unroll 16
          for (int v = 0; v < kVectors; ++v) part[m][v] = D::zero_ints();
        }
#pragma GCC unroll 4
        for (int64_t k = chunk; k < chunk + 32; k += 8, weights += place.weight_stride) {
          octet<D, Tokens, kVectors>(weights, codes + k, c.channels, part, part);
        }
#pragma GCC unroll 16
        for (int m = 0; m < Tokens; ++m) {
#pragma GCC unroll 16
          for (int v = 0; v < kVectors; ++v) ints[m][v] = D::widened_add(ints[m][v], part[m][v]);
        }
      }
    } else {
      // One token has few sums. With twice as many, dot products do not wait for each other.
      constexpr bool kTwice = Tokens == 1;
      typename D::Ints more[Tokens][kVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) more[0][v] = D::zero_ints();
      for (int64_t k = first; k < first + c.group_size; k += 8, weights += place.weight_stride) {
        fetch.next();
        octet<D, Tokens, kVectors>(weights, codes + k, c.channels, ints, kTwice ? more : ints);
      }
      if constexpr (kTwice) {
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) ints[0][v] = D::add(ints[0][v], more[0][v]);
      }
    }
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      const auto factor = Groups::factor(place.scale + group * place.scale_stride, v);
#pragma GCC unroll 16
      for (int m = 0; m < Tokens; ++m) sums[m][v] = Groups::add(sums[m][v], ints[m][v], factor);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < Tokens; ++m) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) Groups::store(out + (m * kVectors + v) * D::kWidth, sums[m][v]);
  }
}

// Calls run(size, first token, prefetch) for every tile of tokens [first, last) on channels [begin, end). A single tile
// reads a stream; several tiles share the prefetching of the next strip, which follows this one.
template <class D, class Run>
[[gnu::always_inline]] inline void tiles(const Place& place, int64_t first, int64_t last, int64_t begin, int64_t end,
                                         Run run) {
  const int64_t count = (last - first + D::kTileTokens - 1) / D::kTileTokens;
  const bool near = count > 2 || last - first <= kNearTokens;
  const uint8_t* ahead = place.weight + (count > 1 ? end / 8 * place.weight_stride : near ? kFetchNear : kFetchFar);
  const int64_t bytes_each = place.weight_stride / count;
  int64_t m = first;
  for (int64_t index = 0; index < count; ++index) {
    const int64_t size = (last - m + count - index - 1) / (count - index);
    const Fetch fetch{ahead + index * bytes_each * (end - begin) / 8, bytes_each, near};
    using std::integral_constant;
    switch (size) {
      case 1: run(integral_constant<int, 1>(), m, fetch); break;
      case 2: run(integral_constant<int, 2>(), m, fetch); break;
      case 3: run(integral_constant<int, 3>(), m, fetch); break;
      case 4: run(integral_constant<int, 4>(), m, fetch); break;
      case 5: run(integral_constant<int, std::min(5, D::kTileTokens)>(), m, fetch); break;
      case 6: run(integral_constant<int, std::min(6, D::kTileTokens)>(), m, fetch); break;
    }
    m += size;
  }
}

// `Blocks` blocks for tokens [first, last), at most kMostTokens, in tiles of similar size.
template <class D, class Groups, int Bits, int Blocks>
inline void panel(const Call& c, int64_t block, int64_t first, int64_t last) {
  alignas(64) float out[kMostTokens * Blocks * kBlock];
  const Place place = place_of(c, block);
  const int64_t count = (last - first + D::kTileTokens - 1) / D::kTileTokens;
  const int64_t strip = count > 2 ? kStrip : count == 2 ? kStripOfTwo : c.channels;
  fetch_for_epilogue<Blocks>(c, block, first, last);
  for (int64_t begin = 0; begin < c.channels; begin += strip) {
    const int64_t end = std::min(begin + strip, c.channels);
    tiles<D>(place, first, last, begin, end, [&](auto tokens, int64_t m, Fetch fetch) {
      tile<D, Groups, Bits, tokens(), Blocks>(c, place, m, begin, end, fetch, out + (m - first) * Blocks * kBlock);
    });
  }
  epilogue<Blocks>(c, block, first, last, out);
}

// Blocks of a unit of work: those of a tile, or one if there are too few for the threads.
inline int64_t unit_blocks(const Call& c) {
  return blocks_of(c) < 4 * Dot::kTileBlocks * c.threads ? 1 : Dot::kTileBlocks;
}

// Chunks of tokens of a panel, and units of work: panels times chunks.
inline int64_t token_chunks(const Call& c) { return (c.tokens + kMostTokens - 1) / kMostTokens; }
inline int64_t gemm_units(const Call& c) {
  return (blocks_of(c) + unit_blocks(c) - 1) / unit_blocks(c) * token_chunks(c);
}

// A range of the `gemm_units`: wide_panel(c, block, first token, last token) computes the blocks of a tile,
// narrow_panel computes one block.
template <class Panel>
inline void panels(const Call& c, Range units, Panel wide_panel, Panel narrow_panel) {
  const int64_t blocks = blocks_of(c), width = unit_blocks(c), chunks = token_chunks(c);
  // Chunks of one size, a multiple of every tile.
  const int64_t chunk = ((c.tokens + chunks - 1) / chunks + 11) / 12 * 12;
  for (int64_t unit = units.begin; unit < units.end; ++unit) {
    const int64_t first = unit % chunks * chunk, last = std::min(first + chunk, c.tokens);
    int64_t block = unit / chunks * width;
    if (first >= last) continue;
    if (width == Dot::kTileBlocks && block + width <= blocks) {
      wide_panel(c, block, first, last);
      continue;
    }
    for (const int64_t end = std::min(block + width, blocks); block < end; ++block) {
      narrow_panel(c, block, first, last);
    }
  }
}

template <class Groups, int Bits>
inline void gemm_groups(const Call& c, Range units) {
  panels(c, units, panel<Dot, Groups, Bits, Dot::kTileBlocks>, panel<Dot, Groups, Bits, 1>);
}

}  // namespace morphoquant

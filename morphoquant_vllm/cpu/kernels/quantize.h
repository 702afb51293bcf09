// The activation quantizer, equal to numerics/activation.py on every code.
//
//     code = clamp(rint((x - centre) * inverse), low, high), NaN -> 0
//
// in float32 without contraction. Clamping before rounding gives the same codes, since the limits are integers.
#pragma once

#include <algorithm>

#include "vector.h"

namespace morphoquant {

// Channels that one thread quantizes at a time, a multiple of every G. It splits a single token over the threads.
constexpr int64_t kQuantizeChannels = 2048;

template <int64_t D>
inline float value_at(const typename Element<D>::Type* p) {
  if constexpr (D == kFloat32) {
    return *p;
  } else if constexpr (D == kBFloat16) {
    const uint32_t bits = static_cast<uint32_t>(*p) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  } else {
    return _cvtsh_ss(*p);
  }
}

// Row of a token, or -1 if its modality is not a row.
template <int64_t D>
inline int64_t token_row(const Call& c, const typename Element<D>::Type* x, int64_t token) {
  for (int64_t set = 0; set < c.massive_sets; ++set) {
    bool inside = true;
    for (int64_t j = set * c.massive_channels; j < (set + 1) * c.massive_channels; ++j) {
      const float value = value_at<D>(x + c.massive_channel[j]);
      inside = inside && value >= c.massive_low[j] && value <= c.massive_high[j];
    }
    if (inside) return c.rows - 1;
  }
  const int64_t row = c.modality[token];
  return row >= 0 && row < c.rows ? row : -1;
}

// 8 channels of a token. Each channel is inserted into a register. The alternatives are not better: a 16-bit gather
// does not exist, AVX2's gathers are not faster, and a vector load would wait for narrower stores.
template <int64_t D>
inline __m256 gathered(const typename Element<D>::Type* x, const int32_t* at) {
  if constexpr (D == kFloat32) {
    return _mm256_setr_ps(x[at[0]], x[at[1]], x[at[2]], x[at[3]], x[at[4]], x[at[5]], x[at[6]], x[at[7]]);
  } else {
    __m128i low = _mm_cvtsi32_si128(x[at[0]]), high = _mm_cvtsi32_si128(x[at[4]]);
    low = _mm_insert_epi16(low, x[at[1]], 1), high = _mm_insert_epi16(high, x[at[5]], 1);
    low = _mm_insert_epi16(low, x[at[2]], 2), high = _mm_insert_epi16(high, x[at[6]], 2);
    low = _mm_insert_epi16(low, x[at[3]], 3), high = _mm_insert_epi16(high, x[at[7]], 3);
    return Element<D>::widened(_mm_unpacklo_epi64(low, high));
  }
}

// Codes of channels [begin, end) of one token, and their sum per group times -8, or -128 for 8-bit weights.
template <int64_t D, bool in_order>
inline void quantize_channels(const Call& c, const typename Element<D>::Type* x, int64_t token, int64_t row,
                              int64_t begin, int64_t end) {
  const float* inverse = c.inverse + row * c.channels;
  const float* centre = c.centre + row * c.channels;
  const uint8_t* mask = c.mask + row * c.channels;
  int8_t* codes = c.codes + token * c.channels;
  const __m256 low = _mm256_set1_ps(-8), high = _mm256_set1_ps(7);
  const __m256 escape_low = _mm256_set1_ps(-128), escape_high = _mm256_set1_ps(127);
  // Turns code into code + 128.
  const __m128i flip = _mm_set1_epi8(static_cast<char>(c.unsigned_codes ? 0x80 : 0));
  const int64_t step = c.offset ? c.group_size : 32;
  const int32_t shift = c.weight_bits == 8 ? -128 : -8;
  // Prefetches the next token's channels in memory order, before they are gathered in channel order.
  const auto* next = reinterpret_cast<const char*>(x + c.x_stride + begin);
  for (int64_t group = begin; group < end; group += step) {
    for (int64_t bytes = step * sizeof(*x); bytes > 0; bytes -= 64, next += 64) __builtin_prefetch(next);
    __m256i sum = _mm256_setzero_si256();
    for (int64_t k = group; k < group + step; k += 8) {
      __m256 value;
      if constexpr (in_order) {
        value = Element<D>::load(x + k);
      } else {
        value = gathered<D>(x, c.channel_order + k);
      }
      value = _mm256_mul_ps(_mm256_sub_ps(value, _mm256_loadu_ps(centre + k)), _mm256_loadu_ps(inverse + k));
      value = _mm256_and_ps(value, _mm256_cmp_ps(value, value, _CMP_ORD_Q));
      const __m128i flags = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(mask + k));
      const __m256 masked = _mm256_castsi256_ps(
          _mm256_cmpgt_epi32(_mm256_cvtepu8_epi32(flags), _mm256_setzero_si256()));
      value = _mm256_max_ps(value, _mm256_blendv_ps(low, escape_low, masked));
      value = _mm256_min_ps(value, _mm256_blendv_ps(high, escape_high, masked));
      value = _mm256_round_ps(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      const __m256i code = _mm256_cvtps_epi32(value);
      sum = _mm256_add_epi32(sum, code);
      const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
      const __m128i bytes = _mm_xor_si128(_mm_packs_epi16(words, words), flip);
      _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + k), bytes);
    }
    if (c.offset) c.offset[token * (c.channels / step) + group / step] = shift * sum_lanes(sum);
  }
}

// This thread's share of the tokens; false if a token's modality is not a row.
template <int64_t D>
inline bool quantize(const Call& c, int64_t thread, int64_t threads) {
  const int64_t parts = (c.channels + kQuantizeChannels - 1) / kQuantizeChannels;
  const int64_t units = c.tokens * parts;
  bool valid = true;
  for (int64_t unit = units * thread / threads; unit < units * (thread + 1) / threads; ++unit) {
    const int64_t token = unit / parts, begin = unit % parts * kQuantizeChannels;
    const auto* x = static_cast<const typename Element<D>::Type*>(c.x) + token * c.x_stride;
    const int64_t row = token_row<D>(c, x, token);
    if (row < 0) {
      valid = false;
      continue;
    }
    if (begin == 0) c.token_row[token] = static_cast<int32_t>(row);
    const int64_t end = std::min(begin + kQuantizeChannels, c.channels);
    if (c.channel_order) {
      quantize_channels<D, false>(c, x, token, row, begin, end);
    } else {
      quantize_channels<D, true>(c, x, token, row, begin, end);
    }
  }
  return valid;
}

inline bool quantize(const Call& c, int64_t thread, int64_t threads) {
  if (c.dtype == kFloat32) return quantize<kFloat32>(c, thread, threads);
  if (c.dtype == kBFloat16) return quantize<kBFloat16>(c, thread, threads);
  return quantize<kFloat16>(c, thread, threads);
}

}  // namespace morphoquant

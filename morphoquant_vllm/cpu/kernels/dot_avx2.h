// Dot products of 4 bytes on AVX2, without and with the AVX-VNNI instruction. See dot.h for the interface of a Dot.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace morphoquant {

struct DotAvx2 {
  using Ints = __m256i;
  using Floats = __m256;
  static constexpr int kWidth = 8;
  // Blocks and largest number of tokens of a tile, bounded by 16 registers.
  static constexpr int kTileBlocks = 1, kTileTokens = 4;
  // Whether dot() sums in 16 bits, which hold sums over 32 channels.
  static constexpr bool kNarrowSums = true;
  // Tokens and outputs of a tile of the 8-bit head.
  static constexpr int kHeadTokens = 2, kHeadOutputs = 4;

  static Ints load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store(uint8_t* p, Ints v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static Ints low_nibbles(Ints v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
  static Ints high_nibbles(Ints v) { return low_nibbles(_mm256_srli_epi16(v, 4)); }
  static Ints broadcast(int32_t v) { return _mm256_set1_epi32(v); }

  static Ints zero_ints() { return _mm256_setzero_si256(); }
  static Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
  // vpmaddubsw adds two products in 16 bits: |15 * 128 * 2| = 3840, and 8 of these still fit 32767.
  static Ints dot(Ints part, Ints weights, Ints codes) {
    return _mm256_add_epi16(part, _mm256_maddubs_epi16(weights, codes));
  }
  static Ints widened_add(Ints sum, Ints part) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(part, _mm256_set1_epi16(1)));
  }

  static Ints times16(Ints v) { return _mm256_slli_epi32(v, 4); }

  static Floats zero() { return _mm256_setzero_ps(); }
  static Floats load_floats(const float* p) { return _mm256_loadu_ps(p); }
  static void store_floats(float* p, Floats v) { _mm256_storeu_ps(p, v); }
  static Floats load_bfloat16(const uint16_t* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  // sum + ints * scale, rounded once: the ints are exact in float32.
  static Floats scaled_add(Floats sum, Ints ints, Floats scale) {
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(ints), scale, sum);
  }
  // Levels of 8 outputs as int32, and twice as 16-bit words for the 4 bytes of each output.
  static Ints load_levels(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static Ints load_level_words(const uint8_t* p) {
    const Ints levels = load_levels(p);
    return _mm256_or_si256(levels, _mm256_slli_epi32(levels, 16));
  }
  static Ints levelled_add(Ints sum, Ints ints, Ints level) {
    return _mm256_add_epi32(sum, _mm256_mullo_epi32(ints, level));
  }
  // q * level as bytes, from bytes q + 8. (q + 8) * level is below 256, so a 16-bit product multiplies two bytes.
  static Ints levelled_bytes(Ints weights, Ints level) {
    const Ints eight = _mm256_slli_epi16(_mm256_or_si256(level, _mm256_slli_epi16(level, 8)), 3);
    return _mm256_sub_epi8(_mm256_mullo_epi16(weights, level), eight);
  }
  static Floats load_int8(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static Floats multiply_add(Floats a, Floats b, Floats sum) { return _mm256_fmadd_ps(a, b, sum); }
};

#ifdef __AVXVNNI__
struct DotAvxVnni : DotAvx2 {
  static constexpr bool kNarrowSums = false;
  static Ints dot(Ints sum, Ints weights, Ints codes) { return _mm256_dpbusd_avx_epi32(sum, weights, codes); }
};
#endif

}  // namespace morphoquant

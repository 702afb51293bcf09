// Dot products of 4 bytes on AVX512-VNNI: vpdpbusd, unsigned weights times signed codes, exact in int32.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace morphoquant {

struct DotAvx512Vnni {
  using Ints = __m512i;
  using Floats = __m512;
  static constexpr int kWidth = 16;
  // Blocks and largest number of tokens of a tile: 24 registers of sums.
  static constexpr int kTileBlocks = 2, kTileTokens = 6;
  static constexpr bool kNarrowSums = false;
  static constexpr int kHeadTokens = 4, kHeadOutputs = 4;

  static Ints load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static void store(uint8_t* p, Ints v) { _mm512_storeu_si512(p, v); }
  static Ints low_nibbles(Ints v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
  static Ints high_nibbles(Ints v) { return low_nibbles(_mm512_srli_epi16(v, 4)); }
  static Ints broadcast(int32_t v) { return _mm512_set1_epi32(v); }

  static Ints zero_ints() { return _mm512_setzero_si512(); }
  static Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
  static Ints dot(Ints part, Ints weights, Ints codes) {
#if !defined(__AVX512VNNI__) || defined(__SANITIZE_ADDRESS__)
    return _mm512_dpbusd_epi32(part, weights, codes);
#else
    asm("vpdpbusd %2, %1, %0" : "+v"(part) : "v"(weights), "v"(codes));
    return part;
#endif
  }

  static Floats zero() { return _mm512_setzero_ps(); }
  static Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
  static void store_floats(float* p, Floats v) { _mm512_storeu_ps(p, v); }
  static Floats load_bfloat16(const uint16_t* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static Floats scaled_add(Floats sum, Ints ints, Floats scale) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(ints), scale, sum);
  }
  // Levels of 16 outputs as int32, and twice as 16-bit words for the 4 bytes of each output.
  static Ints load_levels(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Ints load_level_words(const uint8_t* p) {
    const Ints levels = load_levels(p);
    return _mm512_or_si512(levels, _mm512_slli_epi32(levels, 16));
  }
  static Ints levelled_add(Ints sum, Ints ints, Ints level) {
    return _mm512_add_epi32(sum, _mm512_mullo_epi32(ints, level));
  }
  // q * level as bytes, from bytes q + 8. (q + 8) * level is below 256, so a 16-bit product multiplies two bytes.
  static Ints levelled_bytes(Ints weights, Ints level) {
    const Ints eight = _mm512_slli_epi16(_mm512_or_si512(level, _mm512_slli_epi16(level, 8)), 3);
    return _mm512_sub_epi8(_mm512_mullo_epi16(weights, level), eight);
  }
  static Floats load_int8(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static Floats multiply_add(Floats a, Floats b, Floats sum) { return _mm512_fmadd_ps(a, b, sum); }
};

}  // namespace morphoquant

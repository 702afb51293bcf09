// Stands before the compiler's own header: emulates the AVX512 intrinsics of cpu/kernels/ by SIMDe, so that the
// AVX512-VNNI kernels' logic runs on any machine with AVX2.
#pragma once
#include_next <immintrin.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

// Three that SIMDE 0.7.4 lacks.
static inline simde__m512i emulated_cvtepu16_epi32(__m256i words) {
  simde__m512i_private result;
  uint16_t lanes[16];
  __builtin_memcpy(lanes, &words, sizeof(lanes));
  for (int i = 0; i < 16; ++i) result.u32[i] = lanes[i];
  return simde__m512i_from_private(result);
}
static inline simde__m512 emulated_cvtepi32_ps(simde__m512i ints) {
  simde__m512_private result;
  int32_t lanes[16];
  __builtin_memcpy(lanes, &ints, sizeof(lanes));
  for (int i = 0; i < 16; ++i) result.f32[i] = static_cast<float>(lanes[i]);
  return simde__m512_from_private(result);
}
static inline simde__m512i emulated_cvtepi8_epi32(__m128i bytes) {
  simde__m512i_private result;
  int8_t lanes[16];
  __builtin_memcpy(lanes, &bytes, sizeof(lanes));
  for (int i = 0; i < 16; ++i) result.i32[i] = lanes[i];
  return simde__m512i_from_private(result);
}
#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtepi8_epi32
#undef _mm512_cvtepi32_ps
#define _mm512_cvtepu16_epi32(words) emulated_cvtepu16_epi32(words)
#define _mm512_cvtepi32_ps(ints) emulated_cvtepi32_ps(ints)
#define _mm512_cvtepi8_epi32(bytes) emulated_cvtepi8_epi32(bytes)

// Operations on eight floats in AVX2, F16C and FMA: the same code on every processor that the kernels support.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "call.h"

namespace morphoquant {

template <int64_t D>
struct Element;

template <>
struct Element<kFloat32> {
  using Type = float;
  static __m256 load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, __m256 v) { _mm256_storeu_ps(p, v); }
  static void store(float* p, __m256 v, __m256 next) {
    store(p, v);
    store(p + 8, next);
  }
};

template <>
struct Element<kBFloat16> {
  using Type = uint16_t;
  static __m256 widened(__m128i bits) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static __m256 load(const uint16_t* p) { return widened(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  // Round half to even on the bits; a NaN keeps a set mantissa bit.
  static __m256i rounded(__m256 v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
  }
  static void store(uint16_t* p, __m256 v) {
    const __m256i half = rounded(v);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(half, half), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  static void store(uint16_t* p, __m256 v, __m256 next) {
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded(v), rounded(next)), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), packed);
  }
};

template <>
struct Element<kFloat16> {
  using Type = uint16_t;
  static __m256 widened(__m128i bits) { return _mm256_cvtph_ps(bits); }
  static __m256 load(const uint16_t* p) { return widened(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static void store(uint16_t* p, __m256 v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store(uint16_t* p, __m256 v, __m256 next) {
    store(p, v);
    store(p + 8, next);
  }
};

// Up to 8 values; memory past `count` is neither read nor written.
template <int64_t D>
inline __m256 load_part(const typename Element<D>::Type* p, int64_t count) {
  if (count >= 8) return Element<D>::load(p);
  typename Element<D>::Type part[8] = {};
  std::memcpy(part, p, count * sizeof(part[0]));
  return Element<D>::load(part);
}

template <int64_t D>
inline void store_part(typename Element<D>::Type* p, __m256 v, int64_t count) {
  if (count >= 8) return Element<D>::store(p, v);
  typename Element<D>::Type part[8];
  Element<D>::store(part, v);
  std::memcpy(p, part, count * sizeof(part[0]));
}

inline int32_t sum_lanes(__m256i v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
  return _mm_cvtsi128_si32(s);
}

}  // namespace morphoquant

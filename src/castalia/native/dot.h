// Bytes are multiplied by bytes and summed by fours into 16 lanes, in integers. `dot` takes weights or keys as `factors`
// returns them, `dot_small` bytes from 0 to 127. Instructions of x86-64 multiply unsigned bytes by signed ones. With
// VNNI, 128 is added to signed bytes, and what that adds is taken off at the end. Before VNNI, 16 bits hold the sum of
// two products, which 255 * 127 would overflow, so the sign of a weight moves to the other factor: |w| * (x * sign w).

#pragma once
#include "../core/vectors.h"

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr int ADDED = 128;  // to weights and keys before they are multiplied
#else
constexpr int ADDED = 0;
#endif

INLINE I factors(I bytes) { return ADDED ? bytes ^ (int32_t)0x80808080 : bytes; }

#if defined(__AVX512VNNI__)
INLINE Integers part_dot(Integers sum, Integers w, Integers x) {
    return (Integers)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
}
INLINE Integers part_dot_small(Integers sum, Integers w, Integers x) { return part_dot(sum, w, x); }
#elif defined(__AVX512BW__)
INLINE Integers part_dot_small(Integers sum, Integers w, Integers x) {
    const __m512i pairs = _mm512_maddubs_epi16((__m512i)w, (__m512i)x);
    return sum + (Integers)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
}
INLINE Integers part_dot(Integers sum, Integers w, Integers x) {
    const __mmask64 negative = _mm512_movepi8_mask((__m512i)w);
    const __m512i other = _mm512_mask_sub_epi8((__m512i)x, negative, _mm512_setzero_si512(), (__m512i)x);
    return part_dot_small(sum, (Integers)_mm512_abs_epi8((__m512i)w), (Integers)other);
}
#elif defined(__AVXVNNI__)
INLINE Integers part_dot(Integers sum, Integers w, Integers x) {
    return (Integers)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w, (__m256i)x);
}
INLINE Integers part_dot_small(Integers sum, Integers w, Integers x) { return part_dot(sum, w, x); }
#elif defined(__AVX2__)
INLINE Integers part_dot_small(Integers sum, Integers w, Integers x) {
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)w, (__m256i)x);
    return sum + (Integers)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
INLINE Integers part_dot(Integers sum, Integers w, Integers x) {
    const __m256i other = _mm256_sign_epi8((__m256i)x, (__m256i)w);
    return part_dot_small(sum, (Integers)_mm256_abs_epi8((__m256i)w), (Integers)other);
}
#elif defined(__SSSE3__)
INLINE Integers part_dot_small(Integers sum, Integers w, Integers x) {
    const __m128i pairs = _mm_maddubs_epi16((__m128i)w, (__m128i)x);
    return sum + (Integers)_mm_madd_epi16(pairs, _mm_set1_epi16(1));
}
INLINE Integers part_dot(Integers sum, Integers w, Integers x) {
    const __m128i other = _mm_sign_epi8((__m128i)x, (__m128i)w);
    return part_dot_small(sum, (Integers)_mm_abs_epi8((__m128i)w), (Integers)other);
}
#elif defined(__aarch64__)
INLINE Integers part_dot(Integers sum, Integers w, Integers x) {
    const int8x16_t a = (int8x16_t)w, b = (int8x16_t)x;
#if defined(__ARM_FEATURE_DOTPROD)
    return (Integers)vdotq_s32((int32x4_t)sum, a, b);
#else
    const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
    return (Integers)vpadalq_s16((int32x4_t)sum, vpaddq_s16(low, high));
#endif
}
INLINE Integers part_dot_small(Integers sum, Integers w, Integers x) { return part_dot(sum, w, x); }
#else
INLINE Integers part_dot(Integers sum, Integers w, Integers x) {
    for (int bits = 0; bits < 32; bits += 8) sum += (w << bits >> 24) * (x << bits >> 24);
    return sum;
}
INLINE Integers part_dot_small(Integers sum, Integers w, Integers x) { return part_dot(sum, w, x); }
#endif

INLINE Integers four_times(const int8_t *x) {  // four bytes in every lane
    int32_t four;
    memcpy(&four, x, 4);
    return Integers{} + four;
}

INLINE I dot(I sum, I bytes, const int8_t *x) {  // lane += its 4 bytes times the 4 of x
    const Integers other = four_times(x);
    for (int i = 0; i < PARTS; i++) sum.part[i] = part_dot(sum.part[i], bytes.part[i], other);
    return sum;
}

INLINE I dot_small(I sum, I bytes, const int8_t *x) {
    const Integers other = four_times(x);
    for (int i = 0; i < PARTS; i++) sum.part[i] = part_dot_small(sum.part[i], bytes.part[i], other);
    return sum;
}

// Sixteen numbers side by side, in as many registers as the level of instructions needs: one of AVX-512, two of AVX2,
// four of SSE or NEON. Compilers keep a vector type that is wider than a register in memory, so it is a structure of
// vectors that fit.

#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "basics.h"

constexpr int P = 16;  // numbers in a vector; output channels in a panel of weights
#if defined(__AVX512F__)
constexpr int REGISTER = 64;   // bytes
constexpr int REGISTERS = 32;  // of vectors
#elif defined(__AVX2__)
constexpr int REGISTER = 32;
constexpr int REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int REGISTER = 16;
constexpr int REGISTERS = 32;
#else
constexpr int REGISTER = 16;
constexpr int REGISTERS = 16;
#endif
constexpr int PARTS = 64 / REGISTER;  // registers of a vector
constexpr int WIDTH = P / PARTS;      // numbers in a register

template <class T> struct Lanes {  // 16 numbers of one type
    typedef T Number;
    typedef T Part __attribute__((vector_size(REGISTER)));
    Part part[PARTS];

    T operator[](int lane) const { return part[lane / WIDTH][lane % WIDTH]; }
};

typedef Lanes<float> V;
typedef Lanes<int32_t> I;
typedef V::Part Floats;  // one register
typedef I::Part Integers;
typedef Floats LooseFloats __attribute__((aligned(4)));  // at any address
typedef Integers LooseIntegers __attribute__((aligned(1)));

// Left to itself, a compiler calls some of these as functions, whose vectors go through memory.
#define INLINE static inline __attribute__((always_inline))
#define EACH_PART(Type, expression)                                                                                    \
    Type result;                                                                                                       \
    for (int i = 0; i < PARTS; i++) result.part[i] = expression;                                                       \
    return result;
#define OPERATOR(sign)                                                                                                 \
    template <class T> INLINE Lanes<T> operator sign(Lanes<T> a, Lanes<T> b) {                                         \
        EACH_PART(Lanes<T>, a.part[i] sign b.part[i])                                                                  \
    }                                                                                                                  \
    template <class T> INLINE Lanes<T> operator sign(Lanes<T> a, typename Lanes<T>::Number b) {                        \
        EACH_PART(Lanes<T>, a.part[i] sign b)                                                                          \
    }                                                                                                                  \
    template <class T, class B> INLINE Lanes<T> &operator sign##=(Lanes<T> &a, B b) { return a = a sign b; }
OPERATOR(+)
OPERATOR(-)
OPERATOR(*)
OPERATOR(/)
OPERATOR(&)
OPERATOR(^)
#undef OPERATOR

INLINE V operator-(V a) { EACH_PART(V, -a.part[i]) }
INLINE V operator+(float a, V b) { return b + a; }
INLINE V operator/(float a, V b) { EACH_PART(V, a / b.part[i]) }
INLINE I operator<<(I a, int bits) { EACH_PART(I, a.part[i] << bits) }
INLINE I operator>>(I a, int bits) { EACH_PART(I, a.part[i] >> bits) }
INLINE V select_less(V a, V b, V yes, V no) {  // a < b ? yes : no
    EACH_PART(V, a.part[i] < b.part[i] ? yes.part[i] : no.part[i])
}
// One instruction of x86-64, which takes the second number where one of them is NaN; compilers make two of a selection.
#if defined(__AVX512F__)
INLINE V larger(V a, V b) { EACH_PART(V, (Floats)_mm512_max_ps((__m512)a.part[i], (__m512)b.part[i])) }
INLINE V smaller(V a, V b) { EACH_PART(V, (Floats)_mm512_min_ps((__m512)a.part[i], (__m512)b.part[i])) }
#elif defined(__AVX2__)
INLINE V larger(V a, V b) { EACH_PART(V, (Floats)_mm256_max_ps((__m256)a.part[i], (__m256)b.part[i])) }
INLINE V smaller(V a, V b) { EACH_PART(V, (Floats)_mm256_min_ps((__m256)a.part[i], (__m256)b.part[i])) }
#elif defined(__SSE2__)
INLINE V larger(V a, V b) { EACH_PART(V, (Floats)_mm_max_ps((__m128)a.part[i], (__m128)b.part[i])) }
INLINE V smaller(V a, V b) { EACH_PART(V, (Floats)_mm_min_ps((__m128)a.part[i], (__m128)b.part[i])) }
#else
INLINE V larger(V a, V b) { return select_less(b, a, a, b); }
INLINE V smaller(V a, V b) { return select_less(a, b, a, b); }
#endif
INLINE bool any_less(V a, V b) {  // a < b in some lane
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)a.part[0], (__m512)b.part[0], _CMP_LT_OQ) != 0;
#else
    I::Part less = a.part[0] < b.part[0];
    for (int i = 1; i < PARTS; i++) less |= a.part[i] < b.part[i];
#if defined(__AVX2__)
    return _mm256_movemask_epi8((__m256i)less) != 0;
#elif defined(__aarch64__)
    return vmaxvq_u32((uint32x4_t)less) != 0;
#elif defined(__SSE2__)
    return _mm_movemask_epi8((__m128i)less) != 0;
#else
    for (int i = 0; i < WIDTH; i++)
        if (less[i]) return true;
    return false;
#endif
#endif
}
INLINE V all(float x) { return V{} + x; }
INLINE I all(int32_t x) { return I{} + x; }
INLINE V floats_in(I bits) { EACH_PART(V, (Floats)bits.part[i]) }  // the same bits
INLINE I bits_in(V a) { EACH_PART(I, (Integers)a.part[i]) }
INLINE V to_floats(I a) { EACH_PART(V, __builtin_convertvector(a.part[i], Floats)) }
INLINE I to_integers(V a) { EACH_PART(I, __builtin_convertvector(a.part[i], Integers)) }

INLINE V load(const float *p) { EACH_PART(V, *(const LooseFloats *)(p + i * WIDTH)) }
INLINE I load_bytes(const void *p) {  // 64 bytes as they are
    EACH_PART(I, *(const LooseIntegers *)((const char *)p + i * REGISTER))
}
INLINE void store(float *p, V v) {
    for (int i = 0; i < PARTS; i++) *(LooseFloats *)(p + i * WIDTH) = v.part[i];
}

// Compilers build these two out of single lanes, so the instruction is named.
INLINE V widen(const float *p) { return load(p); }

INLINE V widen(const uint16_t *p) {  // 16 bfloat16 numbers
#if defined(__AVX512F__)
    EACH_PART(V, (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p + i)), 16))
#elif defined(__AVX2__)
    EACH_PART(V, (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p + i)), 16))
#elif defined(__aarch64__)
    EACH_PART(V, (Floats)vshll_n_u16(vld1_u16(p + i * WIDTH), 16))
#else
    EACH_PART(V, (Floats)(Integers{p[i * 4] << 16, p[i * 4 + 1] << 16, p[i * 4 + 2] << 16, p[i * 4 + 3] << 16}))
#endif
}

INLINE V widen(const int8_t *p) {  // 16 bytes
#if defined(__AVX512F__)
    EACH_PART(V, (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p + i))))
#elif defined(__AVX2__)
    EACH_PART(V, (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p + i * 8)))))
#else
    EACH_PART(V, (Floats{(float)p[i * 4], (float)p[i * 4 + 1], (float)p[i * 4 + 2], (float)p[i * 4 + 3]}))
#endif
}
#undef EACH_PART

INLINE V clamp(V x, float low, float high) {  // NaN stays NaN
    return smaller(all(high), larger(all(low), x));
}

// e^x within 2 units in the last place for x from -87.3 to 88, and beyond as at the nearer of the two. The polynomial
// is Cephes' expf.
INLINE V exponential(V x) {
    x = clamp(x, -87.3f, 88.0f);
    const V magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const V shifted = x * 1.44269504f + magic, n = shifted - magic;
    const V r = x - n * 0.693359375f + n * 2.12194440e-4f;
    const float terms[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
    V p = all(1.9875691500e-4f);
    for (float c : terms) p = p * r + c;
    p = (p * r + 1.0f) * r + 1.0f;
    // n stands in the lowest bits of the sum; the others leave.
    return p * floats_in((bits_in(shifted) << 23) + (127 << 23));
}

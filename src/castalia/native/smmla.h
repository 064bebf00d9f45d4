// Products of two rows and two channels in one instruction, which ARM has since v8.6: smmla multiplies 8 bytes of each
// and sums in 32 bits, bfmmla 4 bfloat16 numbers in float32. It takes 8 bytes of one channel, then 8 of the next: two
// cells of a panel that follow each other, zipped. A permutation costs as much as a product, so panels are zipped once
// for all rows, and used for more rows than share a pass without that.
//
// Cycles of the inner loops for 8 inputs and 4 rows of a panel, by llvm-mca 19's models of Neoverse V1, V2 and N2:
// smmla 4.6, 4.6, 9.1 and sdot 10.1, 10.1, 20.1; bfmmla 20, 18, 36 and fmla 53, 54, 108. Not measured on a processor.

#pragma once
#include "dot.h"

INLINE Integers multiply(Integers sum, Integers x, Integers w) {
    return (Integers)vmmlaq_s32((int32x4_t)sum, (int8x16_t)x, (int8x16_t)w);
}
INLINE Floats multiply(Floats sum, Integers x, Integers w) {
    return (Floats)vbfmmlaq_f32((float32x4_t)sum, (bfloat16x8_t)x, (bfloat16x8_t)w);
}

constexpr int STEP = 2 * PARTS;  // registers of two cells of a panel

INLINE Integers *zip(Integers *to, I cell, I next) {
    for (int i = 0; i < PARTS; i++) {
        to[2 * i] = (Integers)vzip1q_s32((int32x4_t)cell.part[i], (int32x4_t)next.part[i]);
        to[2 * i + 1] = (Integers)vzip2q_s32((int32x4_t)cell.part[i], (int32x4_t)next.part[i]);
    }
    return to + STEP;
}

// A panel as products take it, an odd last cell with zeros. int4 becomes bytes from 0 to 15.
static void ready_panel(const Linear &l, int64_t number, Integers *to) {
    const int32_t low = 0x0f0f0f0f;
    const int64_t cell = P * 4, bytes = l.kind == INT4 ? l.k / 2 : l.kind == BF16 ? l.k * 2 : l.k;
    const char *from = (const char *)l.weight + number * P * bytes, *end = from + P * bytes;
    if (l.kind == INT4) {  // the halves of a byte are the two cells
        for (; from < end; from += cell) {
            const I both = load_bytes(from);
            to = zip(to, both & low, (both >> 4) & low);
        }
        return;
    }
    for (; from + 2 * cell <= end; from += 2 * cell) to = zip(to, load_bytes(from), load_bytes(from + cell));
    if (from < end) zip(to, load_bytes(from), I{});
}

// Sums of M rows and the 16 channels of a panel. A register has two rows and two channels; the last row of an odd number
// stands twice, and nobody reads what becomes of the second.
template <class Sums, int M> struct Tiles {
    static constexpr int PAIRS = (M + 1) / 2;
    typename Sums::Part sum[PAIRS][STEP];

    // 8 bytes of every row at x, whose rows are `stride` bytes apart, times STEP registers of weights.
    __attribute__((always_inline)) void add(const Integers *w, const int8_t *x, int64_t stride) {
        for (int p = 0; p < PAIRS; p++) {
            const int8_t *upper = x + 2 * p * stride, *lower = x + min(2 * p + 1, M - 1) * stride;
            const Integers rows = (Integers)vcombine_s8(vld1_s8(upper), vld1_s8(lower));
            for (int i = 0; i < STEP; i++) sum[p][i] = multiply(sum[p][i], rows, w[i]);
        }
    }

    __attribute__((always_inline)) Sums row(int m) const {
        Sums out;
        for (int i = 0; i < PARTS; i++) {
            const int64x2_t a = (int64x2_t)sum[m / 2][2 * i], b = (int64x2_t)sum[m / 2][2 * i + 1];
            out.part[i] = (typename Sums::Part)(m % 2 ? vzip2q_s64(a, b) : vzip1q_s64(a, b));
        }
        return out;
    }
};

template <int M> static void tiles_bf16(const Integers *w, const Input &in, int64_t first, V *out) {
    const int64_t bytes = 2 * padded(in.k);
    const int8_t *x = in.q + first * 2 * bytes;
    Tiles<V, M> sum = {};
    // One term after the other: products that follow each other need sums of their own, or they wait.
    for (int term = 0; term < 2; term++)
        for (int64_t i = 0; i < bytes; i += 8) sum.add(w + i / 8 * STEP, x + term * bytes + i, 2 * bytes);
    for (int m = 0; m < M; m++) out[m] = sum.row(m);
}

template <int M>
static void tiles_int8(const Integers *w, const float *scale, const Input &in, int64_t first, V *out) {
    const int8_t *x = in.q + first * in.k;
    Tiles<I, M> sum = {};
    // Where the last cell is alone, the 4 bytes beyond a row are multiplied by zeros.
    for (int64_t i = 0; i < in.k; i += 8, w += STEP) sum.add(w, x + i, in.k);
    for (int m = 0; m < M; m++) out[m] = to_floats(sum.row(m)) * (load(scale) * in.step[first + m]);
}

template <int M>
static void tiles_int4(const Integers *w, const uint16_t *scale, const Input &in, int64_t first, V *out) {
    const int8_t *x = in.q + first * in.k;
    V sum[M] = {};
    for (int64_t g = 0; g < in.groups; g++) {
        Tiles<I, M> part = {};
        for (int i = 0; i < GROUP; i += 8, w += STEP, x += 8) part.add(w, x, in.k);
        const V step = widen(scale + g * P);
        for (int m = 0; m < M; m++) sum[m] += to_floats(part.row(m) + in.sum[(first + m) * in.groups + g]) * step;
    }
    for (int m = 0; m < M; m++) out[m] = sum[m] * in.step[first + m];
}

template <int M>
static void tiles_up_to(const Linear &l, const Input &in, const Integers *w, int64_t number, int64_t first,
                        int64_t rows, V *out) {
    if constexpr (M > 1)
        if (rows < M) return tiles_up_to<M - 1>(l, in, w, number, first, rows, out);
    if (l.kind == BF16) tiles_bf16<M>(w, in, first, out);
    if (l.kind == INT8) tiles_int8<M>(w, (const float *)l.scale + number * P, in, first, out);
    if (l.kind == INT4) tiles_int4<M>(w, (const uint16_t *)l.scale + number * P * in.groups, in, first, out);
}

constexpr int64_t panel_room(int64_t k) { return (k + 7) / 8 * 8 * P * 2; }  // bytes of a zipped panel at most
constexpr int64_t TILE_ROWS = BLOCK;  // that share a pass

INLINE bool takes_tiles(const Linear &l, int64_t M) { return M > BLOCK && l.kind != FP32; }

static void multiply_panel(const Linear &l, const Input &in, const Integers *panel, int64_t number, int64_t first,
                           int64_t rows, V *out) {
    tiles_up_to<BLOCK>(l, in, panel, number, first, rows, out);
}

struct TileUse {};  // a thread needs no permission

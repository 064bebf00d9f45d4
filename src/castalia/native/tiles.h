// Products of matrix instructions, which take several rows and several channels at once: of ARMv8.6, and of AMX.

#pragma once
#include "dot.h"

#if defined(__ARM_FEATURE_MATMUL_INT8) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define HAS_TILES 1
#elif (defined(__AMX_INT8__) && defined(__AMX_BF16__)) || defined(TILE_MODEL)
#define HAS_TILES 1  // TILE_MODEL is a test's model of the instructions
#else
#define HAS_TILES 0
#endif

#if HAS_TILES
constexpr int64_t padded(int64_t k) { return (k + 3) / 4 * 4; }  // bfloat16 numbers of a row

// x = high + low to 2^-17 of it: weights in bfloat16 round activations on no other level. The row of `q` has all high
// parts, then all low ones, both padded with zeros.
static void split_row(const Input &in, int64_t m) {
    const float *x = in.x + m * in.k;
    uint16_t *high = (uint16_t *)in.q + m * 2 * padded(in.k), *low = high + padded(in.k);
    for (int64_t i = 0; i < in.k; i++) {
        high[i] = narrow(x[i]);
        low[i] = narrow(x[i] - widen(high[i]));
    }
    for (int64_t i = in.k; i < padded(in.k); i++) high[i] = low[i] = 0;
}

#if defined(__aarch64__)
#include "smmla.h"
#else
#include "amx.h"
#endif

static void tiled_linear(const Thread &thread, const Linear &l, const Input &in, int64_t M, float *y, int64_t width,
                         int after) {
    Integers *panel = (Integers *)(in.panels + 2 * thread.number * panel_room(l.k));
    const Range mine = thread.share(l.n / P);
    const TileUse use;
    for (int64_t number = mine.begin; number < mine.end; number++) {
        ready_panel(l, number, panel);
        for (int64_t first = 0; first < M; first += TILE_ROWS) {
            V out[TILE_ROWS];
            const int64_t rows = min(TILE_ROWS, M - first);
            multiply_panel(l, in, panel, number, first, rows, out);
            put(l, out, rows, number, y + first * width, width, after);
        }
    }
}

static void tiled_gated_linear(const Thread &thread, const Linear &l, const Input &in, int64_t M, float *y,
                               int64_t width, int act) {
    Integers *panel = (Integers *)(in.panels + 2 * thread.number * panel_room(l.k));
    Integers *next = panel + panel_room(l.k) / REGISTER;
    const Range pairs = thread.share(l.n / P / 2);
    const TileUse use;
    for (int64_t number = 2 * pairs.begin; number < 2 * pairs.end; number += 2) {
        ready_panel(l, number, panel);
        ready_panel(l, number + 1, next);
        for (int64_t first = 0; first < M; first += TILE_ROWS) {
            V gate[TILE_ROWS], up[TILE_ROWS];
            const int64_t rows = min(TILE_ROWS, M - first);
            multiply_panel(l, in, panel, number, first, rows, gate);
            multiply_panel(l, in, next, number + 1, first, rows, up);
            put_gated(l, gate, up, rows, number, y + first * width, width, act);
        }
    }
}
#endif

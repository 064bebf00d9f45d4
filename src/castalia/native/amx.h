// Products of 16 rows and 16 channels in one instruction: a tile register of AMX has 16 rows of 64 bytes. A panel as it
// lies in memory is a row of such tiles, each of 16 cells of 16 channels: 64 int8 inputs, or 32 of bfloat16. Both factors
// of int8 products are signed, so nothing is added and taken off again.
//
// A product takes 16 cycles, a tile from the cache 8 to 16. So four tiles of rows share one of a panel: tiles 0 to 3 are
// their sums, 4 and 5 take turns for rows, 6 is the panel's.

#pragma once
#include "dot.h"

constexpr int64_t TILE = 16;            // rows, and channels, of a tile of sums
constexpr int64_t TILE_BYTES = 64;      // of a row in a tile
constexpr int64_t TILE_ROWS = 4 * TILE;  // that share a pass
constexpr int64_t panel_room(int64_t) { return 0; }

static void ready_panel(const Linear &, int64_t, Integers *) {}

INLINE bool takes_tiles(const Linear &l, int64_t M) {
    if (M < TILE) return false;
    return (l.kind == INT8 && l.k % 64 == 0) || (l.kind == BF16 && l.k % 32 == 0);
}

struct alignas(64) TileShapes {  // as _tile_loadconfig reads them
    uint8_t palette = 1, first_row = 0, none[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};  // in a row of each of the eight tiles
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
// In the library's data: g++'s intrinsic says that it reads 8 bytes, so the rest of a local one would never be written.
constexpr TileShapes SHAPES;

struct TileUse {  // tiles are a thread's own, and only while this exists
    TileUse() { _tile_loadconfig(&SHAPES); }
    ~TileUse() { _tile_release(); }
};

// Numbers of tiles are parts of the instructions, so that no loop can name them.
#define ADD(sum, rows)                                                                                                 \
    if (TILES > sum) {                                                                                                 \
        _tile_loadd(rows, x + sum * TILE * stride, stride);                                                            \
        if (IS_BF16) _tile_dpbf16ps(sum, rows, 6);                                                                     \
        else _tile_dpbssd(sum, rows, 6);                                                                               \
    }
#define START(sum)                                                                                                     \
    if (TILES > sum) _tile_zero(sum);
#define END(sum)                                                                                                       \
    if (TILES > sum) _tile_stored(sum, to + sum * TILE * P, TILE_BYTES);

// Sums of TILES tiles of rows, `stride` bytes apart, and a panel, both with `bytes` bytes of inputs in a row. Rows for
// bfloat16 have two terms.
template <int TILES, bool IS_BF16>
static void sum_tiles(const char *rows, int64_t stride, const char *w, int64_t bytes, int32_t *to) {
    START(0) START(1) START(2) START(3)
    for (int64_t i = 0; i < bytes; i += TILE_BYTES) {
        _tile_loadd(6, w + i * P, TILE_BYTES);
        for (int term = 0; term <= IS_BF16; term++) {
            const char *x = rows + term * bytes + i;
            ADD(0, 4) ADD(1, 5) ADD(2, 4) ADD(3, 5)
        }
    }
    END(0) END(1) END(2) END(3)
}
#undef ADD
#undef START
#undef END

template <int TILES>
static void multiply_tiles(const Linear &l, const Input &in, int64_t number, int64_t first, V *out) {
    alignas(64) int32_t sum[TILES * TILE * P];
    const bool is_bf16 = l.kind == BF16;
    const int64_t bytes = is_bf16 ? 2 * l.k : l.k, stride = is_bf16 ? 2 * bytes : bytes;
    const char *rows = (const char *)in.q + first * stride, *w = (const char *)l.weight + number * P * bytes;
    if (is_bf16) sum_tiles<TILES, true>(rows, stride, w, bytes, sum);
    else sum_tiles<TILES, false>(rows, stride, w, bytes, sum);
    for (int64_t m = 0; m < TILES * TILE; m++) {
        const I whole = load_bytes(sum + m * P);
        if (is_bf16) out[m] = floats_in(whole);
        else out[m] = to_floats(whole) * (load((const float *)l.scale + number * P) * in.step[first + m]);
    }
}

static void multiply_panel(const Linear &l, const Input &in, const Integers *, int64_t number, int64_t first,
                           int64_t rows, V *out) {
    const int64_t whole = rows / TILE * TILE;
    if (whole == 4 * TILE) multiply_tiles<4>(l, in, number, first, out);
    if (whole == 3 * TILE) multiply_tiles<3>(l, in, number, first, out);
    if (whole == 2 * TILE) multiply_tiles<2>(l, in, number, first, out);
    if (whole == TILE) multiply_tiles<1>(l, in, number, first, out);
    for (int64_t m = whole; m < rows; m += BLOCK)
        panel_of(l, in, number, first + m, min<int64_t>(BLOCK, rows - m), out + m);
}

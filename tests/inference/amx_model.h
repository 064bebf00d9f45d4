// The instructions of AMX as Intel's manual describes them, for processors without them: included before step.cpp, they
// stand for the compiler's. What the processor would refuse ends the program.
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, LDTILECFG, TDPBSSD and TDPBF16PS.

#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define TILE_MODEL

namespace model {

struct Tile {
    uint8_t data[16][64];
    int rows, bytes;
};

static thread_local Tile tiles[8];
static thread_local bool is_configured;

static void require(bool holds) {
    if (!holds) abort();
}

static void load_shapes(const void *from) {
    uint8_t bytes[64];
    memcpy(bytes, from, 64);
    require(bytes[0] == 1);
    for (int i = 1; i < 16; i++) require(bytes[i] == 0);
    for (int i = 32; i < 48; i++) require(bytes[i] == 0);
    for (int i = 56; i < 64; i++) require(bytes[i] == 0);
    for (int t = 0; t < 8; t++) {
        uint16_t width;
        memcpy(&width, bytes + 16 + 2 * t, 2);
        require(width <= 64 && bytes[48 + t] <= 16);
        tiles[t] = {{}, bytes[48 + t], width};
    }
    is_configured = true;
}

static Tile &tile(int t) {
    require(is_configured && t < 8 && tiles[t].rows && tiles[t].bytes);
    return tiles[t];
}

static void zero(int t) { memset(tile(t).data, 0, sizeof(tile(t).data)); }

static void load(int t, const void *base, int64_t stride) {
    zero(t);
    for (int r = 0; r < tile(t).rows; r++) memcpy(tile(t).data[r], (const char *)base + r * stride, tile(t).bytes);
}

static void store(int t, void *base, int64_t stride) {
    for (int r = 0; r < tile(t).rows; r++) memcpy((char *)base + r * stride, tile(t).data[r], tile(t).bytes);
}

// Sums c, rows a, weights b: rows of b are cells of 4 bytes of a.
static void require_shapes(const Tile &c, const Tile &a, const Tile &b) {
    require(&c != &a && &c != &b && &a != &b);
    require(c.rows == a.rows && c.bytes == b.bytes && a.bytes == 4 * b.rows && c.bytes % 4 == 0);
}

static void multiply_bytes(int to, int x, int w) {
    Tile &c = tile(to), &a = tile(x), &b = tile(w);
    require_shapes(c, a, b);
    for (int m = 0; m < c.rows; m++)
        for (int n = 0; n < c.bytes / 4; n++) {
            uint32_t sum;
            memcpy(&sum, c.data[m] + 4 * n, 4);
            for (int i = 0; i < a.bytes; i++)
                sum += (int8_t)a.data[m][i] * (int8_t)b.data[i / 4][4 * n + i % 4];
            memcpy(c.data[m] + 4 * n, &sum, 4);
        }
}

static float number(const uint8_t *bytes) {  // a bfloat16 number
    uint16_t high;
    memcpy(&high, bytes, 2);
    const uint32_t bits = (uint32_t)high << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// Even and odd inputs are summed apart and added to c at the end. Numbers below 2^-126, which the processor takes for
// zero, are not modelled.
static void multiply_bf16(int to, int x, int w) {
    Tile &c = tile(to), &a = tile(x), &b = tile(w);
    require_shapes(c, a, b);
    for (int m = 0; m < c.rows; m++)
        for (int n = 0; n < c.bytes / 4; n++) {
            float part[2] = {}, sum;
            for (int i = 0; i < a.bytes / 2; i++)
                part[i % 2] += number(a.data[m] + 2 * i) * number(b.data[i / 2] + 4 * n + 2 * (i % 2));
            memcpy(&sum, c.data[m] + 4 * n, 4);
            sum += part[0] + part[1];
            memcpy(c.data[m] + 4 * n, &sum, 4);
        }
}

}  // namespace model

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbssd
#undef _tile_dpbf16ps
#define _tile_loadconfig model::load_shapes
#define _tile_release() (model::is_configured = false)
#define _tile_zero model::zero
#define _tile_loadd model::load
#define _tile_stored model::store
#define _tile_dpbssd model::multiply_bytes
#define _tile_dpbf16ps model::multiply_bf16

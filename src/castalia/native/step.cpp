// One forward pass of a transformer decoder on a CPU, in one call: a decode step of a small model lasts less than the
// Python that would dispatch its operators. Compiled for several levels of instructions (castalia.core.levels), for use
// through compiled.py; no header of torch, nothing of the C++ library but what stands in headers.
// What a block computes is data: small integers in `Model` and `Layer`, filled by fused.py.
//
// A batch is M rows, each one token with the slot of its sequence and its position there. So prompts of unequal length
// and sequences in the middle of their text stand side by side without padding. Every row writes its key and value
// before any row looks back; a row sees the positions of its slot up to its own.
//
// Weights lie in panels of 16 output channels, so that a vector register holds one number of each channel and nothing
// is summed across a register. Names as in packing.py; shapes M rows, N outputs, K inputs.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../core/basics.h"
#include "../core/threads.h"
#include "../core/vectors.h"
#include "dot.h"

constexpr int BLOCK = REGISTER == 64 ? 8 : REGISTER == 32 || REGISTERS == 32 ? 4 : 2;  // rows that share a pass over
                                                                                        // a panel
constexpr int BESIDE = REGISTER == 64 ? 2 : 1;  // panels of int8 that share a reading of the rows; others have too few
                                                // registers for their sums
constexpr int GROUP = 32;  // inputs that share a scale in int4
constexpr int AHEAD = 3072;  // bytes of weights between those in use and those that are fetched

INLINE float widen(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint16_t narrow(float x) {  // to bfloat16, ties to even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

INLINE V error_function(V x) {  // Eigen's rational function: error below 5e-7
    x = clamp(x, -4.0f, 4.0f);
    V square = x * x, over = all(-2.72614225801306e-10f), under = all(-1.45660718464996e-05f);
    const float above[] = {2.77068142495902e-08f,  -2.10102402082508e-06f, -5.69250639462346e-05f,
                           -7.34990630326855e-04f, -2.95459980854025e-03f, -1.60960333262415e-02f};
    const float below[] = {-2.13374055278905e-04f, -1.68282697438203e-03f, -7.37332916720468e-03f,
                           -1.42647390514189e-02f};
    for (float c : above) over = over * square + c;
    for (float c : below) under = under * square + c;
    return x * over / under;
}

INLINE float largest_of(V v) {
    float largest = v[0];
    for (int lane = 1; lane < P; lane++) largest = max(largest, v[lane]);
    return largest;
}

// ---------------------------------------------------------------------------------------------------------- linear

enum Kind { FP32, BF16, INT8, INT4 };

struct Linear {
    const void *weight;  // panels; see packing.py
    const void *scale;   // int8: float (N,); int4: bfloat16 (panels, groups, 16)
    const float *bias;   // (N,) or null
    int64_t n, k, kind;  // n is a multiple of 16
};

struct Input {  // rows of activations as the kernels of one kind read them
    const float *x;
    int8_t *q;       // (M, K), round(x / step); bf16 with tiles.h: (M, 2, K) bfloat16, whose sum is x
    float *step;     // (M,)
    int32_t *sum;    // int8: (M,) -ADDED * sum of q; int4: (M, groups) -8 * sum of a group's q
    int64_t k, groups;
    char *panels;    // tiles.h: two panels of weights for each thread
};

static void quantize_row(const Input &in, int64_t m, int64_t kind) {
    const float *x = in.x + m * in.k;
    int8_t *q = in.q + m * in.k;
    float largest = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < in.k; i++) largest = max(largest, fabsf(x[i]));
    float step = largest / 127.0f;
    float inverse = largest > 0 ? 127.0f / largest : 0.0f;
    in.step[m] = step;
#pragma omp simd
    for (int64_t i = 0; i < in.k; i++) q[i] = (int8_t)(int32_t)rintf(x[i] * inverse);
    int64_t width = kind == INT4 ? GROUP : in.k, offset = kind == INT4 ? -8 : -ADDED;
    for (int64_t g = 0; g < in.groups; g++) {
        int32_t sum = 0;
        for (int64_t i = g * width; i < (g + 1) * width; i++) sum += q[i];
        in.sum[m * in.groups + g] = (int32_t)offset * sum;
    }
}

// Rows that share a panel keep the processor busy longer than its own prefetching looks ahead. For one row, which only
// waits for memory, such requests are slower.
template <int M> static inline void fetch_ahead(const void *weights) {
    if (M >= 4) __builtin_prefetch((const char *)weights + AHEAD);
}

// Initializers of arrays are stored to memory first, even where the sums then stay in registers.
template <class T, int A, int B> INLINE void zero(T (&sum)[A][B]) {
#pragma GCC unroll 16
    for (int a = 0; a < A; a++)
#pragma GCC unroll 16
        for (int b = 0; b < B; b++) sum[a][b] = T{};
}

// Sums of a row and a panel: several where one would wait for itself, as many as there are registers for.
template <int M> static constexpr int sums_of() {
    int sums = M >= 4 ? 1 : 4;
    while (sums > 1 && M * sums * PARTS > REGISTERS * 3 / 4) sums /= 2;
    return sums;
}

template <int M> static void panel_fp32(const float *w, const float *x, int64_t k, V *out) {
    constexpr int U = sums_of<M>();
    V sum[M][U] = {};
    int64_t i = 0;
    for (; i + U <= k; i += U)
        for (int u = 0; u < U; u++) {
            V row = load(w + (i + u) * P);
            fetch_ahead<M>(w + (i + u) * P);
            for (int m = 0; m < M; m++) sum[m][u] += row * x[m * k + i + u];
        }
    for (; i < k; i++)
        for (int m = 0; m < M; m++) sum[m][0] += load(w + i * P) * x[m * k + i];
    for (int m = 0; m < M; m++) {
        out[m] = sum[m][0];
        for (int u = 1; u < U; u++) out[m] += sum[m][u];
    }
}

template <int M> static void panel_bf16(const uint16_t *w, const float *x, int64_t k, V *out) {
    constexpr int U = M * 2 * PARTS > REGISTERS * 3 / 4 ? 1 : 2;
    V sum[M][U] = {};
    for (int64_t i = 0; i < k; i += 2) {  // a lane holds inputs i and i + 1 of its channel
        I pair = load_bytes(w + i * P);
        fetch_ahead<M>(w + i * P);
        V even = floats_in(pair << 16), odd = floats_in(pair & (int32_t)0xffff0000);
        for (int m = 0; m < M; m++) {
            sum[m][0] += even * x[m * k + i];
            sum[m][U - 1] += odd * x[m * k + i + 1];
        }
    }
    for (int m = 0; m < M; m++) out[m] = U == 1 ? sum[m][0] : sum[m][0] + sum[m][U - 1];
}

template <int M> static void panel_int8(const int8_t *w, const float *scale, const Input &in, int64_t first, V *out) {
    constexpr int U = sums_of<M>();
    I sum[M][U] = {};
    const int8_t *x = in.q + first * in.k;
    int64_t i = 0;
    for (; i + 4 * U <= in.k; i += 4 * U)
        for (int u = 0; u < U; u++) {
            I bytes = factors(load_bytes(w + (i + 4 * u) * P));
            fetch_ahead<M>(w + (i + 4 * u) * P);
            for (int m = 0; m < M; m++) sum[m][u] = dot(sum[m][u], bytes, x + m * in.k + i + 4 * u);
        }
    for (; i < in.k; i += 4)
        for (int m = 0; m < M; m++) sum[m][0] = dot(sum[m][0], factors(load_bytes(w + i * P)), x + m * in.k + i);
    for (int m = 0; m < M; m++) {
        I whole = sum[m][0] + in.sum[first + m];
        for (int u = 1; u < U; u++) whole += sum[m][u];
        out[m] = to_floats(whole) * (load(scale) * in.step[first + m]);
    }
}

// As panel_int8, of BESIDE panels: a row's bytes are fetched once for all of them, and as many sums hide the latency of
// a product. Their weights are in the cache but for the first rows, so nothing is fetched ahead.
static void panels_int8(const int8_t *w, const float *scale, const Input &in, int64_t first, V (*out)[BLOCK]) {
    I sum[BESIDE][BLOCK];
    zero(sum);
    const int8_t *x = in.q + first * in.k;
    for (int64_t i = 0; i < in.k; i += 4) {
        I bytes[BESIDE];
        for (int b = 0; b < BESIDE; b++) bytes[b] = factors(load_bytes(w + (b * in.k + i) * P));
        for (int m = 0; m < BLOCK; m++)
            for (int b = 0; b < BESIDE; b++) sum[b][m] = dot(sum[b][m], bytes[b], x + m * in.k + i);
    }
#pragma GCC unroll 16
    for (int b = 0; b < BESIDE; b++)
#pragma GCC unroll 16
        for (int m = 0; m < BLOCK; m++) {
            V whole = to_floats(sum[b][m] + in.sum[first + m]);
            out[b][m] = whole * (load(scale + b * P) * in.step[first + m]);
        }
}

template <int M>
static void panel_int4(const uint8_t *w, const uint16_t *scale, const Input &in, int64_t first, V *out) {
    const int32_t low = 0x0f0f0f0f;
    V sum[M] = {};
    for (int64_t g = 0; g < in.groups; g++) {
        I part[M];
        for (int m = 0; m < M; m++) part[m] = all(in.sum[(first + m) * in.groups + g]);
        for (int j = 0; j < GROUP; j += 8) {  // 64 bytes: inputs j..j+3 in the low halves, j+4..j+7 in the high ones
            I both = load_bytes(w + (g * GROUP + j) * P / 2);
            fetch_ahead<M>(w + (g * GROUP + j) * P / 2);
            I even = both & low, odd = (both >> 4) & low;
            for (int m = 0; m < M; m++) {
                const int8_t *x = in.q + (first + m) * in.k + g * GROUP + j;
                part[m] = dot_small(dot_small(part[m], even, x), odd, x + 4);
            }
        }
        V step = widen(scale + g * P);
        for (int m = 0; m < M; m++) sum[m] += to_floats(part[m]) * step;
    }
    for (int m = 0; m < M; m++) out[m] = sum[m] * in.step[first + m];
}

template <int M> static void panel(const Linear &l, const Input &in, int64_t number, int64_t first, V *out) {
    const char *w = (const char *)l.weight;
    int64_t cells = number * P * l.k;
    if (l.kind == FP32) panel_fp32<M>((const float *)w + cells, in.x + first * l.k, l.k, out);
    if (l.kind == BF16) panel_bf16<M>((const uint16_t *)w + cells, in.x + first * l.k, l.k, out);
    if (l.kind == INT8) panel_int8<M>((const int8_t *)w + cells, (const float *)l.scale + number * P, in, first, out);
    if (l.kind == INT4)
        panel_int4<M>((const uint8_t *)w + cells / 2, (const uint16_t *)l.scale + number * P * in.groups, in, first,
                      out);
}

// Rows that are no more than M.
template <int M>
static void panel_up_to(const Linear &l, const Input &in, int64_t number, int64_t first, int64_t rows, V *out) {
    if (rows >= M) return panel<M>(l, in, number, first, out);
    if constexpr (M > 1) panel_up_to<M - 1>(l, in, number, first, rows, out);
}

static void panel_of(const Linear &l, const Input &in, int64_t number, int64_t first, int64_t rows, V *out) {
    panel_up_to<BLOCK>(l, in, number, first, rows, out);
}

// `count` neighbouring panels, at most BESIDE.
static void panels_of(const Linear &l, const Input &in, int64_t number, int64_t count, int64_t first, int64_t rows,
                      V (*out)[BLOCK]) {
    if (BESIDE > 1 && count == BESIDE && rows == BLOCK && l.kind == INT8) {
        const int8_t *w = (const int8_t *)l.weight + number * P * l.k;
        return panels_int8(w, (const float *)l.scale + number * P, in, first, out);
    }
    for (int64_t b = 0; b < count; b++) panel_of(l, in, number + b, first, rows, out[b]);
}

enum After {  // numbers as ACTIVATIONS in fused.py
    PLAIN, ADD, GELU_TANH, GELU_ERF, RELU, RELU2, SOFTSIGN, SILU, MISH, SIGMOID
};

INLINE V activate(V y, int after) {
    if (after == GELU_TANH) return y / (1.0f + exponential(y * (y * y * 0.044715f + 1.0f) * -1.5957691216f));
    if (after == GELU_ERF) return y * 0.5f * (1.0f + error_function(y * 0.70710678f));
    if (after == RELU) return larger(y, all(0.0f));
    if (after == RELU2) return larger(y, all(0.0f)) * larger(y, all(0.0f));
    if (after == SOFTSIGN) return y / (1.0f + larger(y, -y));
    if (after == SILU) return y / (1.0f + exponential(-y));
    if (after == SIGMOID) return 1.0f / (1.0f + exponential(-y));
    if (after == MISH) {  // tanh(log(1 + n)) = n (n + 2) / (n (n + 2) + 2) with n = e^y; it is 1 long before y = 20
        V n = exponential(select_less(y, all(20.0f), y, all(20.0f)));
        V square = n * (n + 2.0f);
        return y * (square / (square + 2.0f));
    }
    return y;
}

INLINE void place(float *to, V v, int64_t lanes) {
    if (lanes == P) store(to, v);
    else memcpy(to, &v, lanes * sizeof(float));
}

// Outputs of one panel for some rows, y from their first on.
static void put(const Linear &l, const V *out, int64_t rows, int64_t number, float *y, int64_t width, int after) {
    int64_t lanes = min<int64_t>(P, width - number * P);
    for (int64_t m = 0; m < rows; m++) {
        V v = l.bias ? out[m] + load(l.bias + number * P) : out[m];
        float *to = y + m * width + number * P;
        if (after != ADD) place(to, activate(v, after), lanes);
        else if (lanes == P) store(to, load(to) + v);
        else
            for (int64_t lane = 0; lane < lanes; lane++) to[lane] += v[lane];
    }
}

// The same of a panel of gate and the next, of up.
static void put_gated(const Linear &l, V *gate, V *up, int64_t rows, int64_t number, float *y, int64_t width, int act) {
    int64_t column = number / 2 * P;
    for (int64_t m = 0; m < rows; m++) {
        if (l.bias) {
            gate[m] += load(l.bias + number * P);
            up[m] += load(l.bias + (number + 1) * P);
        }
        place(y + m * width + column, activate(gate[m], act) * up[m], min<int64_t>(P, width - column));
    }
}

// One row and S panels, S streams of weights. Each sum is one chain whatever S is, so that results do not depend on how
// threads share the panels.
template <int S> INLINE void row_fp32(const Linear &l, const Input &in, const int64_t *number, V *out) {
    V sum[S][1];
    zero(sum);
    const float *w[S];
    for (int s = 0; s < S; s++) w[s] = (const float *)l.weight + number[s] * P * l.k;
    for (int64_t i = 0; i < l.k; i++)
        for (int s = 0; s < S; s++) sum[s][0] += load(w[s] + i * P) * in.x[i];
    for (int s = 0; s < S; s++) out[s] = sum[s][0];
}

template <int S> INLINE void row_bf16(const Linear &l, const Input &in, const int64_t *number, V *out) {
    V sum[S][1];
    zero(sum);
    const uint16_t *w[S];
    for (int s = 0; s < S; s++) w[s] = (const uint16_t *)l.weight + number[s] * P * l.k;
    for (int64_t i = 0; i < l.k; i += 2)
        for (int s = 0; s < S; s++) {
            I pair = load_bytes(w[s] + i * P);
            sum[s][0] += floats_in(pair << 16) * in.x[i];
            sum[s][0] += floats_in(pair & (int32_t)0xffff0000) * in.x[i + 1];
        }
    for (int s = 0; s < S; s++) out[s] = sum[s][0];
}

template <int S> INLINE void row_int8(const Linear &l, const Input &in, const int64_t *number, V *out) {
    I sum[S][1];
    zero(sum);
    const int8_t *w[S];
    for (int s = 0; s < S; s++) w[s] = (const int8_t *)l.weight + number[s] * P * l.k;
    for (int64_t i = 0; i < l.k; i += 4)
        for (int s = 0; s < S; s++) sum[s][0] = dot(sum[s][0], factors(load_bytes(w[s] + i * P)), in.q + i);
    for (int s = 0; s < S; s++)
        out[s] = to_floats(sum[s][0] + in.sum[0]) * (load((const float *)l.scale + number[s] * P) * in.step[0]);
}

template <int S> INLINE void row_int4(const Linear &l, const Input &in, const int64_t *number, V *out) {
    const int32_t low = 0x0f0f0f0f;
    V sum[S][1];
    zero(sum);
    const uint8_t *w[S];
    for (int s = 0; s < S; s++) w[s] = (const uint8_t *)l.weight + number[s] * P * l.k / 2;
    for (int64_t g = 0; g < in.groups; g++) {
        I part[S][1];
        for (int s = 0; s < S; s++) part[s][0] = all(in.sum[g]);
        for (int64_t i = g * GROUP; i < (g + 1) * GROUP; i += 8)
            for (int s = 0; s < S; s++) {
                I both = load_bytes(w[s] + i * P / 2);
                part[s][0] = dot_small(dot_small(part[s][0], both & low, in.q + i), (both >> 4) & low, in.q + i + 4);
            }
        for (int s = 0; s < S; s++)
            sum[s][0] += to_floats(part[s][0]) * widen((const uint16_t *)l.scale + (number[s] * in.groups + g) * P);
    }
    for (int s = 0; s < S; s++) out[s] = sum[s][0] * in.step[0];
}

template <int S> static void row_of(const Linear &l, const Input &in, const int64_t *number, V *out) {
    if (l.kind == FP32) row_fp32<S>(l, in, number, out);
    if (l.kind == BF16) row_bf16<S>(l, in, number, out);
    if (l.kind == INT8) row_int8<S>(l, in, number, out);
    if (l.kind == INT4) row_int4<S>(l, in, number, out);
}

// One row only waits for memory, and a processor fetches ahead by itself for several streams at once: on a Zen 3 four
// bring 1.25 to 1.3 times as much as one. Their sums take at most half of the registers.
constexpr int STREAMS = 4 * PARTS > REGISTERS / 2 ? 2 : 4;

// linear() of one row; a thread's panels are as many parts as there are streams.
static void multiply_row(const Linear &l, const Input &in, float *y, int64_t width, int after, Range mine) {
    const int64_t part = (mine.end - mine.begin) / STREAMS;
    int64_t number[STREAMS];
    V out[STREAMS];
    for (int64_t i = mine.begin; i < mine.begin + part; i++) {
        for (int s = 0; s < STREAMS; s++) number[s] = i + s * part;
        row_of<STREAMS>(l, in, number, out);
        for (int s = 0; s < STREAMS; s++) put(l, out + s, 1, number[s], y, width, after);
    }
    for (int64_t i = mine.begin + STREAMS * part; i < mine.end; i++) {
        row_of<1>(l, in, &i, out);
        put(l, out, 1, i, y, width, after);
    }
}

// The same of pairs of gate and up, which are two streams each; see put_gated.
static void multiply_gated_row(const Linear &l, const Input &in, float *y, int64_t width, int act, Range pairs) {
    constexpr int PAIRS = STREAMS / 2;
    const int64_t part = (pairs.end - pairs.begin) / PAIRS;
    int64_t number[STREAMS];
    V out[STREAMS];
    for (int64_t i = pairs.begin; i < pairs.begin + part; i++) {
        for (int s = 0; s < STREAMS; s++) number[s] = 2 * (i + s / 2 * part) + s % 2;
        row_of<STREAMS>(l, in, number, out);
        for (int s = 0; s < STREAMS; s += 2) put_gated(l, out + s, out + s + 1, 1, number[s], y, width, act);
    }
    for (int64_t i = pairs.begin + PAIRS * part; i < pairs.end; i++) {
        number[0] = 2 * i;
        number[1] = 2 * i + 1;
        row_of<2>(l, in, number, out);
        put_gated(l, out, out + 1, 1, number[0], y, width, act);
    }
}

#include "tiles.h"

// Panels `begin` to `end` of linear(), `count` side by side.
template <int64_t count>
static void multiply_panels(const Linear &l, const Input &in, int64_t M, float *y, int64_t width, int after, int64_t begin,
                            int64_t end) {
    for (int64_t number = begin; number < end; number += count)
        for (int64_t first = 0; first < M; first += BLOCK) {
            V out[count][BLOCK];
            int64_t rows = min<int64_t>(BLOCK, M - first);
            panels_of(l, in, number, count, first, rows, out);
            for (int64_t b = 0; b < count; b++) put(l, out[b], rows, number + b, y + first * width, width, after);
        }
}

// y (M, N) = after(x W^T + bias); ADD adds to what is there. `width` is how many of the N columns y has. A thread takes
// neighbouring panels, and all rows of one before the next, so that weights are read from memory once.
static void linear(const Thread &thread, const Linear &l, const Input &in, int64_t M, float *y, int64_t width,
                   int after) {
#if HAS_TILES
    if (takes_tiles(l, M)) return tiled_linear(thread, l, in, M, y, width, after);
#endif
    const Range mine = thread.share(l.n / P);
    if (M == 1) return multiply_row(l, in, y, width, after, mine);
    // One block of rows reads its weights from memory, in which a panel follows the other.
    const int64_t paired = M > BLOCK ? mine.end - (mine.end - mine.begin) % BESIDE : mine.begin;
    multiply_panels<BESIDE>(l, in, M, y, width, after, mine.begin, paired);
    multiply_panels<1>(l, in, M, y, width, after, paired, mine.end);
}

// y (M, width) = act(gate) * up; panels of gate and up alternate, so that one thread has both while they are hot.
static void gated_linear(const Thread &thread, const Linear &l, const Input &in, int64_t M, float *y, int64_t width,
                         int act) {
#if HAS_TILES
    if (takes_tiles(l, M)) return tiled_gated_linear(thread, l, in, M, y, width, act);
#endif
    const Range pairs = thread.share(l.n / P / 2);
    if (M == 1) return multiply_gated_row(l, in, y, width, act, pairs);
    for (int64_t number = 2 * pairs.begin; number < 2 * pairs.end; number += 2)
        for (int64_t first = 0; first < M; first += BLOCK) {
            V gate[BLOCK], up[BLOCK];
            int64_t rows = min<int64_t>(BLOCK, M - first);
            panel_of(l, in, number, first, rows, gate);
            panel_of(l, in, number + 1, first, rows, up);
            put_gated(l, gate, up, rows, number, y + first * width, width, act);
        }
}

// Activations of one row for the kernels of a layer.
static void prepare_row(const Linear &l, const Input &in, int64_t m) {
#if HAS_TILES
    if (l.kind == BF16) split_row(in, m);
#endif
    if (l.kind == INT8 || l.kind == INT4) quantize_row(in, m, l.kind);
}

static void prepare(const Thread &thread, const Linear &l, const Input &in, int64_t M) {
    const Range rows = thread.share(M);
    for (int64_t m = rows.begin; m < rows.end; m++) prepare_row(l, in, m);
}

// ----------------------------------------------------------------------------------------------------------- model

enum NormKind { LAYERNORM, RMSNORM, SCALENORM };

struct Norm {
    const float *weight, *bias;  // (width,); bias is for layernorm alone
    int64_t kind, part;          // rmsnorm: how many of the numbers its mean square is of
};

struct Layer {
    Norm norm1, norm2, q_norm, k_norm;
    Linear qkv, out, up, down;
    int64_t window;  // tokens that a token sees, itself included; 0 for all
};

struct Model {
    int64_t layers, width, heads, kv_heads, head_dim, ffn, rotary, vocab;
    int64_t parallel, shared_norm, post_norm, activation, gated;
    int64_t qk_norm, qk_across, qk_by_head;  // over all heads together or each head; weights of all heads or of one
    int64_t qkv_width, q_step, k_step, k_first, v_first;  // where heads lie in a row of the qkv product
    double epsilon, embed_factor;
    const Layer *layer;
    Norm norm;
    Linear head;
    const float *cos, *sin;  // (positions, rotary / 2)
    const float *place;      // (positions, width), added to the embedding, or null
    const float *bias;       // added to scores, or null: (heads, positions + 32), of each key, or of each distance with
    int64_t bias_by_key;     // the farthest first
    int64_t positions;
    const void *embed;         // (vocab, width), row after row
    const float *embed_scale;  // int8: (vocab,)
    int64_t embed_kind;
};

struct Cache {  // of each layer, slot and kv head
    void *k;        // (length / 16, head_dim, 16); int8 (length / 16, head_dim / 4, 16, 4), 128 larger
    void *v;        // (length, head_dim rounded up to 16)
    float *k_scale, *v_scale;  // int8: (length,)
    int64_t slots, length, kind;
};

struct Batch {
    int64_t rows;
    const int64_t *token, *slot, *position;  // (rows,)
    int64_t wanted;
    const int64_t *pick;  // (wanted,) rows whose logits are asked for
    float *logits;        // (wanted, vocab)
    int64_t *best;        // (wanted,) the token of the largest logit, the first among equals; or null
    int64_t tokens;       // real vocabulary, from which `best` is
};

static void layer_norm(const float *x, const Norm &norm, float *y, int64_t width, double epsilon) {
    float mean = 0, square = 0;
#pragma omp simd reduction(+ : mean)
    for (int64_t i = 0; i < width; i++) mean += x[i];
    mean /= width;
#pragma omp simd reduction(+ : square)
    for (int64_t i = 0; i < width; i++) square += (x[i] - mean) * (x[i] - mean);
    float factor = 1.0f / sqrtf(square / width + (float)epsilon);
#pragma omp simd
    for (int64_t i = 0; i < width; i++) y[i] = (x[i] - mean) * factor * norm.weight[i] + norm.bias[i];
}

static void normalize(const float *x, const Norm &norm, float *y, int64_t width, double epsilon) {
    if (norm.kind == LAYERNORM) return layer_norm(x, norm, y, width, epsilon);
    int64_t part = norm.kind == RMSNORM ? norm.part : width;
    float square = 0;
#pragma omp simd reduction(+ : square)
    for (int64_t i = 0; i < part; i++) square += x[i] * x[i];
    float factor = norm.kind == RMSNORM ? 1.0f / sqrtf(square / part + (float)epsilon)
                                        : 1.0f / max(sqrtf(square), (float)epsilon);
#pragma omp simd
    for (int64_t i = 0; i < width; i++) y[i] = x[i] * factor * norm.weight[i];
}

static void turn(float *x, const float *cos, const float *sin, int64_t half) {
    for (int64_t j = 0; j < half; j++) {
        float a = x[j], b = x[j + half];
        x[j] = a * cos[j] - b * sin[j];
        x[j + half] = b * cos[j] + a * sin[j];
    }
}

// ----------------------------------------------------------------------------------------------- keys and values

static inline int64_t rounded(int64_t D) { return (D + P - 1) / P * P; }

struct Places {  // where one kv head of one slot keeps its keys and values in a layer
    char *k, *v;
    float *k_scale, *v_scale;
};

static Places places(const Model &model, const Cache &cache, int64_t layer, int64_t slot, int64_t head) {
    int64_t row = ((layer * cache.slots + slot) * model.kv_heads + head) * cache.length;
    int64_t size = cache.kind == FP32 ? 4 : cache.kind == BF16 ? 2 : 1;
    return {(char *)cache.k + row * model.head_dim * size, (char *)cache.v + row * rounded(model.head_dim) * size,
            cache.k_scale + row, cache.v_scale + row};
}

static float step_of(const float *x, int64_t D, float steps, float &inverse) {  // the largest number is `steps` steps
    float largest = 0;
    for (int64_t d = 0; d < D; d++) largest = max(largest, fabsf(x[d]));
    inverse = largest > 0 ? steps / largest : 0.0f;
    return largest / steps;
}

// Write the key and the value of one head at one position.
static void keep(const Cache &cache, const Places &to, int64_t position, const float *k, const float *v, int64_t D) {
    int64_t block = position / P * P * D, lane = position % P, row = position * rounded(D);
    if (cache.kind == FP32) {
        float *keys = (float *)to.k + block + lane;
        for (int64_t d = 0; d < D; d++) keys[d * P] = k[d];
        memcpy((float *)to.v + row, v, D * sizeof(float));
    } else if (cache.kind == BF16) {
        uint16_t *keys = (uint16_t *)to.k + block + lane, *values = (uint16_t *)to.v + row;
        for (int64_t d = 0; d < D; d++) keys[d * P] = narrow(k[d]);
        for (int64_t d = 0; d < D; d++) values[d] = narrow(v[d]);
    } else {
        float inverse;
        uint8_t *keys = (uint8_t *)to.k + block + lane * 4;
        to.k_scale[position] = step_of(k, D, 127, inverse);
        for (int64_t d = 0; d < D; d++) keys[d / 4 * 4 * P + d % 4] = 128 + (int)nearbyintf(k[d] * inverse);
        int8_t *values = (int8_t *)to.v + row;
        to.v_scale[position] = step_of(v, D, 127, inverse);
        for (int64_t d = 0; d < D; d++) values[d] = (int8_t)nearbyintf(v[d] * inverse);
    }
}

// Norm of `heads` heads that lie `step` apart; see HeadNorm of castalia.models.parts.norms.
static void norm_heads(const Model &m, const Norm &norm, float *x, int64_t heads, int64_t step) {
    int64_t D = m.head_dim, together = m.qk_across ? heads : 1;
    for (int64_t first = 0; first < heads; first += together) {
        float mean = 0, square = 0;
        if (norm.kind == LAYERNORM)
            for (int64_t h = first; h < first + together; h++)
                for (int64_t d = 0; d < D; d++) mean += x[h * step + d];
        mean /= together * D;
        for (int64_t h = first; h < first + together; h++)
            for (int64_t d = 0; d < D; d++) square += (x[h * step + d] - mean) * (x[h * step + d] - mean);
        float factor = 1.0f / sqrtf(square / (together * D) + (float)m.epsilon);
        for (int64_t h = first; h < first + together; h++)
            for (int64_t d = 0; d < D; d++) {
                int64_t at = d + (m.qk_by_head ? h * D : 0);
                float y = (x[h * step + d] - mean) * factor * norm.weight[at];
                x[h * step + d] = norm.bias ? y + norm.bias[at] : y;
            }
    }
}

static void norm_queries_and_keys(const Thread &thread, const Model &m, const Layer &l, int64_t M, float *qkv) {
    const Range rows = thread.share(M);
    for (int64_t i = rows.begin; i < rows.end; i++) {
        float *row = qkv + i * m.qkv_width;
        norm_heads(m, l.q_norm, row, m.heads, m.q_step);
        norm_heads(m, l.k_norm, row + m.k_first, m.kv_heads, m.k_step);
    }
    thread.barrier();
}

// Rotation of queries and keys; keys and values go into the cache.
static void remember(const Thread &thread, const Model &model, const Cache &cache, const Batch &batch, int64_t layer,
                     float *qkv) {
    int64_t D = model.head_dim, half = model.rotary / 2, G = model.heads / model.kv_heads;
    if (model.qk_norm) norm_queries_and_keys(thread, model, model.layer[layer], batch.rows, qkv);
    const Range heads = thread.share(batch.rows * model.kv_heads);
    for (int64_t i = heads.begin; i < heads.end; i++) {
        int64_t m = i / model.kv_heads, h = i % model.kv_heads;
        float *row = qkv + m * model.qkv_width;
        float *k = row + model.k_first + h * model.k_step, *v = row + model.v_first + h * model.k_step;
        int64_t position = batch.position[m];
        const float *cos = model.cos + position * half, *sin = model.sin + position * half;
        for (int64_t g = 0; g < G; g++) turn(row + (h * G + g) * model.q_step, cos, sin, half);
        turn(k, cos, sin, half);
        keep(cache, places(model, cache, layer, batch.slot[m], h), position, k, v, D);
    }
    thread.barrier();
}

// ------------------------------------------------------------------------------------------------------- attention

// Keys and values are read in spans of positions that stay in the second cache, each by all queries of a piece of work
// before the next. What a query has of the spans before is scaled by e^(old - new) when a larger score comes (online
// softmax, Milakov and Gimelshein 2018, arXiv:1805.02867). Spans begin at the same positions for every query, so that
// its numbers do not depend on the queries beside it.

constexpr int QUERIES = BLOCK;  // at most so many queries share one reading of the keys and values of a head
constexpr int PIECE = 128;      // at most so many read a span one group after the other
constexpr int64_t SPAN = 512;   // most positions of a span: their scores are in the first cache for a group
// Sums in flight: enough to hide the latency of a product, few enough for the registers.
constexpr int SUMS = REGISTER == 64 ? 8 : 8 / PARTS;

static inline int64_t span_of(int64_t D) {  // positions: 256 KiB of keys and values in float32
    return min(SPAN, max<int64_t>(P, 32768 / rounded(D) / P * P));
}

struct Query {
    const float *x;       // (head_dim,)
    float *y;             // (head_dim,), the sum of values times e^(score - largest)
    int64_t start, end;   // the positions that it sees
    const float *bias;    // of position 0, or null
    float *p;             // of a span: scores, then e^(score - largest), from the first position of its group on
    int8_t *high, *low;   // int8 cache: x = step * (128 * high + low); products of bfloat16: x in it, from `high` on
    float step, offset;   // int8 cache: what larger keys add, in steps
    float largest;        // score so far
    float factor;         // of y and total for this span
    V total;              // of e^(score - largest), lane by lane
};

// Both halves together hold 15 bits, so that the cache alone is rounded to 8.
static void halve(Query &query, int64_t D) {
    float inverse;
    int32_t high_sum = 0, low_sum = 0;
    query.step = step_of(query.x, D, 127 * 128, inverse);
    for (int64_t d = 0; d < D; d++) {
        int32_t whole = (int32_t)nearbyintf(query.x[d] * inverse), high = (whole + 64) >> 7;
        high_sum += query.high[d] = (int8_t)high;
        low_sum += query.low[d] = (int8_t)(whole - high * 128);
    }
    query.offset = (float)ADDED * (128.0f * high_sum + low_sum);
}

// Scores of Q queries with 16 B positions from t on.
template <class T, int Q, int B>
INLINE void score(const Places &from, const Query *query, int64_t D, int64_t t, V (&sum)[Q][B]) {
    const T *k = (const T *)from.k + t * D;
    zero(sum);
    for (int64_t d = 0; d < D; d++)
        for (int b = 0; b < B; b++) {
            V keys = widen(k + (b * D + d) * P);
            for (int i = 0; i < Q; i++) sum[i][b] += keys * query[i].x[d];
        }
}

template <int Q, int B>
INLINE void score_int8(const Places &from, const Query *query, int64_t D, int64_t t, V (&sum)[Q][B]) {
    const char *k = from.k + t * D;
    I high[Q][B], low[Q][B];
    zero(high);
    zero(low);
    for (int64_t d = 0; d < D; d += 4)
        for (int b = 0; b < B; b++) {
            I keys = load_bytes(k + (b * D + d) * P);
            if (!ADDED) keys = keys ^ (int32_t)0x80808080;  // they are stored 128 larger
            for (int i = 0; i < Q; i++) {
                high[i][b] = dot(high[i][b], keys, query[i].high + d);
                low[i][b] = dot(low[i][b], keys, query[i].low + d);
            }
        }
    for (int b = 0; b < B; b++) {
        V scale = load(from.k_scale + t + b * P);
        for (int i = 0; i < Q; i++) {
            V whole = to_floats(high[i][b]) * 128.0f + to_floats(low[i][b]);
            sum[i][b] = (whole - query[i].offset) * (scale * query[i].step);
        }
    }
}

template <class T, int Q, int B>
static void score_block(const Places &from, const Query *query, int64_t D, int64_t t, int64_t first, float scale) {
    V sum[Q][B];
    if constexpr (sizeof(T) == 1) score_int8<Q, B>(from, query, D, t, sum);
    else score<T, Q, B>(from, query, D, t, sum);
#pragma GCC unroll 16
    for (int i = 0; i < Q; i++)
#pragma GCC unroll 16
        for (int b = 0; b < B; b++) {
            V scores = sum[i][b] * scale;
            if (query[i].bias) scores += load(query[i].bias + t + b * P);
            store(query[i].p + t + b * P - first, scores);
        }
}

// From the scores of positions from `first` to `end`, those beyond what the query sees among them, to e^(score - largest).
static void exponentials(Query &query, int64_t first, int64_t end) {
    float *row = query.p - first;
    const int64_t whole = (end + P - 1) / P * P, start = max(first, query.start), last = min(end, query.end);
    query.factor = 1;
    if (start >= last) {
        for (int64_t t = first; t < whole; t++) row[t] = 0;
        return;
    }
    for (int64_t t = first; t < start; t++) row[t] = -INFINITY;
    for (int64_t t = last; t < whole; t++) row[t] = -INFINITY;
    V top = all(query.largest), total = {};
    for (int64_t t = first; t < whole; t += P) top = larger(top, load(row + t));
    const float largest = largest_of(top);
    query.factor = exponential(all(query.largest - largest))[0];
    query.largest = largest;
    for (int64_t t = first; t < whole; t += P) {
        V share = exponential(load(row + t) - largest);
        total += share;
        store(row + t, share);
    }
    query.total = query.total * query.factor + total;
    for (int64_t t = first; t < start; t++) row[t] = 0;
    for (int64_t t = last; t < whole; t++) row[t] = 0;
}

INLINE V some(const float *from, int64_t lanes) {
    if (lanes == P) return load(from);
    V v = {};
    memcpy(&v, from, lanes * sizeof(float));
    return v;
}

// Add positions `start` to `end` to numbers d to d + 16 E of the outputs of Q queries.
template <class T, int Q, int E>
static void weigh(const Places &from, const Query *query, int64_t D, int64_t d, int64_t first, int64_t start,
                  int64_t end) {
    int64_t stride = rounded(D);
    const T *v = (const T *)from.v + d;
    V sum[Q][E];
    for (int i = 0; i < Q; i++)
        for (int e = 0; e < E; e++)
            sum[i][e] = some(query[i].y + d + e * P, min<int64_t>(P, D - d - e * P)) * query[i].factor;
    for (int64_t t = start; t < end; t++)
        for (int e = 0; e < E; e++) {
            V values = widen(v + t * stride + e * P);
            for (int i = 0; i < Q; i++) sum[i][e] += values * query[i].p[t - first];
        }
    for (int i = 0; i < Q; i++)
        for (int e = 0; e < E; e++) place(query[i].y + d + e * P, sum[i][e], min<int64_t>(P, D - d - e * P));
}

// What Q queries that read one head of one slot get of the positions from `begin` to `limit`, one span.
template <class T, int Q>
static void attend(const Places &from, Query *query, int64_t D, int64_t begin, int64_t limit) {
    // Wide registers read a query's number once for two blocks of keys.
    constexpr int WIDE = REGISTER == 64 && Q == QUERIES ? 2 : 1;
    constexpr int B = max(1, WIDE * SUMS / Q / (sizeof(T) == 1 ? 2 : 1));
    constexpr int E = max(1, min(4, (REGISTERS == 32 ? 2 : 1) * SUMS / Q));
    int64_t start = query[0].start, end = query[0].end;
    for (int i = 1; i < Q; i++) {
        start = min(start, query[i].start);
        end = max(end, query[i].end);
    }
    start = max(start, begin);
    end = min(end, limit);
    if (start >= end) return;
    int64_t first = start / P * P, t = first, d = 0;
    const float scale = 1.0f / sqrtf((float)D);
    for (; t + (B - 1) * P < end; t += B * P) score_block<T, Q, B>(from, query, D, t, first, scale);
    for (; t < end; t += P) score_block<T, Q, 1>(from, query, D, t, first, scale);
    for (int i = 0; i < Q; i++) {
        exponentials(query[i], first, end);
        if (sizeof(T) == 1)
            for (int64_t t = start; t < end; t++) query[i].p[t - first] *= from.v_scale[t];
    }
    for (; d + (E - 1) * P < D; d += E * P) weigh<T, Q, E>(from, query, D, d, first, start, end);
    for (; d < D; d += P) weigh<T, Q, 1>(from, query, D, d, first, start, end);
}

template <class T, int Q>
static void attend_up_to(const Places &from, Query *query, int64_t count, int64_t D, int64_t begin, int64_t limit) {
    if (count >= Q) return attend<T, Q>(from, query, D, begin, limit);
    if constexpr (Q > 1) attend_up_to<T, Q - 1>(from, query, count, D, begin, limit);
}

static Range seen_by(const Query *query, int64_t count) {  // positions that any of the queries sees
    Range seen = {query[0].start, query[0].end};
    for (int64_t i = 1; i < count; i++) seen = {min(seen.begin, query[i].start), max(seen.end, query[i].end)};
    return seen;
}

static void divide(Query *query, int64_t count, int64_t D) {  // sums of values by their totals
    for (int64_t i = 0; i < count; i++) {
        float total = 0;
        for (int lane = 0; lane < P; lane++) total += query[i].total[lane];
        for (int64_t d = 0; d < D; d++) query[i].y[d] /= total;
    }
}

// All positions that any of `count` queries sees, span by span.
template <class T> static void attend_to(const Places &from, Query *query, int64_t count, int64_t D) {
    const int64_t span = span_of(D);
    const Range seen = seen_by(query, count);
    for (int64_t i = 0; sizeof(T) == 1 && i < count; i++) halve(query[i], D);
    for (int64_t begin = seen.begin / span * span; begin < seen.end; begin += span)
        for (int64_t i = 0; i < count; i += QUERIES)
            attend_up_to<T, QUERIES>(from, query + i, min<int64_t>(QUERIES, count - i), D, begin, begin + span);
    divide(query, count, D);
}

#if defined(__AVX512BF16__)
// Attention by products of pairs of bfloat16, twice as many in an instruction as of float32: queries, keys, values and
// e^(score - largest) are rounded to 8 bits, sums stay in float32. Keys and values of a span are rounded once for all
// queries of a piece.

INLINE __m512i pairs(__m512 low, __m512 high) {  // lanes with a number of each
    const __m512i below = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(low));
    const __m512i above = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(high));
    return _mm512_or_si512(below, _mm512_slli_epi32(above, 16));
}

INLINE __m512 pair_products(__m512 sum, const uint32_t *from, __m512i pair) {
    const __m512i lanes = _mm512_loadu_si512(from);
    return _mm512_dpbf16_ps(sum, (__m512bh)lanes, (__m512bh)pair);
}

struct Rounded {  // a span of one kv head
    uint32_t *k;  // (positions / 16, D / 2, 16): two dimensions of each key
    uint32_t *v;  // (positions / 2, D): two positions of each dimension
};

static void round_span(const Places &from, const Rounded &to, int64_t D, int64_t begin, int64_t end) {
    const float *k = (const float *)from.k + begin * D, *v = (const float *)from.v + begin * D;
    const int64_t blocks = (end - begin + P - 1) / P;
    for (int64_t i = 0; i < blocks * D; i += 2) {
        const float *both = k + i * P;
        _mm512_storeu_si512(to.k + i / 2 * P, pairs(_mm512_loadu_ps(both), _mm512_loadu_ps(both + P)));
    }
    for (int64_t t = 0; t < end - begin; t += 2)
        for (int64_t d = 0; d < D; d += P) {
            const float *both = v + t * D + d;
            // What was never written is not read: zero times it may be NaN.
            const bool second = t + 1 < end - begin;
            const __m512 high = second ? _mm512_loadu_ps(both + D) : _mm512_setzero_ps();
            _mm512_storeu_si512(to.v + t / 2 * D + d, pairs(_mm512_loadu_ps(both), high));
        }
}

static void round_row(const float *x, int64_t count, void *to) {  // in place, too
    for (int64_t i = 0; i < count; i += P)
        _mm256_storeu_si256((__m256i *)((uint16_t *)to + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + i)));
}

template <int Q, int B>
INLINE void score_rounded(const Rounded &span, const Query *query, int64_t D, int64_t t, int64_t begin, int64_t first,
                          float scale) {
    const uint32_t *k = span.k + (t - begin) * D / 2;
    __m512 sum[Q][B];
#pragma GCC unroll 16
    for (int i = 0; i < Q; i++)
#pragma GCC unroll 16
        for (int b = 0; b < B; b++) sum[i][b] = _mm512_setzero_ps();
    for (int64_t d = 0; d < D / 2; d++)
        for (int i = 0; i < Q; i++) {
            const __m512i pair = _mm512_set1_epi32(((const int32_t *)query[i].high)[d]);
            for (int b = 0; b < B; b++) sum[i][b] = pair_products(sum[i][b], k + (b * D / 2 + d) * P, pair);
        }
#pragma GCC unroll 16
    for (int i = 0; i < Q; i++)
#pragma GCC unroll 16
        for (int b = 0; b < B; b++) {
            V scores = V{{(Floats)sum[i][b]}} * scale;
            if (query[i].bias) scores += load(query[i].bias + t + b * P);
            store(query[i].p + t + b * P - first, scores);
        }
}

template <int Q, int E>
INLINE void weigh_rounded(const Rounded &span, const Query *query, int64_t D, int64_t d, int64_t begin, int64_t first,
                          int64_t end) {
    const uint32_t *v = span.v + (first - begin) / 2 * D + d;
    __m512 sum[Q][E];
#pragma GCC unroll 16
    for (int i = 0; i < Q; i++)
#pragma GCC unroll 16
        for (int e = 0; e < E; e++)
            sum[i][e] = (__m512)(load(query[i].y + d + e * P) * query[i].factor).part[0];
    for (int64_t t = 0; t < (end - first + 1) / 2; t++)
        for (int i = 0; i < Q; i++) {
            const __m512i pair = _mm512_set1_epi32(((const int32_t *)query[i].p)[t]);
            for (int e = 0; e < E; e++) sum[i][e] = pair_products(sum[i][e], v + t * D + e * P, pair);
        }
#pragma GCC unroll 16
    for (int i = 0; i < Q; i++)
#pragma GCC unroll 16
        for (int e = 0; e < E; e++) store(query[i].y + d + e * P, V{{(Floats)sum[i][e]}});
}

template <int Q>  // returns Q
static int attend_rounded(const Rounded &span, Query *query, int64_t D, int64_t begin, int64_t limit) {
    int64_t start = limit, end = begin;
    for (int i = 0; i < Q; i++) {
        start = min(start, max(begin, query[i].start));
        end = max(end, min(limit, query[i].end));
    }
    if (start >= end) return Q;
    const float scale = 1.0f / sqrtf((float)D);
    int64_t first = start / P * P, t = first, d = 0;
    for (; t + P < end; t += 2 * P) score_rounded<Q, 2>(span, query, D, t, begin, first, scale);
    for (; t < end; t += P) score_rounded<Q, 1>(span, query, D, t, begin, first, scale);
    for (int i = 0; i < Q; i++) {
        exponentials(query[i], first, end);
        round_row(query[i].p, end - first, query[i].p);
    }
    for (; d + P < D; d += 2 * P) weigh_rounded<Q, 2>(span, query, D, d, begin, first, end);
    for (; d < D; d += P) weigh_rounded<Q, 1>(span, query, D, d, begin, first, end);
    return Q;
}

// As attend_to for a head of whole vectors and keys of float32; `scratch` has room for a span.
static void attend_to_rounded(const Places &from, Query *query, int64_t count, int64_t D, float *scratch) {
    const int64_t span = span_of(D);
    const Rounded rounded_span = {(uint32_t *)scratch, (uint32_t *)scratch + span * D / 2};
    const Range seen = seen_by(query, count);
    for (int64_t i = 0; i < count; i++) round_row(query[i].x, D, query[i].high);
    for (int64_t begin = seen.begin / span * span; begin < seen.end; begin += span) {
        const int64_t limit = begin + span;
        round_span(from, rounded_span, D, begin, min(limit, seen.end));
        for (int64_t i = 0; i < count;) {
            if (count - i >= 8) i += attend_rounded<8>(rounded_span, query + i, D, begin, limit);
            else if (count - i >= 4) i += attend_rounded<4>(rounded_span, query + i, D, begin, limit);
            else i += attend_rounded<1>(rounded_span, query + i, D, begin, limit);
        }
    }
    divide(query, count, D);
}

static bool may_round(const Model &m, const Cache &cache) { return cache.kind == FP32 && m.head_dim % P == 0; }
#else
static void attend_to_rounded(const Places &, Query *, int64_t, int64_t, float *) {}
static bool may_round(const Model &, const Cache &) { return false; }
#endif

static int64_t scratch_of_attention(const Model &m, bool rounds) {  // floats for one thread
    const int64_t D = rounded(m.head_dim);
    return QUERIES * (SPAN + P) + PIECE * D / 2 + (rounds ? span_of(D) * D : 0);
}

struct Attention {  // what all queries of a layer share
    const Model &m;
    const Cache &cache;
    const Batch &batch;
    int64_t layer;
    const float *qkv;
    float *y;
    bool rounds;  // to bfloat16, where that is faster
};

// Tokens `start` to `end`, which are one run of a slot, and query heads `head` to `last`, which have one kv head: at
// most PIECE queries.
static void attend_together(const Attention &a, int64_t start, int64_t end, int64_t head, int64_t last,
                            float *scratch) {
    const Model &m = a.m;
    int64_t D = m.head_dim, window = m.layer[a.layer].window, count = 0;
    int8_t *halves = (int8_t *)(scratch + QUERIES * (SPAN + P));
    float *room = scratch + QUERIES * (SPAN + P) + PIECE * rounded(D) / 2;
    Query query[PIECE];
    for (int64_t i = start; i < end; i++)
        for (int64_t h = head; h < last; h++, count++) {
            int64_t position = a.batch.position[i];
            Query &q = query[count];
            q.x = a.qkv + i * m.qkv_width + h * m.q_step;
            q.y = a.y + (i * m.heads + h) * D;
            fill(q.y, q.y + D, 0.0f);
            q.start = window ? max<int64_t>(0, position + 1 - window) : 0;
            q.end = position + 1;
            q.bias = nullptr;
            if (m.bias) q.bias = m.bias + h * (m.positions + 2 * P) + (m.bias_by_key ? 0 : m.positions - 1 - position);
            q.p = scratch + count % QUERIES * (SPAN + P);
            q.high = halves + count * 2 * rounded(D);
            q.low = q.high + rounded(D);
            q.largest = -INFINITY;
            q.total = {};
        }
    Places from = places(m, a.cache, a.layer, a.batch.slot[start], head / (m.heads / m.kv_heads));
    if (a.rounds && may_round(m, a.cache)) return attend_to_rounded(from, query, count, D, room);
    if (a.cache.kind == FP32) attend_to<float>(from, query, count, D);
    if (a.cache.kind == BF16) attend_to<uint16_t>(from, query, count, D);
    if (a.cache.kind == INT8) attend_to<int8_t>(from, query, count, D);
}

static int64_t run_end(const Batch &batch, int64_t start, int64_t end) {  // where neighbours of its slot end
    int64_t i = start + 1;
    while (i < end && batch.slot[i] == batch.slot[start] && batch.position[i] == batch.position[start] + i - start) i++;
    return i;
}

// A piece of work is all heads of a kv head, and neighbouring tokens: as many as share a reading of keys and values from
// memory. Fewer where threads would wait for the last piece, or have none. The results do not depend on it.
static void attention(const Thread &thread, const Attention &a, float *scratch) {
    int64_t M = a.batch.rows, G = a.m.heads / a.m.kv_heads, together = PIECE, tokens, heads, parts, runs;
    for (;; together /= 2) {
        tokens = max<int64_t>(1, together / G);
        heads = min<int64_t>(together, G);
        parts = (G + heads - 1) / heads;
        runs = (M + tokens - 1) / tokens;
        int64_t least = together > QUERIES ? 4 * thread.count : thread.count;
        if (together == 1 || runs * a.m.kv_heads * parts >= least) break;
    }
    const int64_t pieces = runs * a.m.kv_heads * parts;
    for (int64_t piece = thread.next(); piece < pieces; piece = thread.next()) {
        // The last tokens see the most positions: they come first, so that short pieces fill the threads at the end.
        int64_t part = piece % parts, kv = piece / parts % a.m.kv_heads, run = runs - 1 - piece / parts / a.m.kv_heads;
        int64_t start = run * tokens, end = min(start + tokens, M);
        int64_t head = kv * G + part * heads, last = min(head + heads, (kv + 1) * G);
        while (start < end) {
            int64_t next = run_end(a.batch, start, end);
            attend_together(a, start, next, head, last, scratch);
            start = next;
        }
    }
    thread.barrier();
}

// --------------------------------------------------------------------------------------------------------- forward

struct Scratch {  // memory of one call
    char *memory, *next, *panels = nullptr;
    explicit Scratch(size_t bytes) : memory((char *)aligned_alloc(64, bytes)), next(memory) {}
    ~Scratch() { free(memory); }
    template <class T> T *take(size_t count) {
        T *place = (T *)next;
        next += (count * sizeof(T) + 63) / 64 * 64;
        return place;
    }
};

#if HAS_TILES
constexpr int64_t bytes_of(int64_t kind, int64_t k) { return kind == BF16 ? 4 * padded(k) : k; }  // a row of q
constexpr int64_t ROOM = 5;  // bytes that an Input takes for a number, with the sums of int4
#else
constexpr int64_t bytes_of(int64_t, int64_t k) { return k; }
constexpr int64_t ROOM = 2;
constexpr int64_t panel_room(int64_t) { return 0; }
#endif

static Input input_of(Scratch &scratch, const float *x, const Linear &l, int64_t M) {
    int64_t groups = l.kind == INT4 ? l.k / GROUP : 1;
    int8_t *q = scratch.take<int8_t>(M * bytes_of(l.kind, l.k));
    return {x, q, scratch.take<float>(M), scratch.take<int32_t>(M * groups), l.k, groups, scratch.panels};
}

extern "C" int castalia_linear(const Linear *l, const float *x, int64_t M, float *y, int64_t width, int threads) {
    const int64_t panels = 2 * threads * panel_room(l->k);
    Scratch scratch((M * (l->k * ROOM + 512) + panels + 1024) / 64 * 64);
    if (!scratch.memory) return 1;
    scratch.panels = scratch.take<char>(panels);
    Input in = input_of(scratch, x, *l, M);
    team_run(threads, [&](const Thread &thread) {
        prepare(thread, *l, in, M);
        thread.barrier();
        linear(thread, *l, in, M, y, width, PLAIN);
    });
    return 0;
}

struct Top {
    float logit;
    int64_t token;
};

struct Forward {  // the activations of one call
    float *x, *n1, *n2, *qkv, *attended, *inner, *scores;
    int64_t *slot, *position;  // of the rows that the last layer goes on with
    bool trims;                // whether those are fewer than all
    bool rounds;               // see Choice
    Top *tops;                 // of each thread, if the largest logits are asked for
    Input to_qkv, to_up, to_out, to_down, to_head;
};

static void norm_rows(const Thread &thread, const float *x, const int64_t *pick, int64_t M, const Model &m,
                      const Norm &norm, float *y, const Linear &next, const Input &in) {
    const Range rows = thread.share(M);
    for (int64_t i = rows.begin; i < rows.end; i++) {
        normalize(x + (pick ? pick[i] : i) * m.width, norm, y + i * m.width, m.width, m.epsilon);
        prepare_row(next, in, i);
    }
}

// x += norm(branch): the residual of a model whose norms come after attention and MLP.
static void add_normed(const Thread &thread, float *x, float *branch, int64_t M, const Model &m, const Norm &norm) {
    const Range rows = thread.share(M);
    for (int64_t i = rows.begin; i < rows.end; i++) {
        float *row = branch + i * m.width;
        normalize(row, norm, row, m.width, m.epsilon);
        for (int64_t c = 0; c < m.width; c++) x[i * m.width + c] += row[c];
    }
}

static void embed(const Thread &thread, const Model &m, const Batch &batch, float *x) {
    float factor = (float)m.embed_factor;
    const Range rows = thread.share(batch.rows);
    for (int64_t i = rows.begin; i < rows.end; i++) {
        int64_t from = batch.token[i] * m.width;
        const float *place = m.place ? m.place + batch.position[i] * m.width : nullptr;
        for (int64_t c = 0; c < m.width; c++) {
            float to = 0;
            if (m.embed_kind == FP32) to = ((const float *)m.embed)[from + c];
            if (m.embed_kind == BF16) to = widen(((const uint16_t *)m.embed)[from + c]);
            if (m.embed_kind == INT8) to = ((const int8_t *)m.embed)[from + c] * m.embed_scale[batch.token[i]];
            x[i * m.width + c] = place ? to * factor + place[c] : to * factor;
        }
    }
}

static void mlp_up(const Thread &thread, const Model &m, const Layer &l, const Forward &f, int64_t M) {
    if (m.gated) gated_linear(thread, l.up, f.to_up, M, f.inner, m.ffn, m.activation);
    else linear(thread, l.up, f.to_up, M, f.inner, m.ffn, m.activation);
}

// out, up and down of a serial or post-norm block, after attention. A thread adds to the same columns in every product
// with the residual, so that no barrier is needed between two of them.
static void rest_of_serial(const Thread &thread, const Model &m, const Layer &l, const Forward &f, int64_t M) {
    if (m.post_norm) {
        linear(thread, l.out, f.to_out, M, f.n1, m.width, PLAIN);
        thread.barrier();
        add_normed(thread, f.x, f.n1, M, m, l.norm1);
        prepare(thread, l.up, f.to_up, M);  // a thread has the rows that it added to
    } else {
        linear(thread, l.out, f.to_out, M, f.x, m.width, ADD);
        thread.barrier();
        norm_rows(thread, f.x, nullptr, M, m, l.norm2, f.n2, l.up, f.to_up);
    }
    thread.barrier();
    mlp_up(thread, m, l, f, M);
    thread.barrier();
    prepare(thread, l.down, f.to_down, M);
    thread.barrier();
    linear(thread, l.down, f.to_down, M, m.post_norm ? f.n2 : f.x, m.width, m.post_norm ? PLAIN : ADD);
    if (m.post_norm) {
        thread.barrier();
        add_normed(thread, f.x, f.n2, M, m, l.norm2);
    }
}

// Move the rows whose logits are asked for to the front of residual stream and queries; they are the batch from here.
static Batch picked(const Thread &thread, const Model &m, const Batch &batch, const Forward &f) {
    for (int64_t i = 0; thread.number == 0 && i < batch.wanted; i++) {
        int64_t from = batch.pick[i];
        memmove(f.x + i * m.width, f.x + from * m.width, m.width * sizeof(float));
        memmove(f.qkv + i * m.qkv_width, f.qkv + from * m.qkv_width, m.qkv_width * sizeof(float));
        f.slot[i] = batch.slot[from];
        f.position[i] = batch.position[from];
    }
    thread.barrier();
    Batch rest = batch;
    rest.rows = batch.wanted;
    rest.slot = f.slot;
    rest.position = f.position;
    return rest;
}

static bool ascends(const Batch &batch) {  // so that rows can move to the front in place
    for (int64_t i = 1; i < batch.wanted; i++)
        if (batch.pick[i] <= batch.pick[i - 1]) return false;
    return true;
}

static void layer_of(const Thread &thread, const Model &m, const Cache &cache, const Batch &batch, int64_t number,
                     const Forward &f) {
    const Layer &l = m.layer[number];
    int64_t M = batch.rows;
    if (m.post_norm) prepare(thread, l.qkv, f.to_qkv, M);
    else norm_rows(thread, f.x, nullptr, M, m, l.norm1, f.n1, l.qkv, f.to_qkv);
    if (m.parallel && !m.shared_norm) norm_rows(thread, f.x, nullptr, M, m, l.norm2, f.n2, l.up, f.to_up);
    thread.barrier();
    linear(thread, l.qkv, f.to_qkv, M, f.qkv, m.qkv_width, PLAIN);
    bool trims = f.trims && number == m.layers - 1;
    if (m.parallel && !trims) mlp_up(thread, m, l, f, M);
    thread.barrier();
    remember(thread, m, cache, batch, number, f.qkv);
    Batch rest = batch;
    if (trims) {
        // Nobody reads what the other rows would become.
        rest = picked(thread, m, batch, f);
        M = rest.rows;
        if (m.parallel) {
            if (m.shared_norm) norm_rows(thread, f.x, nullptr, M, m, l.norm1, f.n1, l.up, f.to_up);
            else norm_rows(thread, f.x, nullptr, M, m, l.norm2, f.n2, l.up, f.to_up);
            thread.barrier();
            mlp_up(thread, m, l, f, M);
        }
    }
    float *scratch = f.scores + thread.number * scratch_of_attention(m, f.rounds);
    attention(thread, {m, cache, rest, number, f.qkv, f.attended, f.rounds}, scratch);
    prepare(thread, l.out, f.to_out, M);
    if (m.parallel) prepare(thread, l.down, f.to_down, M);
    thread.barrier();
    if (m.parallel) {
        linear(thread, l.out, f.to_out, M, f.x, m.width, ADD);
        linear(thread, l.down, f.to_down, M, f.x, m.width, ADD);
    } else {
        rest_of_serial(thread, m, l, f, M);
    }
    thread.barrier();
}

// ---------------------------------------------------------------------------------------------------------- choice

constexpr int64_t COLUMNS = 256;  // logits of a row that exist at a time
constexpr int64_t TOGETHER = 64;  // rows whose logits do, so that a panel stays in the first cache for all of them

static void *memory_for(size_t bytes) {  // of a few numbers a row; without them the machine is at its end
    void *memory = malloc(bytes);
    if (!memory) abort();
    return memory;
}

struct Choice {  // what is asked of the logits of the picked rows
    const Linear *screen;  // the head over the real vocabulary in int8, its rows less their mean; null to compute
                           // every logit in float32
    const float *head;     // (tokens, width) as it is
    double weight_error, weight_norm;  // of the screen: the largest |w - w'| / scale and |w'| / scale of a token
    double near;                       // logits that close to the largest are told apart from it
    int64_t tokens;                    // real vocabulary
    int64_t *best;                     // (wanted,) the largest logit, the first among equals
    float *gap;                        // (wanted,) how far below the second is; farther than `near`: any number above it
    const int64_t *label;              // (wanted,) or null
    float *loss;                       // (wanted,)
    int64_t rounds;                    // whether attention may compute in bfloat16
};

constexpr float HEADROOM = 30.0f;  // how far a logit may be above the base of a sum, whose terms are float32

struct Running {  // of a row, over the logits so far
    float largest, second, base, label;
    int64_t best;
    double sum[P];  // of exp(logit - base), lane by lane
};

static void take(Running &run, float logit, int64_t token) {
    if (logit > run.largest) {
        run.second = run.largest;
        run.largest = logit;
        run.best = token;
    } else if (logit > run.second) {
        run.second = logit;
    }
}

// Logits of tokens `first` to first + count, in `row`, whose rest up to a whole panel is -infinity.
static void absorb(Running &run, const float *row, int64_t first, int64_t count, const Choice &c) {
    V top = all(-INFINITY);
    for (int64_t i = 0; i < count; i += P) top = larger(top, load(row + i));
    if (any_less(all(run.second), top))
        for (int64_t i = 0; i < min(count, c.tokens - first); i += P) {
            if (!any_less(all(run.second), load(row + i))) continue;
            for (int64_t t = i; t < min(i + P, c.tokens - first); t++) take(run, row[t], first + t);
        }
    if (!c.label) return;
    // A base that is near the largest will do, so that few sums are scaled again.
    if (any_less(all(run.base + HEADROOM), top)) {
        float largest = largest_of(top);
        for (double &sum : run.sum) sum *= exp((double)run.base - largest);
        run.base = largest;
    }
    V sum = {};
    for (int64_t i = 0; i < count; i += P) sum += exponential(load(row + i) - run.base);
    alignas(64) float lanes[P];
    store(lanes, sum);
#pragma omp simd
    for (int lane = 0; lane < P; lane++) run.sum[lane] += lanes[lane];
}

static float loss_of(const Running &run) {
    double sum = 0;
    for (double lane : run.sum) sum += lane;
    return (float)(run.base + log(sum) - run.label);
}

// Logits of `rows` rows from `first` on, in rows of COLUMNS.
static void some_logits(const Model &m, const Input &in, int64_t column, int64_t count, int64_t first, int64_t rows,
                        float *logits) {
    for (int64_t i = 0; i < count; i += BESIDE * P)
        for (int64_t row = 0; row < rows; row += BLOCK) {
            V out[BESIDE][BLOCK];
            int64_t taken = min<int64_t>(BLOCK, rows - row), panels = min<int64_t>(BESIDE, (count - i) / P);
            panels_of(m.head, in, (column + i) / P, panels, first + row, taken, out);
            for (int64_t b = 0; b < panels; b++)
                for (int64_t r = 0; r < taken; r++) {
                    int64_t at = i + b * P;
                    V v = m.head.bias ? out[b][r] + load(m.head.bias + column + at) : out[b][r];
                    store(logits + (row + r) * COLUMNS + at, v);
                }
        }
}

// Every logit of rows `start` to `end`, some columns of all rows before the next, so that weights stay in the cache.
static void choose_fully(const Model &m, const Choice &c, const Input &in, int64_t start, int64_t end) {
    Running *runs = (Running *)memory_for((end - start) * sizeof(Running));
    float *logits = (float *)memory_for(TOGETHER * COLUMNS * sizeof(float));
    for (int64_t i = 0; i < end - start; i++) runs[i] = {-INFINITY, -INFINITY, -INFINITY, 0, 0, {}};
    for (int64_t column = 0; column < m.head.n; column += COLUMNS)
        for (int64_t first = start; first < end; first += TOGETHER) {
            int64_t rows = min(TOGETHER, end - first), count = min(COLUMNS, m.head.n - column);
            some_logits(m, in, column, count, first, rows, logits);
            for (int64_t r = 0; r < rows; r++) {
                float *row = logits + r * COLUMNS;
                for (int64_t i = max<int64_t>(0, m.vocab - column); i < count; i++) row[i] = -INFINITY;
                Running &run = runs[first + r - start];
                absorb(run, row, column, count, c);
                int64_t label = c.label ? c.label[first + r] - column : -1;
                if (label >= 0 && label < count) run.label = row[label];
            }
        }
    for (int64_t i = start; i < end; i++) {
        const Running &run = runs[i - start];
        c.best[i] = run.best;
        c.gap[i] = run.largest - run.second;
        if (c.label) c.loss[i] = loss_of(run);
    }
    free(logits);
    free(runs);
}

struct Candidate {  // a token whose logit may be the largest
    int64_t token;
    float upper;  // bound of its logit
};

struct Candidates {  // of a row
    Candidate *list;
    int64_t count, room;
    float least;   // a lower bound of the largest logit
    double error;  // of a logit, in scales of its token

    void add(int64_t token, float upper) {
        if (count == room) {
            room = room ? 2 * room : 16;
            Candidate *larger = (Candidate *)memory_for(room * sizeof(Candidate));
            if (count) memcpy(larger, list, count * sizeof(Candidate));
            free(list);
            list = larger;
        }
        list[count++] = {token, upper};
    }
};

// With x' and w' as the screen holds them, x w = x' w' + x (w - w') + (x - x') w', and Cauchy-Schwarz bounds both
// rests.
static double error_of(const Choice &c, const Input &in, int64_t row) {
    double norm = 0, rest = 0;
    for (int64_t k = 0; k < in.k; k++) {
        double x = in.x[row * in.k + k], difference = x - (double)in.step[row] * in.q[row * in.k + k];
        norm += x * x;
        rest += difference * difference;
    }
    // The factor is for what becomes float32 later; the rounding of logits is far below `near`.
    return (sqrt(norm) * c.weight_error + sqrt(rest) * c.weight_norm) * 1.0001;
}

static float exact(const float *x, const float *w, int64_t K) {
    V sum[2] = {};
    int64_t k = 0;
    for (; k + 2 * P <= K; k += 2 * P) {
        sum[0] += load(x + k) * load(w + k);
        sum[1] += load(x + k + P) * load(w + k + P);
    }
    float rest = 0;
    for (; k < K; k++) rest += x[k] * w[k];
    V both = sum[0] + sum[1];
    for (int lane = 0; lane < P; lane++) rest += both[lane];
    return rest;
}

// Bounds of the logits of a panel, whose first token is `first`, for one row.
static void sift(Candidates &row, V logits, V scale, int64_t first, const Choice &c) {
    V width = scale * (float)row.error, upper = logits + width;
    float least = row.least - (float)c.near;
    if (largest_of(upper) < least) return;
    int64_t lanes = min<int64_t>(P, c.tokens - first);
    for (int64_t i = 0; i < lanes; i++) {
        if (upper[i] < least) continue;
        row.add(first + i, upper[i]);
        row.least = max(row.least, logits[i] - width[i]);
        least = row.least - (float)c.near;
    }
}

// As choose_fully, without losses: bounds of all logits in int8, then those that may be the largest in float32.
static void choose_screened(const Model &m, const Choice &c, const Input &in, const Input &screened, int64_t start,
                            int64_t end) {
    Candidates *found = (Candidates *)memory_for((end - start) * sizeof(Candidates));
    for (int64_t i = start; i < end; i++) found[i - start] = {nullptr, 0, 0, -INFINITY, error_of(c, screened, i)};
    const float *scales = (const float *)c.screen->scale;
    for (int64_t column = 0; column < c.screen->n; column += COLUMNS)
        for (int64_t first = start; first < end; first += BLOCK) {
            int64_t rows = min<int64_t>(BLOCK, end - first), count = min(COLUMNS, c.screen->n - column);
            V top[BLOCK], out[COLUMNS / P][BLOCK];
            for (int64_t r = 0; r < rows; r++) top[r] = all(-INFINITY);
            for (int64_t i = 0; i < count; i += P) {
                panel_of(*c.screen, screened, (column + i) / P, first, rows, out[i / P]);
                V scale = load(scales + column + i);
                for (int64_t r = 0; r < rows; r++)
                    top[r] = larger(top[r], out[i / P][r] + scale * (float)found[first + r - start].error);
            }
            for (int64_t r = 0; r < rows; r++) {
                Candidates &row = found[first + r - start];
                if (largest_of(top[r]) < row.least - (float)c.near) continue;
                for (int64_t i = 0; i < count; i += P)
                    sift(row, out[i / P][r], load(scales + column + i), column + i, c);
            }
        }
    for (int64_t i = start; i < end; i++) {
        Candidates &row = found[i - start];
        Running run = {-INFINITY, -INFINITY, 0, 0, 0, {}};
        for (int64_t n = 0; n < row.count; n++) {
            const int64_t token = row.list[n].token;
            if (row.list[n].upper < row.least - (float)c.near) continue;
            take(run, exact(in.x + i * in.k, c.head + token * in.k, in.k), token);
        }
        free(row.list);
        c.best[i] = run.best;
        c.gap[i] = run.largest - run.second;
    }
    free(found);
}

static void choose(const Thread &thread, const Model &m, const Choice &c, int64_t rows, const Input &in,
                   const Input &screened) {
    const auto [start, end] = thread.share(rows);
    if (start >= end) return;
    // A loss is over all logits, so bounds would save nothing.
    if (c.label || !c.screen) return choose_fully(m, c, in, start, end);
    for (int64_t i = start; i < end; i++) quantize_row(screened, i, INT8);
    choose_screened(m, c, in, screened, start, end);
}

// -------------------------------------------------------------------------------------------------------- one call

// The largest of the logits `begin` to `end` of a row, the first among equals. NaN is skipped.
static Top top_of(const float *row, int64_t begin, int64_t end) {
    Top top = {-INFINITY, begin};
    while (begin < end) {
        const int64_t stop = min(begin + COLUMNS, end), whole = stop - (stop - begin) % P;
        V block = all(-INFINITY);
        for (int64_t i = begin; i < whole; i += P) block = larger(load(row + i), block);
        if (whole < stop || any_less(all(top.logit), block))
            for (int64_t i = begin; i < stop; i++)
                if (row[i] > top.logit) top = {row[i], i};
        begin = stop;
    }
    return top;
}

// Greedy choices, while each thread's logits are in its own cache. tops: (threads, wanted).
static void find_best(const Thread &thread, const Model &m, const Batch &batch, Top *tops) {
    const Range panels = thread.share(m.head.n / P);
    for (int64_t row = 0; row < batch.wanted; row++)
        tops[thread.number * batch.wanted + row] =
            top_of(batch.logits + row * m.vocab, panels.begin * P, min(panels.end * P, batch.tokens));
    thread.barrier();
    if (thread.number) return;
    for (int64_t row = 0; row < batch.wanted; row++) {
        Top top = tops[row];
        for (int n = 1; n < thread.count; n++)
            if (tops[n * batch.wanted + row].logit > top.logit) top = tops[n * batch.wanted + row];
        batch.best[row] = top.token;
    }
}

static int forward(const Model &m, const Cache &cache, const Batch &batch, const Choice *choice, int threads) {
    const bool rounds = choice && choice->rounds;
    int64_t M = batch.rows, C = m.width, A = m.heads * m.head_dim, scores = scratch_of_attention(m, rounds);
    int64_t row = 4 * (3 * C + m.qkv_width + A + m.ffn) + ROOM * (4 * C + A + m.ffn) + 4096;
    int64_t panels = 2 * threads * panel_room(max(C, max(A, m.ffn))), tops = batch.best ? threads * batch.wanted : 0;
    Scratch scratch(((M + 16) * row + threads * scores * 4 + panels + tops * sizeof(Top)) / 64 * 64);
    if (!scratch.memory) return 1;
    scratch.panels = scratch.take<char>(panels);
    Forward f;
    f.trims = batch.wanted < M && ascends(batch);
    f.rounds = rounds;
    f.slot = scratch.take<int64_t>(M);
    f.position = scratch.take<int64_t>(M);
    f.x = scratch.take<float>(M * C);
    f.n1 = scratch.take<float>(M * C);
    f.n2 = scratch.take<float>(M * C);
    f.qkv = scratch.take<float>(M * m.qkv_width);
    f.attended = scratch.take<float>(M * A);
    f.inner = scratch.take<float>(M * m.ffn);
    f.scores = scratch.take<float>(threads * scores);
    f.tops = scratch.take<Top>(tops);
    f.to_qkv = input_of(scratch, m.post_norm ? f.x : f.n1, m.layer->qkv, M);
    f.to_up = m.shared_norm ? f.to_qkv : input_of(scratch, m.post_norm ? f.x : f.n2, m.layer->up, M);
    f.to_out = input_of(scratch, f.attended, m.layer->out, M);
    f.to_down = input_of(scratch, f.inner, m.layer->down, M);
    f.to_head = input_of(scratch, f.n1, m.head, M);
    Input screened = {};
    if (choice && choice->screen) screened = input_of(scratch, f.n1, *choice->screen, M);
    team_run(threads, [&](const Thread &thread) {
        embed(thread, m, batch, f.x);
        thread.barrier();
        for (int64_t number = 0; number < m.layers; number++) layer_of(thread, m, cache, batch, number, f);
        norm_rows(thread, f.x, f.trims ? nullptr : batch.pick, batch.wanted, m, m.norm, f.n1, m.head, f.to_head);
        thread.barrier();
        if (choice) choose(thread, m, *choice, batch.wanted, f.to_head, screened);
        else linear(thread, m.head, f.to_head, batch.wanted, batch.logits, m.vocab, PLAIN);
        if (batch.best) find_best(thread, m, batch, f.tops);
    });
    return 0;
}

// Whether this level sums products of bytes in few instructions.
extern "C" int castalia_has_dot() {
#if defined(__SSSE3__) || defined(__aarch64__)
    return 1;
#else
    return 0;
#endif
}

extern "C" const char *castalia_level() { return CASTALIA_LEVEL; }  // as in castalia.core.levels

extern "C" int castalia_forward(const Model *model, const Cache *cache, const Batch *batch, int threads) {
    return forward(*model, *cache, *batch, nullptr, threads);
}

extern "C" int castalia_choose(const Model *model, const Cache *cache, const Batch *batch, const Choice *choice,
                               int threads) {
    return forward(*model, *cache, *batch, choice, threads);
}

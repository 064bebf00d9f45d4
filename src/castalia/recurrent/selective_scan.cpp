// The selective scan of Mamba on a CPU, forward and backward, without a tensor of all states. Compiled for several
// levels of instructions (castalia.core.levels), for use through compiled_scan.py. selective_scan.py has the same in
// torch, with the formulas.
//
// Sixteen channels stand side by side in the lanes of a vector, and each has its N numbers in N vectors, so that the
// recurrence sums nothing across a vector. Names: S rows, T tokens, E channels, N numbers that a channel remembers,
// L tokens of a chunk. All tensors are contiguous float32: u, dt, y (S, T, E), A (E, N), B, C (S, T, N), h (S, E, N),
// borders (chunks, S, E, N), the states before each chunk; starts (S, T) bytes or null.

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../core/basics.h"
#include "../core/threads.h"
#include "../core/vectors.h"

typedef long long Long;

constexpr Long W = P;      // channels in a vector
constexpr Long SHARES = 4;  // parts of the channels that threads take; fixed, so that sums have one order

// The first `count` of 16 numbers, and zeros.
INLINE V load(const float *p, Long count) {
    if (count >= W) return load(p);
    float numbers[W] = {};
    memcpy(numbers, p, count * sizeof(float));
    return load(numbers);
}

INLINE void store(float *p, V v, Long count) {
    if (count >= W) return store(p, v);
    memcpy(p, &v, count * sizeof(float));
}

INLINE float sum(V v) {
    float total = 0;
    for (Long i = 0; i < W; i++) total += v[i];
    return total;
}

// exp(x) for x <= 88; 0 below -87.
INLINE V decay_of(V x) { return select_less(x, all(-87.0f), V{}, exponential(x)); }

// N numbers of each of `count` channels, (E, N) in memory, as N vectors.
static void gather(V *into, const float *from, Long count, Long N) {
    for (Long n = 0; n < N; n++) {
        float numbers[W] = {};
        for (Long i = 0; i < count; i++) numbers[i] = from[i * N + n];
        into[n] = load(numbers);
    }
}

static void scatter(float *into, const V *from, Long count, Long N) {
    for (Long n = 0; n < N; n++)
        for (Long i = 0; i < count; i++) into[i * N + n] = from[n][i];
}

struct Sizes {
    Long S, T, E, N, L;
    Long blocks() const { return (E + W - 1) / W; }
    Long chunks() const { return (T + L - 1) / L; }
    // The first block of a part of the channels.
    Long begin(Long part) const { return blocks() * part / SHARES; }
};

struct Vectors {  // memory of one part of the work
    V *first;
    explicit Vectors(Long count) : first((V *)aligned_alloc(sizeof(V), count * sizeof(V))) {
        if (!first) abort();
    }
    ~Vectors() { free(first); }
};

struct Inputs {
    const float *u, *dt, *A, *B, *C;
    const uint8_t *starts;
};

template <int FIXED>
static void forward_part(Sizes z, Inputs in, const float *h0, float *y, float *last, float *borders, Long s, Long part) {
    const Long N = FIXED ? FIXED : z.N;
    Vectors memory(2 * N);
    V *A = memory.first, *h = A + N;
    for (Long block = z.begin(part); block < z.begin(part + 1); block++) {
        const Long e = block * W, count = min(W, z.E - e);
        gather(A, in.A + e * N, count, N);
        if (h0) gather(h, h0 + (s * z.E + e) * N, count, N);
        else fill(h, h + N, V{});
        for (Long t = 0; t < z.T; t++) {
            if (t % z.L == 0) scatter(borders + ((t / z.L * z.S + s) * z.E + e) * N, h, count, N);
            if (in.starts && in.starts[s * z.T + t]) fill(h, h + N, V{});
            const Long place = (s * z.T + t) * z.E + e;
            const V dt = load(in.dt + place, count), x = dt * load(in.u + place, count);
            const float *B = in.B + (s * z.T + t) * N, *C = in.C + (s * z.T + t) * N;
            V out = V{};
            for (Long n = 0; n < N; n++) {
                h[n] = decay_of(dt * A[n]) * h[n] + x * B[n];
                out += h[n] * C[n];
            }
            store(y + place, out, count);
        }
        scatter(last + (s * z.E + e) * N, h, count, N);
    }
}

// Gradients of one row's part of the channels. dA is that of the row, dB and dC those of row and part, (T, N) each.
template <int FIXED>
static void backward_part(Sizes z, Inputs in, const float *dy, const float *borders, float *du, float *ddt, float *dA,
                          float *dB, float *dC, Long s, Long part) {
    const Long N = FIXED ? FIXED : z.N, first = z.begin(part), blocks = z.begin(part + 1) - first;
    // States of a chunk with the one before it, decays, sums over blocks of the gradients of B and C lane by lane; then
    // of each block the gradient that comes from behind the chunk, and that of A.
    Vectors memory((4 * z.L + 2) * N + 2 * blocks * N);
    V *A = memory.first, *states = A + N, *decays = states + (z.L + 1) * N;
    V *sums_B = decays + z.L * N, *sums_C = sums_B + z.L * N;
    V *behind = sums_C + z.L * N, *sums_A = behind + blocks * N;
    fill(behind, behind + 2 * blocks * N, V{});
    for (Long chunk = z.chunks() - 1; chunk >= 0; chunk--) {
        const Long from = chunk * z.L, length = min(z.L, z.T - from);
        fill(sums_B, sums_B + 2 * z.L * N, V{});
        for (Long block = 0; block < blocks; block++) {
            const Long e = (first + block) * W, count = min(W, z.E - e);
            gather(A, in.A + e * N, count, N);
            gather(states, borders + ((chunk * z.S + s) * z.E + e) * N, count, N);
            for (Long l = 0; l < length; l++) {
                const Long row = s * z.T + from + l, place = row * z.E + e;
                const V dt = load(in.dt + place, count), x = dt * load(in.u + place, count);
                const bool begins = in.starts && in.starts[row];
                const float *B = in.B + row * N;
                for (Long n = 0; n < N; n++) {
                    const V decay = begins ? V{} : decay_of(dt * A[n]);
                    decays[l * N + n] = decay;
                    states[(l + 1) * N + n] = decay * states[l * N + n] + x * B[n];
                }
            }
            V *g = behind + block * N, *own_A = sums_A + block * N;
            for (Long l = length - 1; l >= 0; l--) {
                const Long row = s * z.T + from + l, place = row * z.E + e;
                const V dt = load(in.dt + place, count), u = load(in.u + place, count);
                const V x = dt * u, out = load(dy + place, count);
                const float *B = in.B + row * N, *C = in.C + row * N;
                V dx = V{}, exponents = V{};
                for (Long n = 0; n < N; n++) {
                    const V here = g[n] + out * C[n];
                    sums_C[l * N + n] += out * states[(l + 1) * N + n];
                    sums_B[l * N + n] += here * x;
                    dx += here * B[n];
                    const V back = here * decays[l * N + n];
                    const V exponent = back * states[l * N + n];
                    exponents += exponent * A[n];
                    own_A[n] += exponent * dt;
                    g[n] = back;
                }
                store(du + place, dx * dt, count);
                store(ddt + place, exponents + dx * u, count);
            }
        }
        for (Long i = 0; i < length * N; i++) {
            dB[from * N + i] = sum(sums_B[i]);
            dC[from * N + i] = sum(sums_C[i]);
        }
    }
    for (Long block = 0; block < blocks; block++) {
        const Long e = (first + block) * W;
        scatter(dA + e * N, sums_A + block * N, min(W, z.E - e), N);
    }
}

extern "C" {

void castalia_scan(const Long *sizes, const float *u, const float *dt, const float *A, const float *B, const float *C,
                   const uint8_t *starts, const float *h, float *y, float *last, float *borders, int threads) {
    const Sizes z{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
    const Inputs in{u, dt, A, B, C, starts};
    // The size that nearly all models have, unrolled.
    const auto work = z.N == 16 ? forward_part<16> : forward_part<0>;
    team_run(threads, [&](const Thread &thread) {
        for (Long task = thread.next(); task < z.S * SHARES; task = thread.next())
            work(z, in, h, y, last, borders, task / SHARES, task % SHARES);
    });
}

// dA (S, E, N) and dB, dC (S, SHARES, T, N) are to be summed up by the caller.
void castalia_scan_backward(const Long *sizes, const float *u, const float *dt, const float *A, const float *B,
                            const float *C, const uint8_t *starts, const float *dy, const float *borders, float *du,
                            float *ddt, float *dA, float *dB, float *dC, int threads) {
    const Sizes z{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
    const Inputs in{u, dt, A, B, C, starts};
    const auto work = z.N == 16 ? backward_part<16> : backward_part<0>;
    team_run(threads, [&](const Thread &thread) {
        for (Long task = thread.next(); task < z.S * SHARES; task = thread.next()) {
            const Long s = task / SHARES, part = task % SHARES;
            float *own_A = dA + s * z.E * z.N, *own_B = dB + task * z.T * z.N, *own_C = dC + task * z.T * z.N;
            work(z, in, dy, borders, du, ddt, own_A, own_B, own_C, s, part);
        }
    });
}

Long castalia_scan_parts() { return SHARES; }
}

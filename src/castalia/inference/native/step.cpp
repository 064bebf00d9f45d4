// One forward pass of a GPT-NeoX decoder on a CPU, in one call: a decode step of a small model lasts less than the
// Python that would dispatch its operators. Compiled at first use by compiled.py; plain C, no header of torch.
//
// A batch is M rows, each one token with the slot of its sequence and its position there. So prompts of unequal length
// and sequences in the middle of their text stand side by side without padding. Every row writes its key and value
// before any row looks back; a row sees the positions of its slot up to its own.
//
// Weights lie in panels of 16 output channels, so that a vector register holds one number of each channel and nothing
// is summed across a register. Names as in packing.py; shapes M rows, N outputs, K inputs.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num() { return 0; }
#endif

constexpr int P = 16;      // output channels in a panel, float lanes of a vector
constexpr int BLOCK = 8;   // rows that share one pass over a panel
constexpr int GROUP = 32;  // inputs that share a scale in int4

typedef float V __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef uint16_t H __attribute__((vector_size(32)));
typedef V VU __attribute__((aligned(4)));
typedef I IU __attribute__((aligned(4)));
typedef H HU __attribute__((aligned(2)));

static inline V load(const float *p) { return *(const VU *)p; }
static inline void store(float *p, V v) { *(VU *)p = v; }
static inline V all(float x) { return V{} + x; }

static inline V widen(const uint16_t *p) {  // 16 bfloat16 numbers
    return (V)(__builtin_convertvector(*(const HU *)p, I) << 16);
}

static inline float widen(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

static inline V clamp(V x, float low, float high) {
    x = x < low ? all(low) : x;
    return x > high ? all(high) : x;
}

static inline V exponential(V x) {  // Cephes' expf: error below 2 ulp
    x = clamp(x, -87.3f, 88.0f);
    const V magic = all(12582912.0f);
    V n = (x * 1.44269504f + magic) - magic;
    V r = x - n * 0.693359375f + n * 2.12194440e-4f;
    V p = all(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = p * r + c;
    p = p * r * r + r + 1.0f;
    return p * (V)((__builtin_convertvector(n, I) + 127) << 23);
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
    int8_t *q;       // (M, K), round(x / step)
    float *step;     // (M,)
    int32_t *sum;    // int8: (M,) -128 * sum of q; int4: (M, groups) -8 * sum of a group's q
    int64_t k, groups;
};

static void quantize_row(const Input &in, int64_t m, int64_t kind) {
    const float *x = in.x + m * in.k;
    int8_t *q = in.q + m * in.k;
    float largest = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < in.k; i++) largest = std::max(largest, std::fabs(x[i]));
    float step = largest / 127.0f;
    float inverse = largest > 0 ? 127.0f / largest : 0.0f;
    in.step[m] = step;
    const float magic = 12582912.0f;  // adding it rounds to the nearest whole number, ties to even
#pragma omp simd
    for (int64_t i = 0; i < in.k; i++) q[i] = (int8_t)(int32_t)((x[i] * inverse + magic) - magic);
    int64_t width = kind == INT4 ? GROUP : in.k, offset = kind == INT4 ? -8 : -128;
    for (int64_t g = 0; g < in.groups; g++) {
        int32_t sum = 0;
        for (int64_t i = g * width; i < (g + 1) * width; i++) sum += q[i];
        in.sum[m * in.groups + g] = (int32_t)offset * sum;
    }
}

extern "C" int castalia_has_dot() {  // whether the processor multiplies bytes and sums them in one instruction
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
    return 1;
#else
    return 0;
#endif
}

static inline I dot(I sum, I unsigned_bytes, const int8_t *x) {  // lane += 4 unsigned bytes times the 4 signed of x
#ifdef __AVX512VNNI__
    int32_t four;
    std::memcpy(&four, x, 4);
    return (I)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)unsigned_bytes, _mm512_set1_epi32(four));
#elif defined(__AVXVNNI__)
    int32_t four;
    std::memcpy(&four, x, 4);
    __m256i halves[2], bytes[2];
    std::memcpy(halves, &sum, 64);
    std::memcpy(bytes, &unsigned_bytes, 64);
    for (int i = 0; i < 2; i++) halves[i] = _mm256_dpbusd_avx_epi32(halves[i], bytes[i], _mm256_set1_epi32(four));
    std::memcpy(&sum, halves, 64);
    return sum;
#else
    for (int j = 0; j < 4; j++) sum += ((unsigned_bytes >> (8 * j)) & 255) * (int32_t)x[j];
    return sum;
#endif
}

template <int M> static void panel_fp32(const float *w, const float *x, int64_t k, V *out) {
    constexpr int U = M >= 4 ? 1 : 4;  // several sums where one would wait for itself
    V sum[M][U] = {};
    int64_t i = 0;
    for (; i + U <= k; i += U)
        for (int u = 0; u < U; u++) {
            V row = load(w + (i + u) * P);
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
    V sum[M][2] = {};
    for (int64_t i = 0; i < k; i += 2) {  // a lane holds inputs i and i + 1 of its channel
        I pair = *(const IU *)(w + i * P);
        V even = (V)(pair << 16), odd = (V)(pair & (int32_t)0xffff0000);
        for (int m = 0; m < M; m++) {
            sum[m][0] += even * x[m * k + i];
            sum[m][1] += odd * x[m * k + i + 1];
        }
    }
    for (int m = 0; m < M; m++) out[m] = sum[m][0] + sum[m][1];
}

template <int M> static void panel_int8(const int8_t *w, const float *scale, const Input &in, int64_t first, V *out) {
    constexpr int U = M >= 4 ? 1 : 4;
    const I flip = (I{} + (int32_t)0x80808080);  // signed bytes to unsigned ones, 128 larger
    I sum[M][U] = {};
    const int8_t *x = in.q + first * in.k;
    int64_t i = 0;
    for (; i + 4 * U <= in.k; i += 4 * U)
        for (int u = 0; u < U; u++) {
            I bytes = *(const IU *)(w + (i + 4 * u) * P) ^ flip;
            for (int m = 0; m < M; m++) sum[m][u] = dot(sum[m][u], bytes, x + m * in.k + i + 4 * u);
        }
    for (; i < in.k; i += 4)
        for (int m = 0; m < M; m++) sum[m][0] = dot(sum[m][0], *(const IU *)(w + i * P) ^ flip, x + m * in.k + i);
    for (int m = 0; m < M; m++) {
        I whole = sum[m][0] + in.sum[first + m];
        for (int u = 1; u < U; u++) whole += sum[m][u];
        out[m] = __builtin_convertvector(whole, V) * (load(scale) * in.step[first + m]);
    }
}

template <int M>
static void panel_int4(const uint8_t *w, const uint16_t *scale, const Input &in, int64_t first, V *out) {
    const I low = I{} + 0x0f0f0f0f;
    V sum[M] = {};
    for (int64_t g = 0; g < in.groups; g++) {
        I part[M];
        for (int m = 0; m < M; m++) part[m] = I{} + in.sum[(first + m) * in.groups + g];
        for (int j = 0; j < GROUP; j += 8) {  // 64 bytes: inputs j..j+3 in the low halves, j+4..j+7 in the high ones
            I both = *(const IU *)(w + (g * GROUP + j) * P / 2);
            I even = both & low, odd = (both >> 4) & low;
            for (int m = 0; m < M; m++) {
                const int8_t *x = in.q + (first + m) * in.k + g * GROUP + j;
                part[m] = dot(dot(part[m], even, x), odd, x + 4);
            }
        }
        V step = widen(scale + g * P);
        for (int m = 0; m < M; m++) sum[m] += __builtin_convertvector(part[m], V) * step;
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
        panel_int4<M>((const uint8_t *)w + cells / 2, (const uint16_t *)l.scale + number * P * in.groups, in, first, out);
}

static void panel_of(const Linear &l, const Input &in, int64_t number, int64_t first, int64_t rows, V *out) {
    switch (rows) {
    case 1: return panel<1>(l, in, number, first, out);
    case 2: return panel<2>(l, in, number, first, out);
    case 3: return panel<3>(l, in, number, first, out);
    case 4: return panel<4>(l, in, number, first, out);
    case 5: return panel<5>(l, in, number, first, out);
    case 6: return panel<6>(l, in, number, first, out);
    case 7: return panel<7>(l, in, number, first, out);
    default: return panel<8>(l, in, number, first, out);
    }
}

enum After { PLAIN, ADD, GELU_TANH, GELU_ERF };

static inline V activate(V y, int after) {
    if (after == GELU_TANH) return y / (1.0f + exponential(y * (y * y * 0.044715f + 1.0f) * -1.5957691216f));
    if (after == GELU_ERF)
        for (int lane = 0; lane < P; lane++) y[lane] *= 0.5f * (1.0f + std::erf(y[lane] * 0.70710678f));
    return y;
}

// y (M, N) = after(x W^T + bias); ADD adds to what is there. `width` is how many of the N columns y has. A thread takes
// neighbouring panels, and all rows of one before the next, so that weights are read from memory once.
static void linear(const Linear &l, const Input &in, int64_t M, float *y, int64_t width, int after) {
#pragma omp for schedule(static) nowait
    for (int64_t number = 0; number < l.n / P; number++)
        for (int64_t first = 0; first < M; first += BLOCK) {
            V out[BLOCK];
            int64_t rows = std::min<int64_t>(BLOCK, M - first), lanes = std::min<int64_t>(P, width - number * P);
            panel_of(l, in, number, first, rows, out);
            for (int64_t m = 0; m < rows; m++) {
                V v = l.bias ? out[m] + load(l.bias + number * P) : out[m];
                float *place = y + (first + m) * width + number * P;
                if (lanes == P) store(place, after == ADD ? load(place) + v : activate(v, after));
                else
                    for (int64_t lane = 0; lane < lanes; lane++)
                        place[lane] = after == ADD ? place[lane] + v[lane] : activate(v, after)[lane];
            }
        }
}

static void prepare(const Linear &l, const Input &in, int64_t M) {  // activations of all rows for a kernel
    if (l.kind == INT8 || l.kind == INT4) {
#pragma omp for schedule(static) nowait
        for (int64_t m = 0; m < M; m++) quantize_row(in, m, l.kind);
    }
}

// ----------------------------------------------------------------------------------------------------------- model

struct Norm {
    const float *weight, *bias;
};

struct Layer {
    Norm norm1, norm2;
    Linear qkv, out, up, down;
};

struct Model {
    int64_t layers, width, heads, head_dim, ffn, rotary, vocab, parallel, tanh;
    double epsilon;
    const Layer *layer;
    Norm norm;
    Linear head;
    const float *cos, *sin;  // (positions, rotary / 2)
    const void *embed;       // (vocab, width), row after row
    const float *embed_scale;  // int8: (vocab,)
    int64_t embed_kind;
};

struct Cache {  // per layer: k (slots, heads, length / 16, head_dim, 16), v (slots, heads, length, head_dim)
    float *k, *v;
    int64_t slots, length;
};

struct Batch {
    int64_t rows;
    const int64_t *token, *slot, *position;  // (rows,)
    int64_t wanted;
    const int64_t *pick;  // (wanted,) rows whose logits are asked for
    float *logits;        // (wanted, vocab)
};

static void layer_norm(const float *x, const Norm &norm, float *y, int64_t width, double epsilon) {
    float mean = 0, square = 0;
#pragma omp simd reduction(+ : mean)
    for (int64_t i = 0; i < width; i++) mean += x[i];
    mean /= width;
#pragma omp simd reduction(+ : square)
    for (int64_t i = 0; i < width; i++) square += (x[i] - mean) * (x[i] - mean);
    float factor = 1.0f / std::sqrt(square / width + (float)epsilon);
#pragma omp simd
    for (int64_t i = 0; i < width; i++) y[i] = (x[i] - mean) * factor * norm.weight[i] + norm.bias[i];
}

static void turn(float *x, const float *cos, const float *sin, int64_t half) {
    for (int64_t j = 0; j < half; j++) {
        float a = x[j], b = x[j + half];
        x[j] = a * cos[j] - b * sin[j];
        x[j + half] = b * cos[j] + a * sin[j];
    }
}

struct Places {  // where one head of one slot keeps its keys and values in a layer
    float *k, *v;
};

static Places places(const Model &model, const Cache &cache, int64_t layer, int64_t slot, int64_t head) {
    int64_t at = ((layer * cache.slots + slot) * model.heads + head) * cache.length * model.head_dim;
    return {cache.k + at, cache.v + at};
}

static void remember(const Model &model, const Cache &cache, const Batch &batch, int64_t layer, float *qkv) {
    int64_t D = model.head_dim, half = model.rotary / 2;
#pragma omp for schedule(static) collapse(2)
    for (int64_t m = 0; m < batch.rows; m++)
        for (int64_t h = 0; h < model.heads; h++) {
            float *q = qkv + (m * model.heads + h) * 3 * D, *k = q + D, *v = k + D;
            int64_t position = batch.position[m];
            turn(q, model.cos + position * half, model.sin + position * half, half);
            turn(k, model.cos + position * half, model.sin + position * half, half);
            Places to = places(model, cache, layer, batch.slot[m], h);
            float *block = to.k + position / P * P * D + position % P;
            for (int64_t d = 0; d < D; d++) block[d * P] = k[d];
            std::memcpy(to.v + position * D, v, D * sizeof(float));
        }
}

// Q neighbouring positions of one head: y (Q, head_dim) out of q, k, v; `scores` has Q rows of `length`.
template <int Q>
static void attend(const Places &from, const float *q, int64_t stride, int64_t position, int64_t D, float *scores,
                   int64_t length, float *y, int64_t y_stride) {
    float scale = 1.0f / std::sqrt((float)D);
    for (int64_t t = 0; t < position + Q; t += P) {
        V sum[Q] = {};
        for (int64_t d = 0; d < D; d++) {
            V keys = load(from.k + t * D + d * P);
            for (int i = 0; i < Q; i++) sum[i] += keys * q[i * stride + d];
        }
        for (int i = 0; i < Q; i++) store(scores + i * length + t, sum[i] * scale);
    }
    for (int i = 0; i < Q; i++) {
        float *row = scores + i * length, largest = -INFINITY, total = 0;
        int64_t count = position + i + 1, whole = (position + Q + P - 1) / P * P;
        for (int64_t t = count; t < whole; t++) row[t] = -INFINITY;
#pragma omp simd reduction(max : largest)
        for (int64_t t = 0; t < count; t++) largest = std::max(largest, row[t]);
        for (int64_t t = 0; t < whole; t += P) store(row + t, exponential(load(row + t) - largest));
        for (int64_t t = count; t < whole; t++) row[t] = 0;
#pragma omp simd reduction(+ : total)
        for (int64_t t = 0; t < count; t++) total += row[t];
        for (int64_t t = 0; t < count; t++) row[t] /= total;
        std::memset(y + i * y_stride, 0, D * sizeof(float));
    }
    for (int64_t d = 0; d < D; d += P) {
        int64_t lanes = std::min<int64_t>(P, D - d);
        V sum[Q] = {};
        for (int64_t t = 0; t < position + Q; t++) {
            V values = {};
            if (lanes == P) values = load(from.v + t * D + d);
            else std::memcpy(&values, from.v + t * D + d, lanes * sizeof(float));
            for (int i = 0; i < Q; i++) sum[i] += values * scores[i * length + t];
        }
        for (int i = 0; i < Q; i++) std::memcpy(y + i * y_stride + d, &sum[i], lanes * sizeof(float));
    }
}

static void attention(const Model &model, const Cache &cache, const Batch &batch, int64_t layer, const float *qkv,
                      float *y, float *scores) {
    constexpr int64_t TOGETHER = 4;
    int64_t D = model.head_dim, H = model.heads;
#pragma omp for schedule(dynamic, 1) collapse(2)
    for (int64_t start = 0; start < batch.rows; start += TOGETHER)
        for (int64_t h = 0; h < H; h++) {
            int64_t end = std::min(start + TOGETHER, batch.rows);
            bool run = end - start == TOGETHER;  // four neighbours of one slot
            for (int64_t m = start + 1; run && m < end; m++)
                run = batch.slot[m] == batch.slot[start] && batch.position[m] == batch.position[start] + m - start;
            for (int64_t m = start; m < end; m += run ? TOGETHER : 1) {
                Places from = places(model, cache, layer, batch.slot[m], h);
                auto one = run ? attend<TOGETHER> : attend<1>;
                one(from, qkv + (m * H + h) * 3 * D, 3 * D * H, batch.position[m], D, scores, cache.length,
                    y + m * D * H + h * D, D * H);
            }
        }
}

struct Scratch {  // memory of one call
    char *memory, *next;
    explicit Scratch(size_t bytes) : memory((char *)std::aligned_alloc(64, bytes)), next(memory) {}
    ~Scratch() { std::free(memory); }
    template <class T> T *take(size_t count) {
        T *place = (T *)next;
        next += (count * sizeof(T) + 63) / 64 * 64;
        return place;
    }
};

static Input input_of(Scratch &scratch, const float *x, const Linear &l, int64_t M) {
    int64_t groups = l.kind == INT4 ? l.k / GROUP : 1;
    return {x, scratch.take<int8_t>(M * l.k), scratch.take<float>(M), scratch.take<int32_t>(M * groups), l.k, groups};
}

extern "C" int castalia_linear(const Linear *l, const float *x, int64_t M, float *y, int64_t width, int threads) {
    Scratch scratch(M * (l->k * 2 + 512) + 1024);
    if (!scratch.memory) return 1;
    Input in = input_of(scratch, x, *l, M);
#pragma omp parallel num_threads(threads)
    {
        prepare(*l, in, M);
#pragma omp barrier
        linear(*l, in, M, y, width, PLAIN);
    }
    return 0;
}

struct Forward {  // the activations of one call
    float *x, *n1, *n2, *qkv, *attended, *inner, *scores;
    Input to_qkv, to_up, to_out, to_down, to_head;
};

static void norm_rows(const float *x, const int64_t *pick, int64_t M, const Model &m, const Norm &norm, float *y,
                      const Linear &next, const Input &in) {
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < M; i++) {
        layer_norm(x + (pick ? pick[i] : i) * m.width, norm, y + i * m.width, m.width, m.epsilon);
        if (next.kind >= INT8) quantize_row(in, i, next.kind);
    }
}

static void embed(const Model &m, const Batch &batch, float *x) {
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < batch.rows; i++) {
        int64_t from = batch.token[i] * m.width;
        for (int64_t c = 0; c < m.width; c++) {
            float &to = x[i * m.width + c];
            if (m.embed_kind == FP32) to = ((const float *)m.embed)[from + c];
            if (m.embed_kind == BF16) to = widen(((const uint16_t *)m.embed)[from + c]);
            if (m.embed_kind == INT8) to = ((const int8_t *)m.embed)[from + c] * m.embed_scale[batch.token[i]];
        }
    }
}

static void layer_of(const Model &m, const Cache &cache, const Batch &batch, int64_t number, const Forward &f) {
    const Layer &l = m.layer[number];
    int64_t M = batch.rows;
    int gelu = m.tanh ? GELU_TANH : GELU_ERF;
    norm_rows(f.x, nullptr, M, m, l.norm1, f.n1, l.qkv, f.to_qkv);
    if (m.parallel) norm_rows(f.x, nullptr, M, m, l.norm2, f.n2, l.up, f.to_up);
#pragma omp barrier
    linear(l.qkv, f.to_qkv, M, f.qkv, 3 * m.width, PLAIN);
    if (m.parallel) linear(l.up, f.to_up, M, f.inner, m.ffn, gelu);
#pragma omp barrier
    remember(m, cache, batch, number, f.qkv);
    attention(m, cache, batch, number, f.qkv, f.attended, f.scores + omp_get_thread_num() * 4 * (cache.length + P));
    prepare(l.out, f.to_out, M);
    if (m.parallel) prepare(l.down, f.to_down, M);
#pragma omp barrier
    linear(l.out, f.to_out, M, f.x, m.width, ADD);  // a thread adds to the same columns in the next product
    if (!m.parallel) {
#pragma omp barrier
        norm_rows(f.x, nullptr, M, m, l.norm2, f.n2, l.up, f.to_up);
#pragma omp barrier
        linear(l.up, f.to_up, M, f.inner, m.ffn, gelu);
#pragma omp barrier
        prepare(l.down, f.to_down, M);
#pragma omp barrier
    }
    linear(l.down, f.to_down, M, f.x, m.width, ADD);
#pragma omp barrier
}

extern "C" int castalia_forward(const Model *model, const Cache *cache, const Batch *batch, int threads) {
    const Model &m = *model;
    int64_t M = batch->rows, C = m.width, row = 4 * (8 * C + m.ffn) + 2 * (4 * C + m.ffn) + 4096;
    int64_t scores = 4 * (cache->length + P);
    Scratch scratch(((M + 16) * row + threads * scores * 4) / 64 * 64);
    if (!scratch.memory) return 1;
    Forward f;
    f.x = scratch.take<float>(M * C);
    f.n1 = scratch.take<float>(M * C);
    f.n2 = scratch.take<float>(M * C);
    f.qkv = scratch.take<float>(M * C * 3);
    f.attended = scratch.take<float>(M * C);
    f.inner = scratch.take<float>(M * m.ffn);
    f.scores = scratch.take<float>(threads * scores);
    f.to_qkv = input_of(scratch, f.n1, m.layer->qkv, M);
    f.to_up = input_of(scratch, f.n2, m.layer->up, M);
    f.to_out = input_of(scratch, f.attended, m.layer->out, M);
    f.to_down = input_of(scratch, f.inner, m.layer->down, M);
    f.to_head = input_of(scratch, f.n1, m.head, M);
#pragma omp parallel num_threads(threads)
    {
        embed(m, *batch, f.x);
#pragma omp barrier
        for (int64_t number = 0; number < m.layers; number++) layer_of(m, *cache, *batch, number, f);
        norm_rows(f.x, batch->pick, batch->wanted, m, m.norm, f.n1, m.head, f.to_head);
#pragma omp barrier
        linear(m.head, f.to_head, batch->wanted, batch->logits, m.vocab, PLAIN);
    }
    return 0;
}

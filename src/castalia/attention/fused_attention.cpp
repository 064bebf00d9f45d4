// Causal attention on a CPU, forward and backward, without a matrix of scores in memory. Compiled for several levels of
// instructions (castalia.core.levels), for use through fused_attention.py, where the formulas stand.
//
// Names: B rows, H query heads, K key heads, T queries of a row held here, `keys` keys of a whole row, D numbers of a
// head. Queries stand side by side in the lanes of vectors, in groups of LANES, so that a softmax sums nothing across a
// vector, and scores go from the registers of one product straight into the factors of the next. Keys come in blocks.
//
// A product takes two packed factors of 32-bit words. A word is a float, or two bfloat16 numbers that are neighbours in
// the dimension that is summed, where the processor multiplies those. One factor lies row after row and its words are
// repeated in all lanes; the other has rows of lanes, one for each word. Sums are floats throughout.
//
// Sums have one order, whatever the number of threads and of rows: blocks follow from the length of a row alone.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../core/basics.h"
#include "../core/threads.h"
#include "../core/vectors.h"

#define METHOD inline __attribute__((always_inline))  // INLINE is for functions

typedef long long Long;
typedef uint32_t Word __attribute__((may_alias));  // floats and halves are packed into words where they lie
typedef uint16_t Half;  // bfloat16

#if defined(__AVX512BF16__)
constexpr bool MULTIPLIES_PAIRS = true;
#else
constexpr bool MULTIPLIES_PAIRS = false;
#endif

constexpr int LANES = 64;                            // queries of a group
constexpr int VECTORS = LANES / P;                   // of a group
constexpr int GROUPS = 2;                            // of a block of queries
constexpr int QUERIES = GROUPS * LANES;              // of a block
constexpr int KEY_WORDS = 64;                        // of a block of keys: its factors fit the second cache
constexpr int WIDEST = 256;                          // numbers of a head
constexpr int COLUMNS = REGISTER == 64 ? VECTORS : 1;  // vectors of a tile of a product
constexpr int ROWS = 4;                              // its rows: 16 registers of sums hide the latency of a product
constexpr int PAIR_COLUMNS = REGISTER == 64 ? 2 : 1;  // of a tile of two products side by side
constexpr int PAIR_ROWS = 4;
constexpr int ROUND = 8;                             // rows of keys are computed by so many
constexpr float HIDES = 1e30f;                       // as the logarithm of a sum: probabilities are 0
constexpr float MOST = 40.0f;                        // log2 of a number before the division by its sum
constexpr Long PART_KEYS = 512;                      // keys whose gradients are one task, at least
constexpr Long MOST_PARTS = 4;                       // each has its own sum of the gradients of queries

// How factors of products are packed: pairs of bfloat16 numbers, or floats.
template <bool PAIRS> struct Packing {
    static constexpr int NUMBERS = PAIRS ? 2 : 1;  // in a word
    static constexpr int KEYS = KEY_WORDS * NUMBERS;
    static constexpr int QUERY_WORDS = QUERIES / NUMBERS;
};

struct Problem {  // as Problem in fused_attention.py
    Long B, H, K, T, keys, D, rotary, chunks;
    Long q_step[3], k_step[3], v_step[3];  // numbers between two rows, heads, tokens
    Long cos_step;                         // numbers between two rows of cos and sin
    Long mask_step[2];                     // bytes between two rows, queries
    Long threads;
    const Long *starts;                    // (chunks,) the position of the first query of each
    const float *cos, *sin;                // (1 or B, T, rotary) or null
    const uint8_t *mask;                   // (B, T, keys) or null
};

static Long round_up(Long n, Long to) { return (n + to - 1) / to * to; }
static Long blocks_of(Long n, Long size) { return (n + size - 1) / size; }

struct Memory {  // of one call or one thread; `first` is null without
    char *first, *next;
    explicit Memory(size_t bytes) : first((char *)aligned_alloc(64, (bytes + 63) / 64 * 64)), next(first) {}
    ~Memory() { free(first); }
    template <class T> T *take(Long count) {
        T *place = (T *)next;
        next += (count * sizeof(T) + 63) / 64 * 64;
        return place;
    }
};

// A few hundred kilobytes of one thread, which cannot turn back alone: others wait for it.
struct OwnMemory : Memory {
    explicit OwnMemory(size_t bytes) : Memory(bytes) {
        if (!first) abort();
    }
};

struct Span {  // queries first to first + count - 1 of the T, at neighbouring positions
    Long first, count, position;
    Long end() const { return position + count; }  // keys before this are seen
};

// Blocks of `size` queries; none reaches over the end of a chunk.
static Long span_count(const Problem &p, Long size) { return p.chunks * blocks_of(p.T / p.chunks, size); }
static Span span_of(const Problem &p, Long number, Long size) {
    const Long chunk = p.T / p.chunks, each = blocks_of(chunk, size);
    const Long offset = number % each * size;
    return {number / each * chunk + offset, min(size, chunk - offset), p.starts[number / each] + offset};
}

// ----------------------------------------------------------------------------------------------------- arithmetic

INLINE Half narrow(float x) {  // to bfloat16, ties to even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
INLINE float number(float x) { return x; }
INLINE float number(Half x) {
    const uint32_t bits = (uint32_t)x << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}
INLINE void put(float *to, float x) { *to = x; }
INLINE void put(Half *to, float x) { *to = narrow(x); }

INLINE V load_words(const Word *p) { return load((const float *)p); }
INLINE void store_words(Word *p, V v) { store((float *)p, v); }

// 2^x; 0 for x below -126, NaN for NaN, and anything above 127. The polynomials are minimax on [0, 1], with relative
// errors of 7.5e-8 and, for what is rounded to 8 bits afterwards, 7.5e-5.
template <bool ROUGH> INLINE V power_of_two(V x) {
    constexpr float FINE[] = {1.877576675e-3f, 8.989340091e-3f, 0.05582631805f, 0.240153617f, 0.6931530732f, 0.9999999251f};
    constexpr float COARSE[] = {0.07802452264f, 0.2260671554f, 0.6958335405f, 0.9999252186f};
    constexpr int TERMS = ROUGH ? 4 : 6;
    const float *terms = ROUGH ? COARSE : FINE;
#if defined(__AVX512DQ__)
    const V r = {(Floats)_mm512_reduce_ps((__m512)x.part[0], 9)};  // x - floor(x)
    V y = all(terms[0]);
    for (int i = 1; i < TERMS; i++) y = y * r + terms[i];
    return {(Floats)_mm512_scalef_ps((__m512)y.part[0], (__m512)x.part[0])};
#else
    const V low = all(-126.0f);
    const V inside = select_less(x, low, low, x);
    const V magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const V n = (inside - 0.5f + magic) - magic;
    const V r = inside - n;
    V y = all(terms[0]);
    for (int i = 1; i < TERMS; i++) y = y * r + terms[i];
    return select_less(x, low, V{}, y * floats_in((to_integers(n) + 127) << 23));
#endif
}

static float log_of_two(float x) {  // log2(x) for x > 0
    uint32_t bits;
    memcpy(&bits, &x, 4);
    int exponent = (int)(bits >> 23) - 127;
    bits = (bits & 0x7fffff) | 0x3f800000;
    float mantissa;
    memcpy(&mantissa, &bits, 4);
    double m = mantissa;
    if (m > 1.41421356) {
        m *= 0.5;
        exponent++;
    }
    // 2 atanh(z) = log(m); |z| <= 0.172, and the next term is below 1e-12.
    const double z = (m - 1) / (m + 1), square = z * z;
    double sum = 0;
    for (int i = 13; i >= 1; i -= 2) sum = sum * square + 1.0 / i;
    return (float)(exponent + 2.8853900817779268 * z * sum);
}

template <bool PAIRS> INLINE Floats multiply_add(Floats sum, Floats b, Word a) {
#if defined(__AVX512BF16__)
    if (PAIRS)
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_castps_si512((__m512)b),
                                        (__m512bh)_mm512_set1_epi32((int)a));
#endif
    float factor;
    memcpy(&factor, &a, 4);
    return sum + b * factor;
}

// sum[r][c] += a's row r times b's vector c, for columns FROM and later and words from `from` to `to`.
template <bool PAIRS, int R, int C, int FROM>
INLINE void multiply(V (&sum)[R][C], const Word *a, Long a_step, const Word *b, Long b_step, Long from, Long to) {
    Floats own[R][C][PARTS];  // a copy that nothing else refers to, or compilers keep sums in memory
#define EACH_SUM                                                                                                       \
    _Pragma("GCC unroll 16") for (int r = 0; r < R; r++)                                                               \
        _Pragma("GCC unroll 8") for (int c = FROM; c < C; c++)                                                         \
            _Pragma("GCC unroll 4") for (int i = 0; i < PARTS; i++)
    EACH_SUM own[r][c][i] = sum[r][c].part[i];
    for (Long k = from; k < to; k++) {
        V row[C];
#pragma GCC unroll 8
        for (int c = FROM; c < C; c++) row[c] = load_words(b + k * b_step + c * P);
        EACH_SUM own[r][c][i] = multiply_add<PAIRS>(own[r][c][i], row[c].part[i], a[r * a_step + k]);
    }
    EACH_SUM sum[r][c].part[i] = own[r][c][i];
#undef EACH_SUM
}

// Columns may end at later words than those before them, as queries see more keys than those before them.
template <bool PAIRS, int R, int C, int FROM>
INLINE void multiply_stairs(V (&sum)[R][C], const Word *a, Long a_step, const Word *b, Long b_step, Long from,
                            const Long *ends) {
    multiply<PAIRS, R, C, FROM>(sum, a, a_step, b, b_step, from, ends[FROM]);
    if constexpr (FROM + 1 < C)
        multiply_stairs<PAIRS, R, C, FROM + 1>(sum, a, a_step, b, b_step, max(from, ends[FROM]), ends);
}

// A tile of out += a b, whose columns end at words `ends`.
template <bool PAIRS, int R, int C>
static void add_tile(const Word *a, Long a_step, const Word *b, Long b_step, Long from, const Long *ends, float *out,
                     Long out_step) {
    V sum[R][C];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) sum[r][c] = load(out + r * out_step + c * P);
    // Away from the diagonal all columns end together; the stairs hold sums in memory between their steps.
    if (ends[0] == ends[C - 1]) multiply<PAIRS, R, C, 0>(sum, a, a_step, b, b_step, from, ends[0]);
    else multiply_stairs<PAIRS, R, C, 0>(sum, a, a_step, b, b_step, from, ends);
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) store(out + r * out_step + c * P, sum[r][c]);
}

// out (D, LANES) += a (D, words) b (words, LANES): sums over keys.
template <bool PAIRS>
static void add_over_keys(Long D, const Word *a, const Word *b, const Long *ends, float *out) {
    for (Long d = 0; d < D; d += ROWS)
        for (int c = 0; c < VECTORS; c += COLUMNS)
            add_tile<PAIRS, ROWS, COLUMNS>(a + d * KEY_WORDS, KEY_WORDS, b + c * P, LANES, 0, ends + c,
                                           out + d * LANES + c * P, LANES);
}

// R rows of out (rows, width) += a (rows, words) b (words, width), from word `from` on: sums over queries.
template <bool PAIRS, int R, int C>
static void add_over_queries(const Word *a, Long a_step, const Word *b, Long width, Long from, Long words, float *out) {
    const Long ends[] = {words, words, words, words};
    for (int r = 0; r < ROUND; r += R)
        add_tile<PAIRS, R, C>(a + r * a_step, a_step, b, width, from, ends, out + r * width, width);
}

// ROUND rows of it, all columns.
template <bool PAIRS>
static void add_rows(const Word *a, Long a_step, const Word *b, Long width, Long from, Long words, float *out) {
    for (Long at = 0; at < width;) {
        const Long left = min<Long>((width - at) / P, COLUMNS);
        if constexpr (COLUMNS == 4) {
            if (left == 4) add_over_queries<PAIRS, 4, 4>(a, a_step, b + at, width, from, words, out + at);
            if (left == 3) add_over_queries<PAIRS, 4, 3>(a, a_step, b + at, width, from, words, out + at);
            if (left == 2) add_over_queries<PAIRS, 8, 2>(a, a_step, b + at, width, from, words, out + at);
            if (left == 1) add_over_queries<PAIRS, 8, 1>(a, a_step, b + at, width, from, words, out + at);
        } else {
            add_over_queries<PAIRS, 4, 1>(a, a_step, b + at, width, from, words, out + at);
        }
        at += left * P;
    }
}

// -------------------------------------------------------------------------------------------------------- packing

// A rotation of a head as castalia.models.parts.rotary.rotate has it; back with sign -1.
static void turn(float *x, const float *cos, const float *sin, Long rotary, float sign) {
    const Long half = rotary / 2;
    for (Long j = 0; j < half; j++) {
        const float a = x[j], b = x[j + half];
        x[j] = a * cos[j] + b * (sign * sin[j]);
        x[j + half] = b * cos[j + half] + a * (sign * sin[j + half]);
    }
}

static void turn_at(const Problem &p, float *x, Long b, Long t, float sign) {
    if (!p.cos) return;
    const Long at = b * p.cos_step + t * p.rotary;
    turn(x, p.cos + at, p.sin + at, p.rotary, sign);
}

template <class N> static void read_row(const N *from, float *to, Long D) {
#pragma omp simd
    for (Long d = 0; d < D; d++) to[d] = number(from[d]);
}
template <class N> static void write_row(const float *from, N *to, Long D) {
#pragma omp simd
    for (Long d = 0; d < D; d++) put(to + d, from[d]);
}

// Words of neighbours in a row: what is summed is D.
template <bool PAIRS, class N> static void words_of_row(const N *from, Word *to, Long D) {
    if constexpr (PAIRS || sizeof(N) == 4) memcpy(to, from, D * sizeof(N));
    else read_row(from, (float *)to, D);
}

// Words of neighbouring rows: what is summed is the row. `rows` rows `step` numbers apart become words / NUMBERS rows
// of `width` words; zeros stand for the rest.
template <bool PAIRS, class N>
static void words_of_rows(const N *from, Long step, Long rows, Long D, Word *to, Long width, Long words) {
    for (Long w = 0; w < words; w++) {
        Word *row = to + w * width;
        const Long first = w * Packing<PAIRS>::NUMBERS;
        if (first + Packing<PAIRS>::NUMBERS > rows || D < width) memset(row, 0, width * sizeof(Word));
        if (first >= rows) continue;
        const N *low = from + first * step;
        if constexpr (!PAIRS) {
            words_of_row<false>(low, row, D);
        } else if (first + 1 < rows) {
            const N *high = low + step;
#pragma omp simd
            for (Long d = 0; d < D; d++) row[d] = (Word)low[d] | (Word)high[d] << 16;
        } else {
#pragma omp simd
            for (Long d = 0; d < D; d++) row[d] = low[d];
        }
    }
}

// to (columns, to_step) = from (rows, from_step) transposed.
static void transpose(const Word *from, Long from_step, Long rows, Long columns, Word *to, Long to_step) {
    for (Long c = 0; c < columns; c++)
        for (Long r = 0; r < rows; r++) to[c * to_step + r] = from[r * from_step + c];
}

// Rows of D numbers as lanes: to (D / NUMBERS, LANES); zeros stand for the rest. `spare` has room for as many words.
template <bool PAIRS, class N>
static void lanes_of_rows(const N *from, Long step, Long rows, Long D, Word *to, Word *spare) {
    const Long words = D / Packing<PAIRS>::NUMBERS;
    if (rows < LANES) memset(to, 0, LANES * words * sizeof(Word));
    if constexpr (PAIRS || sizeof(N) == 4) {
        // Words as they lie in the rows: D and steps are multiples of 4.
        transpose((const Word *)from, step / Packing<PAIRS>::NUMBERS, rows, words, to, LANES);
    } else {
        for (Long r = 0; r < rows; r++) words_of_row<PAIRS>(from + r * step, spare + r * words, D);
        transpose(spare, words, rows, words, to, LANES);
    }
}

// A block of keys or values, (rows, D), as the factor whose rows are d and whose words are keys.
template <bool PAIRS, class N> static void columns_of_rows(const N *from, Long rows, Long D, Word *to, Word *spare) {
    words_of_rows<PAIRS>(from, D, rows, D, spare, D, KEY_WORDS);
    transpose(spare, D, KEY_WORDS, D, to, KEY_WORDS);
}

// The same block as the factor whose rows are keys and whose words are numbers of a head.
template <bool PAIRS, class N> static void rows_of_block(const N *from, Long rows, Long D, Word *to) {
    const Long words = D / Packing<PAIRS>::NUMBERS;
    words_of_row<PAIRS>(from, to, rows * D);
    memset(to + rows * words, 0, (Packing<PAIRS>::KEYS - rows) * words * sizeof(Word));
}

// ---------------------------------------------------------------------------------------------------------- masks

enum Seen { NOTHING, SOME, EVERYTHING };

// Which queries of a group see which of `rows` keys from `key` on: bit `lane` of bits[row][vector].
static Seen seen_of(const Problem &p, Long b, const Span &group, Long key, Long rows, uint16_t (*bits)[VECTORS]) {
    if (!p.mask) {
        if (group.position >= key + rows - 1) return EVERYTHING;
        for (Long r = 0; r < rows; r++)
            for (int c = 0; c < VECTORS; c++) {
                const Long before = key + r - (group.position + c * P);  // queries that come too early
                bits[r][c] = before <= 0 ? 0xffff : before >= P ? 0 : (uint16_t)(0xffff << before);
            }
        return SOME;
    }
    const Long valid = min(rows, p.keys - key);
    bool any = false, every = valid == rows;
    memset(bits, 0, rows * sizeof(*bits));
    for (Long i = 0; i < group.count; i++) {
        const uint8_t *row = p.mask + b * p.mask_step[0] + (group.first + i) * p.mask_step[1] + key;
        Long count = 0;
        for (Long r = 0; r < valid; r++) count += row[r] != 0;
        any |= count > 0;
        every &= count == valid;
        if (count == 0) continue;
        for (Long r = 0; r < valid; r++) bits[r][i / P] |= (uint16_t)((row[r] != 0) << (i % P));
    }
    return every ? EVERYTHING : any ? SOME : NOTHING;
}

INLINE V choose(uint16_t bits, V yes, V no) {  // lane by lane
#if defined(__AVX512F__)
    return {(Floats)_mm512_mask_mov_ps((__m512)no.part[0], bits, (__m512)yes.part[0])};
#else
    static const int32_t place[P] = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
    const I wanted = load_bytes(place) & (int32_t)bits;
    V result;
    for (int i = 0; i < PARTS; i++) result.part[i] = wanted.part[i] != 0 ? yes.part[i] : no.part[i];
    return result;
#endif
}

// Probabilities of neighbouring rows a and b as words of lanes.
INLINE void store_pair(Word *to, V a, V b) {
#if defined(__AVX512BF16__)
    static const Half order[2 * P] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)b.part[0], (__m512)a.part[0]);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_loadu_si512(order), both));
#endif
}

// Two vectors of one row as words of neighbouring lanes.
INLINE void store_row(Word *to, V a, V b) {
#if defined(__AVX512BF16__)
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)b.part[0], (__m512)a.part[0]));
#endif
}

// -------------------------------------------------------------------------------------------------------- forward

struct Block {  // packed keys and values
    const Word *rows;    // keys (KEYS, D / NUMBERS)
    const Word *values;  // (D, KEY_WORDS)
    Long key;            // the first
};

template <bool PAIRS> struct Group {  // what a thread has of one group of queries
    Word *q;                 // (D / NUMBERS, LANES)
    Word *probabilities;     // (KEY_WORDS, LANES)
    Word *spare;
    float *scores;           // (KEYS, LANES)
    float *y;                // (D, LANES), before the division
    uint16_t (*bits)[VECTORS];
    V largest[VECTORS], sum[VECTORS];
    Long D;
    float scale;             // of scores, with log2(e)

    static Long bytes(Long D) {
        const Long words = D / Packing<PAIRS>::NUMBERS, keys = Packing<PAIRS>::KEYS;
        return 4 * LANES * (words + KEY_WORDS + max<Long>(words, D) + keys + D) + keys * (Long)sizeof(*bits) + 6 * 64;
    }
    Group(Memory &memory, Long D) : D(D), scale((float)(1.4426950408889634 / sqrt((double)D))) {
        const Long words = D / Packing<PAIRS>::NUMBERS, keys = Packing<PAIRS>::KEYS;
        q = memory.take<uint32_t>(words * LANES);
        probabilities = memory.take<uint32_t>(KEY_WORDS * LANES);
        spare = memory.take<uint32_t>(max<Long>(words, D) * LANES);
        scores = memory.take<float>(keys * LANES);
        y = memory.take<float>(D * LANES);
        bits = memory.take<uint16_t[VECTORS]>(keys);
    }

    void start() {
        memset(y, 0, D * LANES * sizeof(float));
        for (int c = 0; c < VECTORS; c++) {
            largest[c] = all(-INFINITY);
            sum[c] = V{};
        }
    }

    // exp(score - largest) of ROWS keys from `row` on; those of neighbours share words.
    template <int C> METHOD void keep(V (&p)[ROWS][C], Long row, int c) {
        for (int i = 0; i < C; i++) {
            if constexpr (PAIRS)
                for (int r = 0; r < ROWS; r += 2)
                    store_pair(probabilities + (row + r) / 2 * LANES + (c + i) * P, p[r][i], p[r + 1][i]);
            else
                for (int r = 0; r < ROWS; r++)
                    store((float *)probabilities + (row + r) * LANES + (c + i) * P, p[r][i]);
        }
    }

    // Probabilities of keys that all queries see, against the largest score so far. False, with nothing changed, if
    // they could overflow.
    bool whole_block(const Block &block, Long rows) {
        const Long words = D / Packing<PAIRS>::NUMBERS;
        V sums[VECTORS] = {}, highest[VECTORS];
        for (V &v : highest) v = all(-INFINITY);
        for (Long row = 0; row < rows; row += ROWS)
            for (int c = 0; c < VECTORS; c += COLUMNS) {
                V s[ROWS][COLUMNS] = {};
                multiply<PAIRS, ROWS, COLUMNS, 0>(s, block.rows + row * words, words, q + c * P, LANES, 0, words);
                for (int i = 0; i < COLUMNS; i++)
                    for (int r = 0; r < ROWS; r++) {
                        const V x = s[r][i] * scale - largest[c + i];
                        highest[c + i] = larger(x, highest[c + i]);
                        s[r][i] = power_of_two<PAIRS>(x);
                        sums[c + i] += s[r][i];
                    }
                keep(s, row, c);
            }
        for (int c = 0; c < VECTORS; c++)
            for (int lane = 0; lane < P; lane++)
                // Written so that NaN passes: it is the result.
                if (highest[c][lane] > MOST) return false;
        for (int c = 0; c < VECTORS; c++) sum[c] += sums[c];
        return true;
    }

    template <int C> METHOD void masked_scores(const Block &block, Long row, int c, V *highest) {
        const Long words = D / Packing<PAIRS>::NUMBERS;
        V s[ROWS][C] = {};
        multiply<PAIRS, ROWS, C, 0>(s, block.rows + row * words, words, q + c * P, LANES, 0, words);
        for (int r = 0; r < ROWS; r++)
            for (int i = 0; i < C; i++) {
                const V x = choose(bits[row + r][c + i], s[r][i] * scale, all(-INFINITY));
                highest[c + i] = larger(x, highest[c + i]);
                store(scores + (row + r) * LANES + (c + i) * P, x);
            }
    }

    bool sees(Long row, int c) const {  // whether any query of a vector sees any of ROWS keys
        uint16_t any = 0;
        for (int r = 0; r < ROWS; r++) any |= bits[row + r][c];
        return any != 0;
    }

    // Probabilities of keys that some queries see, or that are larger than all before: the largest score comes first.
    void part_of_block(const Block &block, Long rows) {
        V highest[VECTORS];
        for (int c = 0; c < VECTORS; c++) highest[c] = largest[c];
        for (Long row = 0; row < rows; row += ROWS)
            for (int c = 0; c < VECTORS; c++) {
                if (!sees(row, c)) {
                    for (int r = 0; r < ROWS; r++) store(scores + (row + r) * LANES + c * P, all(-INFINITY));
                } else if (COLUMNS == VECTORS && c == 0) {
                    masked_scores<COLUMNS>(block, row, 0, highest);
                    break;
                } else if (COLUMNS == VECTORS && c == VECTORS - 2) {
                    masked_scores<2>(block, row, c, highest);
                    break;
                } else {
                    masked_scores<1>(block, row, c, highest);
                }
            }
        for (int c = 0; c < VECTORS; c++) {
            // Where a query has seen nothing yet, exp(-inf - 0) = 0.
            const V base = select_less(all(-INFINITY), highest[c], highest[c], V{});
            const V factor = power_of_two<false>(largest[c] - base);
            sum[c] = sum[c] * factor;
            for (Long d = 0; d < D; d++) {
                float *place = y + d * LANES + c * P;
                store(place, load(place) * factor);
            }
            for (Long row = 0; row < rows; row += ROWS) {
                V p[ROWS][1];
                for (int r = 0; r < ROWS; r++) {
                    p[r][0] = power_of_two<PAIRS>(load(scores + (row + r) * LANES + c * P) - base);
                    sum[c] += p[r][0];
                }
                keep(p, row, c);
            }
            largest[c] = highest[c];
        }
    }

    void add_block(const Problem &p, Long b, const Span &span, const Block &block) {
        constexpr int KEYS = Packing<PAIRS>::KEYS;
        // No key behind the last query is computed.
        const Long rows = min<Long>(KEYS, round_up(span.end() - block.key, ROUND));
        const Seen seen = seen_of(p, b, span, block.key, rows, bits);
        if (seen == NOTHING) return;
        if (seen == SOME || !whole_block(block, rows)) {
            if (seen == EVERYTHING) memset(bits, 0xff, rows * sizeof(*bits));
            part_of_block(block, rows);
        }
        Long ends[VECTORS];
        for (int c = 0; c < VECTORS; c++) {
            const Long visible = min(rows, span.position + (c + 1) * P - block.key);
            ends[c] = max<Long>(0, blocks_of(visible, Packing<PAIRS>::NUMBERS));
        }
        add_over_keys<PAIRS>(D, block.values, probabilities, ends, y);
    }

    template <class N> void write(const Span &span, N *to, Long step, float *sums) {
        float inverse[LANES];
        for (int lane = 0; lane < LANES; lane++) {
            const float total = sum[lane / P][lane % P];
            inverse[lane] = total != 0 ? 1.0f / total : 0.0f;
            if (lane < span.count) sums[lane] = total != 0 ? largest[lane / P][lane % P] + log_of_two(total) : HIDES;
        }
        for (Long d = 0; d < D; d++)
            for (int c = 0; c < VECTORS; c++) {
                float *place = y + d * LANES + c * P;
                store(place, load(place) * load(inverse + c * P));
            }
        transpose((const Word *)y, LANES, D, LANES, spare, D);
        for (Long i = 0; i < span.count; i++) write_row((const float *)spare + i * D, to + i * step, D);
    }
};

struct Forward {  // the tensors of a call; q, k, v as they come and contiguous copies, rotated
    const void *q, *k, *v;
    void *own_q, *own_k, *own_v, *y;
    float *sums;
};

// Copies rows of a head, rotated where `turns`.
template <class N>
static void copy_rows(const Problem &p, const N *from, Long step, N *to, Long b, Long first, Long count, bool turns) {
    float row[WIDEST];
    for (Long i = 0; i < count; i++) {
        if (!turns || !p.cos) {
            memcpy(to + i * p.D, from + i * step, p.D * sizeof(N));
            continue;
        }
        read_row(from + i * step, row, p.D);
        turn_at(p, row, b, first + i, 1.0f);
        write_row(row, to + i * p.D, p.D);
    }
}

template <class N, bool PAIRS> static int run_forward(const Problem &p, const Forward &f) {
    constexpr int KEYS = Packing<PAIRS>::KEYS;
    const Long D = p.D, words = D / Packing<PAIRS>::NUMBERS, blocks = blocks_of(p.keys, KEYS);
    const Long size = KEYS * words + D * KEY_WORDS;  // words of a packed block
    Memory shared(p.B * p.K * blocks * size * sizeof(Word));
    if (!shared.first) return 1;
    Word *packed = shared.take<uint32_t>(p.B * p.K * blocks * size);
    const Long groups = span_count(p, LANES);
    team_run((int)p.threads, [&](const Thread &thread) {
        OwnMemory own(Group<PAIRS>::bytes(D) + D * KEY_WORDS * sizeof(Word) + 64);
        Word *spare = own.take<uint32_t>(D * KEY_WORDS);
        for (Long task = thread.next(); task < p.B * p.K * blocks; task = thread.next()) {
            const Long b = task / blocks / p.K, head = task / blocks % p.K, key = task % blocks * KEYS;
            const Long rows = min<Long>(KEYS, p.keys - key), place = (task / blocks * p.keys + key) * D;
            const N *k = (const N *)f.k + b * p.k_step[0] + head * p.k_step[1] + key * p.k_step[2];
            const N *v = (const N *)f.v + b * p.v_step[0] + head * p.v_step[1] + key * p.v_step[2];
            N *own_k = (N *)f.own_k + place, *own_v = (N *)f.own_v + place;
            copy_rows(p, k, p.k_step[2], own_k, b, key, rows, true);
            copy_rows(p, v, p.v_step[2], own_v, b, key, rows, false);
            rows_of_block<PAIRS>(own_k, rows, D, packed + task * size);
            columns_of_rows<PAIRS>(own_v, rows, D, packed + task * size + KEYS * words, spare);
        }
        thread.barrier();
        Group<PAIRS> group(own, D);
        for (Long task = thread.next(); task < p.B * p.H * groups; task = thread.next()) {
            const Long b = task / groups / p.H, head = task / groups % p.H;
            // The last queries, which see most, come first, so that threads end together.
            const Span span = span_of(p, groups - 1 - task % groups, LANES);
            const Long place = (task / groups * p.T + span.first) * D;
            const N *q = (const N *)f.q + b * p.q_step[0] + head * p.q_step[1] + span.first * p.q_step[2];
            N *own_q = (N *)f.own_q + place;
            copy_rows(p, q, p.q_step[2], own_q, b, span.first, span.count, true);
            lanes_of_rows<PAIRS>(own_q, D, span.count, D, group.q, group.spare);
            group.start();
            const Word *first = packed + (b * p.K + head / (p.H / p.K)) * blocks * size;
            const Long last = (span.end() - 1) / KEYS;
            // The block of the queries themselves comes first: its scores say how large scores are.
            for (Long i = 0; i <= last; i++) {
                const Long number = i == 0 ? last : i - 1;
                const Word *at = first + number * size;
                group.add_block(p, b, span, {at, at + KEYS * words, number * KEYS});
            }
            N *y = (N *)f.y + ((b * p.T + span.first) * p.H + head) * D;
            group.write(span, y, p.H * D, f.sums + task / groups * p.T + span.first);
        }
    });
    return 0;
}

// ------------------------------------------------------------------------------------------------------- backward

struct Backward {
    const void *dy, *y, *q, *k, *v;
    const float *sums;
    void *dq, *dk, *dv;
};

template <bool PAIRS> struct Layout {  // of packed queries and their gradients, in words, and of sums of gradients
    Long D, width, lanes, rows, size;
    explicit Layout(Long D) : D(D) {
        width = round_up(D, P);
        lanes = GROUPS * D / Packing<PAIRS>::NUMBERS * LANES;
        rows = Packing<PAIRS>::QUERY_WORDS * width;
        size = 2 * (lanes + rows + QUERIES);
    }
};

template <bool PAIRS> struct Queries {  // a packed block
    Word *q_lanes, *dy_lanes;  // (GROUPS, D / NUMBERS, LANES)
    Word *q_rows, *dy_rows;    // (QUERY_WORDS, width)
    float *sums, *products;    // (QUERIES,) log2 of the sums of a softmax; y dy
    Queries(Word *at, const Layout<PAIRS> &layout) {
        q_lanes = at;
        dy_lanes = q_lanes + layout.lanes;
        q_rows = dy_lanes + layout.lanes;
        dy_rows = q_rows + layout.rows;
        sums = (float *)(dy_rows + layout.rows);
        products = sums + QUERIES;
    }

    template <class N>
    void pack(const Problem &p, const Backward &f, Long b, Long head, const Span &span, const Layout<PAIRS> &layout,
              Word *spare) const {
        const Long D = p.D, line = b * p.H + head, step = p.H * D;
        const N *q = (const N *)f.q + (line * p.T + span.first) * D;
        const Long place = ((b * p.T + span.first) * p.H + head) * D;
        const N *dy = (const N *)f.dy + place, *y = (const N *)f.y + place;
        words_of_rows<PAIRS>(q, D, span.count, D, q_rows, layout.width, Packing<PAIRS>::QUERY_WORDS);
        words_of_rows<PAIRS>(dy, step, span.count, D, dy_rows, layout.width, Packing<PAIRS>::QUERY_WORDS);
        for (int g = 0; g < GROUPS; g++) {
            const Long first = g * LANES, count = max<Long>(0, min<Long>(LANES, span.count - first));
            const Long at = g * layout.lanes / GROUPS;
            lanes_of_rows<PAIRS>(q + first * D, D, count, D, q_lanes + at, spare);
            lanes_of_rows<PAIRS>(dy + first * step, step, count, D, dy_lanes + at, spare);
        }
        for (Long i = 0; i < QUERIES; i++) {
            sums[i] = i < span.count ? f.sums[line * p.T + span.first + i] : HIDES;
            float total = 0;
            if (i < span.count)
#pragma omp simd reduction(+ : total)
                for (Long d = 0; d < D; d++) total += number(y[i * step + d]) * number(dy[i * step + d]);
            products[i] = total;
        }
    }
};

template <bool PAIRS> struct Keys {  // what a thread has of one block of keys
    static constexpr int KEYS = Packing<PAIRS>::KEYS;
    static constexpr Long ROW = Packing<PAIRS>::QUERY_WORDS;  // words between two keys' probabilities
    const Layout<PAIRS> layout;
    Long D, words;
    float scale;               // of scores, with log2(e)
    Word *k, *v;               // (KEYS, D / NUMBERS)
    Word *k_columns;           // (D, KEY_WORDS)
    Word *p, *ds;              // (KEYS, QUERY_WORDS)
    Word *ds_lanes;            // pairs: (GROUPS, KEY_WORDS, LANES)
    Word *spare;
    float *dk, *dv;            // (KEYS, width)
    uint16_t (*bits)[VECTORS];

    static Long bytes(Long D) {
        const Long width = round_up(D, P), words = D / Packing<PAIRS>::NUMBERS;
        const Long numbers = 2 * KEYS * words + D * KEY_WORDS + 2 * KEYS * ROW + GROUPS * KEY_WORDS * LANES;
        return 4 * (numbers + D * QUERIES + 2 * KEYS * width) + KEYS * (Long)sizeof(*bits) + 10 * 64;
    }
    Keys(Memory &memory, Long D)
        : layout(D), D(D), words(D / Packing<PAIRS>::NUMBERS), scale((float)(1.4426950408889634 / sqrt((double)D))) {
        k = memory.take<uint32_t>(KEYS * words);
        v = memory.take<uint32_t>(KEYS * words);
        k_columns = memory.take<uint32_t>(D * KEY_WORDS);
        p = memory.take<uint32_t>(KEYS * ROW);
        ds = memory.take<uint32_t>(KEYS * ROW);
        ds_lanes = memory.take<uint32_t>(GROUPS * KEY_WORDS * LANES);
        spare = memory.take<uint32_t>(D * QUERIES);
        dk = memory.take<float>(KEYS * layout.width);
        dv = memory.take<float>(KEYS * layout.width);
        bits = memory.take<uint16_t[VECTORS]>(KEYS);
    }

    template <class N> void start(const N *keys, const N *values, Long rows) {
        rows_of_block<PAIRS>(keys, rows, D, k);
        rows_of_block<PAIRS>(values, rows, D, v);
        columns_of_rows<PAIRS>(keys, rows, D, k_columns, spare);
        memset(dk, 0, KEYS * layout.width * sizeof(float));
        memset(dv, 0, KEYS * layout.width * sizeof(float));
    }

    // A tile of probabilities and of the gradients of scores, written as factors of the products that need them.
    METHOD void keep(V (&tile)[PAIR_ROWS][PAIR_COLUMNS], Word *rows, Word *lanes, Long row, int g, int c) {
        for (int r = 0; r < PAIR_ROWS; r++) {
            if constexpr (PAIRS)
                for (int i = 0; i < PAIR_COLUMNS; i += 2)
                    store_row(rows + (row + r) * ROW + (g * LANES + (c + i) * P) / 2, tile[r][i], tile[r][i + 1]);
            else
                for (int i = 0; i < PAIR_COLUMNS; i++)
                    store((float *)rows + (row + r) * ROW + g * LANES + (c + i) * P, tile[r][i]);
        }
        if constexpr (PAIRS)
            if (lanes)
                for (int r = 0; r < PAIR_ROWS; r += 2)
                    for (int i = 0; i < PAIR_COLUMNS; i++)
                        store_pair(lanes + (row + r) / 2 * LANES + (c + i) * P, tile[r][i], tile[r + 1][i]);
    }

    bool sees(Long row, int c) const {
        uint16_t any = 0;
        for (int r = 0; r < PAIR_ROWS; r++)
            for (int i = 0; i < PAIR_COLUMNS; i++) any |= bits[row + r][c + i];
        return any != 0;
    }

    // p = exp(s - log of sum), ds = p (dp - y dy); `masked` has bits for what a query does not see.
    template <bool MASKED> void tiles(const Queries<PAIRS> &queries, int g, Long rows) {
        constexpr int R = PAIR_ROWS, C = PAIR_COLUMNS;
        const Word *q = queries.q_lanes + g * layout.lanes / GROUPS, *dy = queries.dy_lanes + g * layout.lanes / GROUPS;
        Word *lanes = ds_lanes + g * KEY_WORDS * LANES;
        for (Long row = 0; row < rows; row += R)
            for (int c = 0; c < VECTORS; c += C) {
                V s[R][C] = {}, gradient[R][C] = {};
                if (!MASKED || sees(row, c)) {
                    multiply<PAIRS, R, C, 0>(s, k + row * words, words, q + c * P, LANES, 0, words);
                    multiply<PAIRS, R, C, 0>(gradient, v + row * words, words, dy + c * P, LANES, 0, words);
                    for (int i = 0; i < C; i++) {
                        const V sum = load(queries.sums + g * LANES + (c + i) * P);
                        const V product = load(queries.products + g * LANES + (c + i) * P);
                        for (int r = 0; r < R; r++) {
                            V x = power_of_two<PAIRS>(s[r][i] * scale - sum);
                            if (MASKED) x = choose(bits[row + r][c + i], x, V{});
                            s[r][i] = x;
                            gradient[r][i] = x * (gradient[r][i] - product);
                        }
                    }
                }
                keep(s, p, nullptr, row, g, c);
                keep(gradient, ds, lanes, row, g, c);
            }
    }

    void empty(int g, Long rows) {
        for (Long row = 0; row < rows; row++) {
            memset(p + row * ROW + g * ROW / GROUPS, 0, ROW / GROUPS * sizeof(Word));
            memset(ds + row * ROW + g * ROW / GROUPS, 0, ROW / GROUPS * sizeof(Word));
        }
    }

    // Add the gradients that come from a block of queries; dq (GROUPS, D, LANES).
    void add(const Problem &problem, Long b, Long key, const Span &span, const Queries<PAIRS> &queries, float *dq) {
        const Long rows = min<Long>(KEYS, round_up(span.end() - key, ROUND));
        const int groups = (int)blocks_of(span.count, LANES);
        bool any = false;
        for (int g = 0; g < groups; g++) {
            const Span group = {span.first + g * LANES, min<Long>(LANES, span.count - g * LANES), span.position + g * LANES};
            const Seen seen = seen_of(problem, b, group, key, rows, bits);
            if (seen == NOTHING || group.end() <= key) {
                empty(g, rows);
                continue;
            }
            any = true;
            if (seen == SOME) tiles<true>(queries, g, rows);
            else tiles<false>(queries, g, rows);
            Long ends[VECTORS];
            for (int c = 0; c < VECTORS; c++) {
                const Long visible = min(rows, group.position + (c + 1) * P - key);
                ends[c] = max<Long>(0, blocks_of(visible, Packing<PAIRS>::NUMBERS));
            }
            float *out = dq + g * D * LANES;
            if constexpr (PAIRS) add_over_keys<PAIRS>(D, k_columns, ds_lanes + g * KEY_WORDS * LANES, ends, out);
            else add_rows_of_floats(k_columns, ds + g * LANES, ends, out);
        }
        if (!any) return;
        const Long end = groups * LANES / Packing<PAIRS>::NUMBERS;
        for (Long row = 0; row < rows; row += ROUND) {
            // Queries before the first of these keys see none of them.
            const Long from = max<Long>(0, key + row - span.position) / Packing<PAIRS>::NUMBERS;
            const Long place = row * layout.width;
            add_rows<PAIRS>(p + row * ROW, ROW, queries.dy_rows, layout.width, from, end, dv + place);
            add_rows<PAIRS>(ds + row * ROW, ROW, queries.q_rows, layout.width, from, end, dk + place);
        }
    }

    // As add_over_keys, of rows of QUERIES floats.
    void add_rows_of_floats(const Word *a, const Word *b, const Long *ends, float *out) {
        for (Long d = 0; d < D; d += ROWS)
            for (int c = 0; c < VECTORS; c += COLUMNS)
                add_tile<PAIRS, ROWS, COLUMNS>(a + d * KEY_WORDS, KEY_WORDS, b + c * P, ROW, 0, ends + c,
                                               out + d * LANES + c * P, LANES);
    }
};

// Keys of one task, a multiple of the largest block: a matter of the length of a row alone.
static Long part_size(Long keys) {
    const Long size = Packing<true>::KEYS;
    return max(PART_KEYS, round_up(blocks_of(keys, MOST_PARTS), size));
}

template <class N, bool PAIRS> struct Gradients {  // a call
    static constexpr int KEYS = Packing<PAIRS>::KEYS;
    const Problem &p;
    const Backward &f;
    const Layout<PAIRS> layout;
    Long spans, size, parts, block;
    Word *packed;  // (B, H, spans) blocks of queries
    float *dq;     // (parts, B, H, spans, GROUPS, D, LANES)

    Gradients(const Problem &p, const Backward &f)
        : p(p), f(f), layout(p.D), spans(span_count(p, QUERIES)), size(part_size(p.keys)),
          parts(blocks_of(p.keys, size)), block(p.D * QUERIES) {}
    Long bytes() const { return p.B * p.H * spans * (layout.size + parts * block) * sizeof(Word) + 128; }
    void take(Memory &memory) {
        packed = memory.take<uint32_t>(p.B * p.H * spans * layout.size);
        dq = memory.take<float>(parts * p.B * p.H * spans * block);
    }
    Queries<PAIRS> queries(Long line, Long number) const {
        return Queries<PAIRS>(packed + (line * spans + number) * layout.size, layout);
    }
    float *sums_of(Long part, Long line, Long number) const {
        return dq + ((part * p.B * p.H + line) * spans + number) * block;
    }

    // Gradients of the keys of one part of a head, and what these add to those of its queries.
    void part_of_head(Long part, Long b, Long head, Keys<PAIRS> &keys) const {
        const Long G = p.H / p.K, first = part * size, end = min(p.keys, first + size);
        const Long line = b * p.H + head * G;
        for (Long g = 0; g < G; g++)
            for (Long number = 0; number < spans; number++)
                if (span_of(p, number, QUERIES).end() > first)
                    memset(sums_of(part, line + g, number), 0, block * sizeof(float));
        for (Long key = first; key < end; key += KEYS) {
            const Long rows = min<Long>(KEYS, end - key), place = ((b * p.K + head) * p.keys + key) * p.D;
            keys.start((const N *)f.k + place, (const N *)f.v + place, rows);
            for (Long g = 0; g < G; g++)
                for (Long number = 0; number < spans; number++) {
                    const Span span = span_of(p, number, QUERIES);
                    if (span.end() > key)
                        keys.add(p, b, key, span, queries(line + g, number), sums_of(part, line + g, number));
                }
            write(keys, b, key, rows, place);
        }
    }

    void write(const Keys<PAIRS> &keys, Long b, Long key, Long rows, Long place) const {
        const float scale = 1.0f / sqrtf((float)p.D);
        for (Long r = 0; r < rows; r++) {
            float *dk = keys.dk + r * layout.width;
            for (Long d = 0; d < p.D; d++) dk[d] *= scale;
            turn_at(p, dk, b, key + r, -1.0f);
            write_row(dk, (N *)f.dk + place + r * p.D, p.D);
            write_row(keys.dv + r * layout.width, (N *)f.dv + place + r * p.D, p.D);
        }
    }

    // Gradients of one block of queries, out of those of all parts that it sees.
    void finish(Long line, Long number, float *rows) const {
        const Span span = span_of(p, number, QUERIES);
        const float scale = 1.0f / sqrtf((float)p.D);
        float *sum = sums_of(0, line, number);
        for (Long part = 1; part < parts && part * size < span.end(); part++) {
            const float *more = sums_of(part, line, number);
#pragma omp simd
            for (Long i = 0; i < block; i++) sum[i] += more[i];
        }
        for (Long i = 0; i < block; i++) sum[i] *= scale;
        for (int g = 0; g < GROUPS; g++)
            transpose((const Word *)sum + g * p.D * LANES, LANES, p.D, LANES, (Word *)rows + g * LANES * p.D, p.D);
        for (Long i = 0; i < span.count; i++) {
            turn_at(p, rows + i * p.D, line / p.H, span.first + i, -1.0f);
            write_row(rows + i * p.D, (N *)f.dq + (line * p.T + span.first + i) * p.D, p.D);
        }
    }
};

template <class N, bool PAIRS> static int run_backward(const Problem &p, const Backward &f) {
    Gradients<N, PAIRS> all(p, f);
    Memory shared(all.bytes());
    if (!shared.first) return 1;
    all.take(shared);
    const Long blocks = p.B * p.H * all.spans;
    team_run((int)p.threads, [&](const Thread &thread) {
        OwnMemory own(Keys<PAIRS>::bytes(p.D));
        Keys<PAIRS> keys(own, p.D);
        for (Long task = thread.next(); task < blocks; task = thread.next()) {
            const Long line = task / all.spans, number = task % all.spans;
            all.queries(line, number)
                .template pack<N>(p, f, line / p.H, line % p.H, span_of(p, number, QUERIES), all.layout, keys.spare);
        }
        thread.barrier();
        // The first keys, which most queries see, come first, so that threads end together.
        const Long heads = p.B * p.K;
        for (Long task = thread.next(); task < all.parts * heads; task = thread.next())
            all.part_of_head(task / heads, task % heads / p.K, task % p.K, keys);
        thread.barrier();
        for (Long task = thread.next(); task < blocks; task = thread.next())
            all.finish(task / all.spans, task % all.spans, (float *)keys.spare);
    });
    return 0;
}

extern "C" {  // both return 0, or 1 without memory

// q (B, H, T, D), k, v (B, K, keys, D) by their steps; own_q, own_k, own_v and sums (B, H, T) contiguous; y (B, T, H, D).
int castalia_attention(const Problem *p, int is_bf16, const void *q, const void *k, const void *v, void *own_q,
                       void *own_k, void *own_v, void *y, float *sums) {
    const Forward f{q, k, v, own_q, own_k, own_v, y, sums};
    if (is_bf16) return run_forward<Half, MULTIPLIES_PAIRS>(*p, f);
    return run_forward<float, false>(*p, f);
}

// All contiguous, of the forward's shapes; dq like own_q.
int castalia_attention_backward(const Problem *p, int is_bf16, const void *dy, const void *y, const void *q,
                                const void *k, const void *v, const float *sums, void *dq, void *dk, void *dv) {
    const Backward f{dy, y, q, k, v, sums, dq, dk, dv};
    if (is_bf16) return run_backward<Half, MULTIPLIES_PAIRS>(*p, f);
    return run_backward<float, false>(*p, f);
}
}

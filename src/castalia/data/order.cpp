// The two slow loops of order.py: numpy's shuffle, and where the rows of a stream begin. compiled_order.py calls them;
// numpy computes the same where there is no library.
//
// Both wait for memory: each step reads a place that nothing foretells. The places of the next steps are known long
// before they are read, so they are asked for ahead.

#include <stdint.h>
#include <string.h>

#include "../core/basics.h"

constexpr int64_t AHEAD = 128;   // places asked for before the first of them is read

// The shuffle of numpy's RandomState for n numbers of 4 bytes: for i = n - 1 .. 1 swap i with a random j <= i, where j is
// the first draw that is <= i after its high bits are cut off. `top` is the next i, first n - 1; it is 0 at the end.
// draws: the generator's 32-bit numbers. Returns how many of them were used.
extern "C" int64_t castalia_shuffle(uint32_t *values, int64_t *top, const uint32_t *draws, int64_t count) {
    int64_t i = *top;
    int64_t used = 0;
    uint32_t places[AHEAD];
    while (i > 0 && used < count) {
        const int bits = 64 - __builtin_clzll((unsigned long long)i);
        const uint32_t mask = (uint32_t)((1ULL << bits) - 1);
        // All i of a batch have the same mask: down to the power of two below, and not to 0.
        const int64_t lowest = max((int64_t)(mask >> 1) + 1, (int64_t)1);
        const int64_t batch = min(AHEAD, i - lowest + 1);
        int64_t found = 0;
        while (found < batch && used < count) {
            const uint32_t j = draws[used++] & mask;
            places[found] = j;
            found += j <= (uint32_t)(i - found);   // no branch: a third of the draws are refused, at random
        }
        for (int64_t k = 0; k < found; k++) __builtin_prefetch(values + places[k], 1);
        for (int64_t k = 0; k < found; k++) swap(values[i - k], values[places[k]]);
        i -= found;
    }
    *top = i;
    return used;
}

static inline int32_t size_of(const char *sizes, int32_t document) {
    int32_t size;
    memcpy(&size, sizes + 4 * (int64_t)document, 4);
    return size;
}

// starts[k] = (place in order, offset in that document) of token k * length of the stream, for k = 0 .. rows.
// sizes: tokens of each document, maybe at odd addresses, as in a mapped .idx; order: the `count` documents of the
// stream. Returns the rows written.
template <typename Number>
static int64_t place(const char *sizes, const int32_t *order, int64_t count, int64_t length, int64_t rows,
                     Number *starts) {
    int64_t row = 0, next = 0, begin = 0;
    for (int64_t d = 0; d < count; d++) {
        if (d + AHEAD < count) __builtin_prefetch(sizes + 4 * (int64_t)order[d + AHEAD]);
        const int64_t end = begin + size_of(sizes, order[d]);
        for (; next < end && row <= rows; row++, next += length) {
            starts[2 * row] = (Number)d;
            starts[2 * row + 1] = (Number)(next - begin);
        }
        begin = end;
    }
    return row;
}

extern "C" int64_t castalia_place_int32(const char *sizes, const int32_t *order, int64_t count, int64_t length,
                                        int64_t rows, int32_t *starts) {
    return place(sizes, order, count, length, rows, starts);
}

extern "C" int64_t castalia_place_int64(const char *sizes, const int32_t *order, int64_t count, int64_t length,
                                        int64_t rows, int64_t *starts) {
    return place(sizes, order, count, length, rows, starts);
}

// Loops with barriers over a team of threads, for test_threads.py.

#include "../../src/castalia/core/threads.h"

// Rounds of: every thread counts its share and takes tickets, and one adds up. Returns how often a sum was wrong.
extern "C" long wrong_sums(int threads, long pieces, int rounds) {
    long *shared = (long *)calloc(1024, sizeof(long)), *taken = (long *)calloc(1024, sizeof(long)), wrong = 0;
    team_run(threads, [&](const Thread &thread) {
        for (int round = 0; round < rounds; round++) {
            const Range mine = thread.share(pieces);
            shared[thread.number] = mine.end - mine.begin;
            taken[thread.number] = 0;
            for (int64_t piece = thread.next(); piece < pieces; piece = thread.next()) taken[thread.number] += piece;
            thread.barrier();
            if (thread.number == 0) {
                long total = 0, tickets = 0;
                for (int i = 0; i < thread.count; i++) total += shared[i];
                for (int i = 0; i < thread.count; i++) tickets += taken[i];
                wrong += total != pieces || tickets != pieces * (pieces - 1) / 2;
            }
            thread.barrier();
        }
    });
    free(shared);
    free(taken);
    return wrong;
}

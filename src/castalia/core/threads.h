// Threads of a call into compiled code: OpenMP's parallel region, barrier and loops, without its runtime, so that a
// library needs nothing but libc and runs wherever it was built.
//
//     team_run(threads, [&](const Thread &t) { ... t.share(n) ... t.barrier(); ... });
//
// A call takes a team from a list of idle ones, so callers in several threads have a team each. Waiting threads spin
// for a moment, because a barrier of a decode step lasts about a microsecond and waking a thread costs fifty, and then
// sleep, so that an idle process burns nothing and a busy machine gets its processors back. A child of fork() starts
// teams of its own: threads do not survive a fork.
//
// Where the program has OpenMP's runtime already, as torch brings it, its threads are lent (lend_openmp): they spin
// after every operator of torch, and threads of ours would have to share the processors with them.

#pragma once
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "basics.h"

constexpr int64_t SPIN_IN_CALL = 100000;   // nanoseconds that a thread spins at a barrier before it sleeps
constexpr int64_t SPIN_IDLE = 300000;      // nanoseconds that it spins for the next call: Python between two steps
constexpr int64_t SPIN_CROWDED = 2000;     // either, where the threads of the call have not a processor each
constexpr int MOST_THREADS = 1024;

static inline int64_t nanoseconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static inline void relax() {  // tells the processor that the loop waits
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

template <class T> struct Atomic {  // as std::atomic
    T held;
    T load(int order = __ATOMIC_SEQ_CST) const { return __atomic_load_n(&held, order); }
    void store(T to, int order = __ATOMIC_SEQ_CST) { __atomic_store_n(&held, to, order); }
    T fetch_add(T more, int order = __ATOMIC_SEQ_CST) { return __atomic_fetch_add(&held, more, order); }
};

struct Signal {  // a number that one thread changes and others wait for
    alignas(64) Atomic<uint64_t> value{0};
    alignas(64) Atomic<int> sleepers{0};
    pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t changed = PTHREAD_COND_INITIALIZER;

    void set(uint64_t to) {
        value.store(to);  // sequentially consistent, as the sleeper's: one of the two sees what the other wrote
        if (sleepers.load() == 0) return;
        pthread_mutex_lock(&lock);
        pthread_cond_broadcast(&changed);
        pthread_mutex_unlock(&lock);
    }

    uint64_t wait(uint64_t old, int64_t spin) {  // the first value that is not `old`
        const int64_t end = nanoseconds() + spin;
        do {
            for (int i = 0; i < 32; i++) {
                const uint64_t now = value.load(__ATOMIC_ACQUIRE);
                if (now != old) return now;
                relax();
            }
        } while (nanoseconds() < end);
        pthread_mutex_lock(&lock);
        sleepers.fetch_add(1);
        uint64_t now;
        while ((now = value.load()) == old) pthread_cond_wait(&changed, &lock);
        sleepers.fetch_add(-1);
        pthread_mutex_unlock(&lock);
        return now;
    }
};

struct Range {
    int64_t begin, end;
};

struct Team;

struct Thread {  // one of the threads of a call
    Team &team;
    int number, count;

    void barrier() const;
    // The part of n pieces that is this thread's: neighbours, the same in every loop over n.
    Range share(int64_t n) const {
        const int64_t size = n / count, more = n % count, before = size * number + (number < more ? number : more);
        return {before, before + size + (number < more ? 1 : 0)};
    }
    // The next piece that no thread has taken since the last barrier, for pieces of unequal size.
    int64_t next() const;
};

typedef void (*Work)(const Thread &, void *);

struct Team {
    Signal start;  // of a call: its number and, in the low 16 bits, how many threads it has
    Signal phase;  // the number of barriers that are passed
    alignas(64) Atomic<int> arrived{0};
    alignas(64) Atomic<int64_t> ticket{0};
    Work work = nullptr;
    void *argument = nullptr;
    int64_t spin = 0;
    int workers = 0;  // threads beside the caller's
    uint64_t calls = 0;
    Team *next_idle = nullptr;

    void barrier(int count) {
        if (count == 1) {
            ticket.store(0, __ATOMIC_RELAXED);
            return;
        }
        const uint64_t passed = phase.value.load(__ATOMIC_RELAXED);
        const int64_t patience = spin;  // after the arrival the next caller may change it
        if (arrived.fetch_add(1, __ATOMIC_ACQ_REL) + 1 < count) {
            phase.wait(passed, patience);
            return;
        }
        arrived.store(0, __ATOMIC_RELAXED);
        ticket.store(0, __ATOMIC_RELAXED);
        phase.set(passed + 1);
    }
};

inline void Thread::barrier() const { team.barrier(count); }
inline int64_t Thread::next() const { return team.ticket.fetch_add(1, __ATOMIC_RELAXED); }

struct Seat {  // what a new thread is told
    Team *team;
    int number;
    uint64_t seen;
};

static void *serve_team(void *given) {
    const Seat seat = *(Seat *)given;
    free(given);
    Team &team = *seat.team;
    uint64_t seen = seat.seen;
    int64_t spin = 0;
    for (;;) {
        seen = team.start.wait(seen, spin);
        const int count = (int)(seen & 0xffff);
        spin = SPIN_CROWDED;
        if (seat.number >= count) continue;  // a smaller call
        team.work(Thread{team, seat.number, count}, team.argument);
        spin = team.spin == SPIN_IN_CALL ? SPIN_IDLE : SPIN_CROWDED;  // before the barrier, which lets the next call in
        team.barrier(count);
    }
    return nullptr;
}

static bool add_worker(Team &team) {
    Seat *seat = (Seat *)malloc(sizeof(Seat));
    if (!seat) return false;
    *seat = {&team, team.workers + 1, team.start.value.load()};
    sigset_t all, before;
    sigfillset(&all);
    pthread_t thread;
    // Signals are for the threads of the program.
    pthread_sigmask(SIG_SETMASK, &all, &before);
    const bool started = pthread_create(&thread, nullptr, serve_team, seat) == 0;
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (!started) {
        free(seat);
        return false;
    }
    pthread_detach(thread);
    team.workers++;
    return true;
}

struct OpenMP {  // functions of the program's runtime; null without one
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned);  // GOMP_parallel, which libomp has too
    int (*number)();                                                 // omp_get_thread_num
    int (*count)();                                                  // omp_get_num_threads
};

static OpenMP lent = {};

extern "C" void castalia_lend_openmp(void *parallel, void *number, void *count) {
    lent = {(void (*)(void (*)(void *), void *, unsigned, unsigned))parallel, (int (*)())number, (int (*)())count};
}

struct Idle {  // teams that no call uses; never freed, because their threads may outlast everything
    pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    Team *first = nullptr;
    bool watches_forks = false;
};

static Idle idle_teams;

static void before_fork() { pthread_mutex_lock(&idle_teams.lock); }
static void after_fork() { pthread_mutex_unlock(&idle_teams.lock); }
static void after_fork_in_child() {
    idle_teams.first = nullptr;
    lent = {};
    pthread_mutex_unlock(&idle_teams.lock);
}

static int processors() {  // that this process may use
#ifdef __linux__
    cpu_set_t mine;
    if (sched_getaffinity(0, sizeof mine, &mine) == 0) return CPU_COUNT(&mine);
#endif
    return (int)sysconf(_SC_NPROCESSORS_ONLN);
}

static Team *take_team() {  // null without memory
    pthread_mutex_lock(&idle_teams.lock);
    if (!idle_teams.watches_forks) {
        pthread_atfork(before_fork, after_fork, after_fork_in_child);
        idle_teams.watches_forks = true;
    }
    Team *team = idle_teams.first;
    if (team) idle_teams.first = team->next_idle;
    pthread_mutex_unlock(&idle_teams.lock);
    if (team) return team;
    team = (Team *)aligned_alloc(64, sizeof(Team));
    if (team) *team = Team{};
    return team;
}

static void give_back(Team *team) {
    pthread_mutex_lock(&idle_teams.lock);
    team->next_idle = idle_teams.first;
    idle_teams.first = team;
    pthread_mutex_unlock(&idle_teams.lock);
}

template <class F> static void call(const Thread &thread, void *work) { (*(F *)work)(thread); }

template <class F> struct LentWork {
    Team *team;
    F *work;
};

template <class F> static void enter(void *given) {  // one of OpenMP's threads; there may be fewer than were asked for
    const LentWork<F> &mine = *(LentWork<F> *)given;
    (*mine.work)(Thread{*mine.team, lent.number(), lent.count()});
}

// Run `work` on as many threads, the caller's among them; fewer where the system refuses more. `work` must not throw,
// and whatever the threads share must be apart from Thread::count the same for any number of them.
template <class F> static void team_run(int threads, F work) {
    threads = threads < 1 ? 1 : threads > MOST_THREADS ? MOST_THREADS : threads;
    if (threads == 1) {
        Team alone;
        work(Thread{alone, 0, 1});
        return;
    }
    Team *team = take_team();
    if (!team) {
        Team alone;
        work(Thread{alone, 0, 1});
        return;
    }
    if (lent.parallel) {
        team->spin = threads > processors() ? SPIN_CROWDED : SPIN_IN_CALL;
        team->ticket.store(0, __ATOMIC_RELAXED);
        LentWork<F> both = {team, &work};
        lent.parallel(enter<F>, &both, (unsigned)threads, 0);
        give_back(team);
        return;
    }
    while (team->workers + 1 < threads && add_worker(*team)) {}
    const int count = team->workers + 1 < threads ? team->workers + 1 : threads;
    team->work = call<F>;
    team->argument = &work;
    team->spin = count > processors() ? SPIN_CROWDED : SPIN_IN_CALL;
    team->ticket.store(0, __ATOMIC_RELAXED);
    team->start.set(++team->calls << 16 | (uint64_t)count);
    const Thread mine{*team, 0, count};
    work(mine);
    team->barrier(count);
    give_back(team);
}

/* A pool of threads for loops of 10 microseconds to 10 ms, several hundred a step.
 *
 * All state of a loop is one word, so that taking a turn is one compare-and-swap, and a thread that was
 * late, or was stopped by the kernel in between, can never take a turn of a loop that has ended:
 *
 *     ticket   | number of the loop : 40 | turns left : 24 |
 *
 * The caller always works, so a loop ends without any helper. Helpers spin for a moment after a loop, for
 * the next is near, and then sleep.
 *
 * The board: local workers of one machine own disjoint shares of its cores, and a helper beyond its own
 * worker's share works on a core of a neighbour's. Each worker writes into its line of a shared page until
 * when it is busy; a helper looks there before every turn and leaves a busy owner's core at once. So one
 * busy worker has all cores, two busy ones have their own, and nobody waits for a message. A line that its
 * owner left behind runs out by itself.
 */
#include "threads.h"

#include <errno.h>
#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { MAX_THREADS = 256, LINE = 8, SPIN_NS = 60000, WAIT_SPINS = 2000 };
#define LINGER_NS 4000000LL      /* between two steps of a busy worker */
#define BUSY_NS 2000000000LL     /* a step lasts no longer, or the neighbours help themselves */
#define TURNS 0xffffffULL

static struct {
    _Alignas(64) uint64_t ticket;
    _Alignas(64) int done;
    _Alignas(64) uint32_t bell; /* a futex: rung at the start of a loop while somebody sleeps */
    int sleepers;
    turn run;
    void *arg;
    int turns; /* of the loop in work */
    int count; /* threads, the caller's included */
    int64_t *board;
    int line;                /* ours */
    int owner[MAX_THREADS];  /* line of the core that a helper works on */
} pool = {.count = 1};

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static int may_work(int thread) {
    if (!pool.board || pool.owner[thread] == pool.line) return 1;
    return __atomic_load_n(&pool.board[pool.owner[thread] * LINE], __ATOMIC_RELAXED) < now_ns();
}

/* Take turns until none is left or, for a helper, its core is wanted. */
static void work(int thread) {
    uint64_t ticket = __atomic_load_n(&pool.ticket, __ATOMIC_ACQUIRE);
    while (ticket & TURNS) {
        if (thread && !may_work(thread)) return;
        if (__atomic_compare_exchange_n(&pool.ticket, &ticket, ticket - 1, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
            pool.run(pool.arg, pool.turns - (int)(ticket & TURNS), thread);
            __atomic_fetch_add(&pool.done, 1, __ATOMIC_RELEASE);
            ticket = __atomic_load_n(&pool.ticket, __ATOMIC_ACQUIRE);
        }
    }
}

static void *helper(void *number) {
    const int thread = (int)(intptr_t)number;
    for (;;) {
        int64_t until = now_ns() + SPIN_NS;
        while (may_work(thread) && now_ns() < until) {
            if (__atomic_load_n(&pool.ticket, __ATOMIC_ACQUIRE) & TURNS) {
                work(thread);
                until = now_ns() + SPIN_NS;
            }
            for (int i = 0; i < 16; i++) _mm_pause();
        }
        uint32_t heard = __atomic_load_n(&pool.bell, __ATOMIC_ACQUIRE);
        __atomic_fetch_add(&pool.sleepers, 1, __ATOMIC_SEQ_CST);
        if (!(__atomic_load_n(&pool.ticket, __ATOMIC_SEQ_CST) & TURNS) || !may_work(thread))
            syscall(SYS_futex, &pool.bell, FUTEX_WAIT_PRIVATE, heard, NULL, NULL, 0);
        __atomic_fetch_sub(&pool.sleepers, 1, __ATOMIC_SEQ_CST);
    }
    return NULL;
}

static int anyone_may_work(void) {
    for (int thread = 1; thread < pool.count; thread++)
        if (may_work(thread)) return 1;
    return 0;
}

void parallel(int count, turn run, void *arg) {
    if (count <= 1 || pool.count == 1) {
        for (int i = 0; i < count; i++) run(arg, i, 0);
        return;
    }
    pool.run = run;
    pool.arg = arg;
    pool.turns = count;
    __atomic_store_n(&pool.done, 0, __ATOMIC_RELAXED);
    uint64_t loop = (pool.ticket >> 24) + 1;
    __atomic_store_n(&pool.ticket, loop << 24 | (uint64_t)count, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&pool.sleepers, __ATOMIC_SEQ_CST) && anyone_may_work()) {
        __atomic_fetch_add(&pool.bell, 1, __ATOMIC_SEQ_CST);
        syscall(SYS_futex, &pool.bell, FUTEX_WAKE_PRIVATE, MAX_THREADS, NULL, NULL, 0);
    }
    work(0);
    for (int spins = 0; __atomic_load_n(&pool.done, __ATOMIC_ACQUIRE) < count; spins++) {
        _mm_pause();
        if (spins > WAIT_SPINS) sched_yield(); /* a helper lost its core in mid-turn: perhaps to us */
    }
}

int num_threads(void) { return pool.count; }

/* Start `count` - 1 helpers, once a process. `board` (NULL: all cores are ours) is shared by the machine's
 * workers, one line of 64 bytes each; thread i works on a core of the worker whose line is owners[i]. Returns
 * how many threads there are then. */
int diptych_threads_start(int count, int64_t *board, int line, const int *owners) {
    if (pool.count > 1) return pool.count;
    pool.board = board;
    pool.line = line;
    for (int i = 1; i < count && i < MAX_THREADS; i++) {
        pthread_t thread;
        pthread_attr_t detached;
        pthread_attr_init(&detached);
        pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
        pool.owner[i] = board ? owners[i] : line;
        if (pthread_create(&thread, &detached, helper, (void *)(intptr_t)i)) break;
        pool.count = i + 1;
    }
    return pool.count;
}

/* Around a step: while busy, and a moment longer, this worker's cores are its own. */
void diptych_threads_busy(int busy) {
    if (pool.board)
        __atomic_store_n(&pool.board[pool.line * LINE], now_ns() + (busy ? BUSY_NS : LINGER_NS), __ATOMIC_RELAXED);
}

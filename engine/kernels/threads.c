/* A pool of threads for loops of 10 microseconds to 10 ms, several hundred a step.
 *
 * All state of a loop is one word, so that a thread takes a work item by one compare-and-swap. A thread that
 * was late, or was stopped by the kernel in between, can never take an item of a loop that has ended:
 *
 *     ticket   | number of the loop : 40 | items left : 24 |
 *
 * The caller always works, so a loop ends without any helper. Helpers spin for a moment after a loop,
 * because the next one usually follows at once, and then sleep.
 *
 * The board: local workers of one machine own disjoint shares of its cores, and a helper beyond its own
 * worker's share works on a core of a neighbour's. Each worker writes into its line of a shared page until
 * when it is busy. A helper reads that line before every item and leaves a busy owner's core at once. So one
 * busy worker has all cores, two busy ones have their own, and no message is needed. The time in the line of
 * a worker that has died runs out. Each owner of cores has its own bell, so that helpers that could not work
 * anyway are not woken on a busy neighbour's cores.
 */
#include "threads.h"

#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { MAX_THREADS = 256, BOARD_BYTES = 4096, MAX_LINES = 64, LINE = 8, SPIN_NS = 60000, WAIT_SPINS = 2000 };
#define LINGER_NS 4000000LL      /* between two steps of a busy worker */
#define BUSY_NS 2000000000LL     /* a step lasts no longer, or the neighbours take the cores */
#define ITEMS 0xffffffULL

static struct {
    _Alignas(64) uint64_t ticket;
    _Alignas(64) int done;
    _Alignas(64) int taken; /* a loop is in work */
    work_item run;
    void *arg;
    int items; /* of the loop in work */
    int count; /* threads, the caller's included */
    int64_t *board;
    int line, num_lines;    /* of this worker; lines that may have bells */
    int owner[MAX_THREADS]; /* line of the core that a helper works on */
} pool = {.count = 1, .num_lines = 1};

/* By owner of cores. */
static struct {
    _Alignas(64) uint32_t rung; /* a futex: counted up at the start of a loop while a helper sleeps */
    int sleepers;
} bells[MAX_LINES];

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* Whether a helper may work on a core of this owner's. */
static int is_free(int owner) {
    if (!pool.board || owner == pool.line) return 1;
    return __atomic_load_n(&pool.board[owner * LINE], __ATOMIC_RELAXED) < now_ns();
}

/* Take items until none is left or, for a helper, its owner needs the core. */
static void work(int thread) {
    uint64_t ticket = __atomic_load_n(&pool.ticket, __ATOMIC_ACQUIRE);
    while (ticket & ITEMS) {
        if (thread && !is_free(pool.owner[thread])) return;
        if (__atomic_compare_exchange_n(&pool.ticket, &ticket, ticket - 1, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
            pool.run(pool.arg, pool.items - (int)(ticket & ITEMS), thread);
            __atomic_fetch_add(&pool.done, 1, __ATOMIC_RELEASE);
            ticket = __atomic_load_n(&pool.ticket, __ATOMIC_ACQUIRE);
        }
    }
}

static void *helper(void *number) {
    const int thread = (int)(intptr_t)number, owner = pool.owner[thread];
    for (;;) {
        int64_t until = now_ns() + SPIN_NS;
        while (is_free(owner) && now_ns() < until) {
            if (__atomic_load_n(&pool.ticket, __ATOMIC_ACQUIRE) & ITEMS) {
                work(thread);
                until = now_ns() + SPIN_NS;
            }
            for (int i = 0; i < 16; i++) _mm_pause();
        }
        uint32_t heard = __atomic_load_n(&bells[owner].rung, __ATOMIC_ACQUIRE);
        __atomic_fetch_add(&bells[owner].sleepers, 1, __ATOMIC_SEQ_CST);
        if (!(__atomic_load_n(&pool.ticket, __ATOMIC_SEQ_CST) & ITEMS) || !is_free(owner))
            syscall(SYS_futex, &bells[owner].rung, FUTEX_WAIT_PRIVATE, heard, NULL, NULL, 0);
        __atomic_fetch_sub(&bells[owner].sleepers, 1, __ATOMIC_SEQ_CST);
    }
    return NULL;
}

/* Wake the helpers whose cores are free. */
static void ring(void) {
    for (int owner = 0; owner < pool.num_lines; owner++)
        if (__atomic_load_n(&bells[owner].sleepers, __ATOMIC_SEQ_CST) && is_free(owner)) {
            __atomic_fetch_add(&bells[owner].rung, 1, __ATOMIC_SEQ_CST);
            syscall(SYS_futex, &bells[owner].rung, FUTEX_WAKE_PRIVATE, MAX_THREADS, NULL, NULL, 0);
        }
}

void parallel(int count, work_item run, void *arg) {
    if (count <= 1 || pool.count == 1 || __atomic_exchange_n(&pool.taken, 1, __ATOMIC_ACQUIRE)) {
        for (int i = 0; i < count; i++) run(arg, i, 0);
        return;
    }
    pool.run = run;
    pool.arg = arg;
    pool.items = count;
    __atomic_store_n(&pool.done, 0, __ATOMIC_RELAXED);
    uint64_t loop = (__atomic_load_n(&pool.ticket, __ATOMIC_RELAXED) >> 24) + 1;
    __atomic_store_n(&pool.ticket, loop << 24 | (uint64_t)count, __ATOMIC_SEQ_CST);
    ring();
    work(0);
    for (int spins = 0; __atomic_load_n(&pool.done, __ATOMIC_ACQUIRE) < count; spins++) {
        _mm_pause();
        if (spins > WAIT_SPINS) sched_yield(); /* a helper lost its core within an item, perhaps to this thread */
    }
    __atomic_store_n(&pool.taken, 0, __ATOMIC_RELEASE);
}

int num_threads(void) { return pool.count; }

/* Start `count` - 1 helpers, once a process. `board` (-1: no sharing) is the file of a page that the
 * machine's workers share, one line of 64 bytes each; thread i works on a core of the worker whose line is
 * owners[i]. Returns how many threads there are then. */
int diptych_threads_start(int count, int board, int line, const int *owners) {
    if (pool.count > 1) return pool.count;
    void *page = board < 0 ? MAP_FAILED : mmap(NULL, BOARD_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, board, 0);
    if (page != MAP_FAILED) pool.board = page, pool.line = line;
    for (int i = 1; i < count && i < MAX_THREADS; i++) {
        pthread_t thread;
        pthread_attr_t detached;
        pthread_attr_init(&detached);
        pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
        pool.owner[i] = pool.board ? owners[i] : 0;
        if (pool.owner[i] >= pool.num_lines) pool.num_lines = pool.owner[i] + 1;
        if (pthread_create(&thread, &detached, helper, (void *)(intptr_t)i)) break;
        pool.count = i + 1;
    }
    return pool.count;
}

/* Called around a step: no other worker uses this worker's cores while it is busy, and a moment longer. */
void diptych_threads_busy(int busy) {
    if (pool.board)
        __atomic_store_n(&pool.board[pool.line * LINE], now_ns() + (busy ? BUSY_NS : LINGER_NS), __ATOMIC_RELAXED);
}

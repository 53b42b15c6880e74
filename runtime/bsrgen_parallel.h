/* bsrgen_parallel.h: the thread driver.  Linux, gnu11, _GNU_SOURCE; everything static: each library has its own pool.
 *   bsrgen_parallel(parts, task, context)   task(context, p, parts) for p = 0 .. parts-1; returns when all are done
 *
 * Part 0 runs on the calling thread, part p on worker p-1.  The caller takes back a part that its worker has not begun,
 * so a sleeping or descheduled worker costs its wake-up and no more; a task must not care which thread runs a part.
 * A caller that finds the pool in use (a call from another thread, a nested call) runs all its parts itself, as it does
 * the parts for which no thread can be had.  Workers start at the first call and sleep between calls until the library
 * is closed.  After fork() the child starts its own: libgomp hangs there, which is why this is not OpenMP.
 * An empty 2-part region: 0.2 us back to back, 13 us after 1 ms idle (all figures: 2-core VM, Zen 5, 2026-11-20).
 */
#ifndef BSRGEN_PARALLEL_H
#define BSRGEN_PARALLEL_H
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

#define BSRGEN_MAX_THREADS 256
#define BSRGEN_STACK_BYTES (512 * 1024) /* kernels need < 64 KiB; glibc takes the static TLS out of it */
#define BSRGEN_ROUNDS 75 /* of watching before sleep: ~100 us, about the price of a wake-up on a virtual machine */

typedef void (*bsrgen_task)(void *context, int part, int parts);
enum { BSRGEN_IDLE, BSRGEN_ASLEEP, BSRGEN_GO, BSRGEN_QUIT }; /* of a word that a thread waits on, until GO or QUIT */

struct bsrgen_job {
    bsrgen_task task;
    void *context;
    int parts, rounds;
    uint64_t float_mode; /* FPCR is a 64-bit register */
};

struct bsrgen_seat {
    _Alignas(64) _Atomic uint32_t word;
    atomic_int cpu; /* where the worker was last */
    int barred;     /* the CPU it is kept off */
    pthread_t thread;
};

static struct {
    atomic_int taken; /* 1: one caller owns all that follows */
    int workers, cores;
    struct bsrgen_job job;
    _Alignas(64) atomic_int pending; /* parts posted and not finished, + 1 until the caller has nothing left to run */
    _Atomic uint32_t done;           /* the caller waits here for the worker that brings pending to 0 */
    struct bsrgen_seat seats[BSRGEN_MAX_THREADS - 1];
} bsrgen_pool;

/* Rounding and flush-to-zero belong to a thread: workers take the caller's, or bits would depend on the threads. */
#if defined __SSE__
#define bsrgen_pause() __builtin_ia32_pause()
#define bsrgen_get_float_mode(mode) ((mode) = __builtin_ia32_stmxcsr() & ~0x3Fu) /* less the sticky exceptions */
#define bsrgen_set_float_mode(mode) __builtin_ia32_ldmxcsr((unsigned)(mode))
#elif defined __aarch64__
#define bsrgen_pause() __extension__({ __asm__ volatile("yield"); })
#define bsrgen_get_float_mode(mode) __asm__ volatile("mrs %x0, fpcr" : "=r"(mode))
#define bsrgen_set_float_mode(mode) __asm__ volatile("msr fpcr, %x0" : : "r"(mode))
#else
#define bsrgen_pause() ((void)0)
#define bsrgen_get_float_mode(mode) ((mode) = 0)
#define bsrgen_set_float_mode(mode) ((void)(mode))
#endif

/* Return when the word is GO or QUIT, or was GO for a moment (a part posted and taken back): look again.
 * The yield lets in another library's worker, woken on this core (four in turn, parts of 20 us: 24 us, without 39). */
static void bsrgen_wait(_Atomic uint32_t *word, int rounds)
{
    for (; rounds > 0; rounds--, sched_yield())
        for (int i = 0; i < 32; i++, bsrgen_pause())
            if (atomic_load_explicit(word, memory_order_acquire) != BSRGEN_IDLE)
                return;
    uint32_t idle = BSRGEN_IDLE;
    if (atomic_compare_exchange_strong(word, &idle, BSRGEN_ASLEEP))
        while (atomic_load_explicit(word, memory_order_acquire) == BSRGEN_ASLEEP)
            syscall(SYS_futex, word, 128 /* FUTEX_WAIT_PRIVATE; musl has no linux/futex.h */, BSRGEN_ASLEEP, NULL);
}

static void bsrgen_post(_Atomic uint32_t *word, uint32_t value)
{
    if (atomic_exchange(word, value) == BSRGEN_ASLEEP)
        syscall(SYS_futex, word, 129 /* FUTEX_WAKE_PRIVATE */, 1);
}

static void *bsrgen_work(void *argument)
{
    struct bsrgen_seat *seat = argument;
    struct bsrgen_job job = {.rounds = 0};
    pthread_setname_np(pthread_self(), "bsrgen");
    for (;;) {
        uint32_t seen = BSRGEN_GO;
        atomic_store_explicit(&seat->cpu, sched_getcpu(), memory_order_relaxed);
        bsrgen_wait(&seat->word, job.rounds);
        if (atomic_compare_exchange_strong(&seat->word, &seen, BSRGEN_IDLE)) {
            job = bsrgen_pool.job; /* a copy: once pending is 0 the next caller writes it */
            bsrgen_set_float_mode(job.float_mode);
            job.task(job.context, (int)(seat - bsrgen_pool.seats) + 1, job.parts);
            if (atomic_fetch_sub(&bsrgen_pool.pending, 1) == 1)
                bsrgen_post(&bsrgen_pool.done, BSRGEN_GO);
        } else if (seen == BSRGEN_QUIT) {
            return NULL;
        }
    }
}

static void bsrgen_after_fork(void) /* in the child: one thread, and whatever state the others left */
{
    bsrgen_pool.workers = 0;
    atomic_store(&bsrgen_pool.done, BSRGEN_GO); /* a signal handler forked within a region: its caller must not wait */
    atomic_store(&bsrgen_pool.taken, 0);
}

/* Not at the first call: a fork in another thread might come between. */
__attribute__((constructor)) static void bsrgen_begin(void) { pthread_atfork(NULL, NULL, bsrgen_after_fork); }

static void bsrgen_hire(int wanted)
{
    static const int faults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGSYS}; /* for crash handlers to see */
    sigset_t blocked, before;
    pthread_attr_t small;
    cpu_set_t cpus;
    bsrgen_pool.cores = sched_getaffinity(0, sizeof cpus, &cpus) == 0 ? CPU_COUNT(&cpus) : 1;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, BSRGEN_STACK_BYTES);
    sigfillset(&blocked);
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++)
        sigdelset(&blocked, faults[i]);
    pthread_sigmask(SIG_SETMASK, &blocked, &before); /* inherited: no handler of the application runs on a worker */
    for (; bsrgen_pool.workers < wanted && bsrgen_pool.workers < BSRGEN_MAX_THREADS - 1; bsrgen_pool.workers++) {
        struct bsrgen_seat *seat = &bsrgen_pool.seats[bsrgen_pool.workers];
        atomic_store(&seat->word, BSRGEN_IDLE); /* a forked child finds the parent's */
        atomic_store(&seat->cpu, sched_getcpu());
        seat->barred = -1;
        if (pthread_create(&seat->thread, &small, bsrgen_work, seat) != 0)
            break; /* tried again at the next call */
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&small);
}

/* Keep a worker off the caller's core, where some kernels wake it and leave it beside an idle one (parts of 300 us
 * after 1 ms idle: 570 us, with this 335).  Two system calls, when it was seen there. */
static void bsrgen_steer(struct bsrgen_seat *seat, int cpu)
{
    cpu_set_t cpus;
    if (atomic_load_explicit(&seat->cpu, memory_order_relaxed) != cpu || seat->barred == cpu ||
        pthread_getaffinity_np(seat->thread, sizeof cpus, &cpus) != 0)
        return;
    CPU_SET((unsigned)seat->barred, &cpus); /* -1: nothing */
    CPU_CLR((unsigned)cpu, &cpus);
    pthread_setaffinity_np(seat->thread, sizeof cpus, &cpus);
    seat->barred = cpu;
}

__attribute__((unused)) static void bsrgen_parallel(int parts, bsrgen_task task, void *context)
{
    int nobody = 0, owner = parts > 1 && atomic_compare_exchange_strong(&bsrgen_pool.taken, &nobody, 1);
    int workers = 0, finished = 1, rounds = 0;
    if (owner) {
        if (bsrgen_pool.workers < parts - 1)
            bsrgen_hire(parts - 1);
        workers = bsrgen_pool.workers < parts - 1 ? bsrgen_pool.workers : parts - 1;
        rounds = parts <= bsrgen_pool.cores ? BSRGEN_ROUNDS : 0; /* else whom we wait for needs our core */
        bsrgen_pool.job = (struct bsrgen_job){task, context, parts, rounds, 0};
        bsrgen_get_float_mode(bsrgen_pool.job.float_mode);
        atomic_store(&bsrgen_pool.pending, workers + 1);
        atomic_store(&bsrgen_pool.done, BSRGEN_IDLE);
        for (int cpu = rounds > 0 ? sched_getcpu() : -2, w = 0; w < workers; w++) {
            bsrgen_steer(&bsrgen_pool.seats[w], cpu);
            bsrgen_post(&bsrgen_pool.seats[w].word, BSRGEN_GO);
        }
    }
    if (parts > 0)
        task(context, 0, parts);
    for (int part = parts - 1; part > 0; part--) { /* backwards: the last posted begins last */
        uint32_t go = BSRGEN_GO;
        if (part > workers || atomic_compare_exchange_strong(&bsrgen_pool.seats[part - 1].word, &go, BSRGEN_IDLE)) {
            task(context, part, parts);
            finished += part <= workers;
        }
    }
    if (owner && atomic_fetch_sub(&bsrgen_pool.pending, finished) != finished)
        bsrgen_wait(&bsrgen_pool.done, rounds);
    if (owner)
        atomic_store(&bsrgen_pool.taken, 0);
}

/* dlclose must not unmap code that a worker runs.  exit() beside a running call unmaps nothing and leaves the workers
 * to the kernel; else the pool stays taken, so that calls from later destructors run serially. */
__attribute__((destructor)) static void bsrgen_dismiss(void)
{
    int nobody = 0, workers = atomic_compare_exchange_strong(&bsrgen_pool.taken, &nobody, 1) ? bsrgen_pool.workers : 0;
    for (int w = 0; w < workers; w++)
        bsrgen_post(&bsrgen_pool.seats[w].word, BSRGEN_QUIT);
    for (int w = 0; w < workers; w++)
        pthread_join(bsrgen_pool.seats[w].thread, NULL);
}
#endif

/* bsrgen_parallel.h: the thread driver.  Include it first; everything is static, so each library has its own pool.
 *
 *   bsrgen_parallel(parts, task, context)   task(context, p, parts) for p = 0 .. parts-1; returns when all are done
 *   bsrgen_usable_cores()                   cores this process may run on, 1 .. BSRGEN_MAX_THREADS
 *
 * Part 0 runs on the calling thread, part p on worker p-1.  The caller takes back a part that its worker has not begun,
 * so a sleeping or descheduled worker costs its wake-up and no more; a task must not care which thread runs a part.
 * A caller that finds the pool in use (a call from another thread, a nested call) runs all its parts itself, as it does
 * the parts for which no thread can be had.  Workers start at the first call and sleep between calls until the library
 * is closed.  After fork() the child starts its own: libgomp hangs there, which is why this is not OpenMP.
 */
#ifndef BSRGEN_PARALLEL_H
#define BSRGEN_PARALLEL_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* sched_getaffinity, syscall */
#endif
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#if defined __GLIBC__ && !defined __USE_GNU
#error "include bsrgen_parallel.h before any libc header, or define _GNU_SOURCE"
#endif

#define BSRGEN_MAX_THREADS 256
#ifndef BSRGEN_SPIN_NS
#define BSRGEN_SPIN_NS 50000 /* a waiting thread watches for so long, then sleeps */
#endif
#ifndef BSRGEN_QUIET_NS
#define BSRGEN_QUIET_NS 5000 /* for this long it does not offer its core to others */
#endif
#define BSRGEN_STACK_BYTES (512 * 1024) /* kernels need < 64 KiB, but glibc takes the static TLS out of it */

typedef void (*bsrgen_task)(void *context, int part, int parts);

/* States of a word that a thread waits on: IDLE (-> ASLEEP) -> GO or QUIT. */
enum { BSRGEN_IDLE, BSRGEN_ASLEEP, BSRGEN_GO, BSRGEN_QUIT };

struct bsrgen_job {
    bsrgen_task task;
    void *context;
    int parts;
    unsigned float_mode;
    int64_t spin_ns;
};

struct bsrgen_seat {
    _Alignas(64) _Atomic uint32_t word;
    atomic_int cpu; /* where the worker was last */
    int barred;     /* the CPU it is kept off */
    pthread_t thread;
};

static struct {
    _Alignas(64) atomic_int taken; /* 1: one caller owns all that follows */
    int workers, cores, atfork_done;
    pid_t pid; /* where the workers live */
    cpu_set_t cpus;
    struct bsrgen_job job;
    _Alignas(64) atomic_int pending; /* parts posted and not finished, + 1 until the caller has nothing left to run */
    _Atomic uint32_t done;           /* the caller waits here for the worker that brings pending to 0 */
    struct bsrgen_seat seats[BSRGEN_MAX_THREADS - 1];
} bsrgen_pool;

/* The float mode (rounding, flush to zero) belongs to a thread: workers compute in the caller's, or the bits of a result
 * would depend on the number of threads.  Without the sticky exception flags. */
#if defined __SSE__
#define bsrgen_pause() __builtin_ia32_pause()
static inline unsigned bsrgen_float_mode(void) { return __builtin_ia32_stmxcsr() & ~0x3Fu; }
static inline void bsrgen_set_float_mode(unsigned mode) { __builtin_ia32_ldmxcsr(mode); }
#elif defined __aarch64__
#define bsrgen_pause() __asm__ volatile("yield")
static inline unsigned bsrgen_float_mode(void) { uint64_t m; __asm__ volatile("mrs %0, fpcr" : "=r"(m)); return (unsigned)m; }
static inline void bsrgen_set_float_mode(unsigned mode) { __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)mode)); }
#else
#define bsrgen_pause() ((void)0)
static inline unsigned bsrgen_float_mode(void) { return 0; }
static inline void bsrgen_set_float_mode(unsigned mode) { (void)mode; }
#endif

__attribute__((unused)) static int bsrgen_usable_cores(void)
{
    cpu_set_t set;
    long cores = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : sysconf(_SC_NPROCESSORS_ONLN);
    return cores < 1 ? 1 : cores > BSRGEN_MAX_THREADS ? BSRGEN_MAX_THREADS : (int)cores;
}

static int64_t bsrgen_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Return when the word is GO or QUIT, or was so for a moment (a part posted and taken back): look again. */
static void bsrgen_wait(_Atomic uint32_t *word, int64_t spin_ns)
{
    int64_t start = spin_ns > 0 ? bsrgen_now_ns() : 0;
    for (int64_t waited = 0; waited < spin_ns; waited = bsrgen_now_ns() - start) {
        if (waited > BSRGEN_QUIET_NS)
            sched_yield();
        for (int i = 0; i < 32; i++, bsrgen_pause())
            if (atomic_load_explicit(word, memory_order_acquire) != BSRGEN_IDLE)
                return;
    }
    uint32_t idle = BSRGEN_IDLE;
    if (atomic_compare_exchange_strong(word, &idle, BSRGEN_ASLEEP))
        while (atomic_load_explicit(word, memory_order_acquire) == BSRGEN_ASLEEP) /* 128: FUTEX_WAIT_PRIVATE */
            syscall(SYS_futex, word, 128, BSRGEN_ASLEEP, NULL, NULL, 0);          /* musl lacks linux/futex.h */
}

static void bsrgen_post(_Atomic uint32_t *word, uint32_t value)
{
    if (atomic_exchange(word, value) == BSRGEN_ASLEEP)
        syscall(SYS_futex, word, 129 /* FUTEX_WAKE_PRIVATE */, 1, NULL, NULL, 0);
}

static void *bsrgen_work(void *argument)
{
    struct bsrgen_seat *seat = argument;
    int64_t spin_ns = 0;
    prctl(PR_SET_NAME, "bsrgen");
    for (;;) {
        uint32_t seen = BSRGEN_GO;
        atomic_store_explicit(&seat->cpu, sched_getcpu(), memory_order_relaxed);
        bsrgen_wait(&seat->word, spin_ns);
        if (atomic_compare_exchange_strong(&seat->word, &seen, BSRGEN_IDLE)) {
            struct bsrgen_job job = bsrgen_pool.job; /* a copy: once pending is 0 it is the next caller's */
            bsrgen_set_float_mode(job.float_mode);
            job.task(job.context, (int)(seat - bsrgen_pool.seats) + 1, job.parts);
            spin_ns = job.spin_ns;
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

static void bsrgen_hire(int wanted)
{
    static const int faults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGSYS}; /* for crash handlers to see */
    sigset_t blocked, before;
    pthread_attr_t attributes;
    if (!bsrgen_pool.atfork_done && pthread_atfork(NULL, NULL, bsrgen_after_fork) != 0)
        return;
    bsrgen_pool.atfork_done = 1;
    bsrgen_pool.pid = getpid();
    bsrgen_pool.cores = bsrgen_usable_cores();
    sched_getaffinity(0, sizeof bsrgen_pool.cpus, &bsrgen_pool.cpus);
    if (pthread_attr_init(&attributes) != 0)
        return;
    pthread_attr_setstacksize(&attributes, BSRGEN_STACK_BYTES);
    sigfillset(&blocked);
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++)
        sigdelset(&blocked, faults[i]);
    pthread_sigmask(SIG_SETMASK, &blocked, &before); /* inherited: no handler of the application runs on a worker */
    for (; bsrgen_pool.workers < wanted; bsrgen_pool.workers++) {
        struct bsrgen_seat *seat = &bsrgen_pool.seats[bsrgen_pool.workers];
        atomic_store(&seat->word, BSRGEN_IDLE); /* a forked child finds the parent's */
        atomic_store(&seat->cpu, sched_getcpu());
        seat->barred = -1;
        int error = pthread_create(&seat->thread, &attributes, bsrgen_work, seat);
        if (error == EINVAL) /* the static TLS does not fit: the default size */
            error = pthread_create(&seat->thread, NULL, bsrgen_work, seat);
        if (error != 0)
            break; /* tried again at the next call */
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
}

/* Own the pool with up to `wanted` workers: their number.  0, and not owned: in use, or no worker to be had. */
static int bsrgen_enter(int wanted)
{
    int workers, nobody = 0;
    if (!atomic_compare_exchange_strong(&bsrgen_pool.taken, &nobody, 1))
        return 0;
    if (bsrgen_pool.workers < wanted)
        bsrgen_hire(wanted < BSRGEN_MAX_THREADS ? wanted : BSRGEN_MAX_THREADS - 1);
    workers = bsrgen_pool.workers < wanted ? bsrgen_pool.workers : wanted;
    if (workers == 0)
        atomic_store(&bsrgen_pool.taken, 0);
    return workers;
}

static void bsrgen_steer(struct bsrgen_seat *seat, int cpu)
{
    if (cpu < 0 || seat->barred == cpu || atomic_load_explicit(&seat->cpu, memory_order_relaxed) != cpu)
        return;
    cpu_set_t others = bsrgen_pool.cpus;
    CPU_CLR((unsigned)cpu, &others);
    pthread_setaffinity_np(seat->thread, sizeof others, &others);
    seat->barred = cpu;
}

__attribute__((unused)) static void bsrgen_parallel(int parts, bsrgen_task task, void *context)
{
    int finished = 1, workers = parts > 1 ? bsrgen_enter(parts - 1) : 0;
    struct bsrgen_job job = {task, context, parts, bsrgen_float_mode(), 0};
    if (workers > 0) {
        if (parts <= bsrgen_pool.cores) /* else: whom we wait for needs our core */
            job.spin_ns = BSRGEN_SPIN_NS;
        bsrgen_pool.job = job;
        atomic_store(&bsrgen_pool.pending, workers + 1);
        atomic_store(&bsrgen_pool.done, BSRGEN_IDLE);
        int cpu = job.spin_ns ? sched_getcpu() : -1;
        for (int w = 0; w < workers; w++) {
            bsrgen_steer(&bsrgen_pool.seats[w], cpu);
            bsrgen_post(&bsrgen_pool.seats[w].word, BSRGEN_GO);
        }
    }
    if (parts > 0)
        task(context, 0, parts);
    for (int part = workers + 1; part < parts; part++)
        task(context, part, parts);
    for (int w = workers - 1; w >= 0; w--) { /* backwards: the last posted begins last */
        uint32_t go = BSRGEN_GO;
        if (atomic_compare_exchange_strong(&bsrgen_pool.seats[w].word, &go, BSRGEN_IDLE)) {
            task(context, w + 1, parts);
            finished++;
        }
    }
    if (workers > 0) {
        if (atomic_fetch_sub(&bsrgen_pool.pending, finished) != finished)
            bsrgen_wait(&bsrgen_pool.done, job.spin_ns);
        atomic_store(&bsrgen_pool.taken, 0);
    }
}

/* dlclose must not unmap code that a worker runs.  exit() beside a running call unmaps nothing and leaves the workers to
 * the kernel; else the pool stays taken, so that calls from later destructors run serially. */
__attribute__((destructor)) static void bsrgen_dismiss(void)
{
    int nobody = 0;
    if (!atomic_compare_exchange_strong(&bsrgen_pool.taken, &nobody, 1) || bsrgen_pool.pid != getpid())
        return;
    for (int w = 0; w < bsrgen_pool.workers; w++)
        bsrgen_post(&bsrgen_pool.seats[w].word, BSRGEN_QUIT);
    for (int w = 0; w < bsrgen_pool.workers; w++)
        pthread_join(bsrgen_pool.seats[w].thread, NULL);
    bsrgen_pool.workers = 0;
}
#endif

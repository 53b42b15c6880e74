/* threads_test.c: the thread driver and the scratch buffers, without Python.
 *
 *   threads_test MODE [library]     one row of `modes` below; exit status 0 and "ok", or the line that failed
 *   threads_test --bench            cost of a 2-part region
 *
 * With -DLIBRARY the same file is the library that the modes `dlclose` and `fork_dlclose` open.
 * The program is linked with --wrap=pthread_create, so that a mode can make it fail.
 */
#define _GNU_SOURCE
#include "bsrgen_parallel.h"
#include "bsrgen_scratch.h"

#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <float.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                                            \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

/* --- a task that counts: every part once, with the right number of parts, in plain memory (ThreadSanitizer looks on) */

struct count {
    int parts;
    int seen[BSRGEN_MAX_THREADS + 64];
    pthread_t thread[BSRGEN_MAX_THREADS + 64];
};

static void count_part(void *context, int part, int parts)
{
    struct count *count = context;
    CHECK(parts == count->parts && part >= 0 && part < parts);
    double *scratch = bsrgen_scratch_take(8000);
    CHECK(scratch != NULL && (uintptr_t)scratch % 64 == 0);
    for (int i = 0; i < 1000; i++)
        scratch[i] = part;
    count->thread[part] = pthread_self();
    count->seen[part] += scratch[part % 1000] == part;
    bsrgen_scratch_give(scratch);
}

static void count_region(int parts)
{
    static _Thread_local struct count count;
    memset(count.seen, 0, sizeof count.seen);
    count.parts = parts;
    bsrgen_parallel(parts, count_part, &count);
    for (int part = 0; part < parts; part++)
        CHECK(count.seen[part] == 1);
    CHECK(parts < 1 || pthread_equal(count.thread[0], pthread_self()));
}

#ifdef LIBRARY
__attribute__((visibility("default"))) void *call(int parts);
void *call(int parts) /* where the library's scratch lies */
{
    count_region(parts);
    void *scratch = bsrgen_scratch_take(1);
    bsrgen_scratch_give(scratch);
    return scratch;
}
#else

static atomic_int creates_left = 1 << 30;

int __real_pthread_create(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
int __wrap_pthread_create(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *), void *argument)
{
    if (creates_left == 0)
        return EAGAIN;
    creates_left--;
    return __real_pthread_create(thread, attributes, start, argument);
}

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void pause_us(long us)
{
    nanosleep(&(struct timespec){us / 1000000, us % 1000000 * 1000}, NULL);
}

static int count_tasks(void)
{
    int tasks = 0;
    DIR *folder = opendir("/proc/self/task");
    CHECK(folder != NULL);
    for (struct dirent *entry; (entry = readdir(folder)) != NULL;)
        tasks += entry->d_name[0] != '.';
    closedir(folder);
    return tasks;
}

/* A joined thread leaves /proc a little later. */
static void expect_tasks(int tasks)
{
    for (int i = 0; i < 2000 && count_tasks() != tasks; i++)
        pause_us(1000);
    CHECK(count_tasks() == tasks);
}

/* All children end with status 0 within 5 s (promise R9). */
static void expect_children(const pid_t *children, int number)
{
    int64_t deadline = now_ns() + INT64_C(5000000000);
    for (int i = 0; i < number; i++) {
        int status = -1;
        CHECK(children[i] > 0);
        while (waitpid(children[i], &status, WNOHANG) == 0) {
            if (now_ns() > deadline)
                kill(children[i], SIGKILL);
            pause_us(200);
        }
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    }
}

/* All parts of a region at one time: each waits until all have begun, so none is taken back. */
struct meeting {
    atomic_int begun;
    void (*look)(int part);
};

static void meet_part(void *context, int part, int parts)
{
    struct meeting *meeting = context;
    atomic_fetch_add(&meeting->begun, 1);
    while (atomic_load_explicit(&meeting->begun, memory_order_acquire) < parts)
        bsrgen_pause();
    if (meeting->look != NULL)
        meeting->look(part);
}

/* --- modes */

static void mode_counts(const char *library)
{
    (void)library;
    count_region(-1);
    count_region(0);
    for (int round = 0; round < 300; round++)
        count_region(1 + round % 17);
    for (int round = 0; round < 2000; round++)
        count_region(2);
    for (int round = 0; round < 20; round++) {
        count_region(2);
        pause_us(500); /* asleep */
    }
    count_region(BSRGEN_MAX_THREADS);
    CHECK(bsrgen_pool.workers == BSRGEN_MAX_THREADS - 1);
    count_region(BSRGEN_MAX_THREADS + 20);
}

static void nested_part(void *context, int part, int parts)
{
    (void)part;
    (void)parts;
    count_region(5);
    atomic_fetch_add((atomic_int *)context, 1);
}

static void mode_nested(const char *library)
{
    (void)library;
    for (int round = 0; round < 200; round++) {
        atomic_int parts = 0;
        bsrgen_parallel(4, nested_part, &parts);
        CHECK(parts == 4);
    }
}

static void *concurrent_caller(void *rounds)
{
    for (int round = 0; round < *(int *)rounds; round++)
        count_region(1 + round % 5);
    return NULL;
}

static void mode_concurrent(const char *library)
{
    (void)library;
    pthread_t callers[16];
    int rounds = 500;
    for (int i = 0; i < 16; i++)
        CHECK(pthread_create(&callers[i], NULL, concurrent_caller, &rounds) == 0);
    for (int i = 0; i < 16; i++)
        CHECK(pthread_join(callers[i], NULL) == 0);
}

/* Parent calls, forks 4 children, they call, one of them forks again; then the parent calls and does so once more. */
static void mode_fork(const char *library)
{
    (void)library;
    for (int round = 0; round < 5; round++) {
        pid_t children[4];
        count_region(4);
        for (int i = 0; i < 4; i++)
            if ((children[i] = fork()) == 0) {
                if (i == 1) /* as a fork amid a region may find it */
                    for (int w = 0; w < 8; w++)
                        bsrgen_pool.seats[w].word = BSRGEN_GO;
                for (int call = 0; call < 50; call++)
                    count_region(3 + i);
                CHECK(count_tasks() == 3 + i); /* workers of its own */
                if (i == 0) {
                    pid_t grandchild = fork();
                    count_region(4);
                    if (grandchild == 0)
                        exit(0);
                    expect_children(&grandchild, 1);
                }
                exit(0);
            }
        expect_children(children, 4);
        count_region(6);
    }
}

static atomic_int stop;

static void *busy_caller(void *unused)
{
    (void)unused;
    while (!stop)
        count_region(3);
    return NULL;
}

/* fork() while another thread is somewhere inside a region (or hires workers: the first rounds). */
static void mode_fork_busy(const char *library)
{
    (void)library;
    pthread_t caller;
    CHECK(pthread_create(&caller, NULL, busy_caller, NULL) == 0);
    for (int round = 0; round < 40; round++) {
        pid_t child = fork();
        if (child == 0) {
            for (int call = 0; call < 20; call++)
                count_region(4);
            CHECK(bsrgen_pool.workers == 3);
            exit(0);
        }
        expect_children(&child, 1);
    }
    stop = 1;
    CHECK(pthread_join(caller, NULL) == 0);
}

static pid_t forked_in_handler;

static void fork_handler(int number)
{
    (void)number;
    forked_in_handler = fork();
}

static void raise_part(void *context, int part, int parts)
{
    (void)context;
    (void)parts;
    if (part == 0)
        raise(SIGUSR1);
    else
        pause_us(2000);
}

/* A signal handler that forks within a region: the child returns from the region (its result is void) and is usable. */
static void mode_fork_handler(const char *library)
{
    (void)library;
    signal(SIGUSR1, fork_handler);
    for (int round = 0; round < 10; round++) {
        bsrgen_parallel(3, raise_part, NULL);
        count_region(4);
        if (forked_in_handler == 0)
            exit(0);
        expect_children(&forked_in_handler, 1);
    }
}

static void *(*open_library(const char *path, void **library))(int)
{
    *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    CHECK(*library != NULL);
    void *(*call)(int) = (void *(*)(int))(uintptr_t)dlsym(*library, "call");
    CHECK(call != NULL);
    return call;
}

/* No thread and no buffer is left behind. */
static void mode_dlclose(const char *path)
{
    void *library;
    int tasks = count_tasks();
    for (int round = 0; round < 200; round++) {
        void *(*call)(int) = open_library(path, &library);
        void *scratch = call(3);
        CHECK(msync(scratch, 4096, MS_ASYNC) == 0);
        if (round % 2)
            pause_us(200); /* closed while workers spin, and while they sleep */
        CHECK(dlclose(library) == 0);
#ifdef __GLIBC__ /* musl closes nothing, ever */
        CHECK(msync(scratch, 4096, MS_ASYNC) == -1 && errno == ENOMEM);
        CHECK(dlopen(path, RTLD_NOW | RTLD_NOLOAD) == NULL);
        expect_tasks(tasks);
#endif
    }
}

/* The child closes what the parent opened, and forgets the threads that it does not have. */
static void mode_fork_dlclose(const char *path)
{
    void *library;
    for (int round = 0; round < 20; round++) {
        void *(*call)(int) = open_library(path, &library);
        call(3);
        pid_t child = fork();
        if (child == 0) {
            if (round % 2)
                call(3);
            CHECK(dlclose(library) == 0);
            exit(0);
        }
        CHECK(dlclose(library) == 0);
        expect_children(&child, 1);
        child = fork(); /* the handler is gone with the library */
        if (child == 0)
            exit(0);
        expect_children(&child, 1);
    }
}

/* exit() while workers spin, while they sleep, and beside a thread that is inside a region. */
static void mode_exit(const char *library)
{
    (void)library;
    for (int round = 0; round < 60; round++) {
        pid_t child = fork();
        if (child == 0) {
            pthread_t caller;
            count_region(3);
            if (round % 3 == 1)
                pause_us(300);
            if (round % 3 == 2) {
                CHECK(pthread_create(&caller, NULL, busy_caller, NULL) == 0);
                pause_us(100 + round * 10);
            }
            exit(0);
        }
        expect_children(&child, 1);
    }
}

static void mode_create_fails(const char *library)
{
    (void)library;
    creates_left = 0;
    for (int round = 0; round < 10; round++)
        count_region(8);
    CHECK(bsrgen_pool.workers == 0);
    creates_left = 3; /* fewer than asked */
    for (int round = 0; round < 10; round++)
        count_region(8);
    CHECK(bsrgen_pool.workers == 3);
    creates_left = 1 << 30; /* better times */
    count_region(8);
    CHECK(bsrgen_pool.workers == 7);
}

static sigset_t masks[8];
static char names[8][16];

static void look_at_thread(int part)
{
    pthread_sigmask(SIG_SETMASK, NULL, &masks[part]);
    pthread_getname_np(pthread_self(), names[part], sizeof names[part]);
}

static void mode_signals(const char *library)
{
    (void)library;
    struct meeting meeting = {0, look_at_thread};
    bsrgen_parallel(4, meet_part, &meeting);
    CHECK(!sigismember(&masks[0], SIGINT) && !sigismember(&masks[0], SIGUSR1));
    for (int part = 1; part < 4; part++) {
        CHECK(strcmp(names[part], "bsrgen") == 0);
        CHECK(sigismember(&masks[part], SIGINT) && sigismember(&masks[part], SIGCHLD) && sigismember(&masks[part], SIGPROF));
        CHECK(!sigismember(&masks[part], SIGSEGV));
    }
}

static int flushed[8];

static void look_at_denormal(int part)
{
    volatile float smallest = FLT_MIN, half = 0.5f;
    volatile float product = smallest * half;
    flushed[part] = product == 0.0f;
}

static void mode_float_mode(const char *library)
{
    (void)library;
#if defined __SSE__ || defined __aarch64__
#ifdef __SSE__
    unsigned flush = 0x8040; /* FZ, DAZ */
#else
    unsigned flush = 1u << 24; /* FZ */
#endif
    unsigned before;
    bsrgen_get_float_mode(before);
    for (int round = 0; round < 4; round++) {
        struct meeting meeting = {0, look_at_denormal};
        bsrgen_set_float_mode(round % 2 ? before | flush : before);
        bsrgen_parallel(4, meet_part, &meeting);
        for (int part = 0; part < 4; part++)
            CHECK(flushed[part] == round % 2);
    }
    bsrgen_set_float_mode(before);
#endif
}

static void mode_scratch(const char *library)
{
    (void)library;
    char *a = bsrgen_scratch_take(100), *b = bsrgen_scratch_take(100);
    CHECK(a != NULL && b != NULL && a != b && (uintptr_t)a % 4096 == 0 && (uintptr_t)b % 4096 == 0);
    memset(a, 1, 100);
    memset(b, 2, 100);
    CHECK(a[99] == 1 && b[0] == 2);
    bsrgen_scratch_give(a);
    CHECK(bsrgen_scratch_take(100) == a); /* the one last used */
    bsrgen_scratch_give(a);
    bsrgen_scratch_give(b);
    bsrgen_scratch_give(NULL);

    char *grown = bsrgen_scratch_take(200000); /* larger than what is kept */
    memset(grown, 3, 200000);
    bsrgen_scratch_give(grown);
    char *huge = bsrgen_scratch_take((size_t)5 << 20);
    CHECK((uintptr_t)huge % BSRGEN_HUGE_PAGE == 0);
    memset(huge, 4, (size_t)5 << 20);
    bsrgen_scratch_give(huge);
    CHECK(bsrgen_scratch_take((size_t)5 << 20) == huge);
    bsrgen_scratch_give(huge);

    CHECK(bsrgen_scratch_take(SIZE_MAX) == NULL);
    CHECK(bsrgen_scratch_take(SIZE_MAX / 2) == NULL);
    CHECK(bsrgen_scratch_take(SIZE_MAX / 2 - (9u << 20)) == NULL);

    char *zero = bsrgen_scratch_take(0);
    CHECK(zero != NULL);
    bsrgen_scratch_give(zero);

    void *many[BSRGEN_SCRATCH_SLOTS + 40]; /* more than there are slots */
    for (int round = 0; round < 2; round++) {
        for (size_t i = 0; i < sizeof many / sizeof *many; i++) {
            CHECK((many[i] = bsrgen_scratch_take(64)) != NULL);
            *(size_t *)many[i] = i;
        }
        for (size_t i = 0; i < sizeof many / sizeof *many; i++) {
            CHECK(*(size_t *)many[i] == i);
            bsrgen_scratch_give(many[i]);
        }
    }
}

static long page_faults(void)
{
    struct rusage usage;
    CHECK(getrusage(RUSAGE_SELF, &usage) == 0);
    return usage.ru_minflt;
}

/* 2000 warm calls fault at most for a stack and a buffer that only now see use: nothing is mapped anew. */
static void mode_scratch_warm(const char *library)
{
    (void)library;
    for (int round = 0; round < 200; round++)
        count_region(2);
    long before = page_faults();
    for (int round = 0; round < 2000; round++)
        count_region(2);
    CHECK(page_faults() - before < 20);
}

/* --- cost of a 2-part region */

static void empty_part(void *context, int part, int parts)
{
    (void)context;
    (void)part;
    (void)parts;
}

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void bench(const char *name, bsrgen_task task, long idle_us, int rounds)
{
    static double us[20000];
    for (int round = 0; round < rounds; round++) {
        struct meeting meeting = {0, NULL};
        if (idle_us)
            pause_us(idle_us);
        int64_t start = now_ns();
        bsrgen_parallel(2, task, &meeting);
        us[round] = (double)(now_ns() - start) * 1e-3;
    }
    qsort(us, (size_t)rounds, sizeof *us, by_size);
    printf("%-44s min %6.2f  median %6.2f  p99 %6.2f us\n", name, us[0], us[rounds / 2], us[rounds * 99 / 100]);
}

static void mode_bench(const char *library)
{
    (void)library;
    bench("warm, empty (the caller may take part 1 back)", empty_part, 0, 20000);
    bench("warm, both threads take part", meet_part, 0, 20000);
    bench("after 1 ms idle, empty", empty_part, 1000, 1000);
    bench("after 1 ms idle, both threads take part", meet_part, 1000, 1000);
}

static const struct {
    const char *name;
    void (*run)(const char *library);
} modes[] = {
    {"counts", mode_counts},
    {"nested", mode_nested},
    {"concurrent", mode_concurrent},
    {"fork", mode_fork},
    {"fork_busy", mode_fork_busy},
    {"fork_handler", mode_fork_handler},
    {"fork_dlclose", mode_fork_dlclose},
    {"dlclose", mode_dlclose},
    {"exit", mode_exit},
    {"create_fails", mode_create_fails},
    {"signals", mode_signals},
    {"float_mode", mode_float_mode},
    {"scratch", mode_scratch},
    {"scratch_warm", mode_scratch_warm},
    {"--bench", mode_bench},
};

int main(int argc, char **argv)
{
    setvbuf(stdout, NULL, _IONBF, 0); /* a child that exits must not print the parent's lines */
    for (size_t i = 0; argc > 1 && i < sizeof modes / sizeof *modes; i++)
        if (strcmp(argv[1], modes[i].name) == 0) {
            modes[i].run(argc > 2 ? argv[2] : NULL);
            puts("ok");
            return 0;
        }
    fprintf(stderr, "usage: threads_test MODE [library]; modes:");
    for (size_t i = 0; i < sizeof modes / sizeof *modes; i++)
        fprintf(stderr, " %s", modes[i].name);
    fputc('\n', stderr);
    return 2;
}
#endif

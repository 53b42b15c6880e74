/* The CUDA runtime for kernels that run on the CPU: a generated .cu is compiled as it stands, by a C++ compiler.
 *
 * The threads of a thread block are fibers, in random order, that change at barriers and shuffles only.  Found are: wrong
 * results, of course; shared memory read before it is written (it is NaN) or written outside of an array (guard zones);
 * global memory read or written past the end of its allocation (a page without access) or read before its start (NaN);
 * vectors that are not aligned; copies to shared memory that nobody waited for (NaN until then); barriers and shuffles that not all threads reach;
 * what thread blocks leave for each other (__stcg) and nobody sees before a fence of who wrote it, counted before it can be
 * seen, or read (__ldcg) before a fence behind the count.  With EMULATED_TOGETHER=n in the environment n thread blocks run at a time.
 * Not modelled: time, caches, the memory model but for that, and whatever ptxas may do. */
#pragma once
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include "stream.h"

#define BSRGEN_EMULATION 1
#define __global__ static
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define SHARED(type, name, count) type *name = (type *)emulation::shared(__LINE__, sizeof(type) * (count))

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

static dim3 gridDim;

typedef int cudaError_t;
typedef void *cudaStream_t;
enum { cudaSuccess = 0, cudaErrorMemoryAllocation = 2, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };

namespace emulation {

enum { GUARD = 4096, STACK = 1 << 15, WARP = 32, MOST = 8 * 384, ARRAYS = 64, CLUSTER = 8 };
struct Copy { void *to; const void *from; int bytes, group; };
struct Late { void *to; int bytes; uint64_t value; }; /* stores that no other thread sees yet */
struct Fiber { ucontext_t context; bool done; int shuffles, copies, groups, lates, room; Late *late; long seen, stored; Copy copy[256]; };
struct Exchange { uint64_t value[WARP]; int arrived[WARP]; };
struct Array { int line, block; size_t bytes; uint8_t *memory, *start; }; /* shared memory, by the line of its declaration */

static char said[256];
static Fiber fibers[MOST];
static Exchange exchanges[MOST / WARP];
static Array arrays[ARRAYS];
static void (*kernel)(void *), *argument;
static ucontext_t scheduler;
static sigjmp_buf escape;
static unsigned threads, current, cluster = 1; /* of a thread block; the one that runs; thread blocks that run together */
static unsigned waiting[CLUSTER]; /* at the barrier */
static long progress, barriers[CLUSTER], met[CLUSTER], counted[CLUSTER], counted_at[CLUSTER]; /* of a thread block: times that all met who store, that it counted, and behind which meeting */
static dim3 thread_index, block_index;
[[maybe_unused]] static bool early, waited[MOST]; /* the launch may overlap the one ahead; a thread knows that that one is over */
static size_t dynamic_bytes; /* of shared memory, that the launch gives */
static void (*at_end)(); /* of a thread block: what else is to be checked */
static void (*landed)(void *); /* who is told of copies that land */

[[noreturn]] static void fail(const char *what)
{
    if (!*said) snprintf(said, sizeof said, "%s (thread block %u, thread %u)", what, block_index.x, current);
    siglongjmp(escape, 1);
}

/* 0 ... count - 1 in random order: Fisher, Yates; xorshift, Marsaglia, J. Stat. Softw. 8(14), 2003. */
static unsigned *shuffled(unsigned count)
{
    static uint64_t state = 88172645463325252u;
    unsigned *order = (unsigned *)malloc(sizeof *order * (count + 1));
    for (unsigned i = 0; i < count; i++) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        const unsigned j = (unsigned)(state % (i + 1));
        order[i] = order[j], order[j] = i;
    }
    return order;
}

/* Which thread block of its cluster a fiber belongs to. */
static unsigned block_rank() { return current / threads; }

static void enter(unsigned fiber) { current = fiber, thread_index.x = fiber % threads, block_index.x = block_index.x / cluster * cluster + fiber / threads; }

static void yield()
{
    const unsigned me = current;
    swapcontext(&fibers[me].context, &scheduler);
    enter(me);
}

static void *shared(int line, size_t bytes)
{
    Array *a = arrays;
    while (a->memory && (a->line != line || a->block != (int)block_rank())) a++;
    if (!a->memory) {
        a->line = line, a->block = (int)block_rank(), a->bytes = bytes, a->memory = (uint8_t *)malloc(bytes + 2 * GUARD + 16);
        memset(a->memory, 0xff, bytes + 2 * GUARD + 16); /* NaN, -1 */
        a->start = (uint8_t *)(((uintptr_t)a->memory + 15) / 16 * 16) + GUARD;
    }
    return a->start;
}

static void free_arrays()
{
    const Array *broken = NULL;
    for (Array *a = arrays; a->memory; a++) {
        for (int i = 1; i <= GUARD; i++)
            if (a->start[-i] != 0xff || a->start[a->bytes + i - 1] != 0xff) broken = a;
        free(a->memory), a->memory = NULL;
    }
    if (broken) fail("shared memory written outside of its array");
}

static void barrier()
{
    const unsigned block = block_rank();
    const long mine = barriers[block];
    progress++;
    if (++waiting[block] == threads) waiting[block] = 0, barriers[block]++, met[block]++;
    while (barriers[block] == mine) yield();
}

static bool arrived(const Exchange &x, int count)
{
    for (int lane = 0; lane < WARP; lane++)
        if (x.arrived[lane] < count) return false;
    return true;
}

/* The values that the lanes of a warp give; all of them must come, and none leaves before all have looked. */
static const uint64_t *gathered(uint64_t value)
{
    Exchange &x = exchanges[current / WARP];
    const int mine = 2 * ++fibers[current].shuffles;
    x.value[current % WARP] = value, x.arrived[current % WARP] = mine - 1, progress++;
    while (!arrived(x, mine - 1)) yield();
    return x.value;
}

static void looked()
{
    Exchange &x = exchanges[current / WARP];
    const int mine = 2 * fibers[current].shuffles;
    x.arrived[current % WARP] = mine, progress++;
    while (!arrived(x, mine)) yield();
}

static uint64_t exchanged(uint64_t value, unsigned lane)
{
    const uint64_t other = gathered(value)[lane < WARP ? lane : current % WARP];
    looked();
    return other;
}

/* Copies on their way: they read and land when somebody waits for their group, and not before. */
static void land(int left)
{
    Fiber &f = fibers[current];
    int kept = 0;
    for (int i = 0; i < f.copies; i++) {
        if (f.copy[i].group >= f.groups - left) {
            f.copy[kept++] = f.copy[i];
            continue;
        }
        memset(f.copy[i].to, 0, 16);
        memcpy(f.copy[i].to, f.copy[i].from, f.copy[i].bytes);
        if (landed) landed(f.copy[i].to);
    }
    f.copies = kept;
}

/* Four 8x8 matrices: lane l has elements 2 (l % 4) and one more of row l / 4, or of column l / 4. */
static void matrices(uint32_t *a, const void *address, bool transposed)
{
    if ((uintptr_t)address % 16) fail("a row of a matrix that is not aligned");
    const int lane = current % WARP, row = lane / 4, column = lane % 4 * 2;
    const uint64_t *rows = gathered((uint64_t)(uintptr_t)address);
    for (int m = 0; m < 4; m++) {
        uint32_t pair = 0;
        for (int e = 0; e < 2; e++) {
            const uint16_t *at = (const uint16_t *)(uintptr_t)rows[8 * m + (transposed ? column + e : row)];
            pair |= (uint32_t)at[transposed ? row : column + e] << 16 * e;
        }
        a[m] = pair;
    }
    looked();
}

/* d += a b in fragments: a 16 x 8 WORDS words of PER elements, b 8 WORDS x 8; WORDS 2, or 1 for half a tile. */
struct Fragments { uint32_t a[4], b[2]; };
template <int WORDS, int PER, class T> static void multiply(T *d, const Fragments &mine, T (*widen)(uint32_t))
{
    const uint64_t *all = gathered((uint64_t)(uintptr_t)&mine);
    const int lane = current % WARP;
    for (int e = 0; e < 4; e++)
        for (int k = 0; k < 4 * WORDS * PER; k++) {
            const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2, word = k / PER, shift = 32 / PER * (k % PER);
            const Fragments *left = (const Fragments *)(uintptr_t)all[row % 8 * 4 + word % 4];
            const Fragments *right = (const Fragments *)(uintptr_t)all[column * 4 + word % 4];
            d[e] += widen(left->a[row / 8 + word / 4 * 2] >> shift) * widen(right->b[word / 4] >> shift);
        }
    looked();
}

/* What thread blocks leave for each other. */
static void store_late(void *to, const void *value, int bytes)
{
    Fiber &f = fibers[current];
    f.stored = met[block_rank()];
    if (counted_at[block_rank()] == f.stored) fail("counted before all threads have stored: no barrier between");
    if (f.lates == f.room) f.late = (Late *)realloc(f.late, sizeof *f.late * (f.room = 2 * f.room + 16));
    f.late[f.lates] = {to, bytes, 0};
    memcpy(&f.late[f.lates++].value, value, bytes);
}

static void fence()
{
    Fiber &f = fibers[current];
    for (int i = 0; i < f.lates; i++) memcpy(f.late[i].to, &f.late[i].value, f.late[i].bytes);
    f.lates = 0, f.seen = counted[block_rank()];
}

static void load_fresh(void *to, const void *from, int bytes)
{
    memcpy(to, from, bytes);
    if (fibers[current].seen < counted[block_rank()]) memset(to, 0xff, bytes); /* what was there at some time before */
}

static unsigned count_up(unsigned *at, unsigned value)
{
    const unsigned old = *at;
    for (unsigned t = block_rank() * threads; t < (block_rank() + 1) * threads; t++)
        if (fibers[t].lates || fibers[t].stored == met[block_rank()]) fail("counted before what was stored can be seen, or without a barrier between");
    counted_at[block_rank()] = met[block_rank()], counted[block_rank()]++, *at = old + value;
    return old;
}

static void fiber_main()
{
    kernel(argument);
    if (fibers[current].copies) fail("a copy that nobody waited for");
    if (fibers[current].lates) fail("a store for other thread blocks that no fence follows");
    fibers[current].done = true, progress++;
    swapcontext(&fibers[current].context, &scheduler);
}

static void run_block(uint8_t *stacks)
{
    memset(exchanges, 0, sizeof exchanges);
    memset(waiting, 0, sizeof waiting);
    memset(counted, 0, sizeof counted);
    for (unsigned i = 0; i < CLUSTER; i++) counted_at[i] = -1;
    for (unsigned t = 0; t < threads * cluster; t++) {
        Fiber &f = fibers[t];
        f.done = false, f.shuffles = f.copies = f.groups = f.lates = 0, f.seen = 0, f.stored = -1;
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = stacks + (size_t)t * STACK, f.context.uc_stack.ss_size = STACK;
        f.context.uc_link = &scheduler;
        makecontext(&f.context, fiber_main, 0);
    }
    static unsigned turn; /* whose thread block of a cluster is slow, if any is, or which of three warpgroups */
    const unsigned warpgroups = cluster == 1 && threads == 3 * 128 ? 3 : 0, together = warpgroups ? 128 : threads;
    const unsigned slow = ++turn % ((warpgroups ? warpgroups : cluster) + 1);
    unsigned pass = 0;
    long seen = 0;
    for (bool left = true; left; pass++) {
        const long before = progress;
        const bool all = (cluster == 1 && !warpgroups) || pass % 16 == 15 || progress == seen; /* the others wait */
        seen = before;
        unsigned *order = shuffled(threads * cluster);
        left = false;
        for (unsigned i = 0; i < threads * cluster; i++) {
            if (fibers[order[i]].done) continue;
            left = true;
            if (!all && order[i] / together == slow) continue;
            enter(order[i]);
            swapcontext(&scheduler, &fibers[current].context);
        }
        free(order);
        if (all && left && progress == before) fail("deadlock: a barrier or a shuffle that not all threads reach");
    }
    if (at_end) at_end();
    free_arrays();
}

static void on_fault(int) { fail("an address outside of every array"); }

static cudaError_t launch(dim3 grid, dim3 block, size_t bytes)
{
    if (block.x % WARP || block.x * cluster > MOST || !grid.x || grid.x % cluster) return cudaErrorInvalidConfiguration;
    struct sigaction mine = {}, before;
    mine.sa_handler = on_fault, mine.sa_flags = SA_NODEFER;
    sigaction(SIGSEGV, &mine, &before);
    const unsigned together = getenv("EMULATED_TOGETHER") && cluster == 1 ? (unsigned)atoi(getenv("EMULATED_TOGETHER")) : cluster, before_that = cluster;
    for (cluster = together; grid.x % cluster || block.x * cluster > MOST; cluster--) {}
    *said = 0, threads = block.x, gridDim = grid, dynamic_bytes = bytes, at_end = NULL, landed = NULL;
    uint8_t *stacks = (uint8_t *)malloc((size_t)threads * cluster * STACK);
    unsigned *const order = shuffled(grid.x / cluster);
    const bool failed = sigsetjmp(escape, 1);
    for (unsigned i = 0; !failed && i < grid.x / cluster; i++) block_index.x = order[i] * cluster, run_block(stacks);
    for (Array *a = arrays; a->memory; a++) free(a->memory), a->memory = NULL;
    free(order), free(stacks), cluster = before_that;
    sigaction(SIGSEGV, &before, NULL);
    return failed ? cudaErrorLaunchFailure : cudaSuccess;
}

/* A vector of a load: its address must be a multiple of its size. */
template <int BYTES> struct alignas(BYTES) Vector {
    uint32_t word[BYTES / 4] = {};
    Vector() = default;
    Vector(const Vector &other) { *this = other; }
    Vector &operator=(const Vector &other)
    {
        if ((uintptr_t)&other % BYTES) fail("a vector that is not aligned");
        memcpy((void *)word, (const void *)other.word, BYTES);
        return *this;
    }
};

} // namespace emulation

typedef emulation::Vector<8> uint2;
typedef emulation::Vector<16> uint4;
#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index

static inline int __dp4a(int a, int b, int sum)
{
    for (int i = 0; i < 4; i++) sum += (int8_t)(a >> 8 * i) * (int8_t)(b >> 8 * i);
    return sum;
}
template <class T> static T atomicMin(T *at, T value) { const T old = *at; return *at = old < value ? old : value, old; }
static inline unsigned atomicOr(unsigned *at, unsigned bits) { const unsigned old = *at; return *at = old | bits, old; }
static inline unsigned atomicMax(unsigned *at, unsigned value) { const unsigned old = *at; return *at = old > value ? old : value, old; }
static inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
static inline int __ffs(unsigned bits) { return __builtin_ffs((int)bits); }
static inline int atomicAdd(int *at, int value) { const int old = *at; return *at = old + value, old; }
static inline unsigned atomicAdd(unsigned *at, unsigned value) { return emulation::count_up(at, value); }
static inline void __syncthreads() { emulation::barrier(); }
static inline int __syncthreads_count(int one)
{
    static int counts[emulation::CLUSTER];
    int &count = counts[emulation::block_rank()];
    count += one != 0;
    emulation::barrier();
    const int all = count;
    emulation::barrier();
    count = 0;
    emulation::barrier();
    return all;
}
template <class T> static void __stcg(T *to, T value) { emulation::store_late(to, &value, sizeof value); }
template <class T> static T __ldcg(const T *from) { T value; emulation::load_fresh(&value, from, sizeof value); return value; }
static inline void __threadfence() { emulation::fence(); }

template <class T> static T shuffled_from(unsigned mask, T value, unsigned lane)
{
    if (mask != 0xffffffffu) emulation::fail("a shuffle of some lanes: not emulated");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = emulation::exchanged(bits, lane);
    memcpy(&value, &bits, sizeof value);
    return value;
}
template <class T> static T __shfl_xor_sync(unsigned mask, T value, int distance)
{
    return shuffled_from(mask, value, threadIdx.x % 32 ^ distance);
}
template <class T> static T __shfl_up_sync(unsigned mask, T value, unsigned distance)
{
    return shuffled_from(mask, value, threadIdx.x % 32 - distance);
}
template <class T> static T __shfl_sync(unsigned mask, T value, unsigned lane) { return shuffled_from(mask, value, lane); }
template <class T> static T __shfl_down_sync(unsigned mask, T value, unsigned distance)
{
    return shuffled_from(mask, value, threadIdx.x % 32 + distance);
}

static unsigned __ballot_sync(unsigned mask, int one)
{
    if (mask != 0xffffffffu) emulation::fail("a ballot of some lanes: not emulated");
    const uint64_t *all = emulation::gathered(one != 0);
    unsigned bits = 0;
    for (int lane = 0; lane < emulation::WARP; lane++) bits |= (unsigned)all[lane] << lane;
    emulation::looked();
    return bits;
}

static inline float widen_bf16(uint32_t v) { const uint32_t bits = v << 16; float f; memcpy(&f, &bits, 4); return f; }
static inline float widen_f16(uint32_t v) { const uint16_t bits = (uint16_t)v; _Float16 h; memcpy(&h, &bits, 2); return (float)h; }
static inline int widen_s8(uint32_t v) { return (int8_t)v; }
static inline float widen_e4m3(uint32_t v)
{
    const int exponent = v >> 3 & 15, fraction = v & 7;
    const float size = exponent ? ldexpf(8 + fraction, exponent - 10) : ldexpf(fraction, -9);
    return (v & 127) == 127 ? NAN : v & 128 ? -size : size;
}
static inline void load_matrices(uint32_t (&a)[4], const void *at) { emulation::matrices(a, at, false); }
static inline void load_matrices_transposed(uint32_t (&a)[4], const void *at) { emulation::matrices(a, at, true); }
#ifdef BSRGEN_TURING
static inline void multiply_half(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b)
{
    const emulation::Fragments mine = {{a0, a1, 0, 0}, {b, 0}};
    emulation::multiply<1, 2>(d, mine, widen_f16);
}
#else
static inline emulation::Fragments fragments(const uint32_t (&a)[4], const uint32_t *b) { return {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}; }
static inline void multiply_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t *b) { const auto f = fragments(a, b); emulation::multiply<2, 2>(d, f, widen_f16); }
static inline void multiply_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t *b) { const auto f = fragments(a, b); emulation::multiply<2, 2>(d, f, widen_bf16); }
static inline void multiply_s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t *b) { const auto f = fragments(a, b); emulation::multiply<2, 4>(d, f, widen_s8); }
static inline void multiply_e4m3(float (&d)[4], const uint32_t (&a)[4], const uint32_t *b) { const auto f = fragments(a, b); emulation::multiply<2, 4>(d, f, widen_e4m3); }
static inline void copies_commit() { emulation::fibers[emulation::current].groups++; }
template <int LEFT> static inline void copies_wait() { emulation::land(LEFT); }
static inline void copy_later(void *to, const void *from, int bytes)
{
    emulation::Fiber &f = emulation::fibers[emulation::current];
    if ((uintptr_t)to % 16 || (uintptr_t)from % 16 || bytes < 0 || bytes > 16) emulation::fail("a copy that is not aligned");
    if (emulation::early && !emulation::waited[emulation::current]) emulation::fail("a copy of X before the kernel ahead is over");
    if (f.copies == 256) emulation::fail("more copies on their way than the emulation has room for");
    memset(to, 0xff, 16);
    f.copy[f.copies++] = {to, from, bytes, f.groups};
}
#endif

static inline float __uint_as_float(uint32_t bits) { float v; memcpy(&v, &bits, 4); return v; }
static inline uint32_t __float_as_uint(float v) { uint32_t bits; memcpy(&bits, &v, 4); return bits; }
static inline float normcdff(float v) { return (float)(0.5 * erfc(-(double)v * M_SQRT1_2)); }
static inline double normcdf(double v) { return 0.5 * erfc(-v * M_SQRT1_2); }

template <class A> struct Launch { void (*kernel)(A); A *a; }; /* the kernel first: cuda.h looks for it */
template <class A> static void launched(void *l) { ((Launch<A> *)l)->kernel(*((Launch<A> *)l)->a); }
template <class A> static cudaError_t cudaLaunchKernel(
    void (*kernel)(A), dim3 grid, dim3 block, void **parameters, size_t bytes, cudaStream_t stream);
template <class A> struct Captured { void (*kernel)(A); dim3 grid, block; A a; size_t bytes; unsigned cluster; bool early; };
template <class A> static void captured(void *c)
{
    Captured<A> &l = *(Captured<A> *)c;
    void *parameters[] = {&l.a};
    emulation::cluster = l.cluster, emulation::early = l.early;
    cudaLaunchKernel(l.kernel, l.grid, l.block, parameters, l.bytes, NULL);
    emulation::cluster = 1, emulation::early = false;
}
template <class A> static cudaError_t cudaLaunchKernel(
    void (*kernel)(A), dim3 grid, dim3 block, void **parameters, size_t bytes, cudaStream_t stream)
{
    emulated_stream *const s = (emulated_stream *)stream;
    if (getenv(EMULATED_CAPTURE) && !s) return 900; /* cudaErrorStreamCaptureUnsupported */
    if (s && s->capturing) { /* run when the graph is launched */
        if (s->count == EMULATED_NODES) return cudaErrorMemoryAllocation;
        s->node[s->count++] = {captured<A>, new Captured<A>{kernel, grid, block, *(A *)parameters[0], bytes, emulation::cluster, emulation::early}};
        return cudaSuccess;
    }
    Launch<A> l = {kernel, (A *)parameters[0]};
    emulation::kernel = launched<A>, emulation::argument = &l;
    return emulation::launch(grid, block, bytes);
}

enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
static inline cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus *status, unsigned long long *id)
{
    *id = stream ? (unsigned long long)((emulated_stream *)stream)->capturing : 0;
    return *status = *id ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone, cudaSuccess;
}
struct cudaFuncAttributes { size_t sharedSizeBytes; };
template <class F> static cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *, F *) { return cudaSuccess; }
static inline cudaError_t cudaGetDevice(int *device) { *device = 0; return cudaSuccess; }
static inline cudaError_t cudaSetDevice(int device) { return device ? 101 : cudaSuccess; }
static inline cudaError_t cudaGetLastError() { return cudaSuccess; }
static inline const char *cudaGetErrorString(cudaError_t) { return "emulated"; }

/* At the end of its pages, a page without access behind it, NaN before it. */
static inline cudaError_t cudaMalloc(void **memory, size_t bytes)
{
    if (getenv(EMULATED_CAPTURE)) return 900; /* so does a GPU */
    const size_t page = 4096, room = (bytes + page - 1) / page * page + page;
    uint8_t *pages = (uint8_t *)mmap(NULL, room + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) return cudaErrorMemoryAllocation;
    memset(pages, 0xff, room);
    memcpy(pages, &room, sizeof room); /* a page or more ahead of the array */
    mprotect(pages + room, page, PROT_NONE);
    *memory = pages + (room - bytes) / 16 * 16;
    return cudaSuccess;
}
/* Nobody may touch it any more, and its addresses are not used again. */
static inline cudaError_t cudaFree(void *memory)
{
    if (getenv(EMULATED_CAPTURE)) return 900;
    const uintptr_t page = 4096, pages = (uintptr_t)memory / page * page - page;
    size_t room;
    if (memory) memcpy(&room, (const void *)pages, sizeof room), mprotect((void *)pages, room, PROT_NONE);
    return cudaSuccess;
}
static inline cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind)
{
    memcpy(to, from, bytes);
    return cudaSuccess;
}

static inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream)
{
    return stream && ((emulated_stream *)stream)->capturing ? 900 : cudaMemcpy(to, from, bytes, kind);
}
static inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return stream && ((emulated_stream *)stream)->capturing ? 900 : cudaSuccess; }

extern "C" __attribute__((visibility("default"))) const char *emulation_said(void) { return emulation::said; }

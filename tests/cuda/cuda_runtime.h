/* The CUDA runtime for kernels that run on the CPU: a generated .cu is compiled as it stands, by a C++ compiler.
 *
 * The threads of a thread block are fibers, in random order, that change at barriers and shuffles only.  Found are: wrong
 * results, of course; shared memory read before it is written (it is NaN) or written outside of an array (guard zones);
 * global memory read or written past the end of its allocation (a page without access) or read before its start (NaN);
 * vectors that are not aligned; barriers and shuffles that not all threads reach.
 * Not modelled: time, caches, the memory model, and whatever ptxas may do. */
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
#include <algorithm>
#include <functional>
#include <map>
#include <random>
#include <vector>

#define __global__ static
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define SHARED(type, name, count) type *name = (type *)emulation::shared(__LINE__, sizeof(type) * (count))

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

typedef int cudaError_t;
typedef void *cudaStream_t;
enum { cudaSuccess = 0, cudaErrorMemoryAllocation = 2, cudaErrorIllegalAddress = 700, cudaErrorLaunchFailure = 719 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1 };

namespace emulation {

enum { GUARD = 4096, STACK = 1 << 16, WARP = 32 };
struct Fiber { ucontext_t context; bool done; int barriers, shuffles; };
struct Exchange { uint64_t value[WARP]; int arrived[WARP]; };

static std::mt19937 dice(1);
static char said[256];
static std::vector<Fiber> fibers;
static std::vector<Exchange> exchanges;
static std::map<int, std::vector<uint8_t>> arrays; /* shared memory, by the line of its declaration */
static std::function<void()> body;
static ucontext_t scheduler;
static sigjmp_buf escape;
static unsigned current;
static long progress;
static dim3 thread_index, block_index;

[[noreturn]] static void fail(const char *what)
{
    if (!*said) snprintf(said, sizeof said, "%s (thread block %u, thread %u)", what, block_index.x, current);
    siglongjmp(escape, 1);
}

static void yield()
{
    const unsigned me = current;
    swapcontext(&fibers[me].context, &scheduler);
    current = me, thread_index.x = me;
}

static void *shared(int line, size_t bytes)
{
    std::vector<uint8_t> &array = arrays[line];
    if (array.empty()) array.assign(bytes + 2 * GUARD + 16, 0xff); /* NaN, -1 */
    return (uint8_t *)(((uintptr_t)array.data() + 15) / 16 * 16) + GUARD;
}

static void check_guards(int line, size_t bytes)
{
    const uint8_t *start = (uint8_t *)shared(line, bytes);
    for (int i = 1; i <= GUARD; i++)
        if (start[-i] != 0xff || start[bytes + i - 1] != 0xff) fail("shared memory written outside of its array");
}

static void barrier()
{
    const int mine = ++fibers[current].barriers;
    progress++;
    for (;;) {
        bool all = true;
        for (Fiber &fiber : fibers) {
            if (fiber.done && fiber.barriers < mine) fail("a barrier that not all threads reach");
            all &= fiber.barriers >= mine;
        }
        if (all) return;
        yield();
    }
}

static uint64_t exchanged(uint64_t value, int distance)
{
    Exchange &x = exchanges[current / WARP];
    const int lane = current % WARP, mine = 2 * ++fibers[current].shuffles;
    const auto all = [&](int count) { return std::all_of(x.arrived, x.arrived + WARP, [&](int a) { return a >= count; }); };
    x.value[lane] = value, x.arrived[lane] = mine - 1, progress++;
    while (!all(mine - 1)) yield();
    const uint64_t other = x.value[lane ^ distance];
    x.arrived[lane] = mine, progress++;
    while (!all(mine)) yield(); /* before the next one overwrites it */
    return other;
}

static void fiber_main()
{
    body();
    fibers[current].done = true, progress++;
    swapcontext(&fibers[current].context, &scheduler);
}

static void run_block(unsigned threads, std::vector<uint8_t> &stacks)
{
    fibers.assign(threads, Fiber()), exchanges.assign(threads / WARP, Exchange()), arrays.clear();
    for (unsigned t = 0; t < threads; t++) {
        ucontext_t &c = fibers[t].context;
        getcontext(&c);
        c.uc_stack.ss_sp = stacks.data() + (size_t)t * STACK, c.uc_stack.ss_size = STACK, c.uc_link = &scheduler;
        makecontext(&c, fiber_main, 0);
    }
    std::vector<unsigned> order(threads);
    for (unsigned t = 0; t < threads; t++) order[t] = t;
    for (;;) {
        bool left = false;
        const long before = progress;
        std::shuffle(order.begin(), order.end(), dice);
        for (unsigned t : order) {
            if (fibers[t].done) continue;
            left = true, current = t, thread_index.x = t;
            swapcontext(&scheduler, &fibers[t].context);
        }
        if (!left) break;
        if (progress == before) fail("deadlock: no thread can go on");
    }
    for (auto &array : arrays) check_guards(array.first, array.second.size() - 2 * GUARD - 16);
}

static void on_fault(int) { fail("an address outside of every array"); }

static cudaError_t launch(dim3 grid, dim3 block)
{
    struct sigaction mine = {}, before;
    mine.sa_handler = on_fault, mine.sa_flags = SA_NODEFER;
    sigaction(SIGSEGV, &mine, &before);
    *said = 0;
    std::vector<uint8_t> stacks((size_t)block.x * STACK);
    std::vector<unsigned> order(grid.x);
    for (unsigned b = 0; b < grid.x; b++) order[b] = b;
    std::shuffle(order.begin(), order.end(), dice);
    volatile bool failed = block.x % WARP || block.x > 1024;
    if (!failed && !sigsetjmp(escape, 1))
        for (unsigned b : order) block_index.x = b, run_block(block.x, stacks);
    else failed = true;
    sigaction(SIGSEGV, &before, NULL);
    return failed ? cudaErrorLaunchFailure : cudaSuccess;
}

/* A vector of a load: its address must be a multiple of its size. */
template <int BYTES> struct alignas(BYTES) Vector {
    uint32_t word[BYTES / 4];
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

static inline void __syncthreads() { emulation::barrier(); }

template <class T> static T __shfl_xor_sync(unsigned mask, T value, int distance)
{
    if (mask != 0xffffffffu) emulation::fail("a shuffle of some lanes: not emulated");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = emulation::exchanged(bits, distance);
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float __uint_as_float(uint32_t bits) { float v; memcpy(&v, &bits, 4); return v; }
static inline uint32_t __float_as_uint(float v) { uint32_t bits; memcpy(&bits, &v, 4); return bits; }
static inline float normcdff(float v) { return (float)(0.5 * erfc(-(double)v * M_SQRT1_2)); }
static inline double normcdf(double v) { return 0.5 * erfc(-v * M_SQRT1_2); }

template <class A> static cudaError_t cudaLaunchKernel(
    void (*kernel)(A), dim3 grid, dim3 block, void **parameters, size_t, cudaStream_t)
{
    emulation::body = [=] { kernel(*(typename std::remove_const<A>::type *)parameters[0]); };
    return emulation::launch(grid, block);
}

static inline cudaError_t cudaGetDevice(int *device) { *device = 0; return cudaSuccess; }
static inline cudaError_t cudaSetDevice(int device) { return device ? 101 : cudaSuccess; }
static inline cudaError_t cudaGetLastError() { return cudaSuccess; }
static inline const char *cudaGetErrorString(cudaError_t) { return "emulated"; }

/* At the end of its pages, a page without access behind it, NaN before it. */
static inline cudaError_t cudaMalloc(void **memory, size_t bytes)
{
    const size_t page = 4096, room = (bytes + page - 1) / page * page + page;
    uint8_t *pages = (uint8_t *)mmap(NULL, room + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) return cudaErrorMemoryAllocation;
    memset(pages, 0xff, room);
    mprotect(pages + room, page, PROT_NONE);
    *memory = pages + (room - bytes) / 16 * 16;
    return cudaSuccess;
}
static inline cudaError_t cudaFree(void *) { return cudaSuccess; } /* addresses are not used again */
static inline cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind)
{
    memcpy(to, from, bytes);
    return cudaSuccess;
}

extern "C" __attribute__((visibility("default"))) const char *emulation_said(void) { return emulation::said; }

/* The driver's types and Hopper's own instructions for kernels that run on the CPU.
 *
 * Barriers have phases and count arrivals and bytes.  Boxes are stored at once, or when somebody waits for them at last, from
 * what then lies in shared memory.  Copies land at any time after they were asked for, in any order;
 * until then there is NaN.  Products run right after they were asked for, or when somebody waits for them at last, from
 * what then lies in shared memory, through the very descriptors; until they are waited for, their sums are NaN.  Found are, beside what cuda_runtime.h finds:
 * arrivals too many, barriers that are not there, bytes that do not add up, addresses that are not aligned, products
 * without a fence, copies and products that nobody waited for, or that were not shown to products, shared memory beyond what was asked for, or of a thread
 * block that is over.  Not modelled:
 * the memory model between the two proxies, registers. */
#pragma once
#include "cuda_runtime.h"

typedef int CUresult;
typedef uint32_t cuuint32_t;
typedef uint64_t cuuint64_t;
typedef int CUtensorMapDataType, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill;
struct alignas(64) CUtensorMap { const uint8_t *base; uint64_t size[2], stride; uint32_t box[2]; int swizzle_bytes, unit; };
enum { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum { CU_TENSOR_MAP_DATA_TYPE_FLOAT16, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, CU_TENSOR_MAP_DATA_TYPE_UINT8, CU_TENSOR_MAP_DATA_TYPE_UINT16, CU_TENSOR_MAP_DATA_TYPE_UINT32 };
enum { CU_TENSOR_MAP_SWIZZLE_NONE = 0, CU_TENSOR_MAP_SWIZZLE_32B = 32, CU_TENSOR_MAP_SWIZZLE_64B = 64, CU_TENSOR_MAP_SWIZZLE_128B = 128 };
enum { CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

#define PARAMETER const
#define DYNAMIC_SHARED(name, bytes) unsigned char *name = emulation::dynamic_shared(bytes)

namespace emulation {

enum { BARRIERS = 64 * CLUSTER, FLYING = 1 << 15, GROUPS = 8, PRODUCTS = 64, NAMED = 16, BASE = 1024 + 16 * 37 };
struct Barrier { const void *at; int count, pending, phase; long bytes; bool usable; };
struct Copying { unsigned block; uint8_t *to; const uint8_t *from; uint32_t bytes; const CUtensorMap *map; int x, y; Barrier *barrier; };
struct Product { void *sums; int width; uint64_t w, x; bool transposed; void (*widen)(), (*now)(const Product *const *, int); };
struct Warpgroup { /* of one thread: groups of products, the open one last; what the sums were, where they are in use */
    Product product[PRODUCTS];
    int group[PRODUCTS], products, opened, run; /* the last group that has run */
    bool fenced;
    size_t bytes; /* of the sums of one */
    void *owner[4];
    uint32_t before[4][128];
    int owners;
};
struct Meeting { int arrived; long times; uint8_t came[MOST / 8]; };
struct Storing { const CUtensorMap *map; int x, y; const uint8_t *from; unsigned thread; int group; };

static Barrier barrier_list[BARRIERS];
static Copying flying[FLYING];
static Storing storing[FLYING]; /* boxes on their way to a matrix */
static int storing_count, stored_groups[MOST];
static long boxes_stored;
static int barrier_count, flying_count;
static Warpgroup warpgroups[MOST];
static Meeting meetings[CLUSTER][NAMED];
static uint8_t *rings[CLUSTER]; /* dynamic shared memory of each thread block */
static Meeting cluster_meeting;
static long products_run;
static bool at_once; /* products of this thread block */
static struct { const void *kernel; size_t bytes; } allowed[64]; /* dynamic shared memory of kernels that have asked for it */
static uint64_t dice = 99194853094755497u;

static size_t &allowed_bytes(const void *kernel)
{
    int i = 0;
    while (allowed[i].kernel && allowed[i].kernel != kernel) i++;
    if (i == 64) fail("more kernels than the emulation has room for");
    if (!allowed[i].kernel) allowed[i] = {kernel, 48 << 10};
    return allowed[i].bytes;
}

static void finish_block()
{
    if (flying_count) fail("a copy that nobody waited for");
    if (storing_count) fail("boxes that nobody waited for");
    for (unsigned t = 0; t < threads * cluster; t++) {
        if (warpgroups[t].products) fail("products that nobody waited for");
        if (early && !waited[t]) fail("a thread that did not wait for the kernel ahead");
    }
    for (int i = 0; i < barrier_count; i++)
        if (barrier_list[i].bytes) fail("a barrier whose bytes never came");
    for (unsigned block = 0; block < cluster; block++)
        for (const Meeting &m : meetings[block])
            if (m.arrived) fail("a barrier of some warps that others never came to");
    at_end = NULL;
}

/* The threads of a thread block of the cluster have not all left. */
static void must_be_there(int rank)
{
    if (rank < 0 || rank >= (int)cluster || !rings[rank]) fail("no such thread block in the cluster, or not yet");
    bool there = false;
    for (unsigned t = 0; t < threads; t++) there |= !fibers[rank * threads + t].done;
    if (!there) fail("shared memory of a thread block that is over");
}

/* Addresses of shared memory begin at some multiple of 16. */
static uint32_t address(const void *at, unsigned block)
{
    const uint8_t *byte = (const uint8_t *)at, *ring = rings[block];
    if (!ring || byte < ring || byte >= ring + dynamic_bytes) fail("not an address of shared memory");
    return (uint32_t)(byte - ring) + BASE;
}
static uint8_t *place(uint32_t address, unsigned block)
{
    if (address < BASE || address >= BASE + dynamic_bytes) fail("an operand outside of shared memory");
    return rings[block] + (address - BASE);
}

/* What a thread's own copies wrote is not the products' to read until that thread says so: by 16 bytes, 1 + its number. */
static uint16_t hidden_by[CLUSTER][(227 << 10) / 16 + 1];
static void hide(void *to) { hidden_by[block_rank()][(address(to, block_rank()) - BASE) / 16] = (uint16_t)(current + 1); }
static void show()
{
    uint16_t *by = hidden_by[block_rank()];
    for (size_t i = 0; i < dynamic_bytes / 16; i++)
        if (by[i] == current + 1) by[i] = 0;
}

static uint8_t *dynamic_shared(size_t bytes)
{
    if (bytes > dynamic_bytes) fail("more shared memory than the launch gives");
    if (dynamic_bytes > allowed_bytes(*(const void *const *)argument)) fail("more shared memory than the kernel was allowed");
    if (!at_end) { /* the first thread of a thread block */
        memset(warpgroups, 0, sizeof *warpgroups * threads * cluster), memset(meetings, 0, sizeof meetings);
        memset(rings, 0, sizeof rings), memset(hidden_by, 0, sizeof hidden_by), landed = hide, cluster_meeting = {};
        memset(waited, 0, sizeof waited), memset(stored_groups, 0, sizeof stored_groups), storing_count = 0;
        at_once = !at_once;
        flying_count = 0, barrier_count = 0, at_end = finish_block;
    }
    return rings[block_rank()] = (uint8_t *)shared(-1, bytes);
}

static Barrier *barrier_at(const void *at)
{
    for (int i = 0; i < barrier_count; i++)
        if (barrier_list[i].at == at) return barrier_list + i;
    fail("a barrier that nobody initialised");
}
static void turn(Barrier *b)
{
    if (b->pending < 0) fail("more arrivals than a barrier counts");
    progress++;
    if (!b->pending && !b->bytes) b->phase ^= 1, b->pending = b->count;
}

/* 128-byte, 64-byte and 32-byte swizzling: bits 4 to 6 of an address are mixed with bits 7 to 9. */
static uint32_t swizzled(uint32_t address, int bytes) { return bytes < 32 ? address : address ^ (address >> 3 & (uint32_t)(bytes / 16 - 1) << 4); }

static void copy_lands(int i)
{
    const Copying c = flying[i];
    flying[i] = flying[--flying_count];
    if (!c.map) memcpy(c.to, c.from, c.bytes);
    else
        for (uint32_t r = 0; r < c.map->box[1]; r++)
            for (uint32_t e = 0; e < c.map->box[0]; e++) {
                const int64_t x = (int64_t)c.x + e, y = (int64_t)c.y + r;
                const bool there = x >= 0 && y >= 0 && x < (int64_t)c.map->size[0] && y < (int64_t)c.map->size[1];
                const int unit = c.map->unit;
                uint8_t *to = place(swizzled(address(c.to, c.block) + (r * c.map->box[0] + e) * unit, c.map->swizzle_bytes), c.block);
                memset(to, 0, unit);
                if (there) memcpy(to, c.map->base + y * c.map->stride + unit * x, unit);
            }
    c.barrier->bytes -= c.bytes;
    turn(c.barrier);
}

/* A box as it lies now. */
static void box_lands(const Storing &s)
{
    const CUtensorMap &map = *s.map;
    boxes_stored++;
    for (uint32_t r = 0; r < map.box[1]; r++)
        for (uint32_t e = 0; e < map.box[0]; e++) {
            const int64_t x = (int64_t)s.x + e, y = (int64_t)s.y + r;
            const unsigned block = s.thread / threads;
            const uint8_t *from = place(swizzled(address(s.from, block) + (r * map.box[0] + e) * map.unit, map.swizzle_bytes), block);
            if (hidden_by[block][(from - rings[block]) / 16]) fail("the copy engine reads what a thread has written and not shown");
            if (x >= 0 && y >= 0 && x < (int64_t)map.size[0] && y < (int64_t)map.size[1]) memcpy((void *)(map.base + y * map.stride + map.unit * x), from, map.unit);
        }
}
static void boxes_left(int left)
{
    int kept = 0;
    for (int i = 0; i < storing_count; i++) {
        const Storing s = storing[i];
        if (s.thread != current || s.group >= stored_groups[current] - left) storing[kept++] = s;
        else box_lands(s);
    }
    storing_count = kept;
}

/* Rows of 8 matrices, through the addresses of all lanes. */
struct Tile { uint8_t *to; uint32_t a[4]; };
static void store_tile(void *to, const uint32_t (&a)[4], bool transposed)
{
    const Tile mine = {(uint8_t *)to, {a[0], a[1], a[2], a[3]}};
    if ((uintptr_t)to % 16) fail("a row of a matrix that is not aligned");
    const uint64_t *all = gathered((uint64_t)(uintptr_t)&mine);
    const int row = current % 8, matrix = current % WARP / 8;
    for (int e = 0; e < 8; e++) {
        const int r = transposed ? e : row, c = transposed ? row : e;
        const uint16_t value = (uint16_t)(((const Tile *)(uintptr_t)all[4 * r + c / 2])->a[matrix] >> 16 * (c % 2));
        memcpy(mine.to + 2 * e, &value, 2);
    }
    hide(mine.to);
    looked();
}

static void fly(Copying c)
{
    if (flying_count == FLYING) fail("more copies on their way than the emulation has room for");
    if (!c.barrier->usable) fail("a copy before barriers_done()");
    memset(c.to, 0xff, c.bytes);
    flying[flying_count++] = c;
}

static void wait_phase(Barrier *b, int parity)
{
    while (b->phase == parity) {
        dice ^= dice << 13, dice ^= dice >> 7, dice ^= dice << 17;
        if (flying_count) {
            progress++;
            if (dice % 64 == 0) copy_lands((int)(dice / 64 % flying_count));
        }
        yield();
    }
}

/* The first byte of an element of an operand: row (of W, or token of X) and feature, through the descriptor. */
static const uint8_t *element(uint64_t d, int row, int k, bool transposed, int bytes)
{
    const uint32_t start = (d & 0x3fff) << 4, leading = (d >> 16 & 0x3fff) << 4, stride = (d >> 32 & 0x3fff) << 4;
    const int mode = (int)(d >> 62), line = mode == 1 ? 128 : mode == 2 ? 64 : mode == 3 ? 32 : 16, chunk = 16 / bytes;
    if (transposed && bytes != 2) fail("only elements of two bytes can be turned");
    const uint32_t at = transposed ? start + row / (line / 2) * leading + row % (line / 2) * 2 + k / 8 * stride + k % 8 * line
                                   : start + row / 8 * stride + row % 8 * line + (line == 16 ? k / chunk * leading + k % chunk * bytes : k * bytes);
    const uint8_t *byte = place(swizzled(at, line), block_rank());
    if (hidden_by[block_rank()][(byte - rings[block_rank()]) / 16]) fail("products read what a thread has copied and not shown");
    return byte;
}

/* A product of one warp, all lanes' sums: rows 16 * warp + lane / 4 and 8 more, tokens 8 i + lane % 4 * 2 and one more. */
template <class T, class E> static void multiply_now(const Product *const *lanes, int warp)
{
    enum { STEP = 32 / sizeof(E) };
    static T w[16][STEP], x[256][STEP];
    const Product &p = *lanes[0];
    T (*const widen)(E) = (T (*)(E))p.widen;
    auto value = [&](uint64_t d, int row, int k, bool transposed) {
        E v;
        memcpy(&v, element(d, row, k, transposed, sizeof(E)), sizeof v);
        return widen(v);
    };
    products_run++;
    for (int k = 0; k < STEP; k++) {
        for (int r = 0; r < 16; r++) w[r][k] = value(p.w, 16 * warp + r, k, false);
        for (int t = 0; t < p.width; t++) x[t][k] = value(p.x, t, k, p.transposed);
    }
    for (int lane = 0; lane < WARP; lane++) {
        if (lanes[lane]->w != p.w || lanes[lane]->x != p.x) fail("lanes of a warp with operands of their own");
        Warpgroup &g = warpgroups[current / WARP * WARP + lane];
        T *sums = NULL;
        for (int o = 0; o < g.owners; o++)
            if (g.owner[o] == lanes[lane]->sums) sums = (T *)(void *)g.before[o];
        for (int e = 0; e < p.width / 2; e++)
            for (int k = 0; k < STEP; k++) sums[e] += w[lane / 4 + e / 2 % 2 * 8][k] * x[e / 4 * 8 + lane % 4 * 2 + e % 2][k];
    }
}

static void products_left(int left)
{
    Warpgroup &g = warpgroups[current];
    progress++, yield(); /* others may do what they like meanwhile */
    const uint64_t *all = gathered((uint64_t)(uintptr_t)&g);
    const int now = at_once ? g.opened : g.opened - left; /* or as late as may be */
    if (current % WARP == 0)
        for (int i = 0; i < g.products && g.group[i] < now; i++) {
            if (g.group[i] < g.run) continue;
            const Product *lanes[WARP];
            for (int lane = 0; lane < WARP; lane++) lanes[lane] = ((const Warpgroup *)(uintptr_t)all[lane])->product + i;
            lanes[0]->now(lanes, (int)(current % threads / WARP % 4));
        }
    looked();
    if (now > g.run) g.run = now;
    int done = 0;
    while (done < g.products && g.group[done] < g.opened - left) done++;
    for (int i = done; i < g.products; i++) g.product[i - done] = g.product[i], g.group[i - done] = g.group[i];
    g.products -= done;
    for (int o = 0; !g.products && o < g.owners; o++) memcpy(g.owner[o], g.before[o], g.bytes);
    if (!g.products) g.owners = 0;
}

template <class T, class E> static void product(T *sums, int width, uint64_t w, uint64_t x, bool transposed, T (*widen)(E))
{
    Warpgroup &g = warpgroups[current];
    if (!g.fenced) fail("products without a fence before them");
    if (g.products == PRODUCTS || g.owners == 4) fail("more products under way than the emulation has room for");
    bool known = false;
    for (int o = 0; o < g.owners; o++) known |= g.owner[o] == sums;
    if (!known) {
        g.bytes = sizeof(T) * (size_t)(width / 2);
        memcpy(g.before[g.owners], sums, g.bytes), g.owner[g.owners++] = sums;
        memset((void *)sums, 0xff, g.bytes);
    }
    g.product[g.products] = {sums, width, w, x, transposed, (void (*)())widen, multiply_now<T, E>}, g.group[g.products++] = g.opened;
}

static void come(Meeting &m, int count)
{
    progress++;
    if (m.came[current / 8] >> current % 8 & 1) fail("a thread that comes twice to a barrier of some warps");
    m.came[current / 8] |= (uint8_t)(1 << current % 8);
    if (++m.arrived == count) m.arrived = 0, m.times++, memset(m.came, 0, sizeof m.came);
}
static void meet(Meeting &m, int count)
{
    const long mine = m.times;
    come(m, count);
    while (m.times == mine) yield();
}

/* The same place in the shared memory of another thread block of the cluster. */
static uint8_t *elsewhere(const void *at, int rank)
{
    must_be_there(rank);
    return place(address(at, block_rank()), (unsigned)rank);
}

static int capability[2] = {9, 0};

/* As cuTensorMapEncodeTiled checks them (driver API, tensor map object management). */
static CUresult encode(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *base, const cuuint64_t *size, const cuuint64_t *stride,
                       const cuuint32_t *box, const cuuint32_t *every, CUtensorMapInterleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill)
{
    const int unit = type == CU_TENSOR_MAP_DATA_TYPE_UINT8 ? 1 : type == CU_TENSOR_MAP_DATA_TYPE_UINT32 ? 4 : 2;
    const bool right = rank == 2 && (uintptr_t)base % 16 == 0 && (uintptr_t)map % 64 == 0 && stride[0] % 16 == 0 && stride[0] < 1ull << 40 &&
                       size[0] && size[1] && box[0] && box[1] && box[0] <= 256 && box[1] <= 256 && every[0] == 1 && every[1] == 1 &&
                       box[0] * unit % 16 == 0 && (!swizzle || box[0] * unit <= (cuuint32_t)swizzle);
    if (!right) return CUDA_ERROR_INVALID_VALUE;
    *map = {(const uint8_t *)base, {size[0], size[1]}, stride[0], {box[0], box[1]}, swizzle, unit};
    return CUDA_SUCCESS;
}

} // namespace emulation

static inline void barrier_init(uint64_t *at, int count)
{
    if (emulation::barrier_count == emulation::BARRIERS || (uintptr_t)at % 8) emulation::fail("barriers too many, or not aligned");
    emulation::address(at, emulation::block_rank());
    emulation::barrier_list[emulation::barrier_count++] = {at, count, count, 0, 0, false};
}
static inline void barriers_done()
{
    const uint8_t *ring = emulation::rings[emulation::block_rank()];
    for (int i = 0; i < emulation::barrier_count; i++) {
        const uint8_t *at = (const uint8_t *)emulation::barrier_list[i].at;
        emulation::barrier_list[i].usable |= at >= ring && at < ring + emulation::dynamic_bytes;
    }
}
static inline void barrier_arrive(uint64_t *at)
{
    emulation::Barrier *b = emulation::barrier_at(at);
    b->pending--, emulation::turn(b);
    emulation::yield(); /* whoever waited may go on first */
}
static inline void barrier_expect(uint64_t *at, uint32_t bytes)
{
    emulation::Barrier *b = emulation::barrier_at(at);
    b->bytes += bytes, b->pending--, emulation::turn(b);
}
static inline void barrier_wait(uint64_t *at, int parity) { emulation::wait_phase(emulation::barrier_at(at), parity); }
/* The same arrival, at the barrier of another thread block. */
static inline void barrier_arrive_there(uint64_t *at, int rank) { barrier_arrive((uint64_t *)(void *)emulation::elsewhere(at, rank)); }
static inline void copy_bulk_to(void *to, const void *from, uint32_t bytes, uint64_t *barrier, int ranks)
{
    if (emulation::address(to, emulation::block_rank()) % 16 || (uintptr_t)from % 16 || bytes % 16 || !bytes) emulation::fail("a bulk copy that is not aligned");
    for (int rank = 0; ranks >> rank; rank++)
        if (ranks >> rank & 1) emulation::fly({(unsigned)rank, emulation::elsewhere(to, rank), (const uint8_t *)from, bytes, NULL, 0, 0, emulation::barrier_at(emulation::elsewhere(barrier, rank))});
}
static inline void copy_box_to(void *to, const CUtensorMap *map, int x, int y, uint64_t *barrier, int ranks)
{
    if (emulation::address(to, emulation::block_rank()) % 128) emulation::fail("a box that is not aligned");
    if (emulation::early && !emulation::waited[emulation::current]) emulation::fail("X before the kernel ahead is over");
    for (int rank = 0; ranks >> rank; rank++)
        if (ranks >> rank & 1) emulation::fly({(unsigned)rank, emulation::elsewhere(to, rank), NULL, map->box[0] * map->box[1] * (uint32_t)map->unit, map, x, y, emulation::barrier_at(emulation::elsewhere(barrier, rank))});
}
static inline void copy_bulk(void *to, const void *from, uint32_t bytes, uint64_t *barrier) { copy_bulk_to(to, from, bytes, barrier, 1 << emulation::block_rank()); }
static inline void copy_box(void *to, const CUtensorMap *map, int x, int y, uint64_t *barrier) { copy_box_to(to, map, x, y, barrier, 1 << emulation::block_rank()); }
static inline void store_box(const CUtensorMap *map, int x, int y, const void *from)
{
    using namespace emulation;
    if (address(from, block_rank()) % 128) fail("a box that is not aligned");
    if (storing_count == FLYING) fail("more boxes on their way than the emulation has room for");
    storing[storing_count++] = {map, x, y, (const uint8_t *)from, current, stored_groups[current]};
    dice ^= dice << 13, dice ^= dice >> 7, dice ^= dice << 17;
    if (dice >> 20 & 1) box_lands(storing[--storing_count]);
}
static inline void stores_commit() { emulation::stored_groups[emulation::current]++; }
template <int LEFT> static void stores_wait() { emulation::boxes_left(LEFT); }
static inline void store_matrices(void *to, const uint32_t (&a)[4]) { emulation::store_tile(to, a, false); }
static inline void store_matrices_transposed(void *to, const uint32_t (&a)[4]) { emulation::store_tile(to, a, true); }
template <class T> static void put_shared(void *to, T value) { memcpy(to, &value, sizeof value), emulation::hide((void *)((uintptr_t)to / 16 * 16)); }
static inline uint32_t pair_bf16(float first, float second) { return put_bf16(first) | (uint32_t)put_bf16(second) << 16; }
static inline uint32_t pair_f16(float first, float second) { return put_f16(first) | (uint32_t)put_f16(second) << 16; }
static inline void seen_by_all() { emulation::show(); }
static inline void products_fence() { emulation::warpgroups[emulation::current].fenced = true; }
static inline void products_commit()
{
    emulation::Warpgroup &g = emulation::warpgroups[emulation::current];
    g.opened++, g.fenced = false;
}
template <int LEFT> static void products_wait() { emulation::products_left(LEFT); }
template <class T, int COUNT> static void sums_done(T (&)[COUNT]) {}
template <int COUNT> static void registers_more() {}
template <int COUNT> static void registers_less() {}
static inline void warps_meet(int number, int count)
{
    if (number == 5 && emulation::meetings[emulation::block_rank()][number].arrived == count - 1) emulation::met[emulation::block_rank()]++; /* all who store */
    emulation::meet(emulation::meetings[emulation::block_rank()][number], count);
}
static inline void warps_arrive(int number, int count) { emulation::come(emulation::meetings[emulation::block_rank()][number], count); }
/* Whoever reads a count reads what was left before with a fence behind it. */
static inline unsigned counted_so_far(const unsigned *at) { return emulation::counted[emulation::block_rank()]++, *at; }
static inline void cluster_meet() { emulation::meet(emulation::cluster_meeting, (int)(emulation::threads * emulation::cluster)); }
template <class T> static T there(const T *at, int rank) { return *(const T *)(void *)emulation::elsewhere(at, rank); }
static inline void earlier_done() { emulation::waited[emulation::current] = true; }
static inline void next_may_begin()
{
    if (!emulation::waited[emulation::current]) emulation::fail("the next kernel may begin before this one knows that the earlier one is over");
}
static inline void __syncwarp() { emulation::gathered(0), emulation::looked(); }
static inline uint32_t __cvta_generic_to_shared(const void *at) { return emulation::address(at, emulation::block_rank()); }

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor, cudaDevAttrL2CacheSize };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
static const cudaError_t cudaErrorInvalidValue = 1, cudaErrorInsufficientDriver = 35;
enum { cudaEnableDefault };
#define CUDART_VERSION 13000
static inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr what, int)
{
    *value = what == cudaDevAttrMultiProcessorCount ? 3 : what == cudaDevAttrL2CacheSize ? 1 << 16 : emulation::capability[what == cudaDevAttrComputeCapabilityMinor];
    return cudaSuccess;
}
template <class F> static cudaError_t cudaFuncSetAttribute(F *kernel, cudaFuncAttribute, int bytes)
{
    if (bytes > 227 << 10) return cudaErrorInvalidValue;
    emulation::allowed_bytes((const void *)kernel) = (size_t)bytes;
    return cudaSuccess;
}
static inline cudaError_t cudaGetDriverEntryPointByVersion(const char *, void **function, unsigned, int, cudaDriverEntryPointQueryResult *how)
{
    *function = (void *)emulation::encode, *how = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension, cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute { cudaLaunchAttributeID id; struct { struct { unsigned x, y, z; } clusterDim; int programmaticStreamSerializationAllowed; } val; };
struct cudaLaunchConfig_t { dim3 gridDim, blockDim; size_t dynamicSmemBytes; cudaStream_t stream; cudaLaunchAttribute *attrs; unsigned numAttrs; };
template <class A> static cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(A), A &a)
{
    void *parameters[] = {&a};
    emulation::early = false;
    for (unsigned i = 0; i < config->numAttrs; i++) {
        const cudaLaunchAttribute &wanted = config->attrs[i];
        if (wanted.id == cudaLaunchAttributeClusterDimension) emulation::cluster = wanted.val.clusterDim.x;
        else emulation::early = wanted.val.programmaticStreamSerializationAllowed;
    }
    const cudaError_t error = cudaLaunchKernel(kernel, config->gridDim, config->blockDim, parameters, config->dynamicSmemBytes, config->stream);
    emulation::cluster = 1, emulation::early = false;
    return error;
}
template <class F> static cudaError_t cudaOccupancyMaxActiveClusters(int *clusters, F *, const cudaLaunchConfig_t *)
{
    *clusters = getenv("EMULATED_CLUSTERS") ? atoi(getenv("EMULATED_CLUSTERS")) : 2;
    return cudaSuccess;
}

/* Which GPU the next launches find. */
extern "C" __attribute__((visibility("default"))) void emulation_gpu(int major, int minor) { emulation::capability[0] = major, emulation::capability[1] = minor; }

/* Boxes that the copy engine has stored since somebody asked last. */
extern "C" __attribute__((visibility("default"))) long emulation_boxes(void)
{
    const long stored = emulation::boxes_stored;
    emulation::boxes_stored = 0;
    return stored;
}

/* Products of warpgroups, one for each warp, since somebody asked last. */
extern "C" __attribute__((visibility("default"))) long emulation_products(void)
{
    const long run = emulation::products_run;
    emulation::products_run = 0;
    return run;
}

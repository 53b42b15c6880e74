/* What Hopper (sm_90a) has of its own: copies that run by themselves, barriers that count their bytes, products of
 * warpgroups.  PTX ISA 8.5, sections 9.7.8.24 (cp.async.bulk), 9.7.14.5.16 (stmatrix), 9.7.12.15 (mbarrier), 9.7.14 (wgmma), 9.7.12.14.1
 * (setmaxnreg); layouts of operands in shared memory: section 9.7.14.5. */
#ifndef BSRGEN_HOPPER_H
#define BSRGEN_HOPPER_H
#include <cuda.h> /* types alone: nothing of the driver is linked */

/* Where copies land is a multiple of this: the layouts of operands repeat after 1024 bytes. */
enum { STAGE_ALIGNMENT = 1024 };

/* An operand in shared memory: where it starts, the strides of its groups of 8 rows (or columns), how it is swizzled. */
enum swizzle { SWIZZLE_NONE = 0, SWIZZLE_128 = 1, SWIZZLE_64 = 2, SWIZZLE_32 = 3 };

#ifndef BSRGEN_HOST_PART
DEVICE uint32_t shared_address(const void *at) { return (uint32_t)__cvta_generic_to_shared(at); }

DEVICE uint64_t operand(const void *at, uint32_t leading_bytes, uint32_t stride_bytes, uint64_t swizzle)
{
    return (shared_address(at) & 0x3ffff) >> 4 | (uint64_t)(leading_bytes >> 4) << 16 | (uint64_t)(stride_bytes >> 4) << 32 | swizzle << 62;
}

#ifndef BSRGEN_EMULATION /* tests/cuda/cuda.h has its own */
#define DYNAMIC_SHARED(name, bytes) extern __shared__ __align__(1024) unsigned char name[]
#define PARAMETER const __grid_constant__ /* the copy engine reads the tensor map where the parameter lies */

/* A barrier turns its phase when `arrivals` have come and all bytes that were announced. */
DEVICE void barrier_init(uint64_t *barrier, int arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" : : "r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

/* All barriers can be used by copies from here on. */
DEVICE void barriers_done() { asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory"); }

DEVICE void barrier_arrive(uint64_t *barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" : : "r"(shared_address(barrier)) : "memory");
}

/* One arrival, and so many bytes to come. */
DEVICE void barrier_expect(uint64_t *barrier, uint32_t bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" : : "r"(shared_address(barrier)), "r"(bytes) : "memory");
}

/* Until the phase of that parity is over. */
DEVICE void barrier_wait(uint64_t *barrier, int parity)
{
    asm volatile("{\n.reg .pred over;\n"
                 "again: mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
                 "@!over bra again;\n}" : : "r"(shared_address(barrier)), "r"(parity) : "memory");
}

/* `bytes`, a multiple of 16, as they lie. */
DEVICE void copy_bulk(void *shared, const void *global, uint32_t bytes, uint64_t *barrier)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 : : "r"(shared_address(shared)), "l"(global), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}

/* A box of a matrix, swizzled, zeros where the matrix has nothing: x along its rows, y the row. */
DEVICE void copy_box(void *shared, const CUtensorMap *map, int x, int y, uint64_t *barrier)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                 : : "r"(shared_address(shared)), "l"(map), "r"(x), "r"(y), "r"(shared_address(barrier)) : "memory");
}

/* The same into that place of each thread block of the cluster whose bit `ranks` has, and the bytes are counted by the
 * barrier at that place there. */
DEVICE void copy_bulk_to(void *shared, const void *global, uint32_t bytes, uint64_t *barrier, int ranks)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;"
                 : : "r"(shared_address(shared)), "l"(global), "r"(bytes), "r"(shared_address(barrier)), "h"((uint16_t)ranks) : "memory");
}

DEVICE void copy_box_to(void *shared, const CUtensorMap *map, int x, int y, uint64_t *barrier, int ranks)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;"
                 : : "r"(shared_address(shared)), "l"(map), "r"(x), "r"(y), "r"(shared_address(barrier)), "h"((uint16_t)ranks) : "memory");
}

/* A box of shared memory, swizzled, into a matrix, and nothing of it where the matrix has nothing.  What a thread stored so
 * goes in groups; shared memory may be written again once that thread has waited for all but LEFT of them. */
DEVICE void store_box(const CUtensorMap *map, int x, int y, const void *shared)
{
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];"
                 : : "l"(map), "r"(x), "r"(y), "r"(shared_address(shared)) : "memory");
}
DEVICE void stores_commit() { asm volatile("cp.async.bulk.commit_group;" : : : "memory"); }
template <int LEFT> DEVICE void stores_wait() { asm volatile("cp.async.bulk.wait_group.read %0;" : : "n"(LEFT) : "memory"); }

/* Four 8x8 matrices as products leave them, to rows of 16 bytes: lane l says where row l % 8 of matrix l / 8 goes. */
DEVICE void store_matrices(void *shared, const uint32_t (&a)[4])
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 : : "r"(shared_address(shared)), "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]) : "memory");
}
DEVICE void store_matrices_transposed(void *shared, const uint32_t (&a)[4])
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                 : : "r"(shared_address(shared)), "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]) : "memory");
}
template <class T> DEVICE void put_shared(void *shared, T value) { *reinterpret_cast<T *>(shared) = value; }

/* Two results side by side, the first in the low half. */
DEVICE uint32_t pair_bf16(float first, float second)
{
    uint32_t both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    return both;
}
DEVICE uint32_t pair_f16(float first, float second)
{
    uint32_t both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    return both;
}

/* An arrival at the barrier at that place of another thread block of the cluster. */
DEVICE void barrier_arrive_there(uint64_t *barrier, int rank)
{
    asm volatile("{\n.reg .b32 at;\n"
                 "mapa.shared::cluster.u32 at, %0, %1;\n"
                 "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [at];\n}"
                 : : "r"(shared_address(barrier)), "r"(rank) : "memory");
}

/* This kernel may have begun before the one ahead of it on the stream was over: until here, where all of that is done and
 * seen; and the next one may begin (programmatic dependent launch; no effect where the launch does not ask for it). */
DEVICE void earlier_done() { asm volatile("griddepcontrol.wait;" : : : "memory"); }
DEVICE void next_may_begin() { asm volatile("griddepcontrol.launch_dependents;" : : : "memory"); }

/* What this thread has seen in shared memory, products and the copy engine see as well. */
DEVICE void seen_by_all() { asm volatile("fence.proxy.async.shared::cta;" : : : "memory"); }

/* Products begin after what was written to their sums, go in groups, and are over when waited for. */
DEVICE void products_fence() { asm volatile("wgmma.fence.sync.aligned;" : : : "memory"); }
DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory"); }
template <int LEFT> DEVICE void products_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(LEFT) : "memory"); }

/* The compiler may not read sums before this; it knows nothing of their coming late. */
template <int COUNT> DEVICE void sums_done(float (&sums)[COUNT])
{
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(sums[i]) : : "memory");
}
template <int COUNT> DEVICE void sums_done(int (&sums)[COUNT])
{
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+r"(sums[i]) : : "memory");
}

template <int COUNT> DEVICE void registers_more() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(COUNT)); }
template <int COUNT> DEVICE void registers_less() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(COUNT)); }

/* A barrier of some warps of the thread block. */
DEVICE void warps_meet(int number, int threads) { asm volatile("bar.sync %0, %1;" : : "r"(number), "r"(threads) : "memory"); }

/* These warps come to such a barrier, and do not wait for the others. */
DEVICE void warps_arrive(int number, int threads) { asm volatile("bar.arrive %0, %1;" : : "r"(number), "r"(threads) : "memory"); }

/* What thread blocks have counted there up to now. */
DEVICE unsigned counted_so_far(const unsigned *at)
{
    unsigned count;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(at) : "memory");
    return count;
}

/* All threads of a cluster of thread blocks meet; what each wrote before to its shared memory, the others see. */
DEVICE void cluster_meet()
{
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" : : : "memory");
}

/* What another thread block of the cluster has at that place of its shared memory. */
template <class T> DEVICE T there(const T *shared, int rank)
{
    uint32_t at, bits;
    T value;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(shared_address(shared)), "r"(rank));
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(bits) : "r"(at) : "memory");
    static_assert(sizeof value == sizeof bits, "sums");
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Which GPUs have all that: code for others in the same library is without. */
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HOPPER_CODE 1
#endif
#else
#define HOPPER_CODE 1
#endif
#define pair_y NAME_OF(pair_, Y_KIND)
#endif

#ifndef __CUDACC_RTC__
/* The driver's function that describes a matrix to the copy engine, NULL where the driver is older. */
typedef CUresult (*describe_matrix)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *, const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

static inline cudaError_t find_describe_matrix(describe_matrix *function)
{
    static void *found; /* the same for all threads that look for it at once */
    cudaError_t error = cudaSuccess;
    if (!found) {
        cudaDriverEntryPointQueryResult how;
        void *at = NULL;
#if CUDART_VERSION >= 12050
        error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &at, 12000, cudaEnableDefault, &how);
#else
        error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &at, cudaEnableDefault, &how);
#endif
        if (!error && how == cudaDriverEntryPointSuccess) found = at;
    }
    *function = (describe_matrix)found;
    return error;
}
#endif
#endif

/* What L2 gives on a Hopper: thread blocks that stay bring 32 KB after 32 KB of one array into shared memory, each of a
 * cluster a part of them that is sent to all of it. */
#define REAL_BYTES 4
#define W_KIND f32
#define X_KIND f32
#define Y_KIND f32
#define E_KIND f32
#include "bsrgen_cuda.h"
#include "bsrgen_hopper.h"

enum { PIECE = 32 << 10, STAGES = 6, THREADS = 32, APART = 37, BYTES = STAGE_ALIGNMENT + STAGES * (PIECE + 16) };

struct arguments {
    const unsigned char *from;
    int64_t pieces;
    int rounds; /* pieces that each thread block gets */
};

template <int CLUSTER> DEVICE void bring(const struct arguments &a)
{
    DYNAMIC_SHARED(memory, BYTES);
    unsigned char *const stages = memory + (-shared_address(memory) & (STAGE_ALIGNMENT - 1));
    uint64_t *const full = reinterpret_cast<uint64_t *>(stages + STAGES * PIECE), *const empty = full + STAGES;
    constexpr int PART = PIECE / CLUSTER;
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) barrier_init(full + s, 1), barrier_init(empty + s, CLUSTER);
        barriers_done();
    }
    __syncthreads();
    if (CLUSTER > 1) cluster_meet();
    if (threadIdx.x == 0) {
        const int rank = blockIdx.x % CLUSTER;
        for (int i = 0; i < a.rounds + STAGES; i++) {
            const int s = i % STAGES, turn = i / STAGES;
            if (i >= STAGES) {
                barrier_wait(full + s, (turn - 1) % 2);
                for (int other = 0; other < CLUSTER; other++) barrier_arrive_there(empty + s, other);
            }
            if (i >= a.rounds) continue;
            const unsigned char *const from = a.from + (blockIdx.x / CLUSTER * (int64_t)APART + i) % a.pieces * PIECE + rank * PART;
            barrier_wait(empty + s, turn % 2 ^ 1);
            barrier_expect(full + s, PIECE);
            copy_bulk_to(stages + s * PIECE + rank * PART, from, PART, full + s, (1 << CLUSTER) - 1);
        }
    }
    __syncwarp();
    if (CLUSTER > 1) cluster_meet();
}

#define KERNEL(count)                                                                              \
    __global__ void __launch_bounds__(THREADS, 1) bring_##count(PARAMETER struct arguments a) { bring<count>(a); }
KERNEL(1)
KERNEL(2)
KERNEL(4)

/* `rounds` pieces to each of *blocks thread blocks, in clusters of 1, 2 or 4; returns an error of the runtime. */
extern "C" __attribute__((visibility("default"))) int l2_bring(const void *from, int64_t bytes, int cluster, int rounds, void *stream, int *blocks)
{
    void (*const kernel)(struct arguments) = cluster == 1 ? bring_1 : cluster == 2 ? bring_2 : bring_4;
    struct arguments a = {(const unsigned char *)from, bytes / PIECE, rounds};
    cudaLaunchAttribute wanted = {};
    wanted.id = cudaLaunchAttributeClusterDimension;
    wanted.val.clusterDim.x = (unsigned)cluster, wanted.val.clusterDim.y = wanted.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)cluster), config.blockDim = dim3(THREADS), config.dynamicSmemBytes = BYTES;
    config.stream = (cudaStream_t)stream, config.attrs = &wanted, config.numAttrs = 1;
    int clusters = 0;
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES);
    if (!error) error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
    config.gridDim = dim3((unsigned)(clusters * cluster)), *blocks = clusters * cluster;
    return error ? error : cudaLaunchKernelEx(&config, kernel, a);
}

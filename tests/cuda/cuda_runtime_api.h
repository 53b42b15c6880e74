/* The C interface of the CUDA runtime for kernels that come as LLVM IR and run on the CPU: see cuda_runtime.h, and
 * tests/mlir_gpu_emulation.py, which puts the functions below in the place of the GPU's own. */
#pragma once
#include "cuda_runtime.h"

typedef struct emulated_library *cudaLibrary_t;
typedef void (*cudaKernel_t)(void *parameters);

extern "C" {
cudaKernel_t emulated_kernel(const char *name);

unsigned emulated_tid_x(void) { return emulation::current; }
unsigned emulated_ctaid_x(void) { return emulation::block_index.x; }
void emulated_barrier(int) { emulation::barrier(); }
void *emulated_shared(int64_t bytes) /* at a multiple of 32 bytes, as the kernels ask for it */
{
    return (void *)(((uintptr_t)emulation::shared(1, (size_t)bytes + 16) + 31) / 32 * 32);
}
float emulated_shuffle_f32(int mask, float value, int distance, int) { return __shfl_xor_sync((unsigned)mask, value, distance); }
int emulated_shuffle_i32(int mask, int value, int distance, int) { return __shfl_xor_sync((unsigned)mask, value, distance); }
float __nv_expf(float v) { return expf(v); }
float __nv_tanhf(float v) { return tanhf(v); }
float __nv_normcdff(float v) { return normcdff(v); }
double __nv_exp(double v) { return exp(v); }
double __nv_tanh(double v) { return tanh(v); }
double __nv_normcdf(double v) { return normcdf(v); }
}

static inline cudaError_t cudaLibraryLoadData(cudaLibrary_t *library, const void *code, ...)
{
    *library = (cudaLibrary_t)(uintptr_t)code;
    return cudaSuccess;
}
static inline cudaError_t cudaLibraryUnload(cudaLibrary_t) { return cudaSuccess; }
static inline cudaError_t cudaLibraryGetKernel(cudaKernel_t *kernel, cudaLibrary_t, const char *name)
{
    *kernel = emulated_kernel(name);
    return cudaSuccess;
}
static inline cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **parameters, size_t bytes, cudaStream_t)
{
    emulation::kernel = (cudaKernel_t)kernel, emulation::argument = parameters;
    return emulation::launch(grid, block, bytes);
}

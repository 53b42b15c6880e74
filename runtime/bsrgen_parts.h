/* The host's part of a .cu whose device's part NVRTC has compiled: its machine code in a file, linked in as data.  Only races
 * of plans are built so: no fatbin, code for one GPU.  Kernels are stubs, as nvcc makes them; here a table knows what they
 * stand for, and the functions of the runtime that take kernels look there first. */
#ifndef BSRGEN_PARTS_H
#define BSRGEN_PARTS_H
#include <cuda_runtime_api.h>

__asm__(".pushsection .rodata\n.balign 64\nbsrgen_machine_code:\n.incbin \"" BSRGEN_CUBIN "\"\n.popsection\n");
extern "C" const unsigned char bsrgen_machine_code[];

struct found_kernel {
    const char *name; /* as NVRTC has mangled it */
    const void *stub;
    cudaKernel_t kernel;
};
static found_kernel *found_kernels;
static int found_count;

/* Once, when the library is loaded.  Where it fails, a call returns the error of a kernel that is not there. */
static void find_kernels(found_kernel *kernels, int count)
{
    cudaLibrary_t library;
    cudaError_t error = cudaLibraryLoadData(&library, bsrgen_machine_code, NULL, NULL, 0, NULL, NULL, 0);
    for (int i = 0; !error && i < count; i++) error = cudaLibraryGetKernel(&kernels[i].kernel, library, kernels[i].name);
    found_kernels = kernels, found_count = count;
}

template <class F> static const void *code_of(F *stub)
{
    for (int i = 0; i < found_count; i++)
        if (found_kernels[i].stub == (const void *)stub) return found_kernels[i].kernel;
    return NULL;
}

template <class F> static cudaError_t launch_stub(F *stub, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream)
{
    return cudaLaunchKernel(code_of(stub), grid, block, arguments, shared, stream);
}

template <class F> static cudaError_t ask_stub(cudaFuncAttributes *to, F *stub) { return cudaFuncGetAttributes(to, code_of(stub)); }

/* Of Hopper's kernels: clusters, and more shared memory than others have. */
template <class A> static cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*stub)(A), A &a)
{
    void *arguments[] = {&a};
    return cudaLaunchKernelExC(config, code_of(stub), arguments);
}
template <class F> static cudaError_t allow_stub(F *stub, cudaFuncAttribute what, int value) { return cudaFuncSetAttribute(code_of(stub), what, value); }
template <class F> static cudaError_t clusters_of_stub(int *clusters, F *stub, const cudaLaunchConfig_t *config)
{
    return cudaOccupancyMaxActiveClusters(clusters, code_of(stub), config);
}

#define cudaFuncSetAttribute allow_stub
#define cudaOccupancyMaxActiveClusters clusters_of_stub
#define cudaLaunchKernel launch_stub
#define cudaFuncGetAttributes ask_stub
#endif

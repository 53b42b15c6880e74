/* The host's part of a kernel whose device's part NVRTC has compiled: machine code in a file, linked in as data.  Only
 * races of plans are built so: no fatbin, code for one GPU. */
#ifndef BSRGEN_PARTS_H
#define BSRGEN_PARTS_H
#include <cuda_runtime_api.h>

__asm__(".pushsection .rodata\n.balign 64\nbsrgen_machine_code:\n.incbin \"" BSRGEN_CUBIN "\"\n.popsection\n");
extern "C" const unsigned char bsrgen_machine_code[];
static const char *const kernel_names[] = {BSRGEN_KERNELS}; /* as NVRTC has mangled them */

/* In place of what nvcc would register.  Where it fails, the kernels stay NULL and a call returns the driver's error. */
static void find_kernels(cudaKernel_t *const *kernels, int count)
{
    cudaLibrary_t library;
    cudaError_t error = cudaLibraryLoadData(&library, bsrgen_machine_code, NULL, NULL, 0, NULL, NULL, 0);
    for (int i = 0; !error && i < count; i++) error = cudaLibraryGetKernel(kernels[i], library, kernel_names[i]);
}
#endif

/* The matrix units, from one warp: tiles of 16 tokens x 32 bytes of features x 8 rows of W.
 * Layouts of fragments: PTX ISA 8.5, sections 9.7.14.5.7 to 9.7.14.5.10 (mma.m16n8k8, k16, k32) and 9.7.14.5.15 (ldmatrix). */
#ifndef BSRGEN_MMA_H
#define BSRGEN_MMA_H
#if defined __CUDA_ARCH__ && __CUDA_ARCH__ < 800
#define BSRGEN_TURING /* sm_75: half as many features in a product of f16, no bf16, no copies that land later */
#endif
#ifndef BSRGEN_EMULATION /* tests/cuda/cuda_runtime.h has its own */

/* Four 8x8 matrices of 16-bit elements: lane l gives the address of row l % 8 of matrix l / 8. */
DEVICE void load_matrices(uint32_t (&a)[4], const void *shared)
{
    const unsigned at = (unsigned)__cvta_generic_to_shared(shared);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(at) : "memory");
}

/* The same, each matrix transposed. */
DEVICE void load_matrices_transposed(uint32_t (&a)[4], const void *shared)
{
    const unsigned at = (unsigned)__cvta_generic_to_shared(shared);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(at) : "memory");
}

#ifdef BSRGEN_TURING
/* d[16 tokens x 8 rows] += a[16 tokens x 8 features] * b[8 features x 8 rows]. */
DEVICE void multiply_half(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b)
{
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(b));
}
#else
/* d[16 tokens x 8 rows] += a[16 tokens x 32 bytes of features] * b[as many features x 8 rows]. */
DEVICE void multiply_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t *b)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

DEVICE void multiply_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t *b)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

DEVICE void multiply_s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t *b)
{
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#if !defined __CUDA_ARCH__ || __CUDA_ARCH__ >= 890
DEVICE void multiply_e4m3(float (&d)[4], const uint32_t (&a)[4], const uint32_t *b)
{
    asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

/* The first `bytes` of 16 from global to shared memory, zeros for the rest; there after copies_wait and a barrier. */
DEVICE void copy_later(void *shared, const void *global, int bytes)
{
    const unsigned to = (unsigned)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" : : "r"(to), "l"(global), "r"(bytes) : "memory");
}

/* The copies since the last call become one group. */
DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" : : : "memory"); }

/* All groups of this thread but the last LEFT have landed. */
template <int LEFT> DEVICE void copies_wait() { asm volatile("cp.async.wait_group %0;" : : "n"(LEFT) : "memory"); }
#endif
#endif
#ifdef BSRGEN_TURING
DEVICE void multiply_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t *b)
{
    multiply_half(d, a[0], a[1], b[0]);
    multiply_half(d, a[2], a[3], b[1]);
}

DEVICE void copy_later(void *shared, const void *global, int bytes)
{
    const uint16_t *from = (const uint16_t *)global;
    uint16_t part[8] = {};
    if (bytes == 16) {
        load_vector(part, from);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (2 * i < bytes) part[i] = from[i];
    }
    store_vector((uint16_t *)shared, part);
}

DEVICE void copies_commit() {}
template <int LEFT> DEVICE void copies_wait() {}
#endif
#define multiply_matrices NAME_OF(multiply_, W_KIND)
#endif

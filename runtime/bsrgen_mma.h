/* The matrix units of sm_80 and later, from one warp: tiles of 16 tokens x 16 features x 8 rows of W.
 * Layouts of fragments: PTX ISA 8.5, sections 9.7.14.5.8 (mma.m16n8k16) and 9.7.14.5.15 (ldmatrix). */
#ifndef BSRGEN_MMA_H
#define BSRGEN_MMA_H
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

/* d[16 tokens x 8 rows] += a[16 tokens x 16 features] * b[16 features x 8 rows]. */
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

/* The first `bytes` of 16 from global to shared memory, zeros for the rest; there after copies_done and a barrier. */
DEVICE void copy_later(void *shared, const void *global, int bytes)
{
    const unsigned to = (unsigned)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" : : "r"(to), "l"(global), "r"(bytes) : "memory");
}

DEVICE void copies_done() { asm volatile("cp.async.wait_all;" : : : "memory"); }

/* The copies since the last call become one group. */
DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" : : : "memory"); }

/* All groups of this thread but the last LEFT have landed. */
template <int LEFT> DEVICE void copies_wait() { asm volatile("cp.async.wait_group %0;" : : "n"(LEFT) : "memory"); }
#endif
#define multiply_matrices NAME_OF(multiply_, W_KIND)
#endif

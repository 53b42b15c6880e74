/* One vector type per kernel, in GCC vector extensions (gcc >= 12, clang >= 15): the same text runs on SSE2, AVX2,
 * AVX-512 and NEON.  Before including it: REAL (float or double), REAL_BYTES, LANES (power of two).
 * No intrinsics: their headers take compilers 0.15 s a file (gcc 12.2), a third of what a kernel of float32 takes in all. */
#ifndef BSRGEN_SIMD_H
#define BSRGEN_SIMD_H
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline, unused))
#define NOINLINE static __attribute__((noinline, unused))
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 64")
#endif

typedef REAL real;
#if REAL_BYTES == 4
typedef int32_t bits; /* an integer as wide as a lane */
#else
typedef int64_t bits;
#endif
typedef real vec __attribute__((vector_size(LANES * REAL_BYTES)));
typedef int64_t words __attribute__((vector_size(LANES * REAL_BYTES)));
typedef bits ivec __attribute__((vector_size(LANES * REAL_BYTES)));

INLINE vec load(const real *p) { vec v; memcpy(&v, p, sizeof v); return v; }
INLINE void store(real *p, vec v) { memcpy(p, &v, sizeof v); }
INLINE int64_t load_word(const void *p) { int64_t w; memcpy(&w, p, 8); return w; }
INLINE vec zero(void) { return (vec){0}; }
INLINE vec splat(real s) { return s - (vec){0}; } /* s - 0 is s for every s, -0 and NaN included: folds to a broadcast */
INLINE vec choose(ivec mask, vec a, vec b) { return (vec)(((ivec)a & mask) | ((ivec)b & ~mask)); }

struct bytes16 { char b[16]; } __attribute__((may_alias)); /* what an instruction reads or writes */
struct bytes32 { char b[32]; } __attribute__((may_alias));
struct bytes64 { char b[64]; } __attribute__((may_alias));

/* v, a product that no sum takes in: of two products in a sum the compiler would contract one here, the other there. */
INLINE vec rounded(vec v)
{
#if defined __AVX512F__ && LANES * REAL_BYTES <= 64
    __asm__("" : "+v"(v));
#elif (defined __AVX__ && LANES * REAL_BYTES <= 32) || (defined __SSE2__ && LANES * REAL_BYTES <= 16)
    __asm__("" : "+x"(v));
#elif defined __aarch64__ && LANES * REAL_BYTES <= 16
    __asm__("" : "+w"(v));
#else /* no register holds it */
    __asm__("" : "+m"(v));
#endif
    return v;
}

#if defined __AVX512F__ && LANES * REAL_BYTES == 64
#define WHOLE struct bytes64
#elif defined __AVX512VL__ && LANES * REAL_BYTES == 32
#define WHOLE struct bytes32
#elif defined __AVX512VL__ && LANES * REAL_BYTES == 16
#define WHOLE struct bytes16
#endif
#ifdef WHOLE
#if REAL_BYTES == 4
#define MASKED "vmovups"
#else
#define MASKED "vmovupd"
#endif
#endif

/* The first `count` lanes of p, zeros behind them.  0 <= count <= LANES. */
INLINE vec load_part(const real *p, int count)
{
    vec v;
#ifdef MASKED
    __asm__(MASKED " %1, %0%{%2%}%{z%}" : "=v"(v) : "m"(*(const WHOLE *)p), "Yk"((uint16_t)((1u << count) - 1)));
#else
    v = zero();
    for (int i = 0; i < count; i++) v[i] = p[i];
#endif
    return v;
}

/* Writes the first `count` lanes of v and nothing else. */
INLINE void store_part(real *p, vec v, int count)
{
#ifdef MASKED
    __asm__(MASKED " %1, %0%{%2%}" : "+m"(*(WHOLE *)p) : "v"(v), "Yk"((uint16_t)((1u << count) - 1)));
#else
    for (int i = 0; i < count; i++) p[i] = v[i];
#endif
}

#if LANES == 16
#define LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif LANES == 8
#define LOW 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH 4, 12, 5, 13, 6, 14, 7, 15
#elif LANES == 4
#define LOW 0, 4, 1, 5
#define HIGH 2, 6, 3, 7
#elif LANES == 2
#define LOW 0, 2
#define HIGH 1, 3
#endif

/* v[i][j] <-> v[j][i] in registers: log2(LANES) perfect shuffles (Stone, IEEE Trans. Computers C-20, 1971). */
INLINE void transpose(vec v[LANES])
{
    UNROLL
    for (int step = 1; step < LANES; step *= 2) {
        vec u[LANES];
        UNROLL
        for (int i = 0; i < LANES / 2; i++) {
            u[2 * i] = __builtin_shufflevector(v[i], v[i + LANES / 2], LOW);
            u[2 * i + 1] = __builtin_shufflevector(v[i], v[i + LANES / 2], HIGH);
        }
        UNROLL
        for (int i = 0; i < LANES; i++) v[i] = u[i];
    }
}
#endif

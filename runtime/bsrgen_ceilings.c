/* Ceilings of one core, as two tables: multiply-add peaks and read rates, one row per ISA level, operand and unrolling.

   A peak function runs n rounds of A independent multiply-adds acc[j] += x * y.  Each is one opaque asm statement, so
   the compiler can neither fold the chains nor lift a load out of the loop.  How many accumulators hide latency times
   ports differs between cores: ceilings.py times every row and keeps the best.  A memory operand is element j of the
   first A vectors (or scalars) at p, the same in every round: out of L1. */
#include <stddef.h>
#include <string.h>

typedef float f32x4 __attribute__((vector_size(16)));
typedef double f64x2 __attribute__((vector_size(16)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef double f64x4 __attribute__((vector_size(32)));
typedef float f32x16 __attribute__((vector_size(64)));
typedef double f64x8 __attribute__((vector_size(64)));

struct peak {
  const char *level, *dtype, *operand;
  int lanes, accumulators;
  void (*run)(const char *p, ptrdiff_t n);
};
struct read {
  const char *level;
  int vectors; /* a pass reads a multiple of 16 vectors of 64 bytes */
  void (*run)(const char *p, ptrdiff_t bytes, ptrdiff_t passes);
};

/* S(0, ...) S(1, ...) ... */
#define ON8(S, ...)                                                                                                    \
  S(0, __VA_ARGS__) S(1, __VA_ARGS__) S(2, __VA_ARGS__) S(3, __VA_ARGS__)                                              \
  S(4, __VA_ARGS__) S(5, __VA_ARGS__) S(6, __VA_ARGS__) S(7, __VA_ARGS__)
#define ON10(S, ...) ON8(S, __VA_ARGS__) S(8, __VA_ARGS__) S(9, __VA_ARGS__)
#define ON12(S, ...) ON10(S, __VA_ARGS__) S(10, __VA_ARGS__) S(11, __VA_ARGS__)
#define ON16(S, ...)                                                                                                   \
  ON12(S, __VA_ARGS__) S(12, __VA_ARGS__) S(13, __VA_ARGS__) S(14, __VA_ARGS__) S(15, __VA_ARGS__)
#define ON24(S, ...)                                                                                                   \
  ON16(S, __VA_ARGS__) S(16, __VA_ARGS__) S(17, __VA_ARGS__) S(18, __VA_ARGS__) S(19, __VA_ARGS__)                     \
  S(20, __VA_ARGS__) S(21, __VA_ARGS__) S(22, __VA_ARGS__) S(23, __VA_ARGS__)

/* In ASM: %0 accumulator, %1 scratch, %2 and %3 registers, %c5(%4) or [%4, %c5] element J of type M at p. */
#define INIT(J, V) V acc##J = x;
#define STEP(J, V, M, C, ASM)                                                                                          \
  {                                                                                                                    \
    V t;                                                                                                               \
    __asm__ volatile(ASM : "+" C(acc##J), "=&" C(t) : C(x), C(y), "r"(p), "i"(J * sizeof(M)));                         \
  }
#define KEEP(J, C) __asm__ volatile("" ::C(acc##J));
#define PEAK(NAME, TARGET, V, M, C, A, ASM)                                                                            \
  TARGET static void NAME(const char *p, ptrdiff_t n) {                                                                \
    V x, y;                                                                                                            \
    memcpy(&x, p, sizeof x);                                                                                           \
    memcpy(&y, p + sizeof x, sizeof y);                                                                                \
    ON##A(INIT, V) for (; n > 0; n--) { ON##A(STEP, V, M, C, ASM) } ON##A(KEEP, C)                                     \
  }

/* Sixteen loads of V a step, one after the other through the buffer; ASM loads %1 into %0. */
#define READ(NAME, TARGET, V, C, ASM)                                                                                  \
  TARGET static void NAME(const char *p, ptrdiff_t bytes, ptrdiff_t passes) {                                          \
    for (; passes > 0; passes--) {                                                                                     \
      for (const V *v = (const V *)p, *end = (const V *)(p + bytes); v < end; v += 16) {                               \
        _Pragma("GCC unroll 16") for (int j = 0; j < 16; j++) {                                                        \
          V t;                                                                                                         \
          __asm__ volatile(ASM : "=" C(t) : "m"(v[j]));                                                                \
        }                                                                                                              \
      }                                                                                                                \
    }                                                                                                                  \
  }

/* The rows: FOR_EACH_PEAK(X) is X(level, target, dtype, V, lanes, operand, M, constraint, A, asm). */
#if defined(__x86_64__)
#define SSE2
#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512f")))
#define SSE2_REG(P) "movaps %2, %1\n\tmul" P " %3, %1\n\tadd" P " %1, %0"
#define SSE2_MEM(P) "movaps %c5(%4), %1\n\tmul" P " %2, %1\n\tadd" P " %1, %0"
#define FMA_REG(P) "vfmadd231" P " %3, %2, %0"
#define FMA_MEM(P) "vfmadd231" P " %c5(%4), %2, %0"
#define AVX2_BCAST(P, S) "vbroadcast" S " %c5(%4), %1\n\tvfmadd231" P " %1, %2, %0"
#define AVX512_BCAST(P, N) "vfmadd231" P " %c5(%4)%{1to" N "%}, %2, %0"
#define SSE2_ROWS(X, A)                                                                                                \
  X(sse2, SSE2, f32, f32x4, 4, reg, f32x4, "x", A, SSE2_REG("ps"))                                                     \
  X(sse2, SSE2, f32, f32x4, 4, mem, f32x4, "x", A, SSE2_MEM("ps"))                                                     \
  X(sse2, SSE2, f64, f64x2, 2, reg, f64x2, "x", A, SSE2_REG("pd"))                                                     \
  X(sse2, SSE2, f64, f64x2, 2, mem, f64x2, "x", A, SSE2_MEM("pd"))
#define AVX2_ROWS(X, A)                                                                                                \
  X(avx2, AVX2, f32, f32x8, 8, reg, f32x8, "x", A, FMA_REG("ps"))                                                      \
  X(avx2, AVX2, f32, f32x8, 8, mem, f32x8, "x", A, FMA_MEM("ps"))                                                      \
  X(avx2, AVX2, f32, f32x8, 8, bcast, float, "x", A, AVX2_BCAST("ps", "ss"))                                           \
  X(avx2, AVX2, f64, f64x4, 4, reg, f64x4, "x", A, FMA_REG("pd"))                                                      \
  X(avx2, AVX2, f64, f64x4, 4, mem, f64x4, "x", A, FMA_MEM("pd"))                                                      \
  X(avx2, AVX2, f64, f64x4, 4, bcast, double, "x", A, AVX2_BCAST("pd", "sd"))
#define AVX512_ROWS(X, A)                                                                                              \
  X(avx512, AVX512, f32, f32x16, 16, reg, f32x16, "v", A, FMA_REG("ps"))                                               \
  X(avx512, AVX512, f32, f32x16, 16, mem, f32x16, "v", A, FMA_MEM("ps"))                                               \
  X(avx512, AVX512, f32, f32x16, 16, bcast, float, "v", A, AVX512_BCAST("ps", "16"))                                   \
  X(avx512, AVX512, f64, f64x8, 8, reg, f64x8, "v", A, FMA_REG("pd"))                                                  \
  X(avx512, AVX512, f64, f64x8, 8, mem, f64x8, "v", A, FMA_MEM("pd"))                                                  \
  X(avx512, AVX512, f64, f64x8, 8, bcast, double, "v", A, AVX512_BCAST("pd", "8"))
#define FOR_EACH_PEAK(X)                                                                                               \
  SSE2_ROWS(X, 8) SSE2_ROWS(X, 12) AVX2_ROWS(X, 8) AVX2_ROWS(X, 10) AVX2_ROWS(X, 12)                                   \
  AVX512_ROWS(X, 8) AVX512_ROWS(X, 12) AVX512_ROWS(X, 16) AVX512_ROWS(X, 24)
#define FOR_EACH_READ(X)                                                                                               \
  X(sse2, SSE2, f32x4, "x", "movaps %1, %0")                                                                           \
  X(avx2, AVX2, f32x8, "x", "vmovaps %1, %0")                                                                          \
  X(avx512, AVX512, f32x16, "v", "vmovaps %1, %0")
#elif defined(__aarch64__)
#define NEON
#define NEON_ROWS(X, A)                                                                                                \
  X(neon, NEON, f32, f32x4, 4, reg, f32x4, "w", A, "fmla %0.4s, %2.4s, %3.4s")                                         \
  X(neon, NEON, f32, f32x4, 4, mem, f32x4, "w", A, "ldr %q1, [%4, %c5]\n\tfmla %0.4s, %2.4s, %1.4s")                          \
  X(neon, NEON, f64, f64x2, 2, reg, f64x2, "w", A, "fmla %0.2d, %2.2d, %3.2d")                                         \
  X(neon, NEON, f64, f64x2, 2, mem, f64x2, "w", A, "ldr %q1, [%4, %c5]\n\tfmla %0.2d, %2.2d, %1.2d")
#define FOR_EACH_PEAK(X) NEON_ROWS(X, 8) NEON_ROWS(X, 12) NEON_ROWS(X, 16) NEON_ROWS(X, 24)
#define FOR_EACH_READ(X) X(neon, NEON, f32x4, "w", "ldr %q0, %1")
#else
#error "no ceilings for this architecture yet: add its rows"
#endif

#define DEFINE_PEAK(LEVEL, TARGET, DTYPE, V, LANES, OPERAND, M, C, A, ASM)                                             \
  PEAK(peak_##LEVEL##_##DTYPE##_##OPERAND##_##A, TARGET, V, M, C, A, ASM)
#define PEAK_ROW(LEVEL, TARGET, DTYPE, V, LANES, OPERAND, M, C, A, ASM)                                                \
  {#LEVEL, #DTYPE, #OPERAND, LANES, A, peak_##LEVEL##_##DTYPE##_##OPERAND##_##A},
#define DEFINE_READ(LEVEL, TARGET, V, C, ASM) READ(read_##LEVEL, TARGET, V, C, ASM)
#define READ_ROW(LEVEL, TARGET, V, C, ASM) {#LEVEL, sizeof(V), read_##LEVEL},

FOR_EACH_PEAK(DEFINE_PEAK)
FOR_EACH_READ(DEFINE_READ)

const struct peak peaks[] = {FOR_EACH_PEAK(PEAK_ROW){0}};
const struct read reads[] = {FOR_EACH_READ(READ_ROW){0}};

int has_level(const char *level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!strcmp(level, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (!strcmp(level, "avx512")) return __builtin_cpu_supports("avx512f") != 0;
#endif
  return !strcmp(level, "sse2") || !strcmp(level, "neon");
}

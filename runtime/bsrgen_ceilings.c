/* Ceilings of one core, as two tables: multiply-add peaks and read rates, one row per ISA level, operand and unrolling.

   A peak function runs n rounds of A independent multiply-adds acc[j] += x * y.  Each is one opaque asm statement, so
   the compiler can neither fold the chains nor lift a load out of the loop.  How many accumulators hide latency times
   ports differs between cores: ceilings.py times every row and keeps the best.  A memory operand is element j of the
   first A vectors (or scalars) at p, the same in every round: out of L1.  Dot products count as the multiply-adds that
   they are: lanes is 2 or 4 a 32-bit accumulator.  So do products of matrix tiles, whose accumulators are tiles. */
#include <stddef.h>
#include <string.h>
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
/* Dot products of pairs of bf16 and of quadruples of u8 and s8, with accumulators of 32 bits. */
#define AVXVNNI __attribute__((target("avxvnni")))
#define AVX512VNNI __attribute__((target("avx512vnni")))
#define AVX512BF16 __attribute__((target("avx512bf16")))
#define VEX_REG "%{vex%} vpdpbusd %3, %2, %0"
#define VEX_MEM "%{vex%} vpdpbusd %c5(%4), %2, %0"
#define VEX_BCAST "vbroadcastss %c5(%4), %1\n\t%{vex%} vpdpbusd %1, %2, %0"
#define DOT_REG(OP) OP " %3, %2, %0"
#define DOT_MEM(OP) OP " %c5(%4), %2, %0"
#define DOT_BCAST(OP) OP " %c5(%4)%{1to16%}, %2, %0"
#define AVXVNNI_ROWS(X, A)                                                                                             \
  X(avxvnni, AVXVNNI, s8, f32x8, 32, reg, f32x8, "x", A, VEX_REG)                                                      \
  X(avxvnni, AVXVNNI, s8, f32x8, 32, mem, f32x8, "x", A, VEX_MEM)                                                      \
  X(avxvnni, AVXVNNI, s8, f32x8, 32, bcast, float, "x", A, VEX_BCAST)
#define AVX512_DOT_ROWS(X, A)                                                                                          \
  X(avx512vnni, AVX512VNNI, s8, f32x16, 64, reg, f32x16, "v", A, DOT_REG("vpdpbusd"))                                  \
  X(avx512vnni, AVX512VNNI, s8, f32x16, 64, mem, f32x16, "v", A, DOT_MEM("vpdpbusd"))                                  \
  X(avx512vnni, AVX512VNNI, s8, f32x16, 64, bcast, float, "v", A, DOT_BCAST("vpdpbusd"))                               \
  X(avx512bf16, AVX512BF16, bf16, f32x16, 32, reg, f32x16, "v", A, DOT_REG("vdpbf16ps"))                               \
  X(avx512bf16, AVX512BF16, bf16, f32x16, 32, mem, f32x16, "v", A, DOT_MEM("vdpbf16ps"))                               \
  X(avx512bf16, AVX512BF16, bf16, f32x16, 32, bcast, float, "v", A, DOT_BCAST("vdpbf16ps"))
#define FOR_EACH_PEAK(X)                                                                                               \
  SSE2_ROWS(X, 8) SSE2_ROWS(X, 12) AVX2_ROWS(X, 8) AVX2_ROWS(X, 10) AVX2_ROWS(X, 12)                                   \
  AVX512_ROWS(X, 8) AVX512_ROWS(X, 12) AVX512_ROWS(X, 16) AVX512_ROWS(X, 24)                                           \
  AVXVNNI_ROWS(X, 8) AVXVNNI_ROWS(X, 10) AVXVNNI_ROWS(X, 12)                                                           \
  AVX512_DOT_ROWS(X, 8) AVX512_DOT_ROWS(X, 12) AVX512_DOT_ROWS(X, 16) AVX512_DOT_ROWS(X, 24)

/* Full products of matrix tiles, 16 rows of 64 bytes, into four tiles: two of A with two of B, which a memory operand
   loads anew for every four products, as the usual kernel does.  No intrinsics, whose tiles gcc 12 lets nobody clobber. */
#define TILE_LOADS                                                                                                     \
  "tileloadd (%0,%1), %%tmm4\n\ttileloadd 1024(%0,%1), %%tmm5\n\t"                                                    \
  "tileloadd 2048(%0,%1), %%tmm6\n\ttileloadd 3072(%0,%1), %%tmm7\n\t"
#define TILE_PRODUCTS(OP)                                                                                              \
  OP " %%tmm6, %%tmm4, %%tmm0\n\t" OP " %%tmm7, %%tmm4, %%tmm1\n\t"                                                   \
  OP " %%tmm6, %%tmm5, %%tmm2\n\t" OP " %%tmm7, %%tmm5, %%tmm3"
#define TILE_PEAK(NAME, ASM)                                                                                           \
  __attribute__((target("amx-tile,amx-bf16,amx-int8"))) static void NAME(const char *p, ptrdiff_t n) {                 \
    struct { /* palette 1: colsb and rows of the eight tiles */                                                        \
      unsigned char palette, start, reserved[14];                                                                      \
      unsigned short colsb[16];                                                                                        \
      unsigned char rows[16];                                                                                          \
    } shape = {.palette = 1};                                                                                          \
    for (int i = 0; i < 8; i++) shape.colsb[i] = 64, shape.rows[i] = 16;                                               \
    __asm__ volatile("ldtilecfg %0" ::"m"(shape)); /* and all tiles are zero */                                        \
    __asm__ volatile(TILE_LOADS "" ::"r"(p), "r"((ptrdiff_t)64));                                                      \
    for (; n > 0; n--) __asm__ volatile(ASM ::"r"(p), "r"((ptrdiff_t)64));                                             \
    __asm__ volatile("tilerelease");                                                                                   \
  }
#define FOR_EACH_TILE_PEAK(X)                                                                                          \
  X(amx, bf16, 8192, reg, TILE_PRODUCTS("tdpbf16ps"))                                                                  \
  X(amx, bf16, 8192, mem, TILE_LOADS TILE_PRODUCTS("tdpbf16ps"))                                                       \
  X(amx, s8, 16384, reg, TILE_PRODUCTS("tdpbssd"))                                                                     \
  X(amx, s8, 16384, mem, TILE_LOADS TILE_PRODUCTS("tdpbssd"))
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
#define FOR_EACH_TILE_PEAK(X)
#define FOR_EACH_READ(X) X(neon, NEON, f32x4, "w", "ldr %q0, %1")
#else
#error "no ceilings for this architecture yet: add its rows"
#endif

#define DEFINE_PEAK(LEVEL, TARGET, DTYPE, V, LANES, OPERAND, M, C, A, ASM)                                             \
  PEAK(peak_##LEVEL##_##DTYPE##_##OPERAND##_##A, TARGET, V, M, C, A, ASM)
#define PEAK_ROW(LEVEL, TARGET, DTYPE, V, LANES, OPERAND, M, C, A, ASM)                                                \
  {#LEVEL, #DTYPE, #OPERAND, LANES, A, peak_##LEVEL##_##DTYPE##_##OPERAND##_##A},
#define DEFINE_TILE_PEAK(LEVEL, DTYPE, LANES, OPERAND, ASM) TILE_PEAK(peak_##LEVEL##_##DTYPE##_##OPERAND, ASM)
#define TILE_PEAK_ROW(LEVEL, DTYPE, LANES, OPERAND, ASM)                                                               \
  {#LEVEL, #DTYPE, #OPERAND, LANES, 4, peak_##LEVEL##_##DTYPE##_##OPERAND},
#define DEFINE_READ(LEVEL, TARGET, V, C, ASM) READ(read_##LEVEL, TARGET, V, C, ASM)
#define READ_ROW(LEVEL, TARGET, V, C, ASM) {#LEVEL, sizeof(V), read_##LEVEL},

FOR_EACH_PEAK(DEFINE_PEAK)
FOR_EACH_TILE_PEAK(DEFINE_TILE_PEAK)
FOR_EACH_READ(DEFINE_READ)

const struct peak peaks[] = {FOR_EACH_PEAK(PEAK_ROW) FOR_EACH_TILE_PEAK(TILE_PEAK_ROW){0}};
const struct read reads[] = {FOR_EACH_READ(READ_ROW){0}};

int has_level(const char *level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!strcmp(level, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (!strcmp(level, "avx512")) return __builtin_cpu_supports("avx512f") != 0;
  if (!strcmp(level, "avxvnni")) return __builtin_cpu_supports("avxvnni") != 0;
  if (!strcmp(level, "avx512vnni")) return __builtin_cpu_supports("avx512vnni") != 0;
  if (!strcmp(level, "avx512bf16")) return __builtin_cpu_supports("avx512bf16") != 0;
#if defined(__linux__)
  if (!strcmp(level, "amx")) /* and the kernel's permission for the tiles, ARCH_REQ_XCOMP_PERM of XTILEDATA */
    return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
           __builtin_cpu_supports("amx-int8") && !syscall(SYS_arch_prctl, 0x1023, 18);
#endif
#endif
  return !strcmp(level, "sse2") || !strcmp(level, "neon");
}

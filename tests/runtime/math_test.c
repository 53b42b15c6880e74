/* Per function f of bsrgen_math.h: test_f applies it to a multiple of LANES numbers, judge_f is libm in long double. */
#include "bsrgen_simd.h"
#include "bsrgen_math.h"
#include <math.h>

#define UNARY(f, exact) \
    void test_##f(const real *x, real *y, int64_t n) \
    { \
        for (int64_t i = 0; i < n; i += LANES) store(y + i, v_##f(load(x + i))); \
    } \
    void judge_##f(const real *x, long double *y, int64_t n) \
    { \
        for (int64_t i = 0; i < n; i++) { const long double v = (long double)x[i]; y[i] = exact; } \
    }
#define BINARY(f) \
    void test_##f(const real *a, const real *b, real *y, int64_t n) \
    { \
        for (int64_t i = 0; i < n; i += LANES) store(y + i, v_##f(load(a + i), load(b + i))); \
    }

UNARY(abs, fabsl(v))
UNARY(exp, expl(v))
UNARY(tanh, tanhl(v))
UNARY(erf, erfl(v))
UNARY(normcdf, erfcl(v * -0.707106781186547524400844362104849039L) / 2)
UNARY(sigmoid, 1 / (1 + expl(-v)))
BINARY(min)
BINARY(max)

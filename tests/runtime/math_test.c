/* Applies each function of bsrgen_math.h to arrays whose length is a multiple of LANES. */
#include "bsrgen_simd.h"
#include "bsrgen_math.h"

#define UNARY(f) \
    void test_##f(const real *x, real *y, int64_t n); \
    void test_##f(const real *x, real *y, int64_t n) { for (int64_t i = 0; i < n; i += LANES) store(y + i, v_##f(load(x + i))); }
UNARY(abs) UNARY(exp) UNARY(tanh) UNARY(erf) UNARY(normcdf) UNARY(sigmoid)
#define BINARY(f) \
    void test_##f(const real *a, const real *b, real *y, int64_t n); \
    void test_##f(const real *a, const real *b, real *y, int64_t n) { for (int64_t i = 0; i < n; i += LANES) store(y + i, v_##f(load(a + i), load(b + i))); }
BINARY(min) BINARY(max)

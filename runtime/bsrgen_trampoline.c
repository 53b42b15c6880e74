/* The call path from Python: one function for every artifact, and one thread pool.  cffi wraps these declarations. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include "bsrgen.h"
#include "bsrgen_parallel.h"

static int bsrgen_trampoline(void *function, int64_t n, const void *x, int64_t ldx, size_t x_bytes, void *y,
                             int64_t ldy, size_t y_bytes, const void *values,
                             const struct bsrgen_operand *operands, int threads)
{
    const uintptr_t a = (uintptr_t)x, b = (uintptr_t)y;
    if (a < b + y_bytes && b < a + x_bytes) return -1; /* which no kernel returns */
    const struct bsrgen_call call = {
        .n = n, .x = x, .ldx = ldx, .y = y, .ldy = ldy, .values = values, .operands = operands,
        .parallel = bsrgen_parallel, .threads = threads,
    };
    return ((int (*)(const struct bsrgen_call *))function)(&call);
}
static int64_t bsrgen_pack(void *function, const void *data, void *packed, int level)
{
    return ((int64_t (*)(const void *, void *, int))function)(data, packed, level);
}
static int64_t bsrgen_prepare(void *function, struct bsrgen_weight *weight, void *prepared, int values_only)
{
    weight->parallel = bsrgen_parallel;
    return ((int64_t (*)(const void *, void *, int))function)(weight, prepared, values_only);
}
static const char *bsrgen_info(void *function, int what) { return ((const char *(*)(int))function)(what); }
static void *bsrgen_open(const char *path) { return dlopen(path, RTLD_NOW | RTLD_LOCAL); }
static void *bsrgen_symbol(void *library, const char *name) { return dlsym(library, name); }
static const char *bsrgen_open_error(void) { return dlerror(); }

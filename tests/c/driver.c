/* Calls one kernel in every way that C can, with each buffer exactly as long as the contract says: for sanitizers, for
 * other architectures, and to be compared with numpy.  -DKERNEL=name -DHEADER='"name.h"' -DREAL=float -DM= -DK= -DVALUES=
 * -DLINEAR= -DOPERANDS='"rs"' (r: one per row, e: one per output, s: a scalar).  Prints n and the sum of Y for each n. */
#include HEADER
#include "bsrgen.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PASTE(a, b) a##b
#define NAME(kernel, suffix) PASTE(kernel, suffix)
#define CHECK(what) do { if (!(what)) { printf("line %d: %s\n", __LINE__, #what); exit(1); } } while (0)

enum { GAP = 3 }; /* between rows, where the leading dimension is longer than a row */

static REAL *reals(int64_t count, int64_t align)
{
    const size_t bytes = sizeof(REAL) * (size_t)count;
    void *p = align > 1 ? aligned_alloc((size_t)align, (bytes + (size_t)align - 1) / (size_t)align * (size_t)align) : malloc(bytes ? bytes : 1);
    CHECK(p);
    return p;
}

static int64_t span(int64_t rows, int64_t columns, int64_t ld) { return rows ? (rows - 1) * ld + columns : 0; }

/* -0.75 .. 0.75, equal for the same (feature, token) whatever the layout */
static REAL sample(int64_t feature, int64_t token) { return (REAL)((feature * 5 + token * 3) % 7 - 3) / 4; }

static void fill(REAL *a, int64_t features, int64_t n, int64_t ld)
{
    for (int64_t f = 0; f < features; f++)
        for (int64_t t = 0; t < n; t++) a[LINEAR ? t * ld + f : f * ld + t] = sample(f, t);
}

static int64_t ld_of(int64_t features, int64_t n, int64_t gap) { return (LINEAR ? features : n) + gap; }
static int64_t size_of(int64_t features, int64_t n, int64_t ld) { return LINEAR ? span(n, features, ld) : span(features, n, ld); }

static void run(int64_t n, int64_t gap, const REAL *packed)
{
    struct bsrgen_operand operands[8];
    const char *kinds = OPERANDS;
    for (int i = 0; kinds[i]; i++) {
        REAL *data = NULL;
        int64_t ld = 0;
        if (kinds[i] == 'r') {
            data = reals(M, 1);
            for (int m = 0; m < M; m++) data[m] = sample(m, i);
        } else if (kinds[i] == 'e') {
            ld = ld_of(M, n, gap);
            data = reals(size_of(M, n, ld), 1);
            fill(data, M, n, ld);
        }
        operands[i] = (struct bsrgen_operand){data, ld, 0.5 + i};
    }
    const int64_t ldx = ld_of(K, n, gap), ldy = ld_of(M, n, gap), size = size_of(M, n, ldy);
    REAL *x = reals(size_of(K, n, ldx), 1), *y = reals(size, 1), *first = reals(size, 1);
    fill(x, K, n, ldx);
    for (int threads = 1; threads <= 3; threads++) {
        for (int64_t i = 0; i < size; i++) y[i] = 99;
        fill(y, M, n, ldy);
        const struct bsrgen_call call = {n, x, ldx, y, ldy, packed, operands, NULL, threads};
        CHECK(NAME(KERNEL, _call)(&call) == 0);
        if (threads == 1) memcpy(first, y, sizeof(REAL) * (size_t)size);
        CHECK(memcmp(first, y, sizeof(REAL) * (size_t)size) == 0); /* the same bits, and nothing between the rows */
    }
    double sum = 0;
    const int64_t rows = LINEAR ? n : M, columns = LINEAR ? M : n;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < ldy && r * ldy + c < size; c++) {
            if (c < columns) sum += (double)y[r * ldy + c];
            else CHECK(y[r * ldy + c] == 99);
        }
    printf("%d %.17g\n", (int)n, sum);
    free(x), free(y), free(first);
    for (int i = 0; kinds[i]; i++) free((void *)operands[i].data);
}

int main(int argc, char **argv)
{
    static const int64_t tokens[] = {0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 67};
    FILE *file = argc == 2 ? fopen(argv[1], "rb") : NULL;
    CHECK(file);
    REAL *data = reals(VALUES, 1);
    CHECK(fread(data, sizeof(REAL), VALUES, file) == VALUES);
    fclose(file);
    const int64_t count = NAME(KERNEL, _pack)(NULL, NULL, -1);
    CHECK(count >= VALUES);
    REAL *packed = reals(count, 64);
    CHECK(NAME(KERNEL, _pack)(data, packed, -1) == count);
    free(data);
    for (size_t i = 0; i < sizeof tokens / sizeof *tokens; i++) {
        run(tokens[i], 0, NULL);
        run(tokens[i], GAP, packed);
    }
    free(packed);
    return 0;
}

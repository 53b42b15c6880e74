/* A C program around one kernel.  The build says which: -DKERNEL=name -DHEADER='"name.h"' -DM=rows -DK=columns. */
#include HEADER
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define PASTE(a, b) a##b
#define NAME(kernel, suffix) PASTE(kernel, suffix) /* NAME(KERNEL, _info) is spmm_..._info */

enum { TOKENS = 32, CALLS = 100 };

int main(void)
{
    float *x = malloc(sizeof *x * TOKENS * K), *y = malloc(sizeof *y * TOKENS * M), *bias = malloc(sizeof *bias * M);
    struct timespec start, end;
    double sum = 0;
    if (!x || !y || !bias) return 1;
    for (int i = 0; i < TOKENS * K; i++) x[i] = (float)(i % 7 - 3) / 4;
    for (int i = 0; i < M; i++) bias[i] = (float)(i % 5) / 8;

    timespec_get(&start, TIME_UTC);
    for (int i = 0; i < CALLS; i++) {
        const int status = KERNEL(TOKENS, x, K, y, M, bias, NULL, 0); /* NULL: the values in the library; 0: all cores */
        if (status) {
            fprintf(stderr, "status %d, missing CPU features: %s\n", status, NAME(KERNEL, _info)(1));
            return 1;
        }
    }
    timespec_get(&end, TIME_UTC);

    for (int i = 0; i < TOKENS * M; i++) sum += y[i];
    fprintf(stderr, "%s: %.1f us a call of %d tokens\n", NAME(KERNEL, _info)(2),
            ((double)(end.tv_sec - start.tv_sec) * 1e9 + (double)(end.tv_nsec - start.tv_nsec)) / 1e3 / (double)CALLS, TOKENS);
    printf("%.6f\n", sum);
    free(x), free(y), free(bias);
    return 0;
}

/* cuSPARSE's SpMM on BSR and Blocked-ELL, float32, on the CPU: that benchmarks/gpu/cusparse.py asks for what it means to.
 * Prototypes and numbers are those of cusparse.h 12.6. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

struct sparse { int64_t brows, bcols, R, C, most; const int *offsets, *columns; const float *values; };
struct dense { int64_t rows, cols, ld; float *values; int order; };

int cusparseCreate(void **handle) { return *handle = "", 0; }
int cusparseSetStream(void *handle, void *stream) { return !handle || (uintptr_t)stream != 77; }

int cusparseCreateBsr(
    struct sparse **to, int64_t brows, int64_t bcols, int64_t bnnz, int64_t R, int64_t C, void *offsets, void *columns, void *values,
    int offset_type, int column_type, int base, int type, int order)
{
    *to = malloc(sizeof **to);
    **to = (struct sparse){brows, bcols, R, C, 0, offsets, columns, values};
    return offset_type != 2 || column_type != 2 || base != 0 || type != 0 || order != 2 || ((int *)offsets)[brows] != bnnz ? 3 : 0;
}

int cusparseCreateBlockedEll(
    struct sparse **to, int64_t rows, int64_t cols, int64_t block, int64_t ell_cols, void *columns, void *values, int index_type,
    int base, int type)
{
    *to = malloc(sizeof **to);
    **to = (struct sparse){rows / block, cols / block, block, block, ell_cols / block, NULL, columns, values};
    return rows % block || ell_cols % block || index_type != 2 || base != 0 || type != 0 ? 3 : 0;
}

int cusparseCreateDnMat(struct dense **to, int64_t rows, int64_t cols, int64_t ld, void *values, int type, int order)
{
    *to = malloc(sizeof **to);
    **to = (struct dense){rows, cols, ld, values, order};
    return type != 0 || ld < (order == 1 ? rows : cols) ? 3 : 0;
}

int cusparseSpMM_bufferSize(
    void *handle, int a, int b, const float *alpha, struct sparse *A, struct dense *B, const float *beta, struct dense *C, int type,
    int algorithm, size_t *bytes)
{
    *bytes = 100;
    return !handle || a || b || *alpha != 1 || *beta != 0 || type || B->rows != A->bcols * A->C || C->rows != A->brows * A->R ||
                   B->cols != C->cols || algorithm != (A->offsets ? 14 : 13) ? 3 : 0;
}

static float *at(struct dense *m, int64_t i, int64_t j) { return m->values + (m->order == 1 ? j * m->ld + i : i * m->ld + j); }

int cusparseSpMM(
    void *handle, int a, int b, const float *alpha, struct sparse *A, struct dense *B, const float *beta, struct dense *C, int type,
    int algorithm, void *buffer)
{
    if (!handle || a || b || !alpha || !beta || type || algorithm < 13 || !buffer) return 3;
    for (int64_t i = 0; i < C->rows; i++)
        for (int64_t j = 0; j < C->cols; j++) *at(C, i, j) = 0;
    for (int64_t row = 0; row < A->brows; row++) {
        const int64_t first = A->offsets ? A->offsets[row] : row * A->most, last = A->offsets ? A->offsets[row + 1] : first + A->most;
        for (int64_t q = first; q < last; q++) {
            if (A->columns[q] < 0) continue;
            for (int64_t r = 0; r < A->R; r++)
                for (int64_t c = 0; c < A->C; c++) {
                    const float w = A->offsets ? A->values[(q * A->R + r) * A->C + c]
                                               : A->values[(row * A->R + r) * A->most * A->C + (q - first) * A->C + c];
                    for (int64_t j = 0; j < C->cols; j++) *at(C, row * A->R + r, j) += w * *at(B, A->columns[q] * A->C + c, j);
                }
        }
    }
    return 0;
}

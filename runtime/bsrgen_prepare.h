/* A pattern that comes with the call: checked, sorted where it must be, cut into panels.  One pass over what is sorted. */
#ifndef BSRGEN_PREPARE_H
#define BSRGEN_PREPARE_H
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include "bsrgen.h"

/* How a prepared weight begins; tables and packed values lie behind it at places that the kernel knows. */
struct bsrgen_prepared {
    uint64_t magic; /* of one plan of one kernel */
    int64_t blocks, segments;
    int64_t sorted; /* the weight's blocks come row by row, columns ascending; else order[] says where each is */
};

/* Blocks of the weight that one segment takes, in sorted order. */
struct bsrgen_run { uint32_t first, count; };

/* 0 where every index can be used; *rising says whether columns rise in each block row. */
__attribute__((unused)) static int bsrgen_check(const struct bsrgen_weight *w, int64_t rows, int64_t cols, int64_t most, int *rising)
{
    const int64_t n = w->blocks, *starts = w->indptr;
    if (n < 0 || n > most) return BSRGEN_TOO_MANY_BLOCKS;
    if (starts[0] != 0 || starts[rows] != n) return BSRGEN_BAD_INDPTR;
    for (int64_t i = 0; i < rows; i++)
        if (starts[i + 1] < starts[i]) return BSRGEN_BAD_INDPTR;
    int outside = 0;
    int32_t falls = 0;
    for (int64_t q = 0; q < n; q++) outside |= (uint32_t)w->indices[q] >= (uint32_t)cols;
    for (int64_t q = 1; q < n; q++) falls += w->indices[q] <= w->indices[q - 1];
    for (int64_t i = 0; i < rows; i++) { /* from row to row they may fall */
        const int64_t q = starts[i];
        if (q > 0 && starts[i + 1] > q) falls -= w->indices[q] <= w->indices[q - 1];
    }
    *rising = falls == 0;
    return outside ? BSRGEN_BAD_INDEX : 0;
}

/* order[blocks]: the blocks row by row, columns ascending, by two passes of counting; sorted[blocks]: their columns. */
__attribute__((unused)) static int bsrgen_sort(const struct bsrgen_weight *w, int64_t rows, int64_t cols, uint32_t *order, int32_t *sorted)
{
    struct place { uint32_t block, row; };
    const int64_t n = w->blocks;
    int64_t *next = calloc((size_t)(cols > rows ? cols : rows) + 1, sizeof *next);
    struct place *places = malloc(sizeof *places * (size_t)(n + 1));
    int status = next && places ? 0 : BSRGEN_PACK_NO_MEMORY;
    if (!status) {
        for (int64_t q = 0; q < n; q++) next[w->indices[q] + 1]++;
        for (int64_t j = 0; j < cols; j++) next[j + 1] += next[j];
        for (int64_t i = 0; i < rows; i++)
            for (int64_t q = w->indptr[i]; q < w->indptr[i + 1]; q++)
                places[next[w->indices[q]]++] = (struct place){(uint32_t)q, (uint32_t)i};
        memcpy(next, w->indptr, sizeof *next * (size_t)rows);
        for (int64_t q = 0; q < n; q++) order[next[places[q].row]++] = places[q].block;
        for (int64_t q = 0; q < n; q++) sorted[q] = w->indices[order[q]];
        for (int64_t i = 0; i < rows; i++)
            for (int64_t q = w->indptr[i] + 1; q < w->indptr[i + 1]; q++)
                if (sorted[q] == sorted[q - 1]) status = BSRGEN_DUPLICATE;
    }
    free(next), free(places);
    return status;
}

/* The first of j[from, end), which rise, that is `column` or more; 16 at a time, for they lie close. */
__attribute__((unused)) static inline int64_t bsrgen_lower(const int32_t *j, int64_t from, int64_t end, int32_t column)
{
    for (; from + 16 <= end; from += 16) {
        int less = 0;
        for (int q = 0; q < 16; q++) less += j[from + q] < column;
        if (less < 16) return from + less;
    }
    while (from < end && j[from] < column) from++;
    return from;
}

/* bits[bytes]: whether each of 8 * bytes marks, 0 or 1, is set; they are 0 afterwards. */
__attribute__((unused)) static inline void bsrgen_take_bits(uint64_t *marks, uint8_t *bits, int64_t bytes)
{
    for (int64_t b = 0; b < bytes; b++) {
        bits[b] = (uint8_t)(marks[b] * UINT64_C(0x0102040810204080) >> 56);
        marks[b] = 0;
    }
}
#endif

/* A pattern that comes with the call: checked, sorted where it must be, cut into panels.  Rows of blocks are independent but
 * for the places that counting gives them. */
#ifndef BSRGEN_PREPARE_H
#define BSRGEN_PREPARE_H
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include "bsrgen.h"
#if defined BSRGEN_BITS && defined __AVX512BW__
#include <immintrin.h>
#endif

/* How a prepared weight begins; tables and packed values lie behind it at places that the kernel knows. */
struct bsrgen_prepared {
    uint64_t magic; /* of one plan of one kernel */
    int64_t blocks, segments;
    int64_t sorted; /* the weight's blocks come row by row, columns ascending; else order[] says where each is */
};

/* Blocks of the weight that one segment takes, in sorted order. */
struct bsrgen_run { uint32_t first, count; };

/* starts[rows + 1]: the weight's indptr, where it and the number of blocks can be used. */
__attribute__((unused)) static int64_t bsrgen_take_starts(const struct bsrgen_weight *w, int64_t rows, int64_t most, uint32_t *starts)
{
    const int64_t n = w->blocks, *from = w->indptr;
    if (n < 0 || n > most) return BSRGEN_TOO_MANY_BLOCKS;
    if (from[0] != 0 || from[rows] != n) return BSRGEN_BAD_INDPTR;
    for (int64_t i = 0; i < rows; i++)
        if (from[i + 1] < from[i]) return BSRGEN_BAD_INDPTR;
    for (int64_t i = 0; i <= rows; i++) starts[i] = (uint32_t)from[i];
    return 0;
}

/* The first block row of part p of `parts` that have equally many blocks. */
__attribute__((unused)) static int64_t bsrgen_row_of(const uint32_t *starts, int64_t rows, int p, int parts)
{
    const int64_t want = (int64_t)starts[rows] * p / parts;
    int64_t low = 0, high = rows;
    if (p == parts) return rows;
    while (low < high) {
        const int64_t mid = (low + high) / 2;
        if ((int64_t)starts[mid] >= want) high = mid;
        else low = mid + 1;
    }
    return low;
}

/* Of one block row: *outside, whether a column is none of `cols`; *falls, whether one is not above the one before. */
__attribute__((unused)) static inline void bsrgen_look(const int32_t *j, int64_t count, int64_t cols, int *outside, int *falls)
{
    int out = count > 0 && (uint32_t)j[0] >= (uint32_t)cols, fall = 0;
    for (int64_t q = 1; q < count; q++) out |= (uint32_t)j[q] >= (uint32_t)cols, fall |= j[q] <= j[q - 1];
    *outside |= out, *falls |= fall;
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

/* The first of j[from, end), which rise, that is `column` or more: it lies close. */
__attribute__((unused)) static inline int64_t bsrgen_lower(const int32_t *j, int64_t from, int64_t end, int32_t column)
{
    while (from + 16 <= end && j[from + 15] < column) from += 16;
    if (from + 16 <= end) {
        int less = 0;
        for (int q = 0; q < 16; q++) less += j[from + q] < column;
        return from + less;
    }
    while (from < end && j[from] < column) from++;
    return from;
}

/* bits[bytes]: whether each of 8 * bytes marks, 0 or 1, is set; they are 0 afterwards. */
__attribute__((unused)) static inline void bsrgen_take_bits(uint64_t *marks, uint8_t *bits, int64_t bytes)
{
    int64_t vectors = 0; /* bytes that are taken eight at a time */
#if defined BSRGEN_BITS && defined __AVX512BW__
    vectors = bytes & ~INT64_C(7);
    for (int64_t b = 0; b < vectors; b += 8) {
        const __m512i v = _mm512_loadu_si512(marks + b);
        const uint64_t set = _mm512_test_epi8_mask(v, v);
        memcpy(bits + b, &set, 8);
        _mm512_storeu_si512(marks + b, _mm512_setzero_si512());
    }
#endif
    for (int64_t b = vectors; b < bytes; b++) {
        bits[b] = (uint8_t)(marks[b] * UINT64_C(0x0102040810204080) >> 56);
        marks[b] = 0;
    }
}
#endif

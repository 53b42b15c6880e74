/* The ABI between an artifact and whoever calls it.  Plain C; number below goes up when a field changes. */
#ifndef BSRGEN_H
#define BSRGEN_H
#include <stdint.h>

#define BSRGEN_ABI 2

enum bsrgen_status {
    BSRGEN_OK = 0,
    BSRGEN_NO_ISA = 1,      /* this CPU lacks features that every kernel of the artifact needs: NAME_info(1) lists them */
    BSRGEN_BAD_ARGUMENT = 2, /* negative n, a null pointer, a leading dimension shorter than a row, or an expert that is not there */
    BSRGEN_NO_MEMORY = 3,
    BSRGEN_NO_SCRATCH = 4,  /* of a GPU: none, or less than the call needs */
    BSRGEN_CUDA = 1000, /* and the CUDA runtime's own number on top: NAME_error has words for it */
};

/* NAME_pack returns the number of packed values, or one of these. */
enum bsrgen_pack_status { BSRGEN_PACK_NO_LEVEL = -1, BSRGEN_PACK_NO_MEMORY = -2 };

/* NAME_prepare returns bytes, one of the two above, or what is wrong with the pattern. */
enum bsrgen_prepare_status {
    BSRGEN_TOO_MANY_BLOCKS = -3, /* more than planned, or negative */
    BSRGEN_BAD_INDPTR = -4,      /* not 0 first and `blocks` last, or falling; new values: not those of the pattern prepared */
    BSRGEN_BAD_INDEX = -5,       /* a block column that there is not */
    BSRGEN_DUPLICATE = -6,       /* one block column twice in a block row */
};

/* An input of an epilogue: an array (with its leading dimension, for one value per output) or a scalar. */
struct bsrgen_operand {
    const void *data;
    int64_t ld;
    double scalar;
};

/* A block-sparse weight, as scipy's BSR has it; columns may come in any order, but each once in a block row. */
struct bsrgen_weight {
    int64_t blocks;
    const void *data;       /* [blocks][R][C], row-major */
    const int32_t *indices; /* [blocks]: block column of each */
    const int64_t *indptr;  /* [block rows + 1]: first block of each block row, and the end */
    void (*parallel)(int parts, void (*task)(void *context, int part, int parts), void *context); /* as in a call */
    int32_t threads;
};

/* One call.  Strides are leading dimensions in elements; rows are contiguous.  y must not overlap an input. */
struct bsrgen_call {
    int64_t n; /* tokens */
    const void *x;
    int64_t ldx;
    void *y;
    int64_t ldy;
    const void *values;                     /* packed by NAME_pack, 64-byte aligned; NULL: those in the artifact
                                             * of a pattern that comes with the call: made by NAME_prepare */
    const struct bsrgen_operand *operands;  /* in the order of the epilogue */
    void (*parallel)(int parts, void (*task)(void *context, int part, int parts), void *context); /* NULL: own threads */
    int32_t threads;                        /* at most; 0: all usable cores */
};
#endif

/* Rows of W whose stored elements lie close together: bits say to which lanes of a vector they belong (AVX-512).  Include
 * after bsrgen_product.h.  Before it:
 *   EXPAND_BYTES   of W that a bit stands for: 1 and 2 need VBMI2
 *   EXPAND_BITS    of one vector */
#ifndef BSRGEN_EXPAND_H
#define BSRGEN_EXPAND_H
#include <immintrin.h>

typedef NAME_OF(NAME_OF(uint, EXPAND_BITS), _t) stored_bits;

#if EXPAND_BITS * EXPAND_BYTES == 64
#define MM_W(op) NAME_OF(_mm512_, op)
#elif EXPAND_BITS * EXPAND_BYTES == 32
#define MM_W(op) NAME_OF(_mm256_, op)
#else
#define MM_W(op) NAME_OF(_mm_, op)
#endif
#if EXPAND_BYTES == 1
#define MM_EPI(op) MM_W(NAME_OF(op, epi8))
#elif EXPAND_BYTES == 2
#define MM_EPI(op) MM_W(NAME_OF(op, epi16))
#elif EXPAND_BYTES == 4
#define MM_EPI(op) MM_W(NAME_OF(op, epi32))
#else
#define MM_EPI(op) MM_W(NAME_OF(op, epi64))
#endif

#if EXPAND_BITS * EXPAND_BYTES == 64
typedef __m512i w_vector;
#elif EXPAND_BITS * EXPAND_BYTES == 32
typedef __m256i w_vector;
#else
typedef __m128i w_vector;
#endif

/* One vector of W, of which the stored elements begin at w; nothing behind them is read.  The zeros are hidden from the
 * compiler: Zen 5 lets an expansion wait for what its register held, and maskz forms in one register are a chain. */
INLINE xvec w_expand(const char *w, stored_bits stored)
{
    w_vector v = {0};
    __asm__("" : "+v"(v));
    v = MM_EPI(mask_expandloadu_)(v, stored, w);
    w_t row[LANES];
    memcpy(row, &v, sizeof row);
    return w_load(row);
}

/* sum + w * x for the stored lanes: Inf and NaN in the others of x reach nothing. */
INLINE avec mac_stored(avec sum, xvec w, xvec x, stored_bits stored)
{
#if INTEGER
    (void)stored;
    return mac_x(sum, w, x);
#elif GROUP > 1
    return mac_x(sum, w, (xvec)MM_EPI(maskz_mov_)(stored, (__m512i)x));
#elif REAL_BYTES == 4
    return (avec)_mm512_mask3_fmadd_ps((__m512)w, (__m512)x, (__m512)sum, stored);
#else
    return (avec)_mm512_mask3_fmadd_pd((__m512d)w, (__m512d)x, (__m512d)sum, stored);
#endif
}
#endif

/* bsrgen_live.h: which words of X hold something, and those alone, side by side.  Include after bsrgen_product.h.
 *   live_bits(v)              a bit for each lane whose word is not zero, of either sign; NaN is not
 *   keep_words(to, v, bits)   the words of `v` that have a bit, in order; writes LANES, of which the first count
 *   keep_places(to, at, bits) the places at + lane of the bits, likewise
 * One compress each on AVX-512 (Zen 5: to a register and stored; vpcompressd to memory takes 100 cycles there). */
#ifndef BSRGEN_LIVE_H
#define BSRGEN_LIVE_H
#if defined __AVX512F__
#include <immintrin.h>
#endif

typedef uint16_t place;
#if LANES == 16
typedef uint16_t live_t; /* the bits of a vector, so that 64 bits hold those of several */
#define LIVE_BITS 16
#else
typedef uint8_t live_t;
#define LIVE_BITS 8
#endif

/* The bits of a word without the signs of its elements: -0.0 is zero. */
#if INTEGER
#define WORD_MASK ((bits)-1)
#elif GROUP == 2
#define WORD_MASK ((bits)0x7fff7fff)
#elif REAL_BYTES == 8
#define WORD_MASK ((bits)INT64_MAX)
#else
#define WORD_MASK ((bits)INT32_MAX)
#endif

INLINE uint32_t live_bits(xvec v)
{
    const ivec w = (ivec)v & WORD_MASK;
#if defined __AVX512F__ && LANES == 16
    return _mm512_test_epi32_mask((__m512i)w, (__m512i)w);
#elif defined __AVX512F__ && LANES == 8 && REAL_BYTES == 8
    return _mm512_test_epi64_mask((__m512i)w, (__m512i)w);
#else
    uint32_t live = 0;
    for (int i = 0; i < LANES; i++) live |= (uint32_t)(w[i] != 0) << i;
    return live;
#endif
}

INLINE void keep_words(unit *to, xvec v, uint32_t live)
{
#if defined __AVX512F__ && LANES == 16
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32((__mmask16)live, (__m512i)v));
#elif defined __AVX512F__ && LANES == 8 && REAL_BYTES == 8
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi64((__mmask8)live, (__m512i)v));
#else
    for (; live; live &= live - 1) *to++ = v[__builtin_ctz(live)];
#endif
}

INLINE void keep_places(place *to, int at, uint32_t live)
{
#if defined __AVX512F__ && LANES == 16
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i kept = _mm512_maskz_compress_epi32((__mmask16)live, _mm512_add_epi32(lane, _mm512_set1_epi32(at)));
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16(kept));
#else
    for (; live; live &= live - 1) *to++ = (place)(at + __builtin_ctz(live));
#endif
}
#endif

/* bsrgen_panel.h: X from rows of tokens into rows of features, elements of 1, 2 or 4 bytes, 64 bytes at a time.
 * Bits are moved, never computed on.  GCC vectors; on AVX-512 a shuffle is one instruction.  Needs bsrgen_simd.h. */
#ifndef BSRGEN_PANEL_H
#define BSRGEN_PANEL_H

typedef uint8_t bytes64 __attribute__((vector_size(64)));
typedef int64_t words64 __attribute__((vector_size(64)));

INLINE bytes64 load64(const void *p) { bytes64 v; memcpy(&v, p, 64); return v; }
INLINE void store64(void *p, bytes64 v) { memcpy(p, &v, 64); }

/* 32 bytes at p, 32 at q. */
INLINE bytes64 join_halves(const void *p, const void *q)
{
#ifdef __AVX512BW__
    return (bytes64)_mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256(p)), _mm256_loadu_si256(q), 1);
#else
    bytes64 v;
    memcpy(&v, p, 32), memcpy((char *)&v + 32, q, 32);
    return v;
#endif
}

/* 16 bytes at each of p, q, r, s: inserts from memory need no shuffle port. */
INLINE bytes64 join_quarters(const void *p, const void *q, const void *r, const void *s)
{
#ifdef __AVX512BW__
    __m512i v = _mm512_castsi128_si512(_mm_loadu_si128(p));
    v = _mm512_inserti32x4(v, _mm_loadu_si128(q), 1);
    v = _mm512_inserti32x4(v, _mm_loadu_si128(r), 2);
    return (bytes64)_mm512_inserti32x4(v, _mm_loadu_si128(s), 3);
#else
    bytes64 v;
    memcpy(&v, p, 16), memcpy((char *)&v + 16, q, 16), memcpy((char *)&v + 32, r, 16), memcpy((char *)&v + 48, s, 16);
    return v;
#endif
}

/* Elements of `size` bytes of a and b in turn, from the low (or high) half of each 16 bytes. */
INLINE bytes64 zip(bytes64 a, bytes64 b, const int size, const int high)
{
#ifdef __AVX512BW__
    const __m512i p = (__m512i)a, q = (__m512i)b;
    if (size == 1) return (bytes64)(high ? _mm512_unpackhi_epi8(p, q) : _mm512_unpacklo_epi8(p, q));
    if (size == 2) return (bytes64)(high ? _mm512_unpackhi_epi16(p, q) : _mm512_unpacklo_epi16(p, q));
    return (bytes64)(high ? _mm512_unpackhi_epi32(p, q) : _mm512_unpacklo_epi32(p, q));
#else
    bytes64 v;
    for (int i = 0; i < 64; i++) {
        const int from = i / 16 * 16 + 8 * high + i % 16 / (2 * size) * size + i % size;
        v[i] = i / size % 2 ? b[from] : a[from];
    }
    return v;
#endif
}

/* In each 16 bytes: element e of v[q] <-> element q of v[e], for 16 / size vectors (perfect shuffles, as transpose). */
INLINE void transpose16(bytes64 *v, const int size)
{
    const int n = 16 / size;
    UNROLL
    for (int step = 1; step < n; step *= 2) {
        bytes64 u[16];
        UNROLL
        for (int i = 0; i < n / 2; i++) {
            u[2 * i] = zip(v[i], v[i + n / 2], size, 0);
            u[2 * i + 1] = zip(v[i], v[i + n / 2], size, 1);
        }
        UNROLL
        for (int i = 0; i < n; i++) v[i] = u[i];
    }
}

/* The order of 32 tokens of 2 bytes in a panel: zip then gives tokens 0-15 and 16-31. */
INLINE bytes64 spread_tokens(bytes64 v)
{
    const words64 w = (words64)v;
    return (bytes64)__builtin_shufflevector(w, w, 0, 4, 1, 5, 2, 6, 3, 7);
}

/* Two features of 32 tokens of 2 bytes, spread: their pairs, 16 tokens in each of p and q. */
INLINE void zip_pairs(const void *f0, const void *f1, void *p, void *q)
{
    const bytes64 a = load64(f0), b = load64(f1);
    store64(p, zip(a, b, 2, 0)), store64(q, zip(a, b, 2, 1));
}

/* Four features of 32 tokens of one byte, in order: their quads, 16 tokens in each of p and q. */
INLINE void zip_quads(const void *f0, const void *f1, const void *f2, const void *f3, void *p, void *q)
{
#define ZIP4(t) t, (t) + 32, (t) + 1, (t) + 33, (t) + 2, (t) + 34, (t) + 3, (t) + 35
#define ZIP ZIP4(0), ZIP4(16), ZIP4(4), ZIP4(20), ZIP4(8), ZIP4(24), ZIP4(12), ZIP4(28)
    bytes64 a = join_halves(f0, f1), b = join_halves(f2, f3);
    a = __builtin_shufflevector(a, a, ZIP), b = __builtin_shufflevector(b, b, ZIP); /* vpermb, AVX512-VBMI */
    store64(p, zip(a, b, 2, 0)), store64(q, zip(a, b, 2, 1));
#undef ZIP
#undef ZIP4
}
#endif

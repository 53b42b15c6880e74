/* What X, W and Y hold in memory, and what arithmetic reads.  Include after bsrgen_simd.h.  Before it: X_KIND, W_KIND,
 * Y_KIND and E_KIND (operands shaped like Y), each f32, f64, bf16, f16 or s8.  Every kind has
 *   KIND_t                      its type in memory; bf16 and f16 are their bits
 *   get_KIND(p, count)          `count` of LANES elements as reals, zeros behind them
 *   put_KIND(p, v, count)       `count` of LANES reals, rounded to nearest even; s8 saturates at +-127, NaN is 0
 */
#ifndef BSRGEN_TYPES_H
#define BSRGEN_TYPES_H

#define PASTE(a, b) a##b
#define NAME_OF(a, b) PASTE(a, b)
#define GET(kind) NAME_OF(get_, kind)
#define PUT(kind) NAME_OF(put_, kind)

typedef float f32_t;
typedef double f64_t;
typedef uint16_t bf16_t, f16_t;
typedef int8_t s8_t;

#define SHORT_f32 0
#define SHORT_f64 0
#define SHORT_bf16 1
#define SHORT_f16 1
#define SHORT_s8 1
#define SHORT(kind) NAME_OF(SHORT_, kind)

INLINE vec NAME_OF(get_, REAL_KIND)(const real *p, int count) { return count == LANES ? load(p) : load_part(p, count); }
INLINE void NAME_OF(put_, REAL_KIND)(real *p, vec v, int count)
{
    if (count == LANES) store(p, v);
    else store_part(p, v, count);
}

#if SHORT(X_KIND) || SHORT(W_KIND) || SHORT(Y_KIND) || SHORT(E_KIND)
#ifdef __x86_64__
#include <immintrin.h>
#endif
typedef uint32_t ubits32 __attribute__((vector_size(LANES * 4)));
typedef uint16_t halves __attribute__((vector_size(LANES * 2)));
typedef int8_t octets __attribute__((vector_size(LANES)));

/* The first `count` of LANES elements, zeros behind them. */
INLINE halves load_halves(const uint16_t *p, int count)
{
    halves h = {0};
#if defined __AVX512BW__ && defined __AVX512VL__ && LANES == 16
    if (count < LANES) return (halves)_mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1), p);
#endif
    if (count == LANES) memcpy(&h, p, sizeof h);
    else for (int i = 0; i < count; i++) h[i] = p[i];
    return h;
}

INLINE void store_halves(uint16_t *p, halves h, int count)
{
#if defined __AVX512BW__ && defined __AVX512VL__ && LANES == 16
    if (count < LANES) { _mm256_mask_storeu_epi16(p, (__mmask16)((1u << count) - 1), (__m256i)h); return; }
#endif
    if (count == LANES) memcpy(p, &h, sizeof h);
    else for (int i = 0; i < count; i++) p[i] = h[i];
}

INLINE octets load_octets(const int8_t *p, int count)
{
    octets b = {0};
#if defined __AVX512BW__ && defined __AVX512VL__ && LANES == 16
    if (count < LANES) return (octets)_mm_maskz_loadu_epi8((__mmask16)((1u << count) - 1), p);
#endif
    if (count == LANES) memcpy(&b, p, sizeof b);
    else for (int i = 0; i < count; i++) b[i] = p[i];
    return b;
}

/* bfloat16 is the upper half of a float. */
INLINE vec widen_bf16(halves h) { return (vec)(__builtin_convertvector(h, ubits32) << 16); }
INLINE vec get_bf16(const bf16_t *p, int count) { return widen_bf16(load_halves(p, count)); }
INLINE void put_bf16(bf16_t *p, vec v, int count)
{
#if defined __AVX512BF16__ && LANES == 16
    const halves h = (halves)_mm512_cvtneps_pbh((__m512)v);
#else
    const ubits32 u = (ubits32)v, nan = (ubits32)(v != v);
    const ubits32 r = ((u + 0x7fff + ((u >> 16) & 1)) & ~nan) | ((u | 0x400000) & nan);
    const halves h = __builtin_convertvector(r >> 16, halves);
#endif
    store_halves(p, h, count);
}

/* IEEE half precision, in integers where the target has no conversion (after F. Giesen's float_to_half_fast3_rtne). */
INLINE vec widen_f16(halves h)
{
#if defined __F16C__ && defined __AVX512F__ && LANES == 16
    return (vec)_mm512_cvtph_ps((__m256i)h);
#elif defined __F16C__ && LANES == 8
    return (vec)_mm256_cvtph_ps((__m128i)h);
#elif defined __F16C__ && LANES == 4
    return (vec)_mm_cvtph_ps((__m128i)(words){load_word(&h), 0});
#else
    const ubits32 u = __builtin_convertvector(h, ubits32), magnitude = (u & 0x7fff) << 13;
    const ubits32 finite = (ubits32)((vec)magnitude * (real)0x1p112), special = (ubits32)(magnitude >= 0x0f800000);
    return (vec)((((magnitude | 0x7f800000) & special) | (finite & ~special)) | (u & 0x8000) << 16);
#endif
}
INLINE vec get_f16(const f16_t *p, int count) { return widen_f16(load_halves(p, count)); }
INLINE void put_f16(f16_t *p, vec v, int count)
{
#if defined __F16C__ && defined __AVX512F__ && LANES == 16
    const halves h = (halves)_mm512_maskz_cvtps_ph((__mmask16)0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined __F16C__ && LANES == 8
    const halves h = (halves)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
    const ubits32 u = (ubits32)v, sign = u & 0x80000000, a = u ^ sign;
    const ubits32 special = (ubits32)(a > 0x7f800000), large = (ubits32)(a >= 0x47800000), tiny = (ubits32)(a < 0x38800000);
    const ubits32 normal = (a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13;
    const ubits32 subnormal = (ubits32)((vec)a + (real)0.5) - 0x3f000000; /* the sum rounds at 2^-24 */
    ubits32 r = (subnormal & tiny) | (normal & ~tiny);
    r = (r & ~large) | (0x7c00 & large) | (0x200 & special);
    const halves h = __builtin_convertvector(r | sign >> 16, halves);
#endif
    store_halves(p, h, count);
}

INLINE ivec load_integers(const s8_t *p, int count) { return __builtin_convertvector(load_octets(p, count), ivec); }
INLINE vec get_s8(const s8_t *p, int count) { return __builtin_convertvector(load_integers(p, count), vec); }
INLINE void put_s8(s8_t *p, vec v, int count)
{
    const vec low = choose(v < (real)-127, splat(-127), choose(v == v, v, zero()));
    const ivec i = (ivec)(choose(low > (real)127, splat(127), low) + (real)0x1.8p23); /* the sum rounds at 1 */
#if defined __AVX512F__ && LANES == 16
    if (count < LANES) _mm512_mask_cvtepi32_storeu_epi8(p, (__mmask16)((1u << count) - 1), (__m512i)i);
    else { const __m128i b = _mm512_cvtepi32_epi8((__m512i)i); memcpy(p, &b, sizeof b); }
#else
    const octets b = __builtin_convertvector(i, octets);
    if (count == LANES) memcpy(p, &b, sizeof b);
    else for (int j = 0; j < count; j++) p[j] = b[j];
#endif
}
#endif

typedef NAME_OF(X_KIND, _t) x_t;
typedef NAME_OF(Y_KIND, _t) y_t;
typedef NAME_OF(E_KIND, _t) e_t;

INLINE vec get_y(const y_t *p, int count) { return GET(Y_KIND)(p, count); }
INLINE vec get_e(const e_t *p, int count) { return GET(E_KIND)(p, count); }
INLINE void put_y(y_t *p, vec v, int count) { PUT(Y_KIND)(p, v, count); }

/* `count` tokens of a list; whether they are neighbours, and then lie side by side from the first on. */
INLINE int are_neighbours(const int32_t *list, int count) { return list[count - 1] - list[0] == count - 1; }

#define GET_LISTED(name, type, get) \
    INLINE vec name(const type *p, const int32_t *list, int count) \
    { \
        if (are_neighbours(list, count)) return get(p + list[0], count); \
        type row[LANES] = {0}; \
        for (int i = 0; i < count; i++) row[i] = p[list[i]]; \
        return get(row, LANES); \
    }
GET_LISTED(get_y_listed, y_t, get_y)
GET_LISTED(get_e_listed, e_t, get_e)
GET_LISTED(load_listed, real, load_part)
#undef GET_LISTED

INLINE void put_y_listed(y_t *p, const int32_t *list, vec v, int count)
{
    if (are_neighbours(list, count)) { put_y(p + list[0], v, count); return; }
    y_t row[LANES];
    put_y(row, v, LANES);
    for (int i = 0; i < count; i++) p[list[i]] = row[i];
}

/* `count` elements of Y, or of an operand like it, that lie `stride` apart. */
INLINE vec get_y_strided(const y_t *p, int64_t stride, int count)
{
    if (stride == 1) return get_y(p, count);
    y_t row[LANES] = {0};
    for (int i = 0; i < count; i++) row[i] = p[i * stride];
    return get_y(row, LANES);
}

INLINE vec get_e_strided(const e_t *p, int64_t stride, int count)
{
    if (stride == 1) return get_e(p, count);
    e_t row[LANES] = {0};
    for (int i = 0; i < count; i++) row[i] = p[i * stride];
    return get_e(row, LANES);
}

INLINE void put_y_strided(y_t *p, int64_t stride, vec v, int count)
{
    if (stride == 1) { put_y(p, v, count); return; }
    y_t row[LANES];
    put_y(row, v, LANES);
    for (int i = 0; i < count; i++) p[i * stride] = row[i];
}
#endif

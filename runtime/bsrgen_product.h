/* One multiply-add of a kernel, and what it reads.  Include after bsrgen_types.h.  Before it:
 *   GROUP      neighbouring k in one lane: 1 multiplies and adds, 2 and 4 are dot products of pairs and quads
 *   DOT        for GROUP > 1: bf16 (vdpbf16ps), s16 (vpmaddwd), u8 (vpdpbusd: X + 128 is unsigned, what that adds to the
 *              sums is known with W and taken back at the end); amx_bf16 and amx_s8: on tiles, which read memory as it lies;
 *              s8: words that tiles multiply, which vectors look through and move; x8 (vpdpbusd): W + 128 is unsigned, what
 *              that adds is 128 times a token's sum of X
 *   INTEGER    1: sums are int32, exact
 *   GATHER     1: columns of W are paired as they occur, X is kept feature by feature and paired when it is read
 * It defines  acc, avec   sums;  unit, xvec   what is multiplied;  w_t   packed W;  cell   X in panels and copies. */
#ifndef BSRGEN_PRODUCT_H
#define BSRGEN_PRODUCT_H

#define DOT_bf16 1
#define DOT_s16 2
#define DOT_u8 3
#define DOT_amx_bf16 4
#define DOT_amx_s8 5
#define DOT_s8 6
#define DOT_x8 7
#define DOT_IS(kind) (NAME_OF(DOT_, DOT) == NAME_OF(DOT_, kind))

#if INTEGER
typedef int32_t acc;
typedef ivec avec;
INLINE vec to_real(avec a) { return __builtin_convertvector(a, vec); }
#else
typedef real acc;
typedef vec avec;
INLINE vec to_real(avec a) { return a; }
#endif

INLINE avec acc_load(const acc *p) { avec v; memcpy(&v, p, sizeof v); return v; }
INLINE void acc_store(acc *p, avec v) { memcpy(p, &v, sizeof v); }
INLINE avec acc_zero(void) { return (avec){0}; }

#if GROUP == 1 || !(DOT_IS(amx_bf16) || DOT_IS(amx_s8))
#if GROUP == 1
typedef acc unit;
typedef avec xvec;
typedef NAME_OF(W_KIND, _t) w_t;
typedef unit cell;

#if INTEGER
INLINE xvec get_unit_w(const w_t *p, int count) { return load_integers(p, count); }
INLINE xvec x_units(const x_t *p, int64_t left) { return load_integers(p, left < LANES ? (int)left : LANES); }
#else
INLINE xvec get_unit_w(const w_t *p, int count) { return GET(W_KIND)(p, count); }
/* LANES units of X from p on, of which `left` > 0 elements are there; zeros behind them. */
INLINE xvec x_units(const x_t *p, int64_t left) { return GET(X_KIND)(p, left < LANES ? (int)left : LANES); }
#endif
INLINE xvec unit_splat(unit s) { return s - (xvec){0}; }
INLINE xvec w_load(const w_t *p) { return get_unit_w(p, LANES); }
/* One element of W in every lane. */
INLINE xvec w_splat(const w_t *p)
{
    if (sizeof(w_t) == sizeof(unit)) {
        unit s;
        memcpy(&s, p, sizeof s);
        return unit_splat(s);
    }
    w_t row[LANES];
    for (int i = 0; i < LANES; i++) row[i] = *p;
    return get_unit_w(row, LANES);
}
INLINE unit x_unit(const x_t *p) { return x_units(p, 1)[0]; }
INLINE avec mac(avec sum, xvec w, xvec x) { return sum + w * x; }

INLINE xvec unit_load(const cell *p) { xvec v; memcpy(&v, p, sizeof v); return v; }
INLINE avec mac_x(avec sum, xvec w, xvec x) { return mac(sum, w, x); }

#else /* x86 only */
#if LANES == 16
#define MM(op) NAME_OF(_mm512_, op)
#define MM_T(kind) NAME_OF(__m512, kind)
#elif LANES == 8
#define MM(op) NAME_OF(_mm256_, op)
#define MM_T(kind) NAME_OF(__m256, kind)
#else
#define MM(op) NAME_OF(_mm_, op)
#define MM_T(kind) NAME_OF(__m128, kind)
#endif
typedef MM_T(i) mm;

typedef uint32_t unit; /* GROUP elements, the first in the low bits */
typedef ubits32 xvec;
typedef uint32_t w_t;

/* An element of X as it lies in a word, from X as the caller has it. */
#if DOT_IS(bf16)
typedef uint16_t element;
INLINE element x_element(x_t x) { return x; }
INLINE avec mac(avec sum, xvec w, xvec x) { return (avec)MM(dpbf16_ps)((MM_T())sum, (MM_T(bh))x, (MM_T(bh))w); }
INLINE avec mac_x(avec sum, xvec w, xvec x) { return (avec)MM(dpbf16_ps)((MM_T())sum, (MM_T(bh))w, (MM_T(bh))x); }
#elif DOT_IS(s16)
typedef int16_t element;
INLINE element x_element(x_t x) { return x; }
INLINE avec mac(avec sum, xvec w, xvec x) { return sum + (avec)MM(madd_epi16)((mm)x, (mm)w); }
INLINE avec mac_x(avec sum, xvec w, xvec x) { return sum + (avec)MM(madd_epi16)((mm)w, (mm)x); }
#elif DOT_IS(s8)
typedef int8_t element;
INLINE element x_element(x_t x) { return x; }
#else
#if defined __AVX512VNNI__
INLINE avec dot(avec sum, xvec u, xvec s) { return (avec)MM(dpbusd_epi32)((mm)sum, (mm)u, (mm)s); }
#else
INLINE avec dot(avec sum, xvec u, xvec s) { return (avec)MM(dpbusd_avx_epi32)((mm)sum, (mm)u, (mm)s); }
#endif
#if DOT_IS(x8)
typedef int8_t element;
INLINE element x_element(x_t x) { return x; }
INLINE avec mac(avec sum, xvec w, xvec x) { return dot(sum, w ^ 0x80808080, x); }
/* sum += the elements of the words. */
INLINE avec add_elements(avec sum, xvec x) { return dot(sum, (xvec){0} + 0x01010101, x); }
#else
typedef uint8_t element;
INLINE element x_element(x_t x) { return (element)(x ^ 0x80); }
INLINE avec mac(avec sum, xvec w, xvec x) { return dot(sum, x, w); }
#endif
INLINE avec mac_x(avec sum, xvec w, xvec x) { return mac(sum, w, x); }
#endif
enum { ELEMENT_BITS = 32 / GROUP, ELEMENT_MASK = (1 << ELEMENT_BITS) - 1 };

#if GATHER
typedef element cell;
#else
typedef unit cell;
#endif

INLINE xvec unit_load(const void *p) { xvec v; memcpy(&v, p, sizeof v); return v; }
INLINE xvec unit_splat(unit s) { return s - (xvec){0}; }
INLINE xvec w_load(const w_t *p) { return unit_load(p); }
INLINE xvec w_splat(const w_t *p) { return unit_splat(*p); }

/* LANES words of X from p on, of which `left` > 0 elements are there; zeros behind them. */
INLINE xvec x_units(const x_t *p, int64_t left)
{
    x_t row[LANES * GROUP] = {0};
    if (left < LANES * GROUP) {
        memcpy(row, p, sizeof(x_t) * (size_t)left);
        p = row;
    }
#if DOT_IS(s16)
    int16_t wide[LANES * GROUP];
    UNROLL
    for (int half = 0; half < GROUP; half++) {
        typedef int16_t shorts __attribute__((vector_size(LANES * 2)));
        const shorts s = __builtin_convertvector(load_octets(p + half * LANES, LANES), shorts);
        memcpy(wide + half * LANES, &s, sizeof s);
    }
    return unit_load(wide);
#elif DOT_IS(u8)
    return unit_load(p) ^ 0x80808080;
#else
    return unit_load(p);
#endif
}

/* One feature of LANES * GROUP tokens as a panel of features keeps it, from X; `left` > 0 tokens are there.  Inside 16 bytes
 * come four tokens of each LANES, so that interleave() finds them in order. */
INLINE xvec x_row(const x_t *p, int64_t left)
{
    const xvec row = x_units(p, left);
#if LANES == 16 && GROUP == 4
    return __builtin_shufflevector(row, row, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
#elif LANES == 16
    return (xvec)__builtin_shufflevector((words)row, (words)row, 0, 4, 1, 5, 2, 6, 3, 7);
#elif LANES == 8 && GROUP == 4
    return __builtin_shufflevector(row, row, 0, 2, 4, 6, 1, 3, 5, 7);
#elif LANES == 8
    return (xvec)__builtin_shufflevector((words)row, (words)row, 0, 2, 1, 3);
#else
    return row;
#endif
}

/* xv[GROUP]: the words of GROUP such rows for LANES * GROUP tokens, in the order of the tokens. */
INLINE void interleave(xvec *xv, const xvec *row)
{
    const mm *r = (const mm *)row;
#if GROUP == 2
    xv[0] = (xvec)MM(unpacklo_epi16)(r[0], r[1]);
    xv[1] = (xvec)MM(unpackhi_epi16)(r[0], r[1]);
#else
    const mm a = MM(unpacklo_epi8)(r[0], r[1]), b = MM(unpackhi_epi8)(r[0], r[1]);
    const mm c = MM(unpacklo_epi8)(r[2], r[3]), d = MM(unpackhi_epi8)(r[2], r[3]);
    xv[0] = (xvec)MM(unpacklo_epi16)(a, c);
    xv[1] = (xvec)MM(unpackhi_epi16)(a, c);
    xv[2] = (xvec)MM(unpacklo_epi16)(b, d);
    xv[3] = (xvec)MM(unpackhi_epi16)(b, d);
#endif
}

#if GATHER
/* The other way: from word[GROUP], the words of LANES tokens each, the rows of their features, the first `count` of GROUP. */
INLINE void put_features(cell *to, int64_t ldp, const xvec *word, int count)
{
    mm w[GROUP], row[GROUP];
#ifndef __SSSE3__ /* 16 bytes, two features */
    for (int g = 0; g < GROUP; g++)
        w[g] = _mm_shuffle_epi32(_mm_shufflehi_epi16(_mm_shufflelo_epi16((mm)word[g], 0xd8), 0xd8), 0xd8);
#else
#if GROUP == 2
#define BY_FEATURE 0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15
#else
#define BY_FEATURE 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15
#endif
    static const uint8_t order[64] = {BY_FEATURE, BY_FEATURE, BY_FEATURE, BY_FEATURE};
    UNROLL
    for (int g = 0; g < GROUP; g++) w[g] = MM(shuffle_epi8)((mm)word[g], (mm)unit_load(order));
#endif
#if GROUP == 2
    row[0] = MM(unpacklo_epi64)(w[0], w[1]);
    row[1] = MM(unpackhi_epi64)(w[0], w[1]);
#else
    const mm a = MM(unpacklo_epi32)(w[0], w[1]), b = MM(unpacklo_epi32)(w[2], w[3]);
    const mm c = MM(unpackhi_epi32)(w[0], w[1]), d = MM(unpackhi_epi32)(w[2], w[3]);
    row[0] = MM(unpacklo_epi64)(a, b);
    row[1] = MM(unpackhi_epi64)(a, b);
    row[2] = MM(unpacklo_epi64)(c, d);
    row[3] = MM(unpackhi_epi64)(c, d);
#endif
    UNROLL
    for (int g = 0; g < GROUP; g++)
        if (g < count) memcpy(to + g * ldp, &row[g], sizeof row[g]);
}

/* The words of GROUP features at `rows`. */
INLINE void gather(xvec *xv, const cell *const *rows)
{
    xvec r[GROUP];
    UNROLL
    for (int g = 0; g < GROUP; g++) r[g] = unit_load(rows[g]);
    interleave(xv, r);
}
#endif
#endif

/* `group` units at p, repeated through the vector: 1 is a broadcast, LANES a load, between them one vbroadcastf*x*
 * (gcc 12 goes through the stack for the same thing written as a shuffle). */
INLINE xvec unit_group(const unit *p, const int group)
{
    if (group == 1) {
        unit s;
        memcpy(&s, p, sizeof s);
        return unit_splat(s);
    }
    if (group * REAL_BYTES == 8) return (xvec)(load_word(p) - (words){0});
#define REPEAT(instruction, size) \
    if (group * REAL_BYTES == size) { \
        xvec v; \
        __asm__(instruction " %1, %0" : "=v"(v) : "m"(*(const struct bytes##size *)p)); \
        return v; \
    }
#if defined __AVX512F__ && LANES * REAL_BYTES == 64
    REPEAT("vbroadcastf32x4", 16)
    REPEAT("vbroadcastf64x4", 32)
#elif defined __AVX512VL__ && LANES * REAL_BYTES == 32
    REPEAT("vbroadcastf32x4", 16)
#elif defined __AVX__ && LANES * REAL_BYTES == 32
    REPEAT("vbroadcastf128", 16)
#endif
    return unit_load(p);
}
#endif
#endif

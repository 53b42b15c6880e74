/* Branch-free exp, tanh, erf, normal cdf and sigmoid of a `vec`, with no libm.  Include after bsrgen_simd.h.
 * NaN gives NaN, infinities their limits, tanh(-0) = erf(-0) = -0; overflow and gradual underflow are as in libm.
 *
 * Largest errors met, in ulp, with FMA / without (float: every 7th number against scipy in double; double: 10^7 numbers
 * against libm in long double; gcc 12.2 and clang 19.1):
 *                            float        double
 *     v_exp                  0.98 / 0.95  0.98 / 0.95
 *     v_tanh                 1.8 / 1.8    1.9 / 2.0
 *     v_erf                  1.7 / 1.9    1.7 / 2.0
 *     v_sigmoid              1.7 / 1.7    1.7 / 1.7
 *     v_normcdf, x >= -1     1.8 / 1.8    1.9 / 1.9
 * and v_normcdf, x < -1: relative 1.8e-7 (1 + x^2), 6e-16 (1 + x^2), above the subnormal numbers.
 * Tables are benchmarks/fit_math.py's, lowest degree first, each with its degrees and fit error. */
#ifndef BSRGEN_MATH_H
#define BSRGEN_MATH_H

#if REAL_BYTES == 4
enum { EXPONENT_SHIFT = 23, EXPONENT_BIAS = 127 };
typedef uint32_t ubits;
static const real exp_min = -104, exp_max = 89, tanh_max = 20, erf_max = 4, cdf_max = 14.6f; /* flat beyond */
static const real integer = 0x1.8p23f, inv_ln2 = 1.442695f, ln2_high = 0x1.62e4p-1f, ln2_low = 1.4286068e-06f;
static const real exp_p[] = {/* degree 5, 2^-30.5 */
    0.5f, 0.16666664f, 0.04166647f, 0.0083339065f, 0.0013934455f, 0.00019560945f};
static const real erf_p[] = {/* degree 8, 2^-27.6 */
    0.12837917f, 0.6366195f, 0.10277694f, -0.019150231f, -0.00016508199f, 0.0016713297f, -0.000635034f, 0.00011822251f,
    -9.318086e-06f};
static const real erf_q[] = {1};
static const real cdf_p[] = {/* degrees 5/3, 2^-28.5 */
    -0.20211549f, 0.20143898f, 0.1898729f, 0.061283085f, 0.007436035f, 1.4104859e-07f};
static const real cdf_q[] = {1, 0.57823914f, 0.15101734f, 0.014896305f};
#else
enum { EXPONENT_SHIFT = 52, EXPONENT_BIAS = 1023 };
typedef uint64_t ubits;
static const real exp_min = -746, exp_max = 710, tanh_max = 20, erf_max = 6, cdf_max = 38.8; /* flat beyond */
static const real integer = 0x1.8p52, inv_ln2 = 1.4426950408889634;
static const real ln2_high = 0x1.62e42fefa38p-1, ln2_low = 5.497923018708371e-14;
static const real exp_p[] = {/* degree 10, 2^-61.5 */
    0.5, 0.16666666666666677, 0.04166666666666661, 0.008333333333321357, 0.001388888888892386, 0.00019841269886954876,
    2.4801587237625896e-05, 2.755724325410584e-06, 2.7557352451081137e-07, 2.5109408156597633e-08,
    2.088978426617151e-09};
static const real erf_p[] = {/* degrees 8/7, 2^-56.0 */
    0.12837916709551256, 0.8512153621289232, 1.337851397444202, 1.0814118440574711, 0.531383990029981,
    0.165369886726177, 0.03158344968969222, 0.0032473180964253463, 0.00011822343944924613};
static const real erf_q[] = {
    1, 1.6715764295439313, 1.331370127552511, 0.6322792403168009, 0.1886443600893691, 0.0343879420511028,
    0.003363122604634561, 0.00011824447053711227};
static const real cdf_p[] = {/* degrees 12/11, 2^-57.5 */
    -0.20211543919713387, -0.03158533064320183, 0.3019094270587792, 0.3673180935817487, 0.2186281797077139,
    0.08033568384367346, 0.019312339999885852, 0.0030200409490829857, 0.00028935904357107735, 1.4930210546134664e-05,
    3.566072055151551e-07, 3.257576158429162e-09, 7.731216279388801e-12};
static const real cdf_q[] = {
    1, 1.7311652104205684, 1.4124263714226801, 0.6946129570768947, 0.2250186753083546, 0.049094668118876264,
    0.0070856031678780945, 0.0006347796026337925, 3.124050843036207e-05, 7.260829128713749e-07, 6.546046749919859e-09,
    1.5462436618654224e-11};
#endif
enum { /* numbers of coefficients */
    EXP_P = sizeof exp_p / sizeof *exp_p, ERF_P = sizeof erf_p / sizeof *erf_p, ERF_Q = sizeof erf_q / sizeof *erf_q,
    CDF_P = sizeof cdf_p / sizeof *cdf_p, CDF_Q = sizeof cdf_q / sizeof *cdf_q
};
typedef ubits uvec __attribute__((vector_size(LANES * REAL_BYTES)));

/* A NaN in the first argument comes through, one in the second does not. */
INLINE vec v_min(vec a, vec b) { return choose(b < a, b, a); }
INLINE vec v_max(vec a, vec b) { return choose(b > a, b, a); }

INLINE vec v_abs(vec x) { return (vec)((ivec)x & ~(ivec)splat((real)-0.0)); }

/* a >= 0 with the sign of x. */
INLINE vec with_sign(vec a, vec x) { return (vec)((ivec)a | ((ivec)x & (ivec)splat((real)-0.0))); }

/* c[0] + c[1] x + c[2] x^2 + ..., by Horner's rule: the shortest code; independent vectors hide the latency. */
INLINE vec polynomial(vec x, const real *c, const int count)
{
    vec p = splat(c[count - 1]);
    UNROLL
    for (int i = count - 2; i >= 0; i--) p = p * x + c[i];
    return p;
}

/* 2^(n - bias) where the low bits of each lane hold n > 0; the bits above the exponent fall off. */
INLINE vec power_of_2(uvec n) { return (vec)(n << EXPONENT_SHIFT); }

/* q = e^r - 1 and the low bits of n, where x = (n - offset) ln 2 + r, |r| <= ln 2 / 2.
 * Adding 1.5 2^23 (2^52) rounds to an integer; ln 2 in two parts keeps r good without FMA (Cody, Waite, Software Manual
 * for the Elementary Functions, 1980); q = r + r^2 P(r) is relatively accurate down to r = 0. */
INLINE vec expm1_reduced(vec x, const int offset, uvec *n)
{
    const real shift = integer + (real)offset;
    vec t = x * inv_ln2 + shift, k = t - shift;
    vec r = (x - k * ln2_high) - k * ln2_low;
    *n = (uvec)t;
    return r + r * r * polynomial(r, exp_p, EXP_P);
}

/* 2^-half e^x = 2^n (1 + q) for exp_min <= x <= exp_max; two powers, so that only their product over- or underflows. */
INLINE vec exp_in_range(vec x, const int half)
{
    uvec n;
    vec q = expm1_reduced(x, 2 * EXPONENT_BIAS - half, &n), s = power_of_2(n >> 1);
    return (q * s + s) * power_of_2(n - (n >> 1));
}

INLINE vec v_exp(vec x) { return exp_in_range(v_max(v_min(x, splat(exp_max)), splat(exp_min)), 0); }

/* y = (1 - E) / (1 + E), E = e^(-2|x|) = s + s q.  (1 - E + (1 - E) y) / 2 is the same number, but the roundings of the
 * quotient weigh half at most.  1 - E = (1 - s) - s q, without cancellation. */
INLINE vec v_tanh(vec x)
{
    uvec n;
    vec q = expm1_reduced((real)-2 * v_min(v_abs(x), splat(tanh_max)), EXPONENT_BIAS, &n), s = power_of_2(n);
    vec c = (real)1 - s, e = c - s * q, y = e / ((s * q + s) + (real)1);
    return with_sign((real)0.5 * ((e * y - s * q) + c), x);
}

/* 1 / (1 + E), E = e^-x = (s + s q) / w with powers of two s and w, is w / (w + s + s q), which neither over- nor
 * underflows; `rest` is the rounding error of w + s where that counts. */
INLINE vec v_sigmoid(vec x)
{
    uvec n;
    vec q = expm1_reduced(-v_max(v_min(x, splat(-exp_min)), splat(exp_min)), 2 * EXPONENT_BIAS, &n);
    vec s = power_of_2(n - (n >> 1)), w = power_of_2(2 * EXPONENT_BIAS - (n >> 1));
    vec sum = w + s, rest = w - (sum - s);
    return w / ((s * q + rest) + sum);
}

/* 1 - e^-g, g(t) = -log erfc(t) = t + t P(t)/Q(t), t = |x|: one formula throughout; near 0 erf is as accurate as g,
 * towards 1 errors of g vanish. */
INLINE vec v_erf(vec x)
{
    uvec n;
    vec t = v_min(v_abs(x), splat(erf_max));
    vec g = t + t * (polynomial(t, erf_p, ERF_P) / polynomial(t, erf_q, ERF_Q));
    vec q = expm1_reduced(-g, EXPONENT_BIAS, &n), s = power_of_2(n);
    return with_sign(((real)1 - s) - s * q, x);
}

/* Phi(x) = erfc(-x / sqrt 2) / 2 is e^-g / 2 for x < 0, else 1 - e^-g / 2;
 * g(t) = -log erfc(t / sqrt 2) = t + t P(t)/Q(t), t = |x|. */
INLINE vec v_normcdf(vec x)
{
    vec t = v_min(v_abs(x), splat(cdf_max));
    vec g = t + t * (polynomial(t, cdf_p, CDF_P) / polynomial(t, cdf_q, CDF_Q));
    vec tail = exp_in_range(-g, 1);
    return choose(x < (real)0, tail, (real)1 - tail);
}
#endif

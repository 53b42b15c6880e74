/* exp, tanh, erf, normal cdf and sigmoid on `vec`, branch-free, without libm.  Include after bsrgen_simd.h. */
#ifndef BSRGEN_MATH_H
#define BSRGEN_MATH_H

#if REAL_BYTES == 4
enum { MANTISSA_BITS = 23 };
static const real exp_min = -104, exp_max = 89, tanh_max = 20, erf_max = 4, cdf_max = 14.6f;
static const real exp_round = 0x1.8p23f + 127, inv_ln4 = 0.7213475f, ln4_high = 0x1.62e4p0f, ln4_low = 2.8572136e-06f;
static const bits one_squared = 254 << 23;
static const real exp_p[] = {0.5f, 0.16666672f, 0.04166665f, 0.008332661f, 0.0013889553f, 0.00020091265f,
    2.486569e-05f};
static const real erf_p[] = {0.12837917f, 0.6366195f, 0.10277694f, -0.019150231f, -0.00016508199f, 0.0016713297f,
    -0.000635034f, 0.00011822251f, -9.318086e-06f};
static const real erf_q[] = {1.0f};
static const real cdf_p[] = {-0.20211549f, 0.20143898f, 0.1898729f, 0.061283085f, 0.007436035f, 1.4104859e-07f};
static const real cdf_q[] = {1.0f, 0.57823914f, 0.15101734f, 0.014896305f};
#else
enum { MANTISSA_BITS = 52 };
static const real exp_min = -746, exp_max = 710, tanh_max = 20, erf_max = 6, cdf_max = 38.8;
static const real exp_round = 0x1.8p52 + 1023, inv_ln4 = 0.7213475204444817, ln4_high = 0x1.62e42fefa3p0, ln4_low = 5.647058112606315e-13;
static const bits one_squared = (bits)2046 << 52;
static const real exp_p[] = {0.5, 0.1666666666666666, 0.041666666666666734, 0.00833333333333617, 0.0013888888888873461,
    0.00019841269837281517, 2.4801587313561288e-05, 2.7557321761571386e-06, 2.755731529874327e-07,
    2.505129927548221e-08, 2.0877226288883642e-09, 1.618521224811491e-10, 1.1484458390825196e-11};
static const real erf_p[] = {0.12837916709551256, 0.8512153621289232, 1.337851397444202, 1.0814118440574711,
    0.531383990029981, 0.165369886726177, 0.03158344968969222, 0.0032473180964253463, 0.00011822343944924613};
static const real erf_q[] = {1.0, 1.6715764295439313, 1.331370127552511, 0.6322792403168009, 0.1886443600893691,
    0.0343879420511028, 0.003363122604634561, 0.00011824447053711227};
static const real cdf_p[] = {-0.20211543919713387, -0.03158533064320183, 0.3019094270587792, 0.3673180935817487,
    0.2186281797077139, 0.08033568384367346, 0.019312339999885852, 0.0030200409490829857, 0.00028935904357107735,
    1.4930210546134664e-05, 3.566072055151551e-07, 3.257576158429162e-09, 7.731216279388801e-12};
static const real cdf_q[] = {1.0, 1.7311652104205684, 1.4124263714226801, 0.6946129570768947, 0.2250186753083546,
    0.049094668118876264, 0.0070856031678780945, 0.0006347796026337925, 3.124050843036207e-05, 7.260829128713749e-07,
    6.546046749919859e-09, 1.5462436618654224e-11};
#endif
enum {
    EXP_P = sizeof exp_p / sizeof *exp_p, ERF_P = sizeof erf_p / sizeof *erf_p, ERF_Q = sizeof erf_q / sizeof *erf_q,
    CDF_P = sizeof cdf_p / sizeof *cdf_p, CDF_Q = sizeof cdf_q / sizeof *cdf_q
};

INLINE vec v_min(vec a, vec b) { return choose(b < a, b, a); }
INLINE vec v_max(vec a, vec b) { return choose(b > a, b, a); }
INLINE vec v_sign(vec x) { return (vec)((ivec)x & (ivec)splat((real)-0.0)); }
INLINE vec v_abs(vec x) { return (vec)((ivec)x & ~(ivec)splat((real)-0.0)); }

/* c[0] + c[1] x + ... + c[count-1] x^(count-1) */
INLINE vec polynomial(vec x, const real *c, const int count)
{
    vec p = splat(c[count - 1]);
    UNROLL
    for (int i = count - 2; i >= 0; i--) p = p * x + c[i];
    return p;
}

#ifndef TWOSUM
#define TWOSUM 0
#endif

INLINE vec exp_parts(vec x, vec extra, vec *s)
{
    vec t = x * inv_ln4 + exp_round, n = t - exp_round;
    vec high = x - n * ln4_high, low = extra - n * ln4_low, r = high + low;
    *s = (vec)((ivec)t << MANTISSA_BITS);
    return high + (r * r * polynomial(r, exp_p, EXP_P) + low);
}

INLINE vec exp_clamped(vec x, vec extra)
{
    vec s, q = exp_parts(x, extra, &s);
    return (q + (real)1) * s * s;
}

INLINE vec log_erfc(vec t, vec ratio, vec *extra)
{
    vec u = t * ratio, g = t + u;
#if TWOSUM
    *extra = (g - t) - u;
#else
    *extra = zero();
#endif
    return -g;
}

INLINE vec v_exp(vec x) { return exp_clamped(v_max(v_min(x, splat(exp_max)), splat(exp_min)), zero()); }

INLINE vec v_tanh(vec x)
{
    vec s, q = exp_parts((real)-2 * v_min(v_abs(x), splat(tanh_max)), zero(), &s);
    s *= s;
    vec a = (s * q + (s - (real)1)) * (real)-0.5, d = (real)1 - a; a+=zero();
    vec y = a / d;
    return (vec)((ivec)(a + a * y) | (ivec)v_sign(x));
}

INLINE vec v_sigmoid(vec x)
{
    vec s, q = exp_parts(-v_max(v_min(x, splat(-exp_min)), splat(exp_min)), zero(), &s);
    vec w = (vec)(one_squared - (ivec)s);
    return w / ((s * q + w) + s);
}

INLINE vec v_erf(vec x)
{
    vec t = v_min(v_abs(x), splat(erf_max)), extra, s;
    vec g = log_erfc(t, polynomial(t, erf_p, ERF_P) / polynomial(t, erf_q, ERF_Q), &extra);
    vec q = exp_parts(g, extra, &s);
    s *= s;
    return (vec)((ivec)-(s * q + (s - (real)1)) | (ivec)v_sign(x));
}

INLINE vec v_normcdf(vec x)
{
    vec t = v_min(v_abs(x), splat(cdf_max)), extra;
    vec g = log_erfc(t, polynomial(t, cdf_p, CDF_P) / polynomial(t, cdf_q, CDF_Q), &extra);
    vec e = (real)0.5 * exp_clamped(g, extra);
    return choose(x < (real)0, e, (real)1 - e);
}
#endif

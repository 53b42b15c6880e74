/* exp, tanh, erf, normal cdf and sigmoid on `vec`, branch-free, without libm.  Include after bsrgen_simd.h. */
#ifndef BSRGEN_MATH_H
#define BSRGEN_MATH_H

#if REAL_BYTES == 4
enum { MANTISSA_BITS = 23, BIAS = 127 };
typedef uint32_t ubits;
static const real exp_min = -104, exp_max = 89, tanh_max = 20, erf_max = 4, cdf_max = 14.6f;
static const real integer = 0x1.8p23f, inv_ln2 = 1.442695f, ln2_high = 0x1.62e4p-1f, ln2_low = 1.4286068e-06f;
static const bits one_squared = 254 << 23;
static const real exp_p[] = {0.5f, 0.16666664f, 0.04166647f, 0.0083339065f, 0.0013934455f, 0.00019560945f};
static const real erf_p[] = {0.12837917f, 0.6366195f, 0.10277694f, -0.019150231f, -0.00016508199f, 0.0016713297f,
    -0.000635034f, 0.00011822251f, -9.318086e-06f};
static const real erf_q[] = {1.0f};
static const real cdf_p[] = {-0.20211549f, 0.20143898f, 0.1898729f, 0.061283085f, 0.007436035f, 1.4104859e-07f};
static const real cdf_q[] = {1.0f, 0.57823914f, 0.15101734f, 0.014896305f};
#else
enum { MANTISSA_BITS = 52, BIAS = 1023 };
typedef uint64_t ubits;
static const real exp_min = -746, exp_max = 710, tanh_max = 20, erf_max = 6, cdf_max = 38.8;
static const real integer = 0x1.8p52, inv_ln2 = 1.4426950408889634, ln2_high = 0x1.62e42fefa38p-1, ln2_low = 5.497923018708371e-14;
static const bits one_squared = (bits)2046 << 52;
static const real exp_p[] = {0.5, 0.16666666666666677, 0.04166666666666661, 0.008333333333321357, 0.001388888888892386,
    0.00019841269886954876, 2.4801587237625896e-05, 2.755724325410584e-06, 2.7557352451081137e-07,
    2.5109408156597633e-08, 2.088978426617151e-09};
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

typedef ubits uvec __attribute__((vector_size(LANES * REAL_BYTES)));

/* x = n ln 2 + r: q = e^r - 1 */
INLINE vec expm1_reduced(vec x, int bias, uvec *n)
{
    vec t = x * inv_ln2 + (integer + (real)bias), k = t - (integer + (real)bias);
    vec r = (x - k * ln2_high) - k * ln2_low;
    *n = (uvec)t;
    return r + r * r * polynomial(r, exp_p, EXP_P);
}

INLINE vec power(uvec n) { return (vec)(n << MANTISSA_BITS); }

INLINE vec exp_clamped(vec x, int bias)
{
    uvec n;
    vec p = (real)1 + expm1_reduced(x, bias, &n);
    return p * power(n >> 1) * power(n - (n >> 1));
}

INLINE vec v_exp(vec x) { return exp_clamped(v_max(v_min(x, splat(exp_max)), splat(exp_min)), 2 * BIAS); }

INLINE vec v_tanh(vec x)
{
    uvec n;
    vec q = expm1_reduced((real)-2 * v_min(v_abs(x), splat(tanh_max)), BIAS, &n), s = power(n);
    vec c = (real)1 - s, d = (s * q + s) + (real)1, y = (c - s * q) / d;
    return (vec)((ivec)((real)0.5 * (((c - s * q) * y - s * q) + c)) | (ivec)v_sign(x));
}

INLINE vec v_sigmoid(vec x)
{
    uvec n;
    vec q = expm1_reduced(-v_max(v_min(x, splat(-exp_min)), splat(exp_min)), 2 * BIAS, &n);
    vec s = power(n - (n >> 1)), w = power(2 * BIAS - (n >> 1));
    vec sum = w + s, rest = w - (sum - s);
    return w / ((s * q + rest) + sum);
}

INLINE vec v_erf(vec x)
{
    uvec n;
    vec t = v_min(v_abs(x), splat(erf_max));
    vec q = expm1_reduced(-(t + t * (polynomial(t, erf_p, ERF_P) / polynomial(t, erf_q, ERF_Q))), BIAS, &n), s = power(n);
    return (vec)((ivec)-(s * q + (s - (real)1)) | (ivec)v_sign(x));
}

INLINE vec v_normcdf(vec x)
{
    vec t = v_min(v_abs(x), splat(cdf_max));
    vec e = exp_clamped(-(t + t * (polynomial(t, cdf_p, CDF_P) / polynomial(t, cdf_q, CDF_Q))), 2 * BIAS - 1);
    return choose(x < (real)0, e, (real)1 - e);
}
#endif

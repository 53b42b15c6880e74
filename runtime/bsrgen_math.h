/* exp, tanh, erf, normal cdf and sigmoid on `vec`, branch-free, without libm.  Include after bsrgen_simd.h. */
#ifndef BSRGEN_MATH_H
#define BSRGEN_MATH_H

#if REAL_BYTES == 4
enum { MANTISSA_BITS = 23 };
static const real exp_min = -104, exp_max = 89, tanh_max = 20, erf_max = 4, cdf_max = 14.6f;
static const real exp_round = 0x1.8p23f + 127, inv_ln4 = 0.7213475f, ln4_high = 0x1.62e4p0f, ln4_low = 2.8572136e-06f;
static const real erf_slope = 0x1.20ep0f, erf_slope_low = -3.8801656e-05f;
static const real cdf_slope = 0x1.988p-1f, cdf_slope_low = 3.29983e-05f;
static const bits high_half = -4096, one_squared = 254 << 23;
static const real exp_p[] = {0.5f, 0.16666672f, 0.04166665f, 0.008332661f, 0.0013889553f, 0.00020091265f,
    2.486569e-05f};
static const real erf_p[] = {0.6366195f, 0.102776855f, -0.019149812f, -0.00016595375f, 0.001672249f, -0.0006355498f,
    0.00011836863f, -9.334466e-06f}, erf_q[] = {1};
static const real cdf_p[] = {0.31830975f, 0.2199896f, 0.06405777f, 0.0073916772f, 1.3194756e-07f};
static const real cdf_q[] = {1, 0.57696164f, 0.15042163f, 0.014806796f};
#else
enum { MANTISSA_BITS = 52 };
static const real exp_min = -746, exp_max = 710, tanh_max = 20, erf_max = 6, cdf_max = 38.8;
static const real exp_round = 0x1.8p52 + 1023, inv_ln4 = 0.7213475204444817, ln4_high = 0x1.62e42fefa3p0, ln4_low = 5.647058112606315e-13;
static const real erf_slope = 0x1.20dd75p0, erf_slope_low = 9.692613531930338e-10;
static const real cdf_slope = 0x1.988453p-1, cdf_slope_low = 7.131982177168955e-09;
static const bits high_half = -134217728, one_squared = (bits)2046 << 52;
static const real exp_p[] = {0.5, 0.1666666666666666, 0.041666666666666734, 0.00833333333333617, 0.0013888888888873461,
    0.00019841269837281517, 2.4801587313561288e-05, 2.7557321761571386e-06, 2.755731529874327e-07,
    2.505129927548221e-08, 2.0877226288883642e-09, 1.618521224811491e-10, 1.1484458390825196e-11};
static const real erf_p[] = {0.6366197723675818, 1.1657332987808326, 0.9985203183117739, 0.5060026885388895,
    0.16050932678943589, 0.031053841639810387, 0.0032215213681692618, 0.00011792746709046285};
static const real erf_q[] = {1.0, 1.6696947559856468, 1.3289720571845958, 0.6307825333868864, 0.1881129453936758,
    0.034279277569571685, 0.003352174384507429, 0.00011794851818085232};
static const real cdf_p[] = {0.3183098861837951, 0.49286123900691897, 0.3633737464529422, 0.16337991761759796,
    0.04854530606706032, 0.009697237460952654, 0.0012690724219719977, 0.00010078277983070058, 4.15773203050336e-06,
    7.177345560019745e-08, 3.5612122411439524e-10};
static const real cdf_q[] = {1.0, 1.434217586273718, 0.9928774191820668, 0.4215976124930162, 0.11880047689640107,
    0.02256123411152035, 0.002813864170930867, 0.00021379145483878929, 8.537190519616544e-06, 1.446798821146649e-07,
    7.122460075277964e-10};
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

INLINE vec exp_parts(vec x, vec *s)
{
    vec t = x * inv_ln4 + exp_round, n = t - exp_round;
    vec high = x - n * ln4_high, low = n * ln4_low, r = high - low;
    *s = (vec)((ivec)t << MANTISSA_BITS);
    return high + (r * r * polynomial(r, exp_p, EXP_P) - low);
}

INLINE vec exp_clamped(vec x)
{
    vec s, q = exp_parts(x, &s);
    return (q + (real)1) * s * s;
}

INLINE vec expm1_clamped(vec x)
{
    vec s, q = exp_parts(x, &s);
    return s * s * q + (s * s - (real)1);
}

INLINE vec log_erfc(vec t, real slope_high, real slope_low, vec ratio)
{
    vec high = (vec)((ivec)t & high_half), low = t - high;
    return -(high * slope_high + (low * slope_high + t * (t * ratio + slope_low)));
}

INLINE vec v_exp(vec x) { return exp_clamped(v_max(v_min(x, splat(exp_max)), splat(exp_min))); }

INLINE vec v_tanh(vec x)
{
    vec b = (real)-0.5 * expm1_clamped((real)-2 * v_min(v_abs(x), splat(tanh_max)));
    return (vec)((ivec)(b + b * (b / ((real)1 - b))) | (ivec)v_sign(x));
}

INLINE vec v_sigmoid(vec x)
{
    vec s, q = exp_parts(-v_max(v_min(x, splat(-exp_min)), splat(exp_min)), &s);
    vec w = (vec)(one_squared - (ivec)s);
    return w / ((w + s) + s * q);
}

INLINE vec v_erf(vec x)
{
    vec t = v_min(v_abs(x), splat(erf_max));
    vec e = expm1_clamped(log_erfc(t, erf_slope, erf_slope_low, polynomial(t, erf_p, ERF_P) / polynomial(t, erf_q, ERF_Q)));
    return (vec)((ivec)-e | (ivec)v_sign(x));
}

INLINE vec v_normcdf(vec x)
{
    vec t = v_min(v_abs(x), splat(cdf_max));
    vec e = (real)0.5 * exp_clamped(log_erfc(t, cdf_slope, cdf_slope_low, polynomial(t, cdf_p, CDF_P) / polynomial(t, cdf_q, CDF_Q)));
    return choose(x < (real)0, e, (real)1 - e);
}
#endif

/* What every CUDA kernel shares: types in memory and in registers, loads of vectors, functions of epilogues.
 * Before it: REAL_BYTES, and W_KIND, X_KIND, Y_KIND and E_KIND (operands shaped like Y), each f32, f64, bf16, f16 or s8. */
#ifndef BSRGEN_CUDA_H
#define BSRGEN_CUDA_H
#ifdef BSRGEN_HOST_PART
#include <cuda_runtime_api.h>
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif
#include <stdint.h>

#define DEVICE static __device__ __forceinline__
#define MEMBER __device__ __forceinline__
#ifndef SHARED /* one array of a thread block */
#define SHARED(type, name, count) __shared__ __align__(16) type name[count]
#endif
#define PASTE(a, b) a##b
#define NAME_OF(a, b) PASTE(a, b)

typedef float f32_t;
typedef double f64_t;
typedef uint16_t bf16_t, f16_t; /* their bits */
typedef int8_t s8_t;
typedef uint8_t e4m3_t; /* its bits */
typedef NAME_OF(W_KIND, _t) w_t;
typedef NAME_OF(X_KIND, _t) x_t;
typedef NAME_OF(Y_KIND, _t) y_t;
typedef NAME_OF(E_KIND, _t) e_t;

#if REAL_BYTES == 4
typedef float real;
#else
typedef double real;
#endif

#ifndef BSRGEN_HOST_PART
DEVICE float get_f32(f32_t v) { return v; }
DEVICE double get_f64(f64_t v) { return v; }
DEVICE float get_bf16(bf16_t v) { return __uint_as_float((uint32_t)v << 16); }
DEVICE float get_f16(f16_t v) { return __half2float(__ushort_as_half(v)); }
DEVICE int get_s8(s8_t v) { return v; }
/* A sign, four bits of exponent above 7, three of fraction; all ones are NaN, and there is no Inf. */
DEVICE float get_e4m3(e4m3_t v)
{
    const float size = __uint_as_float((uint32_t)(v & 0x7f) << 20) * __uint_as_float(247u << 23);
    return (v & 0x7f) == 0x7f ? __uint_as_float(0x7fc00000u) : v & 0x80 ? -size : size;
}

/* Rounded to nearest, ties to even. */
DEVICE f32_t put_f32(float v) { return v; }
DEVICE f64_t put_f64(double v) { return v; }
DEVICE bf16_t put_bf16(float v)
{
    const uint32_t bits = __float_as_uint(v);
    return (bf16_t)((v != v ? bits | 0x400000 : bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
DEVICE f16_t put_f16(float v) { return __half_as_ushort(__float2half_rn(v)); }
/* Saturates at 448; NaN comes through. */
DEVICE e4m3_t put_e4m3(float v)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    uint16_t two;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(two) : "f"(0.0f), "f"(v));
    return (e4m3_t)two;
#else
    const uint32_t sign = __float_as_uint(v) >> 24 & 0x80;
    const float size = fminf(fabsf(v), 448.0f);
    const uint32_t bits = __float_as_uint(size), normal = (bits + 0x7ffff + (bits >> 20 & 1)) >> 20; /* exponents above 127 */
    if (v != v) return (e4m3_t)(sign | 0x7f);
    return (e4m3_t)(sign | (size < 0.015625f ? (uint32_t)rintf(size * 512.0f) : normal - (120 << 3))); /* below 2^-6 all in units of 2^-9 */
#endif
}
DEVICE s8_t put_s8(float v) { return (s8_t)(v != v ? 0.0f : rintf(fminf(fmaxf(v, -127.0f), 127.0f))); }

#define get_w NAME_OF(get_, W_KIND)
#define get_x NAME_OF(get_, X_KIND)
#define get_y NAME_OF(get_, Y_KIND)
#define get_e NAME_OF(get_, E_KIND)
#define put_y NAME_OF(put_, Y_KIND)

/* The longest load that so many bytes are a multiple of. */
template <int BYTES> struct part_of { typedef uint8_t type; };
template <> struct part_of<2> { typedef uint16_t type; };
template <> struct part_of<4> { typedef uint32_t type; };
template <> struct part_of<8> { typedef uint2 type; };
template <> struct part_of<16> { typedef uint4 type; };

/* COUNT elements, with loads of up to 128 bits: `from` is aligned to the largest power of two, up to 16, that divides
 * their bytes. */
template <int COUNT, class T> DEVICE void load_vector(T (&to)[COUNT], const T *from)
{
    constexpr int BYTES = COUNT * (int)sizeof(T), PART = (BYTES & -BYTES) < 16 ? BYTES & -BYTES : 16;
    typedef typename part_of<PART>::type part;
    alignas(16) part parts[BYTES / PART];
#pragma unroll
    for (int i = 0; i < BYTES / PART; i++) parts[i] = reinterpret_cast<const part *>(from)[i];
    memcpy(to, parts, BYTES);
}

/* 16 bytes, aligned. */
template <int COUNT, class T> DEVICE void store_vector(T *to, const T (&from)[COUNT])
{
    static_assert(COUNT * sizeof(T) == 16, "one vector");
    uint4 part;
    memcpy((void *)&part, from, 16);
    *reinterpret_cast<uint4 *>(to) = part;
}

/* COUNT elements of W where `there`, zeros elsewhere: W is read once, L1 is left to X. */
#ifndef BSRGEN_EMULATION
DEVICE void load_once(uint4 &to, const uint4 *from)
{
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(to.x), "=r"(to.y), "=r"(to.z), "=r"(to.w) : "l"(from));
}
#endif
template <class T> DEVICE void load_once(T &to, const T *from) { to = *from; }

template <int COUNT, class T> DEVICE void stream_vector(T *to, const T *from, bool there)
{
    constexpr int BYTES = COUNT * (int)sizeof(T);
    typename part_of<BYTES>::type part = {};
    if (there) load_once(part, reinterpret_cast<const typename part_of<BYTES>::type *>(from));
    memcpy(to, &part, BYTES);
}

/* What formulas of epilogues are made of; a NaN in the first argument comes through, one in the second does not. */
#define R(number) ((real)(number))
DEVICE real splat(real v) { return v; }
DEVICE real rounded(real v) { return v; } /* one text for all elements: what is contracted is the same for all */
DEVICE real v_max(real a, real b) { return b > a ? b : a; }
DEVICE real v_min(real a, real b) { return b < a ? b : a; }
#if REAL_BYTES == 4
DEVICE real v_sigmoid(real v) { return 1.0f / (1.0f + expf(-v)); }
DEVICE real v_tanh(real v) { return tanhf(v); }
DEVICE real v_normcdf(real v) { return normcdff(v); }
#else
DEVICE real v_sigmoid(real v) { return 1.0 / (1.0 + exp(-v)); }
DEVICE real v_tanh(real v) { return tanh(v); }
DEVICE real v_normcdf(real v) { return normcdf(v); }
#endif
#endif
#endif

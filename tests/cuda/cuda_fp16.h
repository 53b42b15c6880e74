/* cuda_fp16.h for the emulation: the conversions that kernels use. */
#pragma once
#include <stdint.h>
#include <string.h>
struct __half { uint16_t bits; };
static inline __half __ushort_as_half(uint16_t bits) { return __half{bits}; }
static inline uint16_t __half_as_ushort(__half h) { return h.bits; }
static inline float __half2float(__half h)
{
    _Float16 v;
    memcpy(&v, &h.bits, 2);
    return (float)v;
}
static inline __half __float2half_rn(float f)
{
    const _Float16 v = (_Float16)f;
    __half h;
    memcpy(&h.bits, &v, 2);
    return h;
}

/* The intrinsics of AMX in plain C, for machines without it: gcc -include amx_emulation.h, for all files of a library.
 * As Intel documents them (SDM volume 2, TDPBF16PS and TDPBSSD), strict: what would raise #GP or #UD aborts.
 * BSRGEN_AMX_REFUSE=1 in the environment: the system refuses the permission. */
#ifndef AMX_EMULATION_H
#define AMX_EMULATION_H
#define BSRGEN_AMX_EMULATED 1
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h> /* before its names are taken over */
#endif

/* One for all files of a library: the permission is asked for in another one than the tiles are used in. */
#define AMX_SHARED __attribute__((weak, visibility("default")))
AMX_SHARED struct { int64_t dots, loads, stores, configs, permissions; } amx_count;
static _Thread_local struct {
    int configured;
    uint16_t row_bytes[8];
    uint8_t rows[8], data[8][16][64];
} amx;
AMX_SHARED int amx_process_permitted;

__attribute__((noreturn, unused)) static void amx_die(const char *what, int a, int b)
{
    fprintf(stderr, "AMX emulation: %s (%d, %d)\n", what, a, b);
    abort();
}

__attribute__((unused)) static long amx_ask(void)
{
    const char *refuse = getenv("BSRGEN_AMX_REFUSE");
    amx_count.permissions++;
    if (refuse && *refuse == '1') return -1;
    __atomic_store_n(&amx_process_permitted, 1, __ATOMIC_RELAXED);
    return 0;
}
#define BSRGEN_AMX_ASK() amx_ask()

__attribute__((unused)) static void amx_loadconfig(const void *memory)
{
    struct { uint8_t palette, start, reserved[14]; uint16_t row_bytes[16]; uint8_t rows[16]; } c;
    memcpy(&c, memory, sizeof c);
    if (!__atomic_load_n(&amx_process_permitted, __ATOMIC_RELAXED)) amx_die("tiles used without the system's permission", 0, 0);
    if (c.palette > 1) amx_die("no such palette", c.palette, 0);
    if (c.start) amx_die("start_row is not 0", c.start, 0);
    for (int i = 0; i < 14; i++)
        if (c.reserved[i]) amx_die("reserved byte is not 0", i, c.reserved[i]);
    for (int t = 0; t < 16; t++) {
        if (t >= 8 && (c.rows[t] || c.row_bytes[t])) amx_die("no such tile", t, c.rows[t]);
        if (c.rows[t] > 16 || c.row_bytes[t] > 64) amx_die("tile too large", c.rows[t], c.row_bytes[t]);
        if (!c.rows[t] != !c.row_bytes[t]) amx_die("rows without bytes or bytes without rows", c.rows[t], c.row_bytes[t]);
    }
    memset(&amx, 0, sizeof amx);
    memcpy(amx.rows, c.rows, 8);
    memcpy(amx.row_bytes, c.row_bytes, 16);
    amx.configured = c.palette;
    amx_count.configs++;
}

__attribute__((unused)) static void amx_release(void) { memset(&amx, 0, sizeof amx); }

static inline void amx_live(int t)
{
    if (t < 0 || t > 7) amx_die("no such tile", t, 0);
    if (!amx.configured || !amx.rows[t]) amx_die("tile is not configured", t, 0);
}

__attribute__((unused)) static void amx_zero(int t) { amx_live(t), memset(amx.data[t], 0, sizeof amx.data[t]); }

__attribute__((unused)) static void amx_load(int t, const void *base, int64_t stride)
{
    amx_live(t);
    memset(amx.data[t], 0, sizeof amx.data[t]);
    for (int r = 0; r < amx.rows[t]; r++) memcpy(amx.data[t][r], (const char *)base + r * stride, amx.row_bytes[t]);
    amx_count.loads++;
}

__attribute__((unused)) static void amx_store(int t, void *base, int64_t stride)
{
    amx_live(t);
    for (int r = 0; r < amx.rows[t]; r++) memcpy((char *)base + r * stride, amx.data[t][r], amx.row_bytes[t]);
    amx_count.stores++;
}

static inline void amx_match(int c, int a, int b)
{
    amx_live(c), amx_live(a), amx_live(b);
    if (c == a || c == b || a == b) amx_die("the three tiles must differ", c, a);
    if (amx.row_bytes[c] % 4 || amx.row_bytes[a] % 4 || amx.row_bytes[b] % 4) amx_die("row is not in dwords", c, a);
    if (amx.rows[c] != amx.rows[a]) amx_die("rows of sums and of A differ", amx.rows[c], amx.rows[a]);
    if (amx.row_bytes[c] != amx.row_bytes[b]) amx_die("columns of sums and of B differ", amx.row_bytes[c], amx.row_bytes[b]);
    if (amx.row_bytes[a] / 4 != amx.rows[b]) amx_die("k of A and of B differ", amx.row_bytes[a] / 4, amx.rows[b]);
    amx_count.dots++;
}

static inline float amx_flush(float v) { return fabsf(v) < 0x1p-126f ? copysignf(0, v) : v; } /* NaN stays */

static inline float amx_bf16(const uint8_t *p)
{
    uint16_t h;
    memcpy(&h, p, 2);
    const uint32_t bits = (uint32_t)h << 16;
    float v;
    memcpy(&v, &bits, 4);
    return amx_flush(v);
}

/* Two chains of multiply-adds, of even and of odd k, whose sum is added to the old value. */
__attribute__((unused)) static void amx_dot_bf16(int c, int a, int b)
{
    amx_match(c, a, b);
    for (int m = 0; m < amx.rows[c]; m++)
        for (int n = 0; n < amx.row_bytes[c] / 4; n++) {
            float even = 0, odd = 0, old;
            for (int k = 0; k < amx.rows[b]; k++) {
                even = amx_flush(fmaf(amx_bf16(amx.data[a][m] + 4 * k), amx_bf16(amx.data[b][k] + 4 * n), even));
                odd = amx_flush(fmaf(amx_bf16(amx.data[a][m] + 4 * k + 2), amx_bf16(amx.data[b][k] + 4 * n + 2), odd));
            }
            memcpy(&old, amx.data[c][m] + 4 * n, 4);
            old = amx_flush(amx_flush(old) + amx_flush(even + odd));
            memcpy(amx.data[c][m] + 4 * n, &old, 4);
        }
}

/* Sums wrap around. */
__attribute__((unused)) static void amx_dot_int8(int c, int a, int b, int a_signed, int b_signed)
{
    amx_match(c, a, b);
    for (int m = 0; m < amx.rows[c]; m++)
        for (int n = 0; n < amx.row_bytes[c] / 4; n++) {
            uint32_t sum;
            memcpy(&sum, amx.data[c][m] + 4 * n, 4);
            for (int k = 0; k < 4 * amx.rows[b]; k++) {
                const uint8_t u = amx.data[a][m][k], v = amx.data[b][k / 4][4 * n + k % 4];
                sum += (uint32_t)((a_signed ? (int8_t)u : (int)u) * (b_signed ? (int8_t)v : (int)v));
            }
            memcpy(amx.data[c][m] + 4 * n, &sum, 4);
        }
}

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#undef _tile_dpbsud
#undef _tile_dpbusd
#undef _tile_dpbuud
#define _tile_loadconfig(memory) amx_loadconfig(memory)
#define _tile_release() amx_release()
#define _tile_zero(t) amx_zero(t)
#define _tile_loadd(t, base, stride) amx_load(t, base, stride)
#define _tile_stream_loadd(t, base, stride) amx_load(t, base, stride)
#define _tile_stored(t, base, stride) amx_store(t, base, stride)
#define _tile_dpbf16ps(c, a, b) amx_dot_bf16(c, a, b)
#define _tile_dpbssd(c, a, b) amx_dot_int8(c, a, b, 1, 1)
#define _tile_dpbsud(c, a, b) amx_dot_int8(c, a, b, 1, 0)
#define _tile_dpbusd(c, a, b) amx_dot_int8(c, a, b, 0, 1)
#define _tile_dpbuud(c, a, b) amx_dot_int8(c, a, b, 0, 0)
#endif

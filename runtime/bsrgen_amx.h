/* bsrgen_amx.h: tiles of the matrix unit.  x86-64 Linux >= 5.16, gnu11; everything static.
 *   bsrgen_amx_allowed()                 1 where this process may use tiles; asks the system once
 *   bsrgen_amx_shape(&tiles, t, rows, bytes)   tile t: so many rows of so many bytes
 *   bsrgen_amx_begin(&tiles), bsrgen_amx_end() around the products of one part
 *
 * Linux grants the 8 KiB of tile state on request, for the process (kernel.org, x86/xstate.rst): threads share the
 * permission and fork() inherits it, so one answer is kept for good.  It refuses where a thread has an alternate signal
 * stack too small for the state; then this level is not there.
 *
 * Tile registers and their configuration are volatile across calls (System V psABI, x86-64, register usage), like
 * vector registers: a caller's own are not preserved.  Every part configures on its own thread and releases at its end,
 * so that idle threads carry no tile state through context switches and the caller finds the initial state. */
#ifndef BSRGEN_AMX_H
#define BSRGEN_AMX_H
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>
#if defined __AMX_TILE__ && !defined BSRGEN_AMX_EMULATED
#include <immintrin.h>
#endif

#ifndef BSRGEN_AMX_ASK /* arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA) */
#ifdef __x86_64__
#define BSRGEN_AMX_ASK() syscall(SYS_arch_prctl, 0x1023, 18)
#else
#define BSRGEN_AMX_ASK() (-1)
#endif
#endif

/* The CPU must have been checked before.  Racing threads store the same answer. */
__attribute__((unused)) static int bsrgen_amx_allowed(void)
{
    static int allowed = -1;
    int answer = __atomic_load_n(&allowed, __ATOMIC_RELAXED);
    if (answer < 0) {
        answer = BSRGEN_AMX_ASK() == 0;
        __atomic_store_n(&allowed, answer, __ATOMIC_RELAXED);
    }
    return answer;
}

#if defined __AMX_TILE__ || defined BSRGEN_AMX_EMULATED
enum { BSRGEN_AMX_ROWS = 16, BSRGEN_AMX_ROW_BYTES = 64, BSRGEN_AMX_TILE_BYTES = 1024 };

struct bsrgen_tiles { /* palette 1 (Intel SDM volume 1, 18.2) */
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

__attribute__((unused)) static void bsrgen_amx_shape(struct bsrgen_tiles *tiles, int t, int rows, int row_bytes)
{
    tiles->palette = 1;
    tiles->rows[t] = (uint8_t)rows;
    tiles->row_bytes[t] = (uint16_t)row_bytes;
}

/* Stores stay on their side of it: gcc's intrinsics do not say that they read memory (of a configuration, 8 bytes). */
#define BSRGEN_AMX_ORDER(p) __asm__ volatile("" : : "r"(p) : "memory")

/* Zeros all tiles. */
__attribute__((unused)) static void bsrgen_amx_begin(const struct bsrgen_tiles *tiles)
{
    BSRGEN_AMX_ORDER(tiles);
    _tile_loadconfig(tiles);
}

__attribute__((unused)) static void bsrgen_amx_end(void) { _tile_release(); }
#endif
#endif

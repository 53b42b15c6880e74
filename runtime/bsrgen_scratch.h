/* bsrgen_scratch.h: a cache of scratch buffers.  Linux, gnu11; everything static: each C file has its own.
 *   bsrgen_scratch_take(bytes)   a buffer of at least `bytes`, 4096-byte aligned, contents undefined; NULL: no memory
 *   bsrgen_scratch_give(buffer)  hand it back, from any thread; NULL is nothing
 *
 * A part takes one buffer and gives it back; a warm take is one exchange: no system call, no page fault, and as a rule
 * the buffer that this thread used last.  About as many are kept as were in use at one time; each grows to the largest
 * request that meets it; closing the library frees them.  After fork() parent and child own a copy (on write) each;
 * those that other threads of the parent held are lost to the child, nothing else is.
 *
 * 4K aliasing: a load whose address agrees in the low 12 bits with that of a store in flight waits for the store
 * (LD_BLOCKS_PARTIAL.ADDRESS_ALIAS on Intel), and lines 4096 bytes apart share an L1 set.  All buffers start at 0 in
 * these bits, as large arrays nearly do.  So a plan keeps row strides off multiples of 4096 bytes, and starts the
 * second of two panels in a buffer some lines further on.
 */
#ifndef BSRGEN_SCRATCH_H
#define BSRGEN_SCRATCH_H
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>

#define BSRGEN_SCRATCH_SLOTS 256 /* 2^8, see home; more buffers than that at one time are not kept */
#define BSRGEN_HUGE_PAGE ((size_t)2 << 20)

struct bsrgen_scratch_head { /* ends where the buffer starts: the end of the page (4096) before it */
    void *map;
    size_t map_bytes, bytes;
};

static _Atomic(void *) bsrgen_scratch_slots[BSRGEN_SCRATCH_SLOTS];

static struct bsrgen_scratch_head *bsrgen_scratch_head(void *buffer)
{
    return (struct bsrgen_scratch_head *)buffer - 1;
}

/* Where a thread looks first: a hash of where its stack lies (stacks are further apart than 64 KiB, frames are not). */
static size_t bsrgen_scratch_home(void)
{
    uintptr_t frame = (uintptr_t)__builtin_frame_address(0) >> 16;
    return (size_t)((uint32_t)frame * UINT32_C(2654435769) >> 24);
}

static void bsrgen_scratch_free(void *buffer)
{
    struct bsrgen_scratch_head *head = bsrgen_scratch_head(buffer);
    munmap(head->map, head->map_bytes);
}

/* Not malloc: pages come on first touch, near the core that touches them, and go back to the system when freed. */
static void *bsrgen_scratch_new(size_t bytes)
{
    if (bytes > PTRDIFF_MAX - 2 * BSRGEN_HUGE_PAGE)
        return NULL;
    bytes = (bytes | 65535) + 1; /* so that sizes that creep up rarely ask for a new buffer */
    size_t align = bytes < BSRGEN_HUGE_PAGE ? 4096 : BSRGEN_HUGE_PAGE, map_bytes = bytes + align + 4096;
    char *map = mmap(NULL, map_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED)
        return NULL;
    char *buffer = map + 4096 + (-(uintptr_t)(map + 4096) & (align - 1));
#ifdef MADV_HUGEPAGE
    if (align == BSRGEN_HUGE_PAGE)
        madvise(buffer, bytes & -BSRGEN_HUGE_PAGE, MADV_HUGEPAGE); /* a kernel without them: small pages */
#endif
    *bsrgen_scratch_head(buffer) = (struct bsrgen_scratch_head){map, map_bytes, bytes};
    return buffer;
}

__attribute__((unused)) static void *bsrgen_scratch_take(size_t bytes)
{
    size_t home = bsrgen_scratch_home();
    for (size_t i = 0; i < BSRGEN_SCRATCH_SLOTS; i++) {
        _Atomic(void *) *slot = &bsrgen_scratch_slots[(home + i) % BSRGEN_SCRATCH_SLOTS];
        if (atomic_load_explicit(slot, memory_order_relaxed) == NULL)
            continue;
        void *buffer = atomic_exchange(slot, NULL);
        if (buffer != NULL && bsrgen_scratch_head(buffer)->bytes >= bytes)
            return buffer;
        if (buffer != NULL) { /* too small: its successor takes its place */
            bsrgen_scratch_free(buffer);
            break;
        }
    }
    return bsrgen_scratch_new(bytes);
}

__attribute__((unused)) static void bsrgen_scratch_give(void *buffer)
{
    size_t home = bsrgen_scratch_home();
    for (size_t i = 0; buffer != NULL && i < BSRGEN_SCRATCH_SLOTS; i++) {
        void *empty = NULL;
        if (atomic_compare_exchange_strong(&bsrgen_scratch_slots[(home + i) % BSRGEN_SCRATCH_SLOTS], &empty, buffer))
            return;
    }
    if (buffer != NULL)
        bsrgen_scratch_free(buffer);
}

__attribute__((destructor)) static void bsrgen_scratch_clear(void)
{
    for (size_t i = 0; i < BSRGEN_SCRATCH_SLOTS; i++) {
        void *buffer = atomic_exchange(&bsrgen_scratch_slots[i], NULL);
        if (buffer != NULL)
            bsrgen_scratch_free(buffer);
    }
}
#endif

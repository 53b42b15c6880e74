/* The CUDA driver for kernels that run on the CPU under cuda_runtime.h: one "GPU", its memory, events of the CPU's clock,
 * graphs.  Memory lies at the end of its pages, a page without access behind it, as cudaMalloc's does there. */
#define _GNU_SOURCE
#include "stream.h"
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

typedef struct emulated_stream *stream;
struct event { struct timespec time; };

int cuInit(unsigned flags) { return flags ? 1 : 0; }
int cuDriverGetVersion(int *version) { return *version = 13000, 0; }
int cuGetErrorString(int error, const char **words) { return *words = error == 2 ? "out of memory" : "emulated", 0; }
int cuDeviceGetCount(int *count) { return *count = 1, 0; }
int cuDeviceGet(int *device, int number) { return *device = number, number ? 101 : 0; }
int cuDeviceGetName(char *name, int bytes, int device) { return snprintf(name, (size_t)bytes, "emulated GPU"), device; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { return *bytes = (size_t)1 << 30, device; }
int cuDeviceGetAttribute(int *value, int which, int device)
{
    *value = which == 16 ? 4 : which == 13 ? 1000000 : which == 38 ? 1 << 20 : which == 75 ? 8 : 0;
    return device;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = "", device; }
int cuCtxPushCurrent_v2(void *context) { return !context; }
int cuCtxPopCurrent_v2(void **context) { return *context = "", 0; }

int cuMemAlloc_v2(uint64_t *memory, size_t bytes)
{
    if (getenv(EMULATED_CAPTURE)) return 900;
    const size_t page = 4096, room = (bytes + page - 1) / page * page;
    uint8_t *pages = mmap(NULL, room + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) return 2;
    memset(pages, 0xff, room);
    mprotect(pages + room, page, PROT_NONE);
    *memory = (uint64_t)(uintptr_t)(pages + (room - bytes) / 16 * 16);
    return 0;
}
int cuMemFree_v2(uint64_t memory) { return !memory; } /* addresses are not used again */
int cuMemcpyHtoD_v2(uint64_t to, const void *from, size_t bytes) { return memcpy((void *)(uintptr_t)to, from, bytes), 0; }
int cuMemcpyDtoH_v2(void *to, uint64_t from, size_t bytes)
{
    if (getenv(EMULATED_CAPTURE)) return 900;
    return memcpy(to, (const void *)(uintptr_t)from, bytes), 0;
}
int cuMemsetD8Async(uint64_t memory, unsigned char value, size_t bytes, void *s)
{
    (void)s;
    return memset((void *)(uintptr_t)memory, value, bytes), 0;
}

int cuStreamCreate(void **s, unsigned flags) { return *s = calloc(1, sizeof(struct emulated_stream)), flags > 1; }
int cuStreamSynchronize(void *s) { return s && ((stream)s)->capturing ? 900 : 0; }
int cuStreamDestroy_v2(void *s) { return free(s), 0; }
int cuStreamBeginCapture_v2(void *s, int mode)
{
    static int captures;
    ((stream)s)->capturing = ++captures, ((stream)s)->count = 0, (void)mode;
    return setenv(EMULATED_CAPTURE, "1", 1);
}
int cuStreamEndCapture(void *s, void **graph)
{
    stream copy = malloc(sizeof *copy);
    *copy = *(stream)s, ((stream)s)->capturing = 0, *graph = copy;
    return unsetenv(EMULATED_CAPTURE);
}
int cuGraphInstantiateWithFlags(void **executable, void *graph, uint64_t flags)
{
    stream copy = malloc(sizeof *copy);
    *copy = *(stream)graph, *executable = copy;
    return flags != 0;
}
int cuGraphLaunch(void *executable, void *s)
{
    const stream graph = executable;
    for (int i = 0; i < graph->count; i++) graph->node[i].run(graph->node[i].data);
    return !s;
}
int cuGraphExecDestroy(void *executable) { return free(executable), 0; }
int cuGraphDestroy(void *graph) { return free(graph), 0; }

int cuEventCreate(void **event, unsigned flags) { return *event = calloc(1, sizeof(struct event)), (int)flags; }
int cuEventRecord(void *event, void *s) { return (void)s, clock_gettime(CLOCK_MONOTONIC, &((struct event *)event)->time); }
int cuEventSynchronize(void *event) { return !event; }
int cuEventElapsedTime(float *ms, void *begin, void *end)
{
    const struct timespec a = ((struct event *)begin)->time, b = ((struct event *)end)->time;
    return *ms = (float)((double)(b.tv_sec - a.tv_sec) * 1e3 + (double)(b.tv_nsec - a.tv_nsec) * 1e-6), 0;
}
int cuEventDestroy_v2(void *event) { return free(event), 0; }

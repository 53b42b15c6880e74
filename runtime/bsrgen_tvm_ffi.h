/* bsrgen_tvm_ffi.h: an artifact as a function of TVM FFI (apache-tvm-ffi 0.1): __tvm_ffi_NAME(x, operands ..., y).
 * Its C ABI is small and kept stable: values of 16 bytes that say their type, arrays as DLPack describes them.  Declared
 * here, so that neither building nor loading an artifact needs TVM; only errors go through its library, where the process
 * has it.  An artifact may be loaded before that, so it is looked up in each failing call.
 * With FFI_ON_GPU defined, arrays are those of one NVIDIA GPU, and calls go to the stream that TVM FFI says is current. */
#ifndef BSRGEN_TVM_FFI_H
#define BSRGEN_TVM_FFI_H
#include <dlfcn.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include "bsrgen.h"
#pragma weak dlsym /* in libdl before glibc 2.34, which nothing else here needs */

#ifdef FFI_ON_GPU
#define FFI_LAST "a stream's handle"
#else
#define FFI_LAST "a number of threads"
#endif
#define FFI_SLOW __attribute__((cold, noinline)) /* compiled for size: a third of what main files take to compile else */

enum { FFI_NONE = 0, FFI_INT = 1, FFI_BOOL = 2, FFI_FLOAT = 3, FFI_POINTER = 4, FFI_ARRAY = 7, FFI_TENSOR = 70 }; /* type of a value */
enum { FFI_CPU = 1, FFI_CUDA = 2, FFI_CUDA_HOST = 3, FFI_CUDA_MANAGED = 13, FFI_HEADER_BYTES = 24, FFI_DEVICES = 64 };

struct ffi_value {
    int32_t type;
    uint32_t zero;
    union { int64_t integer; double real; char *object; } as;
};

struct ffi_array { /* DLTensor */
    char *data;
    struct { int32_t type, id; } device;
    int32_t rank;
    struct { uint8_t code, bits; uint16_t lanes; } element;
    int64_t *sizes, *strides; /* in elements; strides NULL: contiguous */
    uint64_t offset_bytes;
};

struct ffi_type { const char *name; uint8_t code, bits; }; /* code as DLPack has it: 0 integer, 1 unsigned, 2 float, 4 bfloat, 6 bool */

/* An operand: kind is the first letter of row, element, token, scalar, live, or g of routing, m of mask. */
struct ffi_operand { const char *name; char kind; struct ffi_type type; double otherwise; int optional; };

struct ffi_kernel {
    const char *name;
    int (*call)(const struct bsrgen_call *);
    const char *(*info)(int);
    struct ffi_type x, y;
    int64_t features, rows, mask_tokens, mask_rows; /* of X and Y; tokens and features of a block of a mask */
    int by_token, operands; /* by_token: x is [..., K], y [..., M]; else [K, N] and [M, N] */
#ifdef FFI_ON_GPU
    int (*upload)(const void *, int64_t, int, void **), (*release)(void *);
    const char *(*error)(int);
    void **values; /* [FFI_DEVICES]: what upload has left on each */
#endif
};

/* -1, with the error where TVM FFI will look for it. */
static FFI_SLOW int ffi_failed(const char *kind, const struct ffi_kernel *k, const char *name, const char *what)
{
    void (*raise)(const char *, const char *) = NULL;
    char text[512];
    snprintf(text, sizeof text, "%s: %s %s", k->name, name, what);
    if (dlsym) raise = (void (*)(const char *, const char *))dlsym(RTLD_DEFAULT, "TVMFFIErrorSetRaisedFromCStr");
    if (raise) raise(kind, text);
    return -1;
}

static FFI_SLOW int ffi_wants(const struct ffi_kernel *k, const char *name, const char *what, int64_t number)
{
    char text[160];
    snprintf(text, sizeof text, "%s %lld", what, (long long)number);
    return ffi_failed("ValueError", k, name, text);
}

/* Whether the kernel reads an array where it lies; an error otherwise. */
static FFI_SLOW int ffi_reaches(const struct ffi_kernel *k, const struct ffi_array *a, const char *name, int gpu)
{
#ifdef FFI_ON_GPU
    if (a->device.type != FFI_CUDA && a->device.type != FFI_CUDA_MANAGED) return ffi_failed("ValueError", k, name, "is not in the memory of an NVIDIA GPU"), 0;
    if (a->device.id < 0 || a->device.id >= FFI_DEVICES) return ffi_failed("ValueError", k, name, "is on a device whose number is out of range"), 0;
    if (gpu >= 0 && a->device.id != gpu) return ffi_failed("ValueError", k, name, "is on another GPU than x"), 0;
    return 1;
#else
    (void)gpu;
    if (a->device.type != FFI_CPU && a->device.type != FFI_CUDA_HOST) return ffi_failed("ValueError", k, name, "is not in the CPU's memory"), 0;
    return 1;
#endif
}

/* The array that a value is, of the right type and in the right memory, of GPU `gpu` (-1: any); NULL and an error otherwise. */
static FFI_SLOW const struct ffi_array *ffi_array_of(const struct ffi_kernel *k, const struct ffi_value *v, const char *name, struct ffi_type type, int gpu)
{
    const struct ffi_array *a = v->type == FFI_ARRAY ? (void *)v->as.object : v->type == FFI_TENSOR ? (void *)(v->as.object + FFI_HEADER_BYTES) : NULL;
    char text[160];
    if (!a) return ffi_failed("TypeError", k, name, "is not an array"), NULL;
    if (!ffi_reaches(k, a, name, gpu)) return NULL;
    const int fits = a->element.lanes == 1 && a->element.bits == type.bits && (a->element.code == type.code || (type.code == 1 && a->element.code == 6));
    snprintf(text, sizeof text, "has another dtype than %s; convert it", type.name);
    return fits ? a : (ffi_failed("TypeError", k, name, text), NULL);
}

static int64_t ffi_elements(const struct ffi_array *a, int rank)
{
    int64_t product = 1;
    for (int i = 0; i < rank; i++) product *= a->sizes[i];
    return product;
}

/* `a` as `rows` rows of `columns` neighbours: the distance between rows in elements, -1 where it does not lie so. */
static FFI_SLOW int64_t ffi_leading(const struct ffi_array *a, int64_t columns)
{
    int64_t distance = columns, next;
    if (a->strides && columns > 1 && a->strides[a->rank - 1] != 1) return -1;
    int axis = a->rank - 2;
    while (axis >= 0 && a->sizes[axis] == 1) axis--;
    if (!a->strides || axis < 0) return columns;
    distance = next = a->strides[axis];
    for (; axis >= 0; axis--) {
        if (a->sizes[axis] != 1 && a->strides[axis] != next) return -1;
        next *= a->sizes[axis];
    }
    return distance >= columns ? distance : -1;
}

static FFI_SLOW int ffi_matrix(const struct ffi_kernel *k, const struct ffi_value *v, const char *name, struct ffi_type type, int64_t features, int gpu, int64_t *n, int64_t *ld, char **data)
{
    const struct ffi_array *a = ffi_array_of(k, v, name, type, gpu);
    if (!a) return -1;
    if (a->rank < (k->by_token ? 1 : 2) || (!k->by_token && a->rank != 2)) return ffi_failed("ValueError", k, name, k->by_token ? "has no axis of features" : "is not a matrix");
    if (a->sizes[k->by_token ? a->rank - 1 : 0] != features) return ffi_wants(k, name, k->by_token ? "has a last axis that is not" : "has a first axis that is not", features);
    const int64_t tokens = k->by_token ? ffi_elements(a, a->rank - 1) : a->sizes[1];
    if (*n >= 0 && tokens != *n) return ffi_wants(k, name, "has another number of tokens than", *n);
    *n = tokens, *ld = ffi_leading(a, k->by_token ? features : tokens), *data = a->data + a->offset_bytes;
    return *ld < 0 && tokens && features ? ffi_failed("ValueError", k, name, "does not lie row by row; make it contiguous") : 0;
}

/* n numbers side by side. */
static FFI_SLOW int ffi_vector(const struct ffi_kernel *k, const struct ffi_value *v, const struct ffi_operand *o, int64_t n, int gpu, struct bsrgen_operand *to)
{
    const struct ffi_array *a = ffi_array_of(k, v, o->name, o->type, gpu);
    if (!a) return -1;
    const int64_t count = ffi_elements(a, a->rank);
    if (count != n && !(o->kind == 't' && count == 1)) return ffi_wants(k, o->name, "has another number of elements than", n);
    if (a->strides && count > 1 && ffi_leading(a, a->sizes[a->rank - 1]) != a->sizes[a->rank - 1]) return ffi_failed("ValueError", k, o->name, "is not contiguous");
    *to = (struct bsrgen_operand){.data = a->data + a->offset_bytes, .ld = o->kind == 't' && count > 1};
    return 0;
}

static FFI_SLOW int ffi_operand_of(const struct ffi_kernel *k, const struct ffi_value *v, const struct ffi_operand *o, int64_t n, int gpu, struct bsrgen_operand *to)
{
    char *data = NULL;
    int64_t tokens = n;
    const struct ffi_array *a;
    if (v->type == FFI_NONE && o->optional) return *to = (struct bsrgen_operand){.scalar = o->otherwise}, 0;
    switch (o->kind) {
    case 's':
        if (v->type == FFI_INT) return *to = (struct bsrgen_operand){.scalar = (double)v->as.integer}, 0;
        if (v->type == FFI_FLOAT) return *to = (struct bsrgen_operand){.scalar = v->as.real}, 0;
#ifdef FFI_ON_GPU
        return ffi_failed("TypeError", k, o->name, "is not a number; an array on a GPU cannot be read before the launch");
#else
        if (ffi_vector(k, v, o, 1, gpu, to)) return -1;
        return to->scalar = o->type.bits == 64 ? *(const double *)to->data : (double)*(const float *)to->data, 0;
#endif
    case 'e':
        if (ffi_matrix(k, v, o->name, o->type, k->rows, gpu, &tokens, &to->ld, &data)) return -1;
        return to->data = data, 0;
    case 'm':
        if (!(a = ffi_array_of(k, v, o->name, o->type, gpu))) return -1;
        if (a->rank != 2 || a->sizes[0] != (n + k->mask_tokens - 1) / k->mask_tokens || a->sizes[1] != (k->rows + k->mask_rows - 1) / k->mask_rows ||
            (to->ld = ffi_leading(a, a->sizes[1])) < 0) return ffi_failed("ValueError", k, o->name, "is not a contiguous row of blocks for each group of tokens");
        return to->data = a->data + a->offset_bytes, 0;
    default:
        return ffi_vector(k, v, o, o->kind == 'r' ? k->rows : n, gpu, to);
    }
}

#ifdef FFI_ON_GPU
/* Values on the GPU of a call, copied there by the first one; the stream: given as a number, or TVM FFI's current one, where
 * this process has that, or the default one. */
static FFI_SLOW int ffi_place(const struct ffi_kernel *k, struct bsrgen_call *call, int gpu, const struct ffi_value *stream)
{
    void *(*current)(int32_t, int32_t) = NULL, *handle, *there = __atomic_load_n(&k->values[gpu], __ATOMIC_ACQUIRE), *none = NULL;
    const int status = there ? BSRGEN_OK : k->upload(NULL, 0, gpu, &there);
    if (status) return ffi_failed("RuntimeError", k, "values:", k->error(status));
    if (!__atomic_compare_exchange_n(&k->values[gpu], &none, there, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE) && none != there) k->release(there), there = none;
    if (stream && stream->type != FFI_INT && stream->type != FFI_POINTER) return ffi_failed("TypeError", k, "stream", "is not a handle");
    if (!stream && dlsym) current = (void *(*)(int32_t, int32_t))dlsym(RTLD_DEFAULT, "TVMFFIEnvGetStream");
    handle = stream ? stream->as.object : current ? current(FFI_CUDA, gpu) : NULL;
    call->values = there, call->threads = gpu;
    *(void **)&call->parallel = handle;
    return 0;
}
#else
static FFI_SLOW int ffi_place(const struct ffi_kernel *k, struct bsrgen_call *call, int gpu, const struct ffi_value *threads)
{
    if (threads && (threads->type != FFI_INT || threads->as.integer < 0 || threads->as.integer > 1 << 16)) return ffi_failed("ValueError", k, "threads", "is not a number from 0 up");
    return call->threads = threads ? (int32_t)threads->as.integer : 0, (void)gpu, 0;
}
#endif

/* What a status means, where it is not 0. */
static FFI_SLOW int ffi_status(const struct ffi_kernel *k, int status)
{
    switch (status) {
    case BSRGEN_OK: return 0;
    case BSRGEN_NO_ISA: return ffi_failed("RuntimeError", k, "this CPU lacks", k->info(1));
    case BSRGEN_NO_MEMORY: return ffi_failed("MemoryError", k, "the call", "found no memory");
#ifdef FFI_ON_GPU
    default: return ffi_failed(status < BSRGEN_CUDA ? "ValueError" : "RuntimeError", k, "the call:", k->error(status));
#else
    default: return ffi_failed("ValueError", k, "the call", "has an argument that the kernel refuses");
#endif
    }
}

static FFI_SLOW int ffi_call(const struct ffi_kernel *k, const struct ffi_operand *operands, struct bsrgen_operand *given, const struct ffi_value *args, int32_t count)
{
    struct bsrgen_call call = {.n = -1, .operands = given};
    char *x = NULL, *y = NULL;
    const int wanted = k->operands + 2;
    if (count != wanted && count != wanted + 1) return ffi_wants(k, "the call", "takes x, its operands, y and perhaps " FFI_LAST "; without that they are", wanted);
    if (ffi_matrix(k, &args[0], "x", k->x, k->features, -1, &call.n, &call.ldx, &x)) return -1;
    const int gpu = ffi_array_of(k, &args[0], "x", k->x, -1)->device.id;
    if (ffi_matrix(k, &args[wanted - 1], "y", k->y, k->rows, gpu, &call.n, &call.ldy, &y)) return -1;
    for (int i = 0; i < k->operands; i++)
        if (ffi_operand_of(k, &args[i + 1], &operands[i], call.n, gpu, &given[i])) return -1;
    call.x = x, call.y = y;
    const int64_t xrows = k->by_token ? call.n : k->features, yrows = k->by_token ? call.n : k->rows;
    const int apart = x + xrows * call.ldx * (k->x.bits / 8) <= y || y + yrows * call.ldy * (k->y.bits / 8) <= x;
    if (call.n && !apart && xrows && yrows) return ffi_failed("ValueError", k, "y", "overlaps x");
    if (ffi_place(k, &call, gpu, count > wanted ? &args[wanted] : NULL)) return -1;
    return ffi_status(k, k->call(&call));
}
#endif

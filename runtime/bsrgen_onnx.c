/* bsrgen_onnx.c: artifacts as custom operators of ONNX Runtime, the same library for every model.
 *   bsrgen::Linear_TYPE(x [..., K], operands ...) -> y [..., M], x and y of TYPE
 * attributes: `library`, an artifact's .so, relative to this file's folder; `symbol`, its NAME; `features` K, `rows` M;
 * `operands`, a letter for each further input: r is one value for each row, e is like y. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "bsrgen.h"
#include "bsrgen_ort.h"

enum { RANK = 16, OPERANDS = 16, TEXT = 1024 };

struct kernel {
    OrtApi api;
    void *library;
    int (*call)(const struct bsrgen_call *);
    int64_t features, rows;
    char operands[OPERANDS + 1], symbol[TEXT];
};

struct operator {
    struct OrtCustomOp table; /* first: ONNX Runtime hands it back */
    const char *name;
    int type;
};

static OrtStatus *failed(OrtApi api, int code, const char *what, const char *which)
{
    char text[3 * TEXT];
    snprintf(text, sizeof text, "bsrgen: %s%s%s", what, which ? ": " : "", which ? which : "");
    return ort_create_status(api)(code, text);
}

/* A path within this library's folder, as the dynamic linker wants it. */
static int beside(const char *relative, char *path, size_t bytes)
{
    Dl_info self;
    if (*relative == '/' || strstr(relative, "..") || !dladdr((void *)&beside, &self)) return 0;
    const char *end = strrchr(self.dli_fname, '/');
    const int folder = end ? (int)(end - self.dli_fname) : 1;
    return (size_t)snprintf(path, bytes, "%.*s/%s", folder, end ? self.dli_fname : ".", relative) < bytes;
}

static OrtStatus *opened(struct kernel *k, const char *relative)
{
    char path[4 * TEXT], name[TEXT + 8];
    if (!beside(relative, path, sizeof path)) return failed(k->api, ORT_INVALID_ARGUMENT, "not a path below the model's folder", relative);
    if (!(k->library = dlopen(path, RTLD_NOW | RTLD_LOCAL))) return failed(k->api, ORT_FAIL, "cannot be loaded", dlerror());
    snprintf(name, sizeof name, "%s_info", k->symbol);
    const char *(*info)(int) = (const char *(*)(int))dlsym(k->library, name);
    snprintf(name, sizeof name, "%s_call", k->symbol);
    k->call = (int (*)(const struct bsrgen_call *))dlsym(k->library, name);
    if (!info || !k->call) return failed(k->api, ORT_FAIL, "no such kernel in the library", name);
    if (!*info(2)) return failed(k->api, ORT_FAIL, "this CPU lacks what every kernel of the library needs", info(1));
    return NULL;
}

static void destroy(void *kernel)
{
    struct kernel *k = kernel;
    if (k && k->library) dlclose(k->library);
    free(k);
}

static OrtStatus *create(const struct OrtCustomOp *op, OrtApi api, const void *info, void **kernel)
{
    (void)op;
    struct kernel *k = calloc(1, sizeof *k);
    char library[TEXT];
    size_t text = sizeof library, symbol = sizeof k->symbol, operands = sizeof k->operands;
    OrtStatus *bad;
    *kernel = NULL;
    if (!k) return failed(api, ORT_FAIL, "out of memory", NULL);
    k->api = api;
    if ((bad = ort_string(api)(info, "library", library, &text)) || (bad = ort_string(api)(info, "symbol", k->symbol, &symbol)) ||
        (bad = ort_string(api)(info, "operands", k->operands, &operands)) || (bad = ort_integer(api)(info, "features", &k->features)) ||
        (bad = ort_integer(api)(info, "rows", &k->rows)) || (bad = opened(k, library))) {
        destroy(k);
        return bad;
    }
    *kernel = k;
    return NULL;
}

/* Data of an input and its sizes; rank 0 where something is wrong with it. */
static OrtStatus *input(const struct kernel *k, const void *context, size_t index, void **data, int64_t *sizes, size_t *rank)
{
    const void *tensor = NULL;
    void *shape = NULL;
    OrtStatus *bad = ort_input(k->api)(context, index, &tensor);
    if (bad || (bad = ort_shape(k->api)(tensor, &shape))) return bad;
    if (!(bad = ort_rank(k->api)(shape, rank)) && *rank <= RANK) bad = ort_sizes(k->api)(shape, sizes, *rank);
    ort_release_shape(k->api)(shape);
    if (bad) return bad;
    if (*rank > RANK) return failed(k->api, ORT_INVALID_ARGUMENT, "more than 16 axes", k->symbol);
    return ort_data(k->api)((void *)tensor, data); /* not written to */
}

static int64_t elements(const int64_t *sizes, size_t rank)
{
    int64_t product = 1;
    for (size_t i = 0; i < rank; i++) product *= sizes[i];
    return product;
}

/* ── threads: those of the session, so that two pools never fight for the cores ── */

struct share {
    void (*task)(void *, int, int);
    void *context;
    int parts;
};

static _Thread_local struct { OrtApi api; const void *context; } session; /* of the call that this thread is in */

static void one_part(void *data, size_t part)
{
    const struct share *share = data;
    share->task(share->context, (int)part, share->parts);
}

static void on_session(int parts, void (*task)(void *, int, int), void *context)
{
    struct share share = {task, context, parts};
    OrtStatus *bad = ort_parallel(session.api)(session.context, one_part, (size_t)parts, 0, &share);
    if (!bad) return;
    ort_release_status(session.api)(bad);
    for (int part = 0; part < parts; part++) task(context, part, parts);
}

static OrtStatus *operand(const struct kernel *k, const void *context, size_t i, int64_t wanted, struct bsrgen_operand *to)
{
    int64_t sizes[RANK];
    size_t rank = 0;
    void *data = NULL;
    OrtStatus *bad = input(k, context, i + 1, &data, sizes, &rank);
    if (bad) return bad;
    if (elements(sizes, rank) != wanted) return failed(k->api, ORT_INVALID_ARGUMENT, "an operand has another number of elements than the kernel wants", k->symbol);
    *to = (struct bsrgen_operand){.data = data, .ld = k->rows};
    return NULL;
}

static OrtStatus *compute(void *kernel, void *context)
{
    const struct kernel *k = kernel;
    struct bsrgen_operand operands[OPERANDS];
    struct bsrgen_call call = {.ldx = k->features, .ldy = k->rows, .operands = operands, .parallel = on_session};
    int64_t sizes[RANK];
    size_t rank = 0, count = 0, letters = strlen(k->operands);
    void *x = NULL, *y = NULL;
    OrtStatus *bad = ort_inputs(k->api)(context, &count);
    if (bad || (bad = input(k, context, 0, &x, sizes, &rank))) return bad;
    if (count != letters + 1) return failed(k->api, ORT_INVALID_ARGUMENT, "the node has another number of inputs than the kernel", k->symbol);
    if (rank == 0 || sizes[rank - 1] != k->features) return failed(k->api, ORT_INVALID_ARGUMENT, "x has another number of features than the kernel", k->symbol);
    call.n = elements(sizes, rank - 1);
    for (size_t i = 0; i < letters; i++)
        if ((bad = operand(k, context, i, k->operands[i] == 'e' ? call.n * k->rows : k->rows, &operands[i]))) return bad;
    sizes[rank - 1] = k->rows;
    if ((bad = ort_output(k->api)(context, 0, sizes, rank, &y)) || (bad = ort_data(k->api)(y, &call.y))) return bad;
    call.x = x;
    session.api = k->api, session.context = context;
    switch (call.n && k->rows ? k->call(&call) : BSRGEN_OK) {
    case BSRGEN_OK: return NULL;
    case BSRGEN_NO_MEMORY: return failed(k->api, ORT_FAIL, "out of memory", k->symbol);
    default: return failed(k->api, ORT_FAIL, "the kernel refused the call", k->symbol);
    }
}

/* ── what ONNX Runtime asks of an operator: one variadic input of any types, one output ── */

static const char *name_of(const struct OrtCustomOp *op) { return ((const struct operator *)op)->name; }
static const char *provider(const struct OrtCustomOp *op) { (void)op; return NULL; } /* the CPU's */
static size_t one(const struct OrtCustomOp *op) { (void)op; return 1; }
static int at_least_one(const struct OrtCustomOp *op) { (void)op; return 1; }
static int of_any_type(const struct OrtCustomOp *op) { (void)op; return 0; }
static int undefined(const struct OrtCustomOp *op, size_t i) { (void)op, (void)i; return ORT_UNDEFINED; }
static int type_of(const struct OrtCustomOp *op, size_t i) { (void)i; return ((const struct operator *)op)->type; }
static int variadic(const struct OrtCustomOp *op, size_t i) { (void)op, (void)i; return ORT_VARIADIC; }
static int required(const struct OrtCustomOp *op, size_t i) { (void)op, (void)i; return ORT_REQUIRED; }
static int in_memory(const struct OrtCustomOp *op, size_t i) { (void)op, (void)i; return 0; }
static int last_version(const struct OrtCustomOp *op) { (void)op; return INT32_MAX; }

#define OPERATOR(NAME, TYPE) \
    {{.version = ORT_VERSION, .name = name_of, .provider = provider, .input_type = undefined, .input_count = one, .output_type = type_of, \
      .output_count = one, .destroy = destroy, .input_kind = variadic, .output_kind = required, .input_memory = in_memory, \
      .least_inputs = at_least_one, .inputs_of_one_type = of_any_type, .least_outputs = at_least_one, .outputs_of_one_type = at_least_one, \
      .create = create, .compute = compute, .first_version = at_least_one, .last_version = last_version}, NAME, TYPE}

static const struct operator operators[] = {
    OPERATOR("Linear_float32", ORT_FLOAT),
    OPERATOR("Linear_float64", ORT_DOUBLE),
    OPERATOR("Linear_float16", ORT_FLOAT16),
    OPERATOR("Linear_bfloat16", ORT_BFLOAT16),
};

__attribute__((visibility("default"))) OrtStatus *RegisterCustomOps(void *options, const struct OrtApiBase *base)
{
    const OrtApi api = base->api(ORT_VERSION);
    void *domain = NULL; /* lives as long as the process: sessions keep it */
    if (!api) return NULL; /* older than ONNX Runtime 1.17: the model's operators stay unknown, which it says */
    OrtStatus *bad = ort_create_domain(api)("bsrgen", &domain);
    for (size_t i = 0; !bad && i < sizeof operators / sizeof *operators; i++) bad = ort_add_operator(api)(domain, &operators[i].table);
    return bad ? bad : ort_add_domain(api)(options, domain);
}

/* bsrgen_ort.h: the part of ONNX Runtime's C ABI that a library of custom operators needs, version 17 (1.17, 2024) and up.
 * ONNX Runtime ships no headers on PyPI.  Its OrtApi is a table of functions that grows at the end only, so that an index
 * is as stable as a name; OrtCustomOp says by `version` how far it goes. */
#ifndef BSRGEN_ORT_H
#define BSRGEN_ORT_H
#include <stddef.h>
#include <stdint.h>

enum { ORT_VERSION = 17 };
enum { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 };                                /* OrtErrorCode */
enum { ORT_UNDEFINED = 0, ORT_FLOAT = 1, ORT_FLOAT16 = 10, ORT_DOUBLE = 11, ORT_BFLOAT16 = 16 }; /* element types of ONNX */
enum { ORT_REQUIRED = 0, ORT_OPTIONAL = 1, ORT_VARIADIC = 2 };

typedef struct OrtStatus OrtStatus; /* NULL: all is well */
typedef void *const *OrtApi;        /* functions by index */
struct OrtApiBase {
    OrtApi (*api)(uint32_t version);
    const char *(*version)(void);
};

#define ORT_CALL(api, index, result, ...) ((result(*)(__VA_ARGS__))(api)[index])
#define ort_create_status(api) ORT_CALL(api, 0, OrtStatus *, int code, const char *message)
#define ort_create_domain(api) ORT_CALL(api, 26, OrtStatus *, const char *name, void **domain)
#define ort_add_operator(api) ORT_CALL(api, 27, OrtStatus *, void *domain, const struct OrtCustomOp *op)
#define ort_add_domain(api) ORT_CALL(api, 28, OrtStatus *, void *options, void *domain)
#define ort_data(api) ORT_CALL(api, 51, OrtStatus *, void *tensor, void **data)
#define ort_rank(api) ORT_CALL(api, 61, OrtStatus *, const void *shape, size_t *rank)
#define ort_sizes(api) ORT_CALL(api, 62, OrtStatus *, const void *shape, int64_t *sizes, size_t rank)
#define ort_shape(api) ORT_CALL(api, 65, OrtStatus *, const void *tensor, void **shape)
#define ort_integer(api) ORT_CALL(api, 86, OrtStatus *, const void *info, const char *name, int64_t *value)
#define ort_string(api) ORT_CALL(api, 87, OrtStatus *, const void *info, const char *name, char *text, size_t *bytes)
#define ort_inputs(api) ORT_CALL(api, 88, OrtStatus *, const void *context, size_t *count)
#define ort_input(api) ORT_CALL(api, 90, OrtStatus *, const void *context, size_t index, const void **tensor)
#define ort_output(api) ORT_CALL(api, 91, OrtStatus *, void *context, size_t index, const int64_t *sizes, size_t rank, void **tensor)
#define ort_release_status(api) ORT_CALL(api, 93, void, OrtStatus *status)
#define ort_release_shape(api) ORT_CALL(api, 99, void, void *shape)
#define ort_parallel(api) ORT_CALL(api, 274, OrtStatus *, const void *context, void (*task)(void *, size_t), size_t count, size_t batches, void *data)

struct OrtCustomOp {
    uint32_t version;
    void *create_without_status;
    const char *(*name)(const struct OrtCustomOp *);
    const char *(*provider)(const struct OrtCustomOp *);
    int (*input_type)(const struct OrtCustomOp *, size_t index);
    size_t (*input_count)(const struct OrtCustomOp *);
    int (*output_type)(const struct OrtCustomOp *, size_t index);
    size_t (*output_count)(const struct OrtCustomOp *);
    void *compute_without_status;
    void (*destroy)(void *kernel);
    int (*input_kind)(const struct OrtCustomOp *, size_t index);
    int (*output_kind)(const struct OrtCustomOp *, size_t index);
    int (*input_memory)(const struct OrtCustomOp *, size_t index);
    int (*least_inputs)(const struct OrtCustomOp *);
    int (*inputs_of_one_type)(const struct OrtCustomOp *);
    int (*least_outputs)(const struct OrtCustomOp *);
    int (*outputs_of_one_type)(const struct OrtCustomOp *);
    OrtStatus *(*create)(const struct OrtCustomOp *, OrtApi, const void *info, void **kernel);
    OrtStatus *(*compute)(void *kernel, void *context);
    void *infer_shape;
    int (*first_version)(const struct OrtCustomOp *);
    int (*last_version)(const struct OrtCustomOp *);
};
#endif

/* A stream of the emulated driver (libcuda.c), which kernels under cuda_runtime.h look into: is somebody capturing? */
#pragma once
enum { EMULATED_NODES = 256 };
struct emulated_node { void (*run)(void *); void *data; };
struct emulated_stream { int capturing, count; struct emulated_node node[EMULATED_NODES]; }; /* capturing: the number of its capture, 0: none */
#define EMULATED_CAPTURE "EMULATED_CAPTURE" /* in the environment while any stream does: each library has its own globals */

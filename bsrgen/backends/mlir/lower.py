"""Lowering: MLIR -> LLVM IR.  The stock sparsifier makes the loops, stock passes the rest."""

import re
import struct
from dataclasses import dataclass

from bsrgen import llvm
from bsrgen.bindings import bindings
from bsrgen.errors import BuildError

TILE_BYTES = 1 << 16  # of a local buffer: a register tile has some KB

SPARSIFY = (
    "sparsification-and-bufferization,canonicalize,cse,"  # loops over the stored blocks, tensors as buffers
    "func.func(buffer-loop-hoisting,"  # to the entry of the function, where LLVM looks for what can be a register
    f"promote-buffers-to-stack{{max-alloc-size-in-bytes={TILE_BYTES}}})"
)
TO_LLVM = (
    "convert-linalg-to-loops,canonicalize,cse,expand-strided-metadata,lower-affine,convert-scf-to-cf,"
    "convert-vector-to-llvm,finalize-memref-to-llvm,convert-func-to-llvm{use-bare-ptr-memref-call-conv=1},"
    "convert-arith-to-llvm,convert-cf-to-llvm,convert-index-to-llvm,reconcile-unrealized-casts"
)

SPARSIFY_GPU = "sparsification-and-bufferization,canonicalize,cse"
TO_NVVM = (
    "convert-linalg-to-loops,canonicalize,cse,expand-strided-metadata,lower-affine,convert-scf-to-cf,"
    "gpu.module(convert-gpu-to-nvvm{use-bare-ptr-memref-call-conv=1}),reconcile-unrealized-casts"
)

_NEW_HEXADECIMAL = re.compile(r"\bf0x([0-9A-F]{16}|[0-9A-F]{8})\b")


@dataclass(frozen=True, slots=True)
class Lowered:
    """A module after the sparsifier, and as LLVM IR."""

    loops: str
    llvm_ir: str


def identity() -> str:
    """What must be equal for two lowerings to give equal bytes.  UnsupportedError where a package is missing."""
    return f"{bindings().identity}, {llvm.identity()}"


def lower_gpu(text: str) -> Lowered:
    """The one gpu.module of `text` by way of the NVVM dialect.  BuildError with MLIR's own words."""
    return lower(text, SPARSIFY_GPU, TO_NVVM)


def lower(text: str, sparsify: str = SPARSIFY, to_llvm: str = TO_LLVM) -> Lowered:
    """Run the passes, those of this backend unless others are given.  BuildError with MLIR's own words."""
    mlir = bindings()
    with mlir.ir.Context() as context:
        context.enable_multithreading(False)  # one function after the other: no threads that a fork would lose
        try:
            module = mlir.ir.Module.parse(text)
            _run(sparsify, module)
            loops = str(module)
            _run(to_llvm, module)
            kernels = [op.operation for op in module.body.operations if op.operation.name == "gpu.module"]
            text = str(mlir.llvm.translate_module_to_llvmir((kernels or [module.operation])[0]))
            return Lowered(loops, _NEW_HEXADECIMAL.sub(_old_hexadecimal, text))
        except (mlir.ir.MLIRError, ValueError) as e:
            raise BuildError(f"{mlir.identity}: {' '.join(str(e).split())[:500]}") from e


def _old_hexadecimal(number: re.Match[str]) -> str:
    """f0x3DCCCCCD, as MLIR's LLVM prints a float, for older ones: its digits as a double."""
    digits = bytes.fromhex(number[1])
    (value,) = struct.unpack(">f" if len(digits) == 4 else ">d", digits)
    return f"0x{struct.pack('>d', value).hex().upper()}"


def _run(passes: str, module: object) -> None:
    bindings().passmanager.PassManager.parse(f"builtin.module({passes})").run(module.operation)  # type: ignore[attr-defined]

"""MLIR kernels for GPUs on the CPU: the LLVM IR that becomes PTX, with the GPU's own functions given by tests/cuda."""

import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from device_emulation import FLAGS, HEADERS, replace_notes
from programs import tool

from bsrgen import build, llvm, package
from bsrgen.artifact import read_artifact, write_manifest
from bsrgen.backends.mlir import MlirGpuPlan
from bsrgen.backends.mlir.gpu_text import texts
from bsrgen.device import DeviceKernel
from bsrgen.loading import kernel_of
from bsrgen.pattern import Weight
from bsrgen.targets import native

INTRINSICS = {
    "llvm.nvvm.read.ptx.sreg.tid.x": "emulated_tid_x", "llvm.nvvm.read.ptx.sreg.ctaid.x": "emulated_ctaid_x",
    "llvm.nvvm.barrier.cta.sync.aligned.all": "emulated_barrier",
    "llvm.nvvm.shfl.sync.bfly.f32": "emulated_shuffle_f32", "llvm.nvvm.shfl.sync.bfly.i32": "emulated_shuffle_i32",
}  # fmt: skip
WRAPPER = """#include <cuda_runtime_api.h>
extern "C" {{
#include "bsrgen.h"
#include "{name}_device.c"
void {name}_many_from(void *);
void {name}_few_from(void *);
cudaKernel_t emulated_kernel(const char *name)
{{
    return strcmp(name, "{name}_few") ? {name}_many_from : {name}_few_from;
}}
}}
"""


def for_cpu(text: str) -> str:
    """LLVM IR of NVVM as that of a CPU: one address space, shared memory from the emulation, and for each kernel a
    function that takes an array of pointers to its parameters."""
    for gpu, cpu in INTRINSICS.items():
        text = text.replace(f"@{gpu}(", f"@{cpu}(")
    assert "@llvm.nvvm" not in text, "a function of the GPU that is not emulated"
    shared = dict(re.findall(r"^(@__wg_\w+) = internal addrspace\(3\) global \[(\d+) x i8\].*\n", text, re.M))
    text = re.sub(r"^@__wg_\w+ = .*\n", "", text, flags=re.M)
    text = re.sub(r" addrspace\(\d\)", "", text)
    text = re.sub(r"(%\w+) = addrspacecast ptr (%\w+) to ptr", r"\1 = getelementptr i8, ptr \2, i64 0", text)
    text = re.sub(r"addrspacecast \(ptr (@\w+|inttoptr \(i64 \d+ to ptr\)) to ptr\)", r"\1", text)
    assert "addrspacecast" not in text
    wrappers = []
    for head, name, parameters in re.findall(r"^(define ptx_kernel void @(\w+)\((.*)\).* \{)\n", text, re.M):
        own = f"@__wg_{name}_0"
        body = f"{head.replace('ptx_kernel ', '')}\n  %shared = call ptr @emulated_shared(i64 {shared[own]})"
        text = text.replace(head, body).replace(own, "%shared")
        types = [words.split()[0] for words in parameters.split(", ")]
        lines = [f"define void @{name}_from(ptr %from) {{"]
        for i, type in enumerate(types):
            lines += [f"  %at{i} = getelementptr ptr, ptr %from, i64 {i}", f"  %p{i} = load ptr, ptr %at{i}",
                      f"  %a{i} = load {type}, ptr %p{i}"]  # fmt: skip
        given = ", ".join(f"{type} %a{i}" for i, type in enumerate(types))
        wrappers.append("\n".join([*lines, f"  call void @{name}({given})", "  ret void", "}"]))
    return "\n".join([text, "declare ptr @emulated_shared(i64)", *wrappers])


def emulated(
    plan: MlirGpuPlan, weight: Weight, folder: Path, change: Callable[[str], str] = lambda text: text
) -> DeviceKernel:
    """Print `plan`, compile it for the CPU and load it; `change` may alter the kernels' IR before."""
    source, name = texts(plan, weight), plan.problem.name
    wrapper = WRAPPER.format(name=name).encode()
    for file, data in (source.files | {"wrapper.cc": wrapper, f"{name}_device.fatbin": b"none"}).items():
        (folder / file).write_bytes(data)
    text = for_cpu(change(source.files[f"{name}_device.ll"].decode()))
    (folder / "kernel.o").write_bytes(llvm.compile_object(text, llvm.flags(native())))
    gcc, gxx = tool("gcc"), tool("g++")
    library = f"lib{name}.so"
    commands = (
        (gcc, "-std=gnu11", *FLAGS, "-I.", "-c", f"{name}.c", "-o", "main.o"),
        (gxx, "-std=c++17", *FLAGS, "-Wno-unused-function", f"-I{HEADERS}", "-I.", "-c", "wrapper.cc", "-o",
         "device.o"),
        (gxx, "-shared", "-Wl,-z,noexecstack", "main.o", "device.o", "kernel.o", "-o", library),
    )  # fmt: skip
    for command in commands:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr[:2000]
    for file in ("main.o", "device.o", "kernel.o", "wrapper.cc"):
        (folder / file).unlink()
    manifest = package.describe(source, weight, build.find_compiler(plan.target), (), folder, {})
    write_manifest(folder, replace_notes(manifest))
    kernel = kernel_of(read_artifact(folder))
    assert isinstance(kernel, DeviceKernel)
    return kernel


def smaller(plan: MlirGpuPlan, **knobs: object) -> MlirGpuPlan:
    """`plan` with other knobs."""
    return replace(plan, **knobs)

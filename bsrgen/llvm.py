"""LLVM IR -> object files for any CPU, by llvmlite: in this process, without a compiler of the system."""

import functools
from pathlib import Path
from typing import Any

from bsrgen.errors import BuildError, UnsupportedError
from bsrgen.targets import Target

NVPTX = "nvptx64-nvidia-cuda"
TRIPLES = {"x86_64": "x86_64-unknown-linux-gnu", "aarch64": "aarch64-unknown-linux-gnu"}


def identity() -> str:
    """What must be equal for two objects to have equal bytes.  UnsupportedError without llvmlite."""
    version = ".".join(map(str, _binding().llvm_version_info))
    import llvmlite

    return f"llvmlite {llvmlite.__version__} (LLVM {version})"


def flags(target: Target) -> tuple[str, ...]:
    """`target` in the words of llc: triple, CPU, features."""
    cpu = target.flags[0].removeprefix("-march=")
    features = [f"+{flag.removeprefix('-m')}" for flag in target.flags[1:] if "=" not in flag]
    if target.vector_bytes == 64:
        features.append("-prefer-256-bit")  # as in C: LLVM prefers 256 bits for most AVX-512 machines
    cpu = "generic" if target.family == "aarch64" else cpu
    return f"-mtriple={TRIPLES[target.family]}", f"-mcpu={cpu}", f"-mattr={','.join(features)}"


def compile_object(text: str, options: tuple[str, ...], *, vectorize: bool = False) -> bytes:
    """LLVM IR at -O3 as a relocatable object, position independent, for `flags` of a target.  BuildError."""
    module, machine = optimized(text, options, vectorize=vectorize)
    return bytes(machine.emit_object(module))


def compile_ptx(text: str, arch: str, library: Path | None) -> str:
    """LLVM IR at -O3 as PTX for GPUs of `arch`, e.g. "sm_80", and newer; functions that it only declares come from
    `library`, which is bitcode.  BuildError."""
    module, machine = optimized(text, (f"-mtriple={NVPTX}", f"-mcpu={arch}", "-mattr="), library=library)
    return str(machine.emit_assembly(module))


def optimized(
    text: str, options: tuple[str, ...], *, vectorize: bool = False, library: Path | None = None
) -> tuple[Any, Any]:
    """The module after LLVM's passes, and its target machine."""
    llvm = _binding()
    triple, cpu, features = (option.partition("=")[2] for option in options)
    try:
        module = llvm.parse_assembly(text)
        module.verify()
        target = llvm.Target.from_triple(triple)
    except RuntimeError as e:
        raise BuildError(f"llvmlite {' '.join(options)}: {' '.join(str(e).split())[:500]}") from e
    machine = target.create_target_machine(cpu=cpu, features=features, opt=3, reloc="pic", codemodel="small")
    module.triple, module.data_layout = triple, str(machine.target_data)
    if library is not None:
        _link(module, library)
    tuning = llvm.create_pipeline_tuning_options(speed_level=3)
    tuning.loop_vectorization = tuning.slp_vectorization = vectorize  # a plan has its own vectors
    builder = llvm.create_pass_builder(machine, tuning)
    builder.getModulePassManager().run(module, builder)
    return module, machine


def _link(module: Any, library: Path) -> None:
    """Give `module` the functions of `library` that it declares."""
    if not any(function.is_declaration and not function.name.startswith("llvm.") for function in module.functions):
        return
    other = _binding().parse_bitcode(library.read_bytes())
    other.triple, other.data_layout = module.triple, module.data_layout
    names = [function.name for function in other.functions if not function.is_declaration]
    module.link_in(other)
    for name in names:
        module.get_function(name).linkage = "internal"  # what is not called goes


@functools.cache
def _binding() -> Any:
    try:
        import llvmlite.binding as llvm
    except ImportError as e:
        raise UnsupportedError(f"backend='mlir': llvmlite makes its objects; pip install 'bsrgen[mlir]' ({e})") from e
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    return llvm

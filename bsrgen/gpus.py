"""The GPU architectures: one row each, with the ceilings of one product that has it."""

import platform
from dataclasses import dataclass, replace

from bsrgen import driver
from bsrgen.errors import ArgumentError, ArgumentTypeError, DeviceError, UnsupportedError
from bsrgen.targets import Target

WARP = 32
ERRORS = (  # of the CUDA runtime that a caller can do something about (driver_types.h)
    (2, "out of memory on the GPU"),
    (35, "no usable NVIDIA driver"),
    (98, "no code in this library for this GPU: build it for its architecture"),
    (100, "no GPU"),
    (101, "no such GPU"),
    (209, "no code in this library for this GPU: build it for its architecture"),
    (222, "the code for newer GPUs in this library needs a newer driver"),
    (700, "an address that is not on this GPU, or outside of its array"),
)


@dataclass(frozen=True, slots=True)
class GpuTarget(Target):
    """What nvcc and the planner must know of a GPU, or of several that share a library; rates are the newest one's.

    Rates are per cycle of the whole GPU, from NVIDIA's data sheets and architecture white papers; none is measured.
    """

    sms: int = 1
    fp32_lanes: int = 128  # of one SM
    fp64_lanes: int = 2
    half_flop_per_cycle: float = 0.0  # of dense products on the matrix units, float16 and bfloat16; int8 twice as many
    archs: tuple[str, ...] = ()

    @property
    def host(self) -> str:
        """The CPU architecture of the part of a library that launches kernels: this machine's."""
        return platform.machine()

    @property
    def where(self) -> str:
        """What a prediction is the time of."""
        return f"one GPU ({self.archs[-1]}, figures of data sheets)"

    def flop_per_cycle(self, real_bytes: int) -> float:
        """Peak FLOP of the GPU in one cycle, without its matrix units."""
        return 2.0 * self.sms * (self.fp64_lanes if real_bytes == 8 else self.fp32_lanes)

    def matrix_flop_per_cycle(self, dtype: str) -> float:
        """Peak FLOP of dense products on the matrix units; 0 where they do not know the type."""
        newest = self.archs[-1]
        times = {"float16": 1, "bfloat16": newest != "sm_75", "int8": 2, "float8_e4m3fn": 2 * (newest == "sm_90a")}
        return times.get(dtype, 0) * self.half_flop_per_cycle


def _gpu(
    arch: str, sms: int, fp32: int, fp64: int, ghz: float, dram_gbs: float, l2_mib: int, half_tflops: float
) -> GpuTarget:
    return GpuTarget(
        arch, "cuda", (), (arch,), vector_bytes=4 * WARP, registers=255, fma=True, fma_per_cycle=sms * fp32 / WARP,
        loads_per_cycle=sms, l1_bytes=64 << 10, l2_bytes=l2_mib << 20, l3_bytes=0,
        l2_bytes_per_cycle=32.0 * sms, dram_bytes_per_cycle=dram_gbs / ghz, ghz=ghz, call_s=4e-6, fork_s=0.0,
        sms=sms, fp32_lanes=fp32, fp64_lanes=fp64, half_flop_per_cycle=1e3 * half_tflops / ghz, archs=(arch,),
    )  # fmt: skip


GPUS = {
    row.name: row
    for row in (
        _gpu("sm_75", 40, 64, 2, 1.59, 320, 4, 65),  # T4
        _gpu("sm_80", 108, 64, 32, 1.41, 2039, 40, 312),  # A100 80 GB SXM
        _gpu("sm_86", 72, 128, 2, 1.70, 600, 6, 125),  # A10
        _gpu("sm_89", 142, 128, 2, 2.52, 864, 48, 362),  # L40S
        _gpu("sm_90", 132, 128, 64, 1.83, 3350, 50, 989),  # H100 SXM
        _gpu("sm_90a", 132, 128, 64, 1.83, 3350, 50, 989),  # and what Hopper alone has: wgmma
    )
}


def as_gpus(value: str | tuple[str, ...] | list[str]) -> tuple[GpuTarget, ...]:
    """One target for all architectures of `value`: a library holds machine code for each, and PTX of the newest that is
    not of one GPU alone (sm_90a is) for those still to come.  A call on any other GPU returns an error."""
    names = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, (list, tuple)) else value
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        raise ArgumentTypeError(f"target={value!r}: an architecture or a tuple of them, e.g. 'sm_80'")
    if not names:
        raise ArgumentError("target=(): at least one is needed, e.g. 'sm_80'")
    for name in names:
        if name != "native" and name not in GPUS:
            raise ArgumentError(f"target {name!r} with backend='cuda': 'native', or of {', '.join(GPUS)}")
    here = native_gpu() if "native" in names else None
    archs = tuple(sorted({here.name if here and name == "native" else name for name in names}))
    if {"sm_90", "sm_90a"} <= set(archs):
        raise ArgumentError(f"target={names}: sm_90 and sm_90a are code for the same GPU; give one of them")
    codes = [code_flags(arch, arch) for arch in archs]
    lasting = [arch for arch in archs if not arch.endswith("a")]  # an `a` is for one GPU alone
    newest = [code_flags(lasting[-1], lasting[-1].replace("sm_", "compute_"))] if lasting else []
    row = here if here and here.name == archs[-1] else GPUS[archs[-1]]
    return (replace(row, name=",".join(archs), flags=(*codes, *newest), requires=archs, archs=archs),)


def native_gpu() -> GpuTarget:
    """The row of the first GPU here, with its SMs and its L2.  UnsupportedError where there is none, or no row."""
    try:
        gpu = driver.gpus()[0]
    except DeviceError as e:
        raise UnsupportedError(
            f"target='native' with backend='cuda' asks the first GPU what it is: {e}; give target=, one or several of "
            f"{', '.join(GPUS)}"
        ) from e
    fitting = [row for row in GPUS.values() if runs_on((row.name,), gpu.capability)]
    if not fitting:
        raise UnsupportedError(f"{gpu}: older than all of {', '.join(GPUS)}")
    row = max(fitting, key=lambda row: (_version(row.name), row.name))
    share = gpu.sms / row.sms
    return replace(
        row, sms=gpu.sms, l2_bytes=gpu.l2_bytes, fma_per_cycle=share * row.fma_per_cycle,
        loads_per_cycle=share * row.loads_per_cycle, l2_bytes_per_cycle=share * row.l2_bytes_per_cycle,
        half_flop_per_cycle=share * row.half_flop_per_cycle,
    )  # fmt: skip


def code_flags(arch: str, code: str) -> str:
    """nvcc's flag for machine code of an architecture, or for its PTX where `code` is compute_..."""
    return f"-gencode=arch={arch.replace('sm_', 'compute_')},code={code}"


def code_for(archs: tuple[str, ...], capability: tuple[int, int]) -> str:
    """Which of `archs` a GPU takes, or what the driver makes of the newest one's PTX for it."""
    fitting = [arch for arch in archs if _version(arch)[0] == capability[0] and runs_on((arch,), capability)]
    return max(fitting, key=lambda arch: (_version(arch), arch), default="sm_{}{}".format(*capability))


def runs_on(archs: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Whether a GPU of this compute capability runs a library for `archs`: machine code goes up within a generation,
    that of sm_90a and its like nowhere else, PTX of the newest to all later ones (CUDA C++ Programming Guide, 3.1)."""
    lasting = [_version(arch) for arch in archs if not arch.endswith("a")]
    exact = any(_version(arch) == capability for arch in archs)
    upwards = any(version[0] == capability[0] and version <= capability for version in lasting)
    return exact or upwards or bool(lasting and lasting[-1] <= capability)


def _version(arch: str) -> tuple[int, int]:
    """sm_90a -> (9, 0)"""
    digits = arch.removeprefix("sm_").rstrip("a")
    return int(digits[:-1]), int(digits[-1])

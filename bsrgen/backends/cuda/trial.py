"""A kernel as a race builds it: machine code of one GPU, by NVRTC where that can be had."""

import re
from dataclasses import replace

from bsrgen.emit import Source
from bsrgen.errors import CompilerNotFoundError
from bsrgen.gpus import GpuTarget, code_flags, code_for
from bsrgen.nvcc import find_nvcc
from bsrgen.nvrtc import find_nvrtc
from bsrgen.tracks import GpuTrack, Track

PARTED = "#ifndef BSRGEN_HOST_PART"
KERNEL = r"^__global__ .* (\w+)\((?:const|PARAMETER) "


def trial(source: Source, track: Track) -> Source:
    """`source` for the GPU of a race alone.

    NVRTC compiles the device's part in this process, a C++ compiler the host's (its text says how where it can be cut
    in two), with headers and libcudart of CUDA 13 or newer, whose runtime takes machine code at run time; else nvcc
    compiles both, in two to three times the time.
    """
    target, (*others, unit) = source.plans[0].target, source.units
    assert isinstance(target, GpuTarget)
    assert isinstance(track, GpuTrack)
    arch = code_for(target.archs, track.gpu.capability)
    try:
        tools = f"{find_nvrtc().identity}; {find_nvcc().identity}"
    except CompilerNotFoundError:
        tools = ""
    text = source.files[unit.file].decode()
    if not tools or not find_nvcc().takes_code or PARTED not in text:
        return replace(source, units=(*others, replace(unit, flags=(code_flags(arch, arch),))))
    kernels = re.findall(KERNEL, text, re.M)
    return replace(source, units=(*others, replace(unit, flags=(arch,), kernels=tuple(kernels))), tools=tools)

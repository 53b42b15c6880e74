"""Dynamic kernels as contenders: the call with a prepared weight, and the preparation of one."""

import functools
from typing import Any

from bsrgen import api
from bsrgen.bench.case import Array, Case
from bsrgen.bench.peer import Peer, Run
from bsrgen.dtypes import DTYPES, INT8
from bsrgen.dynamic import DynamicKernel
from bsrgen.quantize import quantized

CALL, PREPARE = "bsrgen, dynamic", "prepare a weight"


def dynamic_kernel(case: Case, tune: Any, **options: Any) -> DynamicKernel:
    """Planned for as many blocks as the case has."""
    kernel = api.compile(
        case.weight, case.operator, dtype=case.dtype.name, n=case.n, threads=case.threads, tune=tune, mode="dynamic",
        **options,
    )  # fmt: skip
    assert isinstance(kernel, DynamicKernel)
    return kernel


def dynamic_peers(tune: str) -> tuple[Peer, Peer]:
    """The call, and the preparation from (data, indices, indptr) of the kernel's type."""

    def called(case: Case) -> Run:
        kernel, y = dynamic_kernel(case, tune), case.out()
        ready = functools.partial(kernel, case.x, kernel.prepare(case.weight), out=y, **case.given)
        return Run(ready, lambda: y)

    def prepared(case: Case) -> Run:
        kernel, given, p = dynamic_kernel(case, tune), dict(case.given), case.weight.pattern
        data = case.weight.data
        if case.dtype is INT8:
            weight, given["w_scale"] = quantized(case.weight)
            data = weight.data
        latest = [kernel.prepare((data, p.indices, p.indptr))]

        def call() -> None:
            latest[0] = kernel.prepare((data, p.indices, p.indptr))

        def result() -> Array:
            y: Array = kernel(case.x, latest[0], **given)
            return y

        return Run(call, result)

    types = tuple(DTYPES)
    return (
        Peer(CALL, "bsrgen", "dynamic", lambda _: None, called, types),
        Peer(PREPARE, "bsrgen", "prepare", lambda _: None, prepared, types),
    )

"""What all tests share: one store for the whole session, the option for golden files, and skips with their reason."""

import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bsrgen.api import _own_digest
from bsrgen.targets import TARGETS, native, runs_here

ISA = {"sse2": "x86-64", "sse4.2": "x86-64-v2", "avx2": "x86-64-v3", "avx512": "x86-64-v4", "neon": "aarch64"}
ISA |= {row.removeprefix("x86-64-"): row for row in TARGETS if row.count("-") > 2}  # v4-bf16


# Of these tests one case in n runs, drawn by its name and the sources of bsrgen, so that each change draws others; all
# run with --full.  Each compiles a kernel or more.
THINNED = {
    "test_bench.py": {"test_every_peer_is_right_or_says_why_not": 2},
    "test_compilers.py": {
        "test_no_report_of_address_and_undefined_sanitizer": 2, "test_every_problem_compiles_without_warnings": 2,
        "test_golden_text_compiles_without_warnings": 2,
    },
    "test_cuda.py": {"test_table": 2, "test_reduced_types": 2},
    "test_cuda_dynamic.py": {"test_any_pattern_in_any_order": 3, "test_mutation_is_found": 3},
    "test_cuda_matrix.py": {"test_table": 2, "test_mutation_is_found": 2},
    "test_cuda_pairs.py": {"test_cases": 2, "test_mutation_is_found": 2, "test_mutation_on_units_is_found": 2},
    "test_cuda_pattern.py": {"test_products_match_numpy": 3, "test_mutation_is_found": 6, "test_nothing_is_spilled": 3},
    "test_cuda_split.py": {"test_shared_launches": 3, "test_mutation_is_found": 3},
    "test_cuda_stream.py": {"test_on_ordinary_cores": 2, "test_mutation_is_found": 2},
    "test_epilogues.py": {"test_every_ordered_pair": 4, "test_alone": 2, "test_activation_over_the_whole_range": 3},
    "test_expand.py": {"test_every_type": 3, "test_panels_and_patterns": 3},
    "test_cuda_attention.py": {"test_matches_numpy": 3, "test_mutation_is_found": 6, "test_nothing_is_spilled": 2},
    "test_cuda_compile.py": {
        "test_nothing_is_spilled_where_calls_leave_something_out": 2,
        "test_nothing_is_spilled_by_what_prepares_weights": 2,
    },
    "test_cuda_pit.py": {"test_right_and_nothing_else_is_written": 3, "test_mutation_is_found": 4},
    "test_hopper.py": {"test_table": 2, "test_mutation_is_found": 4, "test_mutation_of_boxes_is_found": 4},
    "test_hopper_compile.py": {"test_gates": 2},
    "test_hopper_equal.py": {"test_pieces": 3, "test_mutation_is_found": 4},
    "test_hopper_turned.py": {"test_table": 2, "test_mutation_is_found": 5},
    "test_isa.py": {"test_aarch64": 3},
    "test_kernels.py": {
        "test_table": 3, "test_plan_space": 3, "test_inf_and_nan_in_X_and_behind_it": 3,
        "test_extreme_weights_compile_and_are_right": 2,
    },
    "test_matrix.py": {"test_emulated_kernel": 4, "test_real_intrinsics_compile": 3},
    "test_mlir.py": {"test_table": 4, "test_reduced_types": 3},
    "test_reduced.py": {
        "test_every_level": 4, "test_every_triple": 3, "test_every_epilogue": 3, "test_every_kind": 3,
        "test_update_of_half_types": 2, "test_verify_reads_the_weight_back": 2, "test_integers_are_exact": 3,
        "test_bits_do_not_depend_on_threads": 3, "test_tuned_by_the_clock": 2, "test_scales_of_tokens": 2,
    },
    "test_shared_x.py": {"test_every_way_to_multiply": 3, "test_pairs": 2},
    "test_threads.py": {"test_fork": 2}, "test_torch_cuda.py": {"test_gradients": 2},
}  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="all cases of the tests that are thinned out (conftest.py)")
    parser.addoption("--update-golden", action="store_true", help="write the golden files anew instead of comparing")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = config.getoption("--full") or any("::" in word for word in config.args)
    left = [item for item in items if not asked and not _drawn(item)]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in set(left)]


def _drawn(item: pytest.Item) -> bool:
    share = THINNED.get(item.path.name, {}).get(item.name.partition("[")[0], 1)
    return zlib.crc32(f"{_own_digest()} {item.name}".encode()) % share == 0


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("isa"):
        (level,) = mark.args
        row = TARGETS[ISA.get(level, level)]
        if not runs_here(row):
            lacks = ", ".join(f for f in row.requires if f not in native().requires) or row.family
            name = next(isa for isa, target in ISA.items() if target == row.name)
            pytest.skip(f"no {name}: this CPU lacks {lacks}")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The store of this session: all xdist workers and all child processes use it, and nobody's real one is touched."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "bsrgen-store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BSRGEN_CACHE_DIR", str(root))
        for name in ("BSRGEN_DISABLE_JIT", "BSRGEN_NUM_THREADS"):
            patch.delenv(name, raising=False)
        yield root


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(2026)


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden"))

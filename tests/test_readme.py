"""README's Python runs as it stands, and it has no hole left."""

import re
import shutil

import pytest
from support import REPOSITORY

TEXT = (REPOSITORY / "README.md").read_text()


def test_no_placeholders():
    assert not re.search(r"@[A-Z]+@|TODO|TBD", TEXT)


@pytest.mark.parametrize(
    "block", re.findall(r"```python\n(.*?)```", TEXT, re.S), ids=lambda block: block.split("\n")[0]
)
def test_python_blocks_run(block, tmp_path, monkeypatch):
    if '"mlir"' in block:
        pytest.importorskip("torch_mlir.ir")
        pytest.importorskip("llvmlite")
    if "integrations.torch" in block:
        pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'bsrgen[torch]'")
    if "integrations.jax" in block:
        pytest.importorskip("jax_tvm_ffi", reason="jax-tvm-ffi is not installed: pip install 'bsrgen[jax]'")
    if '"cuda"' in block:
        from bsrgen.errors import CompilerNotFoundError
        from bsrgen.nvcc import find_nvcc

        try:
            find_nvcc()
        except CompilerNotFoundError as e:
            pytest.skip(f"no nvcc: {e}")
    (tmp_path / "examples").mkdir()
    shutil.copy(REPOSITORY / "examples" / "minilm_ffn_32x1_d20.safetensors", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})

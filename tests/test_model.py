"""A whole model in one folder: tables of layers, shared artifacts, the command, and what must not be loaded."""

import hashlib
import json
import shutil
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file
from support import assert_right

import bsrgen
from bsrgen.__main__ import main
from bsrgen.assemble import compile_model
from bsrgen.errors import ArgumentError, ArtifactCorruptError, ArtifactError
from bsrgen.model import load_model
from bsrgen.pattern import Weight, as_weight
from bsrgen.problem import as_problem
from bsrgen.prune import magnitude, masked
from bsrgen.sparsity import jobs_of, read_sparsity

TABLES = """
[default]
blocksize = "4x1"
density = 0.25
n = 8

[[fuse]]
match = ["h.*.q.weight", "h.*.k.weight"]
name = "h.*.qk"
density = 0.5

[[layer]]
match = "*.norm.weight"
skip = true

[[layer]]
match = "h.*.up.weight"
epilogue = ["relu"]
blocksize = [2, 2]
"""


@pytest.fixture(scope="module")
def tensors():
    rng = np.random.default_rng(3)
    shapes = {"q": (8, 12), "k": (8, 12), "up": (10, 12), "norm": (4, 4)}
    made = {}
    for layer in "01":
        for name, shape in shapes.items():
            made[f"h.{layer}.{name}.weight"] = rng.standard_normal(shape, np.float32)
            made[f"h.{layer}.{name}.bias"] = rng.standard_normal(shape[0], np.float32)
    made["h.1.up.weight"], made["h.1.up.bias"] = made["h.0.up.weight"], made["h.0.up.bias"]  # tied
    made["embedding.weight"] = rng.standard_normal((5, 12), np.float32)
    return made


@pytest.fixture(scope="module")
def files(tensors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    save_file(tensors, folder / "model.safetensors")
    np.savez(folder / "model.npz", **tensors)
    (folder / "sparsity.toml").write_text(TABLES)
    return folder


@pytest.fixture(scope="module")
def folder(files):
    target = files / "built"
    with ProcessPoolExecutor(1) as pool:
        shares = []
        model = compile_model(
            files / "model.safetensors", files / "sparsity.toml", target, executor=pool, progress=shares.append
        )
    assert shares[-1] == 1.0
    assert list(model) == ["h.0.qk", "h.0.up", "h.1.qk", "h.1.up"]
    return target


def test_every_layer_computes_its_tensors(folder, tensors, rng):
    model = load_model(folder, threads=1)
    x = rng.standard_normal((5, 12), np.float32)
    for layer in "01":
        parts = model[f"h.{layer}.qk"](x)
        for name, y in zip("qk", parts, strict=True):
            check(tensors, f"h.{layer}.{name}", (4, 1), 0.5, ("bias",), x, y)
        check(tensors, f"h.{layer}.up", (2, 2), 0.25, ("bias", "relu"), x, model[f"h.{layer}.up"](x))


def check(tensors, name, block, density, epilogue, x, y):
    W = tensors[f"{name}.weight"]
    weight = as_weight(masked(W, block, magnitude(W, block, density)), blocksize=block)
    problem = as_problem("linear", weight.pattern, "float32", epilogue=epilogue)
    assert_right(problem, weight, y, x, {"bias": tensors[f"{name}.bias"]})


def test_one_manifest_says_what_is_there(folder):
    record = json.loads((folder / "model.json").read_text())
    layers = record["layers"]
    assert layers["h.0.up"]["kernel"] == layers["h.1.up"]["kernel"]  # tied
    assert len(list((folder / "kernels").iterdir())) == 3
    assert layers["h.0.qk"]["tensors"] == ["h.0.q.weight", "h.0.k.weight"]
    assert 0 < layers["h.0.up"]["mass"] < 1
    model = load_model(folder)
    one, other = model["h.0.up"], model["h.1.up"]
    x = np.ones((3, one.shape[1]), one.x_dtype)
    before = other(x)
    one.update(Weight(one.pattern, np.zeros((one.pattern.nnzb, *one.pattern.blocksize), one.dtype)))
    assert not np.array_equal(one(x), before)
    np.testing.assert_array_equal(other(x), before)  # equal layers share a file, and are updated one by one
    assert model.seconds == pytest.approx(sum(layer["seconds"] for layer in layers.values()))
    assert "4 kernels" in repr(model)
    digest = hashlib.sha256((folder / "model.json").read_bytes()).hexdigest()
    assert len(load_model(folder, expect_sha256=digest)) == 4
    with pytest.raises(ArtifactCorruptError):
        load_model(folder, expect_sha256="0" * 64)


def test_the_command_and_npz_make_the_same_kernels(files, folder, monkeypatch):
    monkeypatch.setenv("BSRGEN_DISABLE_JIT", "1")  # all of it is in the store
    out = files / "by-command"
    arguments = ["compile", str(files / "model.npz"), "--config", str(files / "sparsity.toml"), "-o", str(out)]
    said = CliRunner().invoke(main, [*arguments, "--json"])
    assert said.exit_code == 0, said.output
    assert json.loads(said.stdout)["layers"] == json.loads((folder / "model.json").read_text())["layers"]
    again = CliRunner().invoke(main, arguments)  # a model is replaced
    assert "h.1.qk" in again.stdout
    assert "h.1.qk" in CliRunner().invoke(main, ["inspect", str(out)]).stdout
    seen = json.loads(CliRunner().invoke(main, ["inspect", str(out), "--json"]).stdout)
    assert seen["layers"] == json.loads(said.stdout)["layers"]
    checked = json.loads(CliRunner().invoke(main, ["verify", str(out), "--json"]).stdout)
    assert checked["ok"]
    assert len(checked["kernels"]) == 3
    assert CliRunner().invoke(main, ["verify", str(out), "--expect-sha256", "0"]).exit_code == 4
    for wrong, words in (([*arguments, "--n", "3"], "--n with --config"), (arguments[:-2], "needs -o")):
        failed = CliRunner().invoke(main, wrong)
        assert (failed.exit_code, words in failed.stderr) == (2, True), failed.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[layer]]\nmatch = 'x.*'\n", "no tensor is left"),
        ("[[layer]]\nmatch = '*'\ncolour = 1\n", "colour"),
        ("[[layer]]\nmatch = '*.up.weight'\nblocksize = '0x1'\n", "rows x columns"),
        ("[[layer]]\nmatch = '*.up.weight'\ntune = 'long'\n", "tune"),
        ("[[fuse]]\nmatch = ['h.*.q.weight', 'h.*.z.weight']\nname = 'h.*.z'\n", "is not"),
        ("[[fuse]]\nmatch = ['h.*.q.weight', 'h.0.k.weight']\nname = 'h.*.z'\n", "asterisks"),
        ("[[fuse]]\nmatch = ['z.weight']\nname = 'z'\n", "no tensor matches"),
        ("[[fuse]]\nmatch = []\nname = 'z'\n", "names no tensors"),
        ("[[fuse]]\nmatch = ['h.*.q.weight']\nname = 'same'\n", "asterisks"),
        ("", "chooses? no tensor|choose no tensor"),
        ("not toml", "not a table"),
    ],
)
def test_tables_that_say_nonsense(tensors, tmp_path, text, words):
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(ArgumentError, match=words):
        jobs_of(read_sparsity(tmp_path / "s.toml"), [name for name in tensors if name.endswith("weight")])


def test_nothing_is_overwritten_or_half_written(files, folder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    (tmp_path / "alike" / "kernels").mkdir(parents=True)
    (tmp_path / "alike" / "model.json").write_text("{}")
    for name in ("mine", "alike"):
        with pytest.raises(ArgumentError, match="not a model"):
            compile_model(files / "model.safetensors", files / "sparsity.toml", tmp_path / name)
    shutil.copytree(folder, tmp_path / "more")
    (tmp_path / "more" / "kernels" / "thesis.txt").write_text("all of it")
    with pytest.raises(ArgumentError, match=r"also holds 'kernels/thesis\.txt'"):
        compile_model(files / "model.safetensors", files / "sparsity.toml", tmp_path / "more")
    (tmp_path / "twice.toml").write_text("[[layer]]\nmatch='*.up.weight'\nblocksize='4x1'\nepilogue=['bias']\n")
    with pytest.raises(ArgumentError, match="its bias is in the file"):
        compile_model(files / "model.safetensors", tmp_path / "twice.toml", tmp_path / "new")
    (tmp_path / "bad.toml").write_text("[[layer]]\nmatch='*.up.weight'\nblocksize='4x1'\nepilogue=['sing']\n")
    with pytest.raises(bsrgen.BsrgenError):
        compile_model(files / "model.safetensors", tmp_path / "bad.toml", tmp_path / "new")
    (tmp_path / "bad.toml").write_text("[[layer]]\nmatch='*.up.weight'\ndensity=0.5\n")
    with pytest.raises(ArgumentError, match=r"h\.0\.up\.weight: density="):
        compile_model(files / "model.safetensors", tmp_path / "bad.toml", tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alike", "bad.toml", "mine", "more", "twice.toml"]


def test_damaged_models_are_refused(folder, tmp_path):
    with pytest.raises(ArtifactError, match=r"no model\.json"):
        load_model(tmp_path)
    copied = tmp_path / "copy"
    shutil.copytree(folder, copied)
    record = json.loads((copied / "model.json").read_text())
    for change in ({"kernel": "../x"}, {"kernel": ""}, {"seconds": "long"}, {"more": 1}):
        layers = {"a": record["layers"]["h.0.up"] | change}
        (copied / "model.json").write_text(json.dumps(record | {"layers": layers}))
        with pytest.raises(ArtifactError, match="not a model"):
            load_model(copied)
    layers = {"a": record["layers"]["h.0.up"] | {"sha256": "0" * 64}}
    (copied / "model.json").write_text(json.dumps(record | {"layers": layers}))
    with pytest.raises(ArtifactCorruptError):
        load_model(copied)

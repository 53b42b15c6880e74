"""examples/bert: pruning by second order, the study's figures and page.  Tiny models, nothing trained or timed."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import REPOSITORY

torch = pytest.importorskip("torch", reason="no torch")
bt = pytest.importorskip("bsrgen.integrations.torch")
pytest.importorskip("tokenizers", reason="no tokenizers")

NUMBERS = (2, 32, 2, 64, 50, 16, 1e-12)


@pytest.fixture
def bert(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example's modules by name, as its scripts see them."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples" / "bert"))
    return importlib.import_module


def some(count: int = 4) -> list[Any]:
    torch.manual_seed(1)
    live = torch.arange(12) < torch.tensor([[12], [9], [5]] * 8)
    return [(torch.randint(50, (24, 12)), live) for _ in range(count)]


def encoder(bert: Any) -> Any:
    torch.manual_seed(0)
    model = bert("model").Encoder(bert("model").Shape(*NUMBERS)).eval()
    with torch.no_grad():
        for layer in bert("obs").linears(model.layers).values():
            layer.weight.mul_(3)  # else a layer hardly changes its input
    return model


@pytest.mark.parametrize("block", [(16, 1), (1, 1), (4, 4)], ids=str)
def test_a_pruned_encoder_has_its_density_and_beats_magnitude(bert: Any, block: tuple[int, int]) -> None:
    obs, dense, batches = bert("obs"), encoder(bert), some()
    student, plain = encoder(bert), encoder(bert)
    obs.prune(student, dense, batches, 0.4, block)
    for layer in obs.linears(student.layers).values():
        stored = layer.weight.unfold(0, block[0], block[0]).unfold(1, block[1], block[1]).flatten(2).any(-1)
        assert float(stored.float().mean()) == pytest.approx(0.4, abs=0.5 / stored.numel() + 1e-6)
    bt.prune_(plain.layers, block, 0.4)
    ids, live = some(5)[-1]
    with torch.inference_mode():
        near, far = ((model(ids, live) * dense(ids, live)).sum(-1).mean() for model in (student, plain))
    assert far < near <= 1 + 1e-6


def test_weights_are_the_least_squares_of_their_columns(bert: Any) -> None:
    obs = bert("obs")
    torch.manual_seed(0)
    layer, x, y = torch.nn.Linear(8, 4), torch.randn(200, 8), torch.randn(200, 4)
    mask = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0]], dtype=torch.bool)  # blocks of 2x2
    fit = obs.moments([(x[:120], y[:120]), (x[120:], y[120:])], layer)
    damping = float(fit.H[-1, -1]) - len(x)
    old = np.c_[layer.weight.detach().numpy(), layer.bias.detach().numpy()]
    inputs = np.r_[np.c_[x.numpy(), np.ones(len(x))], np.sqrt(damping) * np.eye(9)].astype(np.float64)
    obs.solve(layer, fit, mask)
    new = np.c_[layer.weight.detach().numpy(), layer.bias.detach().numpy()]
    for rows, columns in ((slice(0, 2), [0, 1, 4, 5, 6, 7, 8]), (slice(2, 4), [2, 3, 8])):
        aims = np.r_[y.numpy()[:, rows], np.sqrt(damping) * old.T[:, rows]]
        want = np.zeros((2, 9))
        want[:, columns] = np.linalg.lstsq(inputs[:, columns], aims, rcond=None)[0].T
        np.testing.assert_allclose(new[rows], want, atol=1e-4)


def test_costs_of_independent_inputs_are_norms(bert: Any) -> None:
    obs = bert("obs")
    w = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    fit = obs.Fit(torch.eye(7), torch.cat([w, torch.zeros(4, 1)], 1))
    found = obs.costs(fit, (2, 3), 1.0)
    want = w.square().view(2, 2, 2, 3).sum((1, 3))
    gone = found.isfinite()
    assert gone.sum() == 2  # one block of each row stays
    assert torch.equal(gone, want == want.min(1, keepdim=True).values)
    torch.testing.assert_close(found[gone], want[gone])


def test_a_checkpoint_gives_the_run_back(bert: Any, tmp_path: Path) -> None:
    recover, student = bert("recover"), encoder(bert)
    bt.prune_(student.layers, (4, 4), 0.4)
    pruned = {name: value.clone() for name, value in student.state_dict().items()}
    run = recover.Run(student, (4, 4))
    assert len([m for m in run.student.modules() if isinstance(m, bt.BsrLinear)]) == 6 * len(student.layers)
    run.steps = 7
    run.save(tmp_path / "run.pt")
    again = recover.Run.load(tmp_path / "run.pt", encoder(bert))
    assert again.steps == 7
    assert again.dense().keys() == pruned.keys()
    for name, value in again.dense().items():
        assert torch.equal(value, pruned[name]), name


def test_quality_of_the_dense_model_itself_is_whole(bert: Any) -> None:
    study, model = bert("study"), encoder(bert)
    near = [(torch.randint(50, (40, 12)), torch.ones(40, 12, dtype=torch.bool)) for _ in range(5)]
    text = bert("recover").Text([], near, [])
    with torch.inference_mode():
        dense = torch.cat([model(*batch) for batch in near])
    found = study.quality(model, dense, text)
    assert found["cosine"] == pytest.approx(1, abs=1e-5)
    assert found["top 1"] == found["top 10"] == 1


def test_points_of_the_study_have_names_of_their_own(bert: Any) -> None:
    study = bert("study")
    for size in study.SIZES.values():
        names = [str(point) for point in study.points(size)]
        assert len(set(names)) == len(names)
    assert str(study.Point("minilm", (32, 1), 0.8)) == "minilm-32x1-80"


def test_the_page_holds_all_tables(bert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["study.py", "small", str(tmp_path), "--only", "80$"])
    times = {name: {"best_ms": 1.5, "median_ms": 2.0, "gain": 4.0} for name in ("torch f32", "bsrgen f32")}
    judged = {"bsrgen f32": {"cosine": 0.975, "top 1": 0.5, "top 10": 0.75}}
    for model, quality, trained in (("minilm", judged, {"steps": 7, "cpu_minutes": 0.5}), ("random", {}, {})):
        point = {"model": model, "block": [32, 1], "sparsity": 0.8, "layers": 2, "quality": quality, "trained": trained}
        (tmp_path / f"{model}.json").write_text(json.dumps(point | {"times": {"1": times}}))
    page = bert("page").write(tmp_path, [tmp_path / "minilm.json", tmp_path / "random.json"], 1).read_text()
    text = (tmp_path / "report.md").read_text()
    for part in ("32x1 80%", "0.975", "75%", "1.50 (4.00x)", "study.py small FOLDER --only"):
        assert part in page
        assert part in text
    assert "http" not in page

"""fuse_: what goes into kernels and what must not, results before and after, tracing, copies, new values."""

import copy
import pickle

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'bsrgen[torch]'")
nn = torch.nn

import bsrgen.integrations.torch as bt  # noqa: E402
from bsrgen.errors import ArgumentTypeError  # noqa: E402
from bsrgen.integrations.torch import fused  # noqa: E402
from bsrgen.integrations.torch.packed import Packed  # noqa: E402

F, WIDTH, INNER, BLOCK = nn.functional, 16, 24, (4, 1)


class Attention(nn.Module):
    """Q, K and V of one x; an optional mask; a view that splits the last axis."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.drop = nn.Dropout(0.5)

    def forward(self, x, mask=None):
        b, t, d = x.shape
        q, k, v = (f(x).view(b, t, 2, d // 2).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + self.drop(self.out(y.transpose(1, 2).reshape(b, t, d)))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = (nn.Linear(WIDTH, INNER, bias=False) for _ in range(2))
        self.down = nn.Linear(INNER, WIDTH)

    def forward(self, x):
        h = self.down(F.silu(self.gate(x)) * self.up(x))
        h += x
        return h


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.gated = Attention(), Gated()
        self.feed = nn.Sequential(nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH), nn.Tanh())

    def forward(self, x, mask=None):
        return self.feed(self.gated(self.attention(x, mask)))


def converted(dtype=torch.float32):
    torch.manual_seed(3)
    model = Model().eval().to(dtype)
    bt.prune_(model, BLOCK, 0.4)
    bt.convert_(model, bt.BsrConfig(BLOCK, n=8, min_speedup=0))
    return model


@pytest.fixture(scope="module")
def pair():
    """The model as it was, and fused."""
    model = converted()
    other = copy.deepcopy(model)
    return model, other, bt.fuse_(other)


def close(y, expected):
    torch.testing.assert_close(y, expected, rtol=2e-5, atol=2e-5)


def test_what_is_fused(pair):
    assert sorted(map(str, pair[2])) == [
        "attention: out + residual", "attention: q, k, v", "feed: 0 + gelu", "feed: 2 + tanh",
        "gated: down + residual", "gated: gate, up + swiglu",
    ]  # fmt: skip
    assert list(pair[0].state_dict()) == list(pair[1].state_dict())
    assert isinstance(pair[1].attention, Attention)
    assert bt.fuse_(pair[1]) == ()  # once is enough


def test_results(pair, monkeypatch):
    model, other, _ = pair
    seen = []
    run = Packed.run

    def counted(self, *a):
        seen.extend([self.rows] * (self.which[1] == "fused"))  # layers by themselves run, too
        return run(self, *a)

    monkeypatch.setattr(Packed, "run", counted)
    for shape in ((1, 1, WIDTH), (2, 5, WIDTH), (2, 5, WIDTH), (0, 3, WIDTH)):
        x = torch.randn(shape)
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                close(other(x), model(x))
    assert len(seen) == 4 * 2 * 6
    mask = torch.rand(2, 1, 5, 5) < 0.7
    x = torch.randn(2, 5, WIDTH).transpose(0, 1).contiguous().transpose(0, 1)  # and x that is not contiguous
    with torch.no_grad():
        close(other(x, mask), model(x, mask))
        close(other(x=x), model(x))
    assert len(seen) == 4 * 2 * 6 + 4 + 6  # a mask takes attention's own forward
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(other(x), model(x))


def test_gradients_and_new_values(pair):
    model, other = copy.deepcopy(pair[0]), copy.deepcopy(pair[1])
    x = torch.randn(2, 5, WIDTH)
    for m in (model, other):
        m(x).square().mean().backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad)
    with torch.no_grad():
        before = other(x)
        for m in (model, other):
            for p in m.parameters():
                p.mul_(1.5)
        close(other(x), model(x))
        assert not torch.equal(before, other(x))
        other.load_state_dict(pair[1].state_dict())
        close(other(x), before)
    other.train()
    assert other(x).shape == x.shape  # dropout and all: its own forward


def test_half_types():
    model = converted(torch.bfloat16)
    other = copy.deepcopy(model)
    bt.fuse_(other)
    x = torch.randn(3, 4, WIDTH).bfloat16()
    with torch.no_grad():
        torch.testing.assert_close(other(x), model(x), rtol=0.02, atol=0.02)


def test_copies_pickles_and_tracing(pair):
    model, other, _ = pair
    x = torch.randn(2, 5, WIDTH)
    with torch.no_grad():
        expected = model(x)
        close(copy.deepcopy(other)(x), expected)
        back = pickle.loads(pickle.dumps(other))
        assert type(back.attention) is Attention
        close(back(x), expected)
        compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
        close(compiled(x), expected)
        program = torch.export.export(other, (x,), dynamic_shapes=({0: torch.export.Dim("b")},))
        ours = [node.target for node in program.graph.nodes if "bsrgen" in str(node.target)]
        assert ours == [torch.ops.bsrgen.fused.default] * 6
        close(program.module()(torch.cat([x, x]))[:2], expected)


def test_operators_pass_torchs_own_checks(pair):
    part = next(v for v in vars(pair[1].gated).values() if isinstance(v, fused.BsrFused) and v.residual)
    (layer,) = part._layers
    x, r = torch.randn(3, layer.in_features), torch.randn(3, layer.out_features)
    own = part._own(torch.float32)
    lists = [[t.detach()] for t in (layer.values, layer.crow_indices, layer.col_indices, layer.bias)]
    torch.library.opcheck(torch.ops.bsrgen.fused.default, (x, *lists, r, part._text(own)))


class Read(nn.Module):
    """Nothing here may be fused: results that others read, hooks, shapes that differ, branches on data."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.one, self.two = kind, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.seen = []

    def forward(self, x):
        y = self.one(x)
        if self.kind == "read twice":
            return F.relu(y), y
        if self.kind == "hook":
            return F.relu(y)
        if self.kind == "in place":
            return F.relu_(y)
        if self.kind == "x in place":
            x = x + 0
            y = self.one(x)
            x.add_(1)
            return y, self.two(x)
        if self.kind == "dropout":
            return x + F.dropout(y, 0.5)
        if self.kind == "state":
            self.mean = self.mean * 0.9 + F.relu(y).mean(0) * 0.1
            self.seen.append(y)
            return F.relu(y)
        return y if y.sum() > 0 else x


@pytest.mark.parametrize("kind", ["read twice", "hook", "in place", "x in place", "dropout", "state", "branch"])
def test_what_is_not_fused(kind):
    model = nn.Sequential(Read(kind)).eval()
    bt.convert_(model, bt.BsrConfig(BLOCK, min_speedup=0))
    if kind == "hook":
        model[0].one.register_forward_hook(lambda *a: None)
    assert bt.fuse_(model) == ()
    assert type(model[0]) is Read
    assert type(model[0].mean) is torch.Tensor  # tracing leaves no proxies
    assert model[0].seen == []


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.drop = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)

    def forward(self, x):
        return x + self.drop(self.one(x))


def test_what_changes_after_fusing_is_seen():
    """Dropout that is on, layers in the place of others, hooks: the old forward runs."""
    model = nn.Sequential(Dropping()).eval()
    bt.convert_(model, bt.BsrConfig(BLOCK, min_speedup=0, n=8))
    plain, x = copy.deepcopy(model), torch.randn(3, WIDTH)
    assert len(bt.fuse_(model)) == 1
    with torch.no_grad():
        close(model(x), plain(x))
        model[0].drop.train()
        assert not torch.equal(model(x), model(x))
        model[0].drop.eval()
        calls = []
        hook = model[0].one.register_forward_hook(lambda *a: calls.append(1))
        model(x)
        hook.remove()
        assert calls == [1]
        model[0].one = nn.Linear(WIDTH, WIDTH)
        close(model(x), x + model[0].one(x))
    with torch.inference_mode():
        made = nn.Sequential(Dropping()).eval()
        bt.convert_(made, bt.BsrConfig(BLOCK, min_speedup=0, n=8))
        bt.fuse_(made)
        made(x)
        made[0].one.values.mul_(3)
        close(made(x), x + F.linear(x, made[0].one.weight, made[0].one.bias))


def test_a_residual_that_spreads_runs_layer_by_layer():
    class Add(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(WIDTH, WIDTH)

        def forward(self, x, r):
            return self.one(x) + r

    model = nn.Sequential(Add()).eval()
    bt.convert_(model, bt.BsrConfig(BLOCK, min_speedup=0, n=8))
    other = copy.deepcopy(model)
    assert [str(fusion) for fusion in bt.fuse_(other)] == ["0: one + residual"]
    x = torch.randn(3, WIDTH)
    with torch.no_grad():
        for r in (torch.randn(3, WIDTH), torch.randn(WIDTH), torch.randn(2, 3, WIDTH), torch.randn(3, WIDTH).double()):
            close(other[0](x, r), model[0](x, r))


def test_a_training_model_and_no_model():
    assert bt.fuse_(converted().train()) == ()
    with pytest.raises(ArgumentTypeError, match=r"is not a torch\.nn\.Module"):
        bt.fuse_("model")


def test_negated_views_are_read_as_what_they_stand_for(pair):
    """A view that says the negative of its memory, as z.conj().imag does, in x and in the residual that x is too."""
    model, other, _ = pair
    x = torch.complex(torch.randn(2, 5, WIDTH), torch.randn(2, 5, WIDTH)).conj().imag
    flat = torch._neg_view(torch.randn(2, 5, WIDTH))
    assert x.is_neg()
    assert flat.is_neg()
    with torch.no_grad():
        for given in (x, flat, flat):
            close(other(given), model(given.resolve_neg().contiguous()))

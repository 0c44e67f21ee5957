"""Splitting modules that others wrote: what a plan may say, what is refused, and what is found when it forgets."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.parallel.comparison import check_gradients, close, drawn, tensor_mesh
from tests.pool import Pool
from weft.parallel import Style, check_parallel, count_traffic, load_shards, parallelize, shardings

HIDDEN, HEADS, HEAD_DIM = 24, 12, 4


class Attention(nn.Module):
    """Grouped-query attention as many write it: heads counted by attributes, one normalised by itself."""

    def __init__(self, kv_heads: int, dropout: float) -> None:
        super().__init__()
        self.dropout, self.residual_dropout = nn.Dropout(dropout), nn.Dropout(dropout)
        self.num_heads, self.num_key_value_heads, self.head_dim = HEADS, kv_heads, HEAD_DIM
        self.num_key_value_groups = HEADS // kv_heads
        self.q_proj = nn.Linear(HIDDEN, HEADS * HEAD_DIM)
        self.k_proj = nn.Linear(HIDDEN, kv_heads * HEAD_DIM)
        self.v_proj = nn.Linear(HIDDEN, kv_heads * HEAD_DIM)
        self.k_norm = nn.LayerNorm(HEAD_DIM)
        self.o_proj = nn.Linear(HEADS * HEAD_DIM, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, self.num_heads, HEAD_DIM).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(batch, length, self.num_key_value_heads, HEAD_DIM)).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.num_key_value_heads, HEAD_DIM).transpose(1, 2)
        k, v = (heads.repeat_interleave(self.num_key_value_groups, 1) for heads in (k, v))
        scores = self.dropout((q @ k.transpose(-1, -2) * HEAD_DIM**-0.5).softmax(-1))
        return self.residual_dropout(self.o_proj((scores @ v).transpose(1, 2).flatten(2)))


class GatedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Linear(HIDDEN, 96)
        self.down = nn.Linear(48, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(nn.functional.silu(gate) * up)


class ScaledEmbedding(nn.Embedding):
    """A subclass that does something around the plain lookup."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * 3.0


class Model(nn.Module):
    """Embedding and head share their weight; 50 tokens divide over no 3 or 4 ranks."""

    def __init__(self, kv_heads: int = 2, *, recompute: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = ScaledEmbedding(50, HIDDEN, padding_idx=7)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(HIDDEN), "attn": Attention(kv_heads, dropout), "mlp": GatedMLP()})
            for _ in range(2)
        )
        self.head = nn.Linear(HIDDEN, 50, bias=False)
        self.head.weight = self.embed.weight
        self.recompute = recompute

    def block(self, layer: nn.ModuleDict, x: Tensor) -> Tensor:
        x = x + layer["attn"](layer["norm"](x))
        return x + layer["mlp"](x)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = checkpoint(self.block, layer, x, use_reentrant=False) if self.recompute else self.block(layer, x)
        return self.head(x)


PLAN: dict[str, str | Style] = {
    "embed": "embedding",
    "layers.*.attn.q_proj": "column",
    "layers.*.attn.k_proj": "column",
    "layers.*.attn.v_proj": "column",
    "layers.*.attn.k_norm": "partial_gradient",
    "layers.*.attn.o_proj": "row",
    "layers.*.mlp.gate_up": Style("column", chunks=(48, 48)),
    "layers.*.mlp.down": "row",
    "head": "column_gather_output",
}


def build(*arguments: Any, **keywords: Any) -> Model:
    torch.manual_seed(1)
    return Model(*arguments, **keywords).double()


def tokens() -> Tensor:
    return torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(2))


def compare(kv_heads: int, recompute: bool) -> None:
    plain = build(kv_heads, recompute=recompute)
    split = parallelize(copy.deepcopy(plain), PLAN, tensor_mesh())
    assert split.head.weight is split.embed.weight
    for _ in range(2):  # a second forward and backward adds up
        cotangent = drawn(2, 6, 50)
        expected = plain(tokens())
        expected.backward(cotangent)
        logits = split(tokens())
        logits.backward(cotangent)
        close(logits, expected, "logits")
    check_gradients(split, plain)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_outputs_and_every_gradient_are_those_of_the_whole_module(pool: Pool, ranks: int) -> None:
    for kv_heads in (12, 2, 1) if ranks != 3 else (12, 3, 1):
        pool.run(ranks, compare, kv_heads, False)
    pool.run(ranks, compare, 1, True)


def share_reductions(recompute: bool) -> list[tuple[int, int]]:
    model = parallelize(build(2, recompute=recompute), PLAN, tensor_mesh())
    with count_traffic() as forward:
        total = model(tokens()).sum()
    with count_traffic() as backward:
        total.backward()
    return [(t.count()["all_reduce"] + t.count()["send"], t.count()["all_gather"]) for t in (forward, backward)]


@pytest.mark.parametrize("recompute", [False, True])
def test_layers_that_read_the_same_input_share_one_reduction(pool: Pool, recompute: bool) -> None:
    """Forward: embedding, two rows a layer, one gather of logits. Backward: two inputs and a norm's two parameters a
    layer, and the head; with recompute the rows again.

    On two ranks a collective is one send.
    """
    for forward, backward in pool.run(2, share_reductions, recompute):
        assert forward == (1 + 2 * 2 + 1, 0)
        assert backward == (1 + 2 * 4 + (2 * 2 if recompute else 0), 0)


def called_from_elsewhere() -> None:
    """A projection that is called outside its parent's forward reduces by itself, and nothing is kept."""
    plain = build()
    split = parallelize(copy.deepcopy(plain), PLAN, tensor_mesh())
    x = drawn(2, 6, HIDDEN)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for model, given in zip((plain, split), inputs, strict=True):
        with torch.no_grad():
            model.layers[0]["attn"](given)  # leaves no copy without gradient behind
        model.layers[0]["attn"].q_proj(given).square().sum().backward()
        model.layers[0]["attn"](given).sum().backward()
    # each rank's loss is its own heads' part of the plain one; the copy sums their gradients
    close(inputs[1].grad, inputs[0].grad, "input gradient")


def test_a_projection_called_by_itself_is_right(pool: Pool) -> None:
    pool.run(2, called_from_elsewhere)


def copies_and_meta(directory: Path) -> None:
    plain = build()
    x = tokens()
    with torch.device("meta"):
        model = Model().double()
    parallelize(model, PLAN, tensor_mesh())
    twin = copy.deepcopy(model)
    assert all(parameter.is_meta for parameter in model.parameters())
    load_shards(model, directory)
    load_shards(twin, directory)
    assert model.head.weight is model.embed.weight
    assert model.embed.weight.dtype == torch.float64
    for split in (model, twin, copy.deepcopy(model)):
        close(split(x), plain(x), "loaded")
    text = repr(model)
    for part in ("ColumnParallelLinear", "RowParallelLinear", "ScaledEmbedding(50, 24", "chunks=[48, 48]", "LayerNorm"):
        assert part in text, text


@pytest.mark.parametrize("parts", [1, 3])
def test_each_rank_reads_its_own_slices_from_safetensors(pool: Pool, tmp_path: Path, parts: int) -> None:
    from safetensors.torch import save_file

    state = {name: value.float() for name, value in build().state_dict().items() if name != "head.weight"}
    state |= {name: value.double() for name, value in build().state_dict().items() if name in state}
    if parts == 1:
        save_file(state, tmp_path / "model.safetensors")
    else:
        import json

        files = {name: f"model-{i % parts}.safetensors" for i, name in enumerate(state)}
        for file in set(files.values()):
            save_file({name: value for name, value in state.items() if files[name] == file}, tmp_path / file)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    pool.run(2, copies_and_meta, tmp_path)


def held_while_loading(directory: Path) -> int:
    """Bytes of the largest tensor that was made."""
    import safetensors

    made: list[int] = []

    class Slice:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def get_shape(self) -> list[int]:
            return self.inner.get_shape()

        def __getitem__(self, index: Any) -> Tensor:
            made.append(self.inner[index].nbytes)
            return self.inner[index]

    class File:
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            self.inner = safetensors.safe_open(*arguments, **keywords)

        def __enter__(self) -> "File":
            return self

        def __exit__(self, *error: Any) -> None:
            pass

        def keys(self) -> list[str]:
            return self.inner.keys()

        def get_slice(self, name: str) -> Slice:
            return Slice(self.inner.get_slice(name))

    import weft.parallel.tensor.load as load

    original, load.safe_open = load.safe_open, File
    try:
        model = parallelize(build(), {"head": "column_gather_output", "embed": "embedding"}, tensor_mesh())
        load_shards(model, directory)
    finally:
        load.safe_open = original
    return max(made)


def test_no_more_than_the_shard_is_read(pool: Pool, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(
        {name: value for name, value in build().state_dict().items() if name != "head.weight"},
        tmp_path / "model.safetensors",
    )
    largest_whole = 96 * HIDDEN * 8  # gate_up, which this plan leaves whole
    assert pool.run(4, held_while_loading, tmp_path) == [largest_whole] * 4


def refused(changes: dict[str, Any], kv_heads: int) -> str:
    plan = {name: style for name, style in (PLAN | changes).items() if style is not None}
    with pytest.raises(ValueError, match=r"\w") as caught:
        parallelize(build(kv_heads), plan, tensor_mesh())
    return str(caught.value)


@pytest.mark.parametrize(
    ("ranks", "changes", "kv_heads", "message"),
    [
        (
            2,
            {"layers.*.attn.q_prj": "column"},
            2,
            "'layers.*.attn.q_prj' fits no module; the nearest are layers.*.attn.q_proj",
        ),
        (2, {"layers.*.mlp.down": "rowwize"}, 2, "layers.0.mlp.down: the plan asks for style 'rowwize'"),
        (2, {"layers.*.norm": "column"}, 2, "layers.0.norm is a LayerNorm; only nn.Linear and Conv1D"),
        (2, {"head": "embedding"}, 2, "head is a Linear, not an nn.Embedding"),
        (2, {"head": None}, 2, "head.weight is shared with a parameter that the plan splits; add head to the plan"),
        (2, {"head": "row"}, 2, "head.weight is shared with a parameter that is split otherwise"),
        (
            2,
            {"layers.*.attn.q_proj.weight": "column"},
            2,
            "layers.0.attn.q_proj.weight: the plan asks for style 'column' of a bare",
        ),
        (2, {"layers.*.mlp.gate_up": Style("column", chunks=(48, 24))}, 2, "chunks [48, 24] add up to 72, not to 96"),
        (4, {}, 3, "layers.0.attn: 3 key-value heads do not divide over tensor 4; choose 1, 3, 6 or 12"),
        (
            4,
            {"layers.*.mlp.gate_up": Style("column", chunks=(90, 6))},
            2,
            "layers.0.mlp.gate_up: out_features 90 does not",
        ),
    ],
)
def test_a_wrong_plan_is_named(pool: Pool, ranks: int, changes: dict[str, Any], kv_heads: int, message: str) -> None:
    for seen in pool.run(ranks, refused, changes, kv_heads):
        assert message in seen


def forgotten(missing: str | None, kv_heads: int) -> str:
    plan = {name: style for name, style in PLAN.items() if name != missing}
    model = parallelize(build(kv_heads), plan, tensor_mesh())
    try:
        check_parallel(model, tokens())
    except ValueError as error:
        return str(error)
    finally:
        assert model.training
        assert all(parameter.grad is None for parameter in model.parameters())
    return ""


@pytest.mark.parametrize(
    ("missing", "kv_heads", "found"),
    [
        (None, 2, ""),
        (None, 1, ""),
        ("layers.*.attn.o_proj", 2, "layers.0.attn.o_proj: a Linear that reads [2, 6, 24]"),
        ("layers.*.mlp.down", 2, "layers.0.mlp.down: a Linear that reads [2, 6, 24]"),
        ("layers.*.mlp.gate_up", 2, "layers.0.mlp.down: a row layer reads 48 features, but this rank's share is 24"),
        ("layers.*.attn.k_norm", 2, "layers.0.attn.k_norm: a LayerNorm that reads [2, 6, 1, 4], which differs"),
        # the one key-value head is the same on all ranks, but each uses it for its own queries
        ("layers.*.attn.k_norm", 1, "layers.0.attn.k_norm.weight is whole on every rank, but its gradient differs"),
    ],
)
def test_what_the_plan_forgot_is_found_and_named(pool: Pool, missing: str | None, kv_heads: int, found: str) -> None:
    for seen in pool.run(2, forgotten, missing, kv_heads):
        assert found in seen if found else not seen


def declared() -> dict[str, Any]:
    model = parallelize(build(1), PLAN, tensor_mesh())
    return {name: (s.dim, s.full_shape, s.replicas, s.partial_gradient) for name, s in shardings(model).items()}


def test_every_split_parameter_is_declared(pool: Pool) -> None:
    for seen in pool.run(2, declared):
        assert seen["embed.weight"] == seen["head.weight"] == (0, (50, HIDDEN), 1, False)
        assert seen["layers.1.attn.q_proj.weight"] == (0, (HEADS * HEAD_DIM, HIDDEN), 1, False)
        assert seen["layers.1.attn.k_proj.weight"] == (0, (HEAD_DIM, HIDDEN), 2, True)
        assert seen["layers.1.attn.o_proj.weight"] == (1, (HIDDEN, HEADS * HEAD_DIM), 1, False)
        assert seen["layers.1.attn.o_proj.bias"] == (None, (HIDDEN,), 1, False)
        assert seen["layers.1.attn.k_norm.bias"] == (None, (HEAD_DIM,), 1, True)


def drop(recompute: bool) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """What the attention's two dropouts keep, in each layer; the logits, a gradient, and a number drawn afterwards."""
    model = parallelize(build(12, dropout=0.5, recompute=recompute), PLAN, tensor_mesh())
    kept = []
    for layer in model.layers:
        for dropout in (layer["attn"].dropout, layer["attn"].residual_dropout):
            dropout.register_forward_hook(lambda module, given, result: kept.append(result.detach() != 0))
    torch.manual_seed(3)
    logits = model(tokens())
    logits.square().sum().backward()
    return kept[:4], logits.detach(), model.layers[0]["norm"].weight.grad, torch.rand(())


def test_dropout_differs_between_shards_and_agrees_elsewhere(pool: Pool) -> None:
    (mine, logits, gradient, number), (theirs, *whole) = pool.run(2, drop, False)
    for left, right in zip((logits, gradient, number), whole, strict=True):
        assert torch.equal(left, right)
    for layer in (0, 2):
        agreement = (mine[layer] == theirs[layer]).double().mean()
        assert abs(agreement - 0.5) < 0.1, "the heads of two ranks drop independently"
        assert torch.equal(mine[layer + 1], theirs[layer + 1]), "replicated activations drop alike"
    assert not torch.equal(mine[0], mine[2]), "two layers drop in different places"
    _, again, gradient_again, _ = pool.run(2, drop, True)[0]
    assert torch.equal(again, logits)
    close(gradient_again, gradient, "a recomputed forward drops the same")


def refuse_torch_attention() -> str:
    with pytest.raises(ValueError, match="MultiheadAttention") as caught:
        parallelize(nn.Sequential(nn.MultiheadAttention(8, 2)), {"0.out_proj": "row"}, tensor_mesh())
    return str(caught.value)


def test_torch_attention_is_refused(pool: Pool) -> None:
    for seen in pool.run(2, refuse_torch_attention):
        assert seen.startswith("0.out_proj belongs to an nn.MultiheadAttention")

"""A published row as the planner's input; what the row leaves out is taken from tables, or assumed and said so."""

import re
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from weft.launch.overrides import read_yaml
from weft.launch.plan.cluster import Cluster, Link, cluster_names, load_cluster
from weft.launch.plan.layout import Job, Layout, Recompute
from weft.launch.plan.recipe import MEGATRON, Recipe
from weft.launch.plan.shape import Experts, LatentAttention, ModelShape
from weft.launch.plan.validation.rows import Row

HERE = Path(__file__).parent
USUAL_VOCABULARY = 51200
BLOOM_VOCABULARY = 250880
SCHEDULES = (
    (r"zb-?v|dualpipe", "zb-v"),
    (r"zb-?2p|zb-?h2", "zb-h2"),
    (r"zb", "zb-h1"),
    (r"gpipe|afab$", "gpipe"),
)


class UnknownError(Exception):
    """What a row does not say and no table knows, in a few words."""


@dataclass(frozen=True)
class Case:
    """A row that can be judged; `assumed`: what was taken for granted."""

    row: Row
    shape: ModelShape
    job: Job
    layout: Layout
    recipe: Recipe
    cluster: Cluster
    assumed: tuple[str, ...]


def describe(row: Row) -> Case:
    """The planner's input for a row.

    Raises:
        UnknownError: something that neither the row nor a table tells, and that no usual value could stand for.
    """
    if re.search(r"one .*layer", row.remarks, re.IGNORECASE) and row.whole("layers") == 1:
        raise UnknownError("a step; the row times one layer")
    software = _first("software.yaml", row.remarks)
    assumed: list[str] = []
    cluster = _cluster(row)
    shape = _shape(row, software.get("shape", {}), assumed)
    recipe = _recipe(row, software)
    layout, job = _layout(row, shape, recipe, assumed)
    return Case(row, shape, job, layout, recipe, cluster, tuple(assumed))


@cache
def _entries(name: str) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = read_yaml((HERE / name).read_text(encoding="utf-8"), name)
    return entries


def _first(name: str, text: str) -> dict[str, Any]:
    return next((entry for entry in _entries(name) if re.search(entry["match"], text, re.IGNORECASE)), {})


def _cluster(row: Row) -> Cluster:
    """The GPU's cluster, with the network and the memory that the row tells."""
    gpu = re.sub(r"[^a-z0-9]", "", row.text("gpu").lower())
    names = {re.sub(r"sxm|80gb|[^a-z0-9]", "", name): name for name in cluster_names() if name != "cpu"}
    names["a10040"] = "a100-40gb"
    found = next((names[short] for short in sorted(names, key=len, reverse=True) if gpu.startswith(short)), None)
    if found is None:
        raise UnknownError(f"GPU {row.text('gpu') or 'not given'}")
    cluster = load_cluster(found)
    changes: dict[str, Any] = {}
    if memory := re.search(r"(\d+)GB", row.text("gpu")):
        changes["memory"] = float(memory[1])
    per_node = row.whole("gpus_per_node")
    if per_node and cluster.devices_per_node < 72:
        changes["devices_per_node"] = per_node
    rate = _network_rate(row.text("notes"), per_node or cluster.devices_per_node)
    if rate:
        changes["network"] = Link(
            bandwidth=rate, efficiency=cluster.network.efficiency, latency=cluster.network.latency
        )
    return cluster.model_copy(update=changes)


def _network_rate(notes: str, per_node: int) -> float | None:
    """GB/s of one device, where the notes tell a node's adapters, or the rate of one or of all of them."""
    if adapters := re.search(r"(\d+) ?x ?(\d+) ?Gb", notes):
        return int(adapters[1]) * int(adapters[2]) / 8 / per_node
    if adapters := re.search(r"(\d+)x Omni-Path", notes):
        return int(adapters[1]) * 100 / 8 / per_node
    if node := re.search(r"inter-node (\d+) ?Gb/s|(\d+) ?Gb/s \w+ per node", notes):
        return int(node[1] or node[2]) / 8 / per_node
    return None


def _shape(row: Row, software: dict[str, Any], assumed: list[str]) -> ModelShape:
    known = {
        key: value for key, value in _first("models.yaml", row.text("model")).items() if key not in ("match", "source")
    }
    names = {"layers": "layers", "hidden": "hidden", "ffn_hidden": "intermediate", "heads": "heads",
             "kv_heads": "kv_heads", "vocab": "vocab"}  # fmt: skip
    values = {"gated": True} | software | known
    values |= {own: number for name, own in names.items() if (number := row.whole(name))}
    if "hidden" not in values:
        raise UnknownError("hidden size")
    hidden = values["hidden"]
    if "vocab" not in values:
        big = re.search(r"vocab ~?250k", row.text("notes"))
        values["vocab"] = BLOOM_VOCABULARY if big else USUAL_VOCABULARY
    if "intermediate" not in values:
        values["intermediate"] = 4 * hidden
        assumed.append("MLP of 4 hidden")
    if "heads" not in values:
        values["heads"] = max(1, hidden // 128)
        assumed.append("heads of 128")
    if "layers" not in values:
        values["layers"] = _layers_of(row, values, assumed)
    values.setdefault("kv_heads", values["heads"])
    values.setdefault("head_dim", max(1, hidden // values["heads"]))
    values["gated"] = values["gated"] and values["intermediate"] != 4 * hidden
    if not values["gated"]:
        sequence = row.whole("seq") or 0
        values |= {"positions": sequence, "norm_vectors": 2, "tied": True}
        values |= dict.fromkeys(("qkv_bias", "output_bias", "mlp_bias"), True)
    return _with_mixture(values)


def _with_mixture(values: dict[str, Any]) -> ModelShape:
    if "latent" in values:
        values["latent"] = LatentAttention(**values["latent"])
    if "experts" in values:
        experts = Experts(**values["experts"])
        values["experts"] = replace(experts, dense_layers=min(experts.dense_layers, max(0, values["layers"] - 3)))
    return ModelShape(**{field.name: values[field.name] for field in fields(ModelShape) if field.name in values})


def _layers_of(row: Row, values: dict[str, Any], assumed: list[str]) -> int:
    """From the number of parameters, when that is given."""
    parameters = row.number("params_b")
    if parameters is None:
        raise UnknownError("number of layers")
    single = {"layers": 1, "kv_heads": values["heads"], "head_dim": values["hidden"] // values["heads"]}
    one = replace(_with_mixture(values | single), tied=True)
    assumed.append("layers from the number of parameters")
    return max(1, round((parameters * 1e9 - one.embedding_parameters) / one.layer_parameters))


def _recipe(row: Row, software: dict[str, Any]) -> Recipe:
    text = row.text("precision").lower()
    precision = next((name for name in ("fp4", "fp8", "bf16", "fp16", "fp32") if name in text), "bf16")
    changes = software.get("recipe", {})
    if precision == "bf16" and text:
        changes = changes | software.get("bf16", {})
    return replace(MEGATRON, precision=precision, **changes)


def _layout(row: Row, shape: ModelShape, recipe: Recipe, assumed: list[str]) -> tuple[Layout, Job]:
    sequence, gpus = row.whole("seq"), row.whole("num_gpus")
    tensor, pipeline = row.whole("tp"), row.whole("pp")
    context = row.whole("cp") or 1
    if sequence is None:
        raise UnknownError("sequence length")
    if tensor is None and pipeline is None and gpus != 1:
        raise UnknownError("layout")
    tensor, pipeline = tensor or 1, pipeline or 1
    data = row.whole("dp")
    if gpus and gpus % (tensor * pipeline * context) == 0:
        data = gpus // (tensor * pipeline * context)
    if data is None:
        raise UnknownError("data-parallel size")
    micro, batch = row.whole("mbs"), row.whole("gbs")
    if micro is None:
        micro = 1
        assumed.append("microbatch of 1")
    if batch is None:
        raise UnknownError("global batch")
    layout = Layout(
        data=data,
        tensor=tensor,
        pipeline=pipeline,
        context=context,
        expert=min(row.whole("ep") or 1, data * context),
        micro_batch=micro,
        recompute=_recompute(row, recipe),
        zero=_zero(row),
        sequence_parallel=_splits_sequence(row),
    )
    return _with_schedule(row, shape, layout, assumed), Job(batch, sequence)


def _with_schedule(row: Row, shape: ModelShape, layout: Layout, assumed: list[str]) -> Layout:
    """The schedule by its name; one that is interleaved and does not tell its stages gets two layers in each."""
    if layout.pipeline == 1:
        return replace(layout, schedule="1f1b")
    text = row.text("schedule").lower()
    several = row.whole("vpp")
    name = next((own for pattern, own in SCHEDULES if re.search(pattern, text)), None)
    if name is None:
        interleaved = "interleav" in text or (several or 1) > 1
        if interleaved and several is None:
            several = max(1, shape.layers // layout.pipeline // 2)
            assumed.append(f"{several} stages per rank")
        name = "interleaved" if interleaved and (several or 1) > 1 else "1f1b"
    several = 2 if name == "zb-v" else (several or 1) if name == "interleaved" else 1
    layout = replace(layout, schedule=name, stages_per_rank=several)
    return replace(layout, layers_of_stages=_split(row, shape.layers, layout.stages))


def _split(row: Row, layers: int, stages: int) -> tuple[int, ...]:
    """Equal shares, or one layer less on the first and the last stage, which have embedding and head besides."""
    fewer = re.search(
        r"(first and last stage hold one layer less|removed from first and last stage)", row.text("notes")
    )
    if (fewer or layers < stages) and (layers + 2) % stages == 0:
        share = (layers + 2) // stages
        return (share - 1, *[share] * (stages - 2), share - 1)
    if layers < stages:
        raise UnknownError(f"how {layers} layers fill {stages} stages is")
    return ()


def _recompute(row: Row, recipe: Recipe) -> Recompute:
    text = row.text("recompute").lower()
    if text.startswith("full"):
        return "full"
    if text.startswith("selective"):
        return "selective"
    return "none"


def _zero(row: Row) -> int:
    text = row.text("zero").lower()
    if "fsdp" in text:
        return 2 if "no reshard" in text else 3
    return int(text[0]) if text[:1] in ("1", "2", "3") else 0


def _splits_sequence(row: Row) -> bool:
    words = r"without sequence parallel|no SP\b|BigScience|vTrain|DeepSpeed|neox|\(2020\)"
    return re.search(words, f"{row.text('notes')} {row.source}") is None

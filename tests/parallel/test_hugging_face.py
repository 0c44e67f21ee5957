"""Hugging Face models of every supported family, split, against the same model whole."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.parallel.comparison import close, tensor_mesh
from tests.parallel.hugging_face import DECODERS, HEADS, MODELS, SIZES, batch, build, exact, run
from tests.pool import Pool
from weft.parallel import (
    PipelineExecutor,
    PipelineStage,
    build_mesh,
    build_schedule,
    check_parallel,
    count_traffic,
    gather_full,
    load_shards,
    parallelize,
    split_stages,
    take_shard,
)
from weft.parallel.sharding import sharded_parameters

pytest.importorskip("transformers", reason="the extra huggingface is not installed")


def check_whole_gradients(module: nn.Module, plain: nn.Module, what: str) -> None:
    """Every gradient of `plain` has its shard in `module`, on this rank and put together."""
    expected = dict(plain.named_parameters())
    seen = {name: (parameter, sharding) for name, parameter, sharding in sharded_parameters(module)}
    assert seen.keys() == expected.keys(), what
    for name, (parameter, sharding) in seen.items():
        gradient, whole = parameter.grad, expected[name].grad
        assert (gradient is None) == (whole is None), (what, name)
        if gradient is not None:
            close(gradient, take_shard(whole, sharding) if sharding else whole, f"{what}: this rank's {name}")
            close(gather_full(gradient, sharding), whole, f"{what}: {name}")


def _first(result: Any) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result


def compare(names: list[str], dtype: torch.dtype, sequence_parallel: bool) -> None:
    for name in names:
        plain = build(name, dtype)
        split = parallelize(copy.deepcopy(plain), None, tensor_mesh(), sequence_parallel=sequence_parallel)
        lengths: set[int] = set()
        blocks = next(module for module in split.modules() if isinstance(module, nn.ModuleList))
        blocks[0].register_forward_hook(lambda block, given, x, seen=lengths: seen.add(_first(x).shape[1]))
        with exact(dtype):
            logits, loss = run(split, batch(name))
            expected_logits, expected_loss = run(plain, batch(name))
        close(logits, expected_logits, f"{name}: logits")
        close(loss, expected_loss, f"{name}: loss")
        check_whole_gradients(split, plain, name)
        assert lengths == {8 // (tensor_mesh().size() if sequence_parallel else 1)}, name
        parameters = sum(p.numel() for p in split.parameters()), sum(p.numel() for p in plain.parameters())
        assert parameters[0] < (0.75 if tensor_mesh().size() == 2 else 0.6) * parameters[1], name


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logits_loss_and_every_gradient_are_those_of_the_whole_model(
    pool: Pool, ranks: int, dtype: torch.dtype
) -> None:
    """With four ranks, the two key-value heads are fewer than the ranks."""
    pool.run(ranks, compare, list(MODELS), dtype, False, timeout=240)


@pytest.mark.parametrize("ranks", [2, 4])
def test_sequence_parallel_models_are_the_whole_ones_too(pool: Pool, ranks: int) -> None:
    pool.run(ranks, compare, [*DECODERS, "bert"], torch.float64, True, timeout=240)


def refuse_two_stacks() -> str:
    with pytest.raises(ValueError, match="sequence_parallel") as caught:
        parallelize(build("bart"), None, tensor_mesh(), sequence_parallel=True)
    return str(caught.value)


def test_an_encoder_decoder_is_not_sequence_parallel(pool: Pool) -> None:
    for seen in pool.run(2, refuse_two_stacks):
        assert "there are 2: ['model.encoder.layers', 'model.decoder.layers']" in seen


def count_reductions(layers: int, recompute: bool) -> int:
    model = parallelize(build("llama", num_hidden_layers=layers, num_key_value_heads=4), None, tensor_mesh())
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with count_traffic() as traffic:
        run(model.train(), batch("llama"))
    return traffic.count()["all_reduce"]


def test_a_llama_layer_costs_four_reductions(pool: Pool) -> None:
    """Attention and MLP, forward and backward: q, k, v share one, gate and up share one. Recompute repeats two."""
    for recompute, expected in ((False, 4), (True, 6)):
        two, three = (pool.run(4, count_reductions, layers, recompute) for layers in (2, 3))
        assert [more - less for more, less in zip(three, two, strict=True)] == [expected] * 4


def generate() -> list[list[int]]:
    """Greedy continuations of the split and the whole model."""
    plain = build("llama", torch.float32).eval()
    split = parallelize(copy.deepcopy(plain), None, tensor_mesh())
    prompt = batch("llama")["input_ids"][:1]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    return [model.generate(prompt, **options)[0].tolist() for model in (split, plain)]


def test_a_split_model_generates_with_its_cache(pool: Pool) -> None:
    for split, plain in pool.run(2, generate):
        assert split == plain


def load_from_directory(directory: str, name: str) -> None:
    plain = build(name, torch.float32)
    with torch.device("meta"):
        model = type(plain)(plain.config)
    parallelize(model, None, tensor_mesh())
    load_shards(model, directory)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    logits, _ = run(model.eval(), batch(name))
    expected, _ = run(plain.eval(), batch(name))
    close(logits, expected, name)
    check_whole_gradients(model, plain, name)


@pytest.mark.parametrize("name", ["llama-tied", "gemma3", "gpt2", "bert", "t5"])
def test_pretrained_weights_go_to_a_model_on_the_meta_device(pool: Pool, tmp_path: Path, name: str) -> None:
    build(name, torch.float32).save_pretrained(tmp_path, max_shard_size="20KB")
    pool.run(2, load_from_directory, str(tmp_path), name)


def phi3_with_fused_projections() -> None:
    """A plan of the user's instead of the model's own, which gathers the fused projection: gate and up stay split."""
    plain = build("phi3")
    plan = {
        **plain._tp_plan,
        "model.layers.*.mlp.gate_up_proj": "packed_colwise",
        "model.layers.*.mlp.down_proj": "rowwise",
    }
    split = parallelize(copy.deepcopy(plain), plan, tensor_mesh())
    with exact(torch.float64):
        logits, _ = run(split, batch("phi3"))
        expected, _ = run(plain, batch("phi3"))
    close(logits, expected, "logits")
    check_whole_gradients(split, plain, "phi3")


def test_a_fused_projection_is_split_chunk_by_chunk(pool: Pool) -> None:
    pool.run(2, phi3_with_fused_projections)


def refuse_experts() -> str:
    import transformers

    config = transformers.Qwen3MoeConfig(
        **SIZES, **HEADS, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8
    )
    with pytest.raises(ValueError, match="style") as caught:
        parallelize(transformers.Qwen3MoeForCausalLM(config), None, tensor_mesh())
    return str(caught.value)


def test_unknown_styles_are_refused_by_module_and_name(pool: Pool) -> None:
    for seen in pool.run(2, refuse_experts):
        assert "model.layers.0.mlp.experts" in seen
        assert "the plan asks for style '" in seen


def check_whole_plans() -> None:
    for name in MODELS:
        check_parallel(parallelize(build(name, torch.float32), None, tensor_mesh()), batch(name))


def test_no_plan_forgets_a_module(pool: Pool) -> None:
    pool.run(2, check_whole_plans, timeout=120)


def pipeline(
    names: list[str], dtype: torch.dtype, schedule_name: str, tensor: int, sequence_parallel: bool = False
) -> None:
    """Pipeline 2, two microbatches with masks of their own, against their mean in one process.

    Sequence parallel models are split after the cut, others before.
    """
    mesh = build_mesh(pipeline=2, tensor=tensor)
    rank = mesh["pipeline"].get_local_rank()
    for name in names:
        plain = build(name, dtype)
        inputs = batch(name)
        tokens, masks, labels = (inputs[key].chunk(2) for key in ("input_ids", "attention_mask", "labels"))
        model = copy.deepcopy(plain)
        if not sequence_parallel:
            parallelize(model, None, mesh["tensor"])
        part = split_stages(model, None, 2, split=(1, 3))[rank]
        if sequence_parallel:
            parallelize(part.model, None, mesh["tensor"], sequence_parallel=True)
        schedule = build_schedule(schedule_name, 2, 2)
        stage = PipelineStage(part, rank, shared=part.shared)
        executor = PipelineExecutor(schedule, [stage], mesh["pipeline"], next_token_loss)
        with exact(dtype):
            result = executor.step(tokens, labels, keywords=[{"attention_mask": mask} for mask in masks])
            loss = torch.stack(
                [
                    next_token_loss(plain(input_ids=x, attention_mask=mask).logits, y)
                    for x, mask, y in zip(tokens, masks, labels, strict=True)
                ]
            ).mean()
            loss.backward()
        close(result.loss.to(dtype), loss.detach(), f"{name}: loss")
        held = {key.removeprefix("model."): entry for key, *entry in sharded_parameters(part)}
        expected = {key: value for key, value in plain.named_parameters(remove_duplicate=False) if key in held}
        assert expected.keys() == held.keys(), name
        for key, (parameter, sharding) in held.items():
            whole = expected[key].grad
            close(parameter.grad, take_shard(whole, sharding) if sharding else whole, f"{name}: {key}")
        layers = len({key.split(".layers.")[-1].split(".h.")[-1].split(".")[0] for key in held if LAYER.search(key)})
        assert layers == (1, 3)[rank], name


LAYER = re.compile(r"\.(layers|h)\.\d+\.")


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize(("dtype", "schedule", "tensor"), [(torch.float64, "1f1b", 2), (torch.float32, "zb-h1", 1)])
def test_a_pipeline_of_stages_trains_as_the_whole_model(
    pool: Pool, dtype: torch.dtype, schedule: str, tensor: int
) -> None:
    pool.run(2 * tensor, pipeline, DECODERS, dtype, schedule, tensor, timeout=240)


def test_stages_may_be_split_after_the_cut(pool: Pool) -> None:
    pool.run(4, pipeline, ["llama-tied", "qwen3", "gpt2"], torch.float64, "1f1b", 2, True, timeout=120)

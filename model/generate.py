"""Text from a model on any mesh: the same tokens in every layout, from one seed."""

from collections.abc import Sequence
from math import lcm

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from weft.parallel import PipelineExecutor, gather

FEW_LENGTHS = 32


def generate(
    executor: PipelineExecutor,
    prompt: Sequence[int],
    *,
    new_tokens: int,
    vocab_size: int,
    window: int,
    tensor: DeviceMesh,
    pipeline: DeviceMesh,
    temperature: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    end_of_text: int | None = None,
) -> list[int]:
    """Go on from `prompt` by up to `new_tokens` tokens; a collective call of the tensor and pipeline axes.

    `executor` runs one microbatch. The model sees the last `window` tokens. `temperature` 0 takes the likeliest token;
    `top_k` 0 draws from the whole vocabulary. Every rank returns the same tokens.
    """
    tokens = list(prompt)
    generator = torch.Generator().manual_seed(seed)
    device = torch.device(tensor.device_type)
    last_rank = executor.schedule.rank_of(executor.schedule.stages - 1)
    for _ in range(new_tokens):
        seen = tokens[-window:]
        outputs = executor.forward([_padded(seen, window, tensor.size(), device)])
        token = torch.zeros(1, dtype=torch.int64, device=device)
        if outputs is not None:
            logits = outputs[0]
            assert isinstance(logits, Tensor)
            whole = gather(logits[:, len(seen) - 1], tensor, -1)[0, :vocab_size]
            token[0] = _choose(whole.float().cpu(), temperature, top_k, generator)
        if pipeline.size() > 1:
            dist.broadcast(token, group=pipeline.get_group(), group_src=last_rank)
        tokens.append(int(token))
        if tokens[-1] == end_of_text:
            break
    return tokens[len(prompt) :]


def _padded(tokens: Sequence[int], window: int, ranks: int, device: torch.device) -> Tensor:
    """`[1, length]`, filled up so that the sequence divides over the ranks and few lengths occur.

    The causal mask hides what is filled up from the tokens before it.
    """
    multiple = lcm(FEW_LENGTHS, ranks)
    length = min(-(-len(tokens) // multiple) * multiple, max(window, len(tokens)))
    return torch.tensor([[*tokens, *[0] * (length - len(tokens))]], device=device)


def _choose(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0.0:
        return int(logits.argmax())
    if top_k:
        lowest = logits.topk(min(top_k, logits.numel())).values[-1]
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    probabilities = (logits / temperature).softmax(-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))

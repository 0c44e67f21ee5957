"""A Hugging Face Llama made parallel in five lines: each rank holds half of every matrix.

    python examples/hugging_face_llama.py
    torchrun --nproc-per-node 2 examples/hugging_face_llama.py

Needs the extra `huggingface`. Prints how many parameters a rank holds, the loss, and a continuation of a prompt: the
same on any number of ranks. The weights are random; for real ones make the model under `torch.device("meta")` and call
`load_shards(model, directory)` after `parallelize`: each rank reads its own slices.
"""

import os

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from weft.parallel import build_mesh, check_parallel, parallelize


def main() -> None:
    config = LlamaConfig(vocab_size=512, hidden_size=128, intermediate_size=352, num_hidden_layers=2)
    config.num_attention_heads, config.num_key_value_heads = 8, 2
    torch.manual_seed(0)

    mesh = build_mesh(tensor=int(os.environ.get("WORLD_SIZE", "1")))["tensor"]
    model = LlamaForCausalLM(config)
    whole = sum(parameter.numel() for parameter in model.parameters())
    parallelize(model, None, mesh)  # None: the plan that the model brings with it
    check_parallel(model, torch.arange(8)[None])

    tokens = torch.arange(64).view(2, 32)
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    continuation = model.generate(tokens[:1, :8], max_new_tokens=8, do_sample=False, pad_token_id=0)
    if dist.get_rank() == 0:
        held = sum(parameter.numel() for parameter in model.parameters())
        print(f"{model.model.layers[0].self_attn}\nthis rank holds {held:,} of {whole:,} parameters")
        print(f"loss {loss.item():.4f}, continuation {continuation[0, 8:].tolist()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

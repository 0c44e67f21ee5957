"""Models of the papers that the planner's formulas are from."""

from weft.launch.plan.shape import ModelShape


def gpt(layers: int, hidden: int, heads: int, vocab: int = 51200, positions: int = 2048) -> ModelShape:
    """A GPT as Megatron-LM has it: MLP of four times the width, no gate, biases, a tied table, dropout."""
    return ModelShape(
        layers=layers,
        hidden=hidden,
        intermediate=4 * hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        vocab=vocab,
        gated=False,
        tied=True,
        positions=positions,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        norm_vectors=2,
        dropout=True,
    )


LLAMA_405B = ModelShape(126, 16384, 53248, 128, 8, 128, 128256)

"""docs/models.md: its commands lead from a directory to a fine-tuned one that transformers reads."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from tests.test_docs import ROOT, blocks

PAGE = ROOT / "docs/models.md"


def test_the_page_from_a_directory_to_a_fine_tune_and_back(tmp_path: Path) -> None:
    (script,) = blocks(PAGE, "python")
    (settings,) = blocks(PAGE, "yaml")
    (tmp_path / "make_tiny.py").write_text(script)
    assert yaml.safe_load(settings)["parallel"] == {"tensor": 2}
    (tmp_path / "finetune.yaml").write_text(settings)
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    for command in "\n".join(blocks(PAGE, "sh")).splitlines():
        program, *words = shlex.split(command)
        line = [sys.executable, *(["-m", "weft"] if program == "weft" else []), *words]
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("tiny-qwen3", "my-qwen3"))
    assert before.keys() - after.keys() <= {"lm_head.weight"}
    assert all(after[name].shape == before[name].shape for name in after)
    assert any(not torch.equal(after[name], before[name]) for name in after)
    tokenizers = [(tmp_path / name / "tokenizer.json").read_text() for name in ("runs/finetune", "my-qwen3")]
    assert tokenizers[0] == tokenizers[1]

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "my-qwen3")
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 300)

"""lm-evaluation-harness gets the same numbers from weft's adapter as from weft's own tasks."""

import json
from pathlib import Path

import pytest

from tests.launch.test_evaluate import CHOICES
from tests.launch.tiny_run import make_run
from tests.pool import Pool
from weft.launch.cli import run

pytest.importorskip("lm_eval", reason="the extra evaluate is not installed")

TASK = """
task: weave
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


def test_a_local_task_has_the_same_accuracy_through_the_harness(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    make_run(pool, tmp_path / "tiny")
    questions, output = tmp_path / "questions.jsonl", tmp_path / "results.json"
    questions.write_text("\n".join(map(json.dumps, [question for question in CHOICES if question["prompt"]])))
    (tmp_path / "weave.yaml").write_text(TASK.format(file=questions))
    arguments = ["--task", str(questions), "--harness", "weave", "--harness-folder", str(tmp_path)]
    command = ["evaluate", str(tmp_path / "tiny"), *arguments, "--json", str(output)]
    assert pool.run(1, run, command, timeout=200) == [0]
    values = {result["metric"]: result["value"] for result in json.loads(output.read_text())["results"]}
    assert values["acc"] == values["accuracy"]

"""The pages tell the truth: their commands run, their links lead somewhere, the house is built as they say.

Commands run in a folder with a small copy of the demo's settings. Those that need a cluster, or are the set-up itself,
are checked for what they name: files, settings, arguments.
"""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.test_parallel_examples import EXAMPLES, lines
from weft.launch.errors import UserError
from weft.launch.settings import check_layout, load_settings

ROOT = Path(__file__).parents[1]
PIPELINE = ROOT / "docs/pipeline.md"  # its commands run in tests/parallel/pipeline/test_docs.py
VERIFY = ROOT / "docs/verify.md"  # and its in tests/launch/test_verify_docs.py
GENERATE = ROOT / "docs/generate-and-serve.md"  # and its in tests/launch/test_generate_docs.py
MODELS = ROOT / "docs/models.md"  # and its in tests/launch/test_models_docs.py
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, ROOT / "README.zh.md", ROOT / "CONTRIBUTING.md", ROOT / "docker/README.md"]
ROOMS = {"parallel": {"parallel"}, "model": {"parallel", "model"}, "launch": {"parallel", "model", "launch"}}
# set-up, other machines, or minutes of measuring
NOT_RUN = ("./run", "srun", "sbatch", "docker", "MASTER_ADDR=", "python benchmarks/", "python docs/images/")
LARGEST_PICTURE = 300_000


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """The commands of a page's sh blocks, one a line, without comments."""
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [" ".join(command) for line in lines if (command := shlex.split(line, comments=True))]


def all_commands() -> list[str]:
    return list(
        dict.fromkeys(
            command for page in PAGES if page not in (PIPELINE, VERIFY, GENERATE, MODELS) for command in commands(page)
        )
    )


def named_files(page: Path) -> dict[str, str]:
    """The python blocks that are to be saved: their code by the file name in their first line."""
    found = (re.match(r"# (\w+\.py)\n", block) for block in blocks(page, "python"))
    return {match[1]: match.string for match in found if match}


def trains(command: str) -> bool:
    return "train" in command and ".yaml" in command and "--dry-run" not in command


RUN_WITH_EXAMPLES = {" ".join(shlex.split(line, comments=True)) for name in EXAMPLES for line in lines(name)}
RUN = [command for command in all_commands() if not command.startswith(NOT_RUN) and command not in RUN_WITH_EXAMPLES]
CHECKED = [command for command in all_commands() if command.startswith(NOT_RUN)]


@dataclass
class Workspace:
    """A folder in which the commands of the pages run in seconds."""

    path: Path
    steps: int = 0
    finished: dict[str, subprocess.CompletedProcess[str]] = field(default_factory=dict)

    def run(self, command: str) -> str:
        """Run a command, once; returns what it printed."""
        if command not in self.finished:
            if trains(command):
                self.steps += 2  # a later part of the same run has steps left to do
            self.finished[command] = self._run(command)
        finished = self.finished[command]
        assert finished.returncode == 0, finished.stderr[-3000:]
        return finished.stdout + finished.stderr

    def _run(self, command: str) -> subprocess.CompletedProcess[str]:
        if trains(command):
            command += f" train.steps={self.steps}"
        executables = Path(sys.executable).parent
        environment = os.environ | {"PATH": f"{executables}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        environment["XDG_CACHE_HOME"] = str(self.path / "cache")
        return subprocess.run(
            command, shell=True, cwd=self.path, env=environment, capture_output=True, text=True, timeout=120
        )


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    path = tmp_path_factory.mktemp("pages")
    for name in ("examples", "docs", "benchmarks"):
        (path / name).symlink_to(ROOT / name)
    (path / "words").mkdir()
    for page in PAGES:
        (path / "words" / f"{page.stem}.txt").write_text(text_of(page), encoding="utf-8")
    (path / "configs").mkdir()
    (path / "configs/demo.yaml").write_text(yaml.safe_dump(small_demo()), encoding="utf-8")
    for page in PAGES:
        for name, code in named_files(page).items():
            (path / name).write_text(code, encoding="utf-8")
    return Workspace(path)


def small_demo() -> dict[str, Any]:
    """The demo's settings with everything small."""
    demo: dict[str, Any] = yaml.safe_load(text_of(ROOT / "configs/demo.yaml"))
    demo["model"] |= {"vocab_size": 320, "hidden_size": 24, "intermediate_size": 32, "max_position_embeddings": 16}
    demo["batch"] = {"global_size": 8, "micro_size": 2}
    demo["train"] |= {"evaluate_sequences": 4}
    demo["corpus"] = {"path": "words", "sequence_length": 16}
    return demo


@pytest.mark.parametrize("command", RUN)
def test_command_runs(workspace: Workspace, command: str) -> None:
    workspace.run(command)


@pytest.mark.parametrize("command", CHECKED)
def test_command_names_what_exists(command: str) -> None:
    words = [word for word in shlex.split(command) if not re.match(r"[A-Z_]+=", word)]
    for word in words:
        if "/" in word and "=" not in word and not word.startswith("-"):
            assert (ROOT / word).exists(), word
    configs = [word for word in words if word.endswith(".yaml") and word.startswith("configs/")]
    for config in configs:
        load_settings(ROOT / config, [word for word in words[words.index(config) + 1 :] if "=" in word])
    if words[0] == "./run":
        assert words[1] in text_of(ROOT / "run").split("command=${1:-}")[1]


def test_tables_of_memory_are_what_the_command_prints(workspace: Workspace) -> None:
    printed = workspace.run("python docs/memory_costs.py")
    tables = blocks(ROOT / "docs/memory.md", "text")
    assert len(tables) == 2
    for table in tables:
        assert table in printed


def test_code_of_the_readme_gives_the_same_on_one_rank_and_on_two(workspace: Workspace) -> None:
    outputs = [workspace.run(command) for command in ("python mlp.py", "torchrun --nproc-per-node 2 mlp.py")]
    assert float(outputs[0]) > 0
    assert outputs[1].count(outputs[0].strip()) == 2
    losses = re.findall(r"loss (\S+)", workspace.run("torchrun --nproc-per-node 2 stages.py"))
    assert float(losses[-1]) < float(losses[0]) / 4


def test_a_run_goes_on_in_every_layout_of_the_pages(workspace: Workspace) -> None:
    parts = [command for command in RUN if trains(command) and "report.directory" not in command]
    assert len(parts) == 3
    for part in parts:
        workspace.run(part)
    steps = [json.loads(line)["step"] for line in (workspace.path / "runs/demo/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, steps[-1] + 1))
    assert sum("going on from" in workspace.run(part) for part in parts) == 2


def test_chinese_page_has_the_commands_the_code_and_the_pictures_of_the_english_one() -> None:
    english, chinese = ROOT / "README.md", ROOT / "README.zh.md"
    assert commands(chinese) == commands(english)
    assert [ast.dump(ast.parse(code)) for code in blocks(chinese, "python")] == [
        ast.dump(ast.parse(code)) for code in blocks(english, "python")
    ]
    assert pictures(english) == pictures(chinese) != []
    headings = [re.findall(r"^(#+) ", re.sub(r"```.*?```", "", text_of(p), flags=re.DOTALL), re.MULTILINE)
                for p in (english, chinese)]  # fmt: skip
    assert headings[0] == headings[1]


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in [*re.findall(r"[^!]\[[^\]]*\]\(([^)\s]+)\)", text_of(page)), *pictures(page)]:
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        file = page.parent / target if target else page
        assert file.exists(), link
        if anchor:
            assert anchor in anchors(file), link


def pictures(page: Path) -> list[str]:
    return re.findall(r"(?:!\[[^\]]*\]\(|<img src=\")([^)\"]+)", text_of(page))


def anchors(page: Path) -> set[str]:
    """What GitHub calls a page's headings in links."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.zh.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page: Path) -> None:
    for name in re.findall(r"`([\w.]+/[\w./*]+\.(?:pyi?|md|yaml|sh|html))`", text_of(page)):
        assert list(ROOT.glob(name)), name


REFUSED = {"parallel.context": "2"}


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_settings_that_the_readme_calls_unsupported_are_refused_and_no_others(page: str) -> None:
    limits = text_of(ROOT / page).rpartition("\n## ")[2]
    assert set(re.findall(r"^- .*?`([a-z_]+\.[a-z_]+)`", limits, re.MULTILINE)) == REFUSED.keys()
    for key, value in REFUSED.items():
        with pytest.raises(UserError, match=rf"^{key} is {value}"):
            check_layout(load_settings(ROOT / "configs/demo.yaml", [f"{key}={value}"]), 4)
    for recompute in ("selective", "full"):
        check_layout(load_settings(ROOT / "configs/demo.yaml", [f"parallel.recompute={recompute}"]), 4)


def test_pictures_are_small() -> None:
    for picture in (ROOT / "docs/images").glob("*.[ps][nv]g"):
        assert picture.stat().st_size < LARGEST_PICTURE, picture.name


@cache
def rooms_imported(file: Path) -> frozenset[str]:
    """The rooms of weft that a source file imports from, at its top or later."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(text_of(file))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(match[1] for name in names if (match := re.match(r"weft\.(parallel|model|launch)\b", name)))


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room: str) -> None:
    files = [file for file in (ROOT / room).rglob("*.py*") if file.suffix in (".py", ".pyi")]
    assert files
    for file in files:
        assert rooms_imported(file) <= ROOMS[room], file
    assert any(rooms_imported(file) for file in files)  # else nothing was read


def test_what_the_page_calls_free_of_torch_does_not_import_it() -> None:
    page = text_of(ROOT / "docs/architecture.md")
    sentence = page.partition("What needs no torch does not import it")[2].partition("The public names")[0]
    modules = [name.removesuffix(".py").replace("/", ".") for name in re.findall(r"`([\w/]+\.py)`", sentence)]
    assert {"launch.settings", "launch.topology", "model.config", "parallel.pipeline.schedules"} <= set(modules)
    code = (
        f"import sys\nfor name in {modules}:\n  __import__('weft.' + name)\n  assert 'torch' not in sys.modules, name"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

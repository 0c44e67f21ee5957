"""Makes the pictures of the README from a run of the demo, about two minutes on 2 cores.

    python docs/images/make_pictures.py

Writes demo.svg, the terminal as a user sees it at the end, and report.png, the report in headless Chromium.
"""

import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COMMAND = "weft train configs/demo.yaml"
COLUMNS, LINES = 108, 50
PAGE = (1000, 1445)  # pixels of the report that are shown

# Rich's own frame, with a font that the reader's machine has instead of one from the network.
FRAME = """\
<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px; }}
.{unique_id}-title {{ font-size: 18px; font-family: sans-serif; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" /></clipPath>
{lines}</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}<g class="{unique_id}-matrix">
{matrix}
</g></g></svg>
"""


def run_in_terminal(report: str) -> str:
    """All that the command writes to a terminal of `COLUMNS` columns."""
    primary, secondary = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": str(LINES)}
    command = [sys.executable, "-m", *COMMAND.split(), f"report.directory={report}", "checkpoint.resume=never"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=secondary, stderr=secondary)
    os.close(secondary)
    written = b""
    while True:
        try:
            written += os.read(primary, 1 << 16)
        except OSError:  # the other end is closed
            break
    if process.wait():
        raise SystemExit("\n".join(last_state(written.decode())))
    return written.decode()


def last_state(written: str) -> list[str]:
    """The lines that are left at the end: a line that was erased and written again counts as last written."""
    lines = [line.rpartition("\x1b[2K")[2].rpartition("\r")[2] for line in written.replace("\r\n", "\n").split("\n")]
    return [re.sub(r"\x1b\[\?25[lh]", "", line) for line in lines]


def draw_terminal(lines: list[str], path: Path) -> None:
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    console.print(Text.from_ansi("\n".join(lines).strip("\n")))
    console.save_svg(str(path), title=f"$ {COMMAND}", theme=MONOKAI, code_format=FRAME, unique_id="demo")


def draw_page(page: Path, path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("chromium was not found; install it to draw the report.")
    size = f"--window-size={PAGE[0]},{PAGE[1]}"
    options = ["--headless", "--no-sandbox", "--hide-scrollbars", "--disable-gpu", size, f"--screenshot={path}"]
    subprocess.run([browser, *options, page.as_uri()], check=True, capture_output=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        report = f"{folder}/runs/demo"
        lines = last_state(run_in_terminal(report))
        draw_terminal([line.replace(f"{folder}/", "") for line in lines], HERE / "demo.svg")
        draw_page(Path(report) / "report.html", HERE / "report.png")


if __name__ == "__main__":
    main()

"""The text that every machine has: Python's language reference and the documentation inside its standard library.

Modules are read as text and never imported. The reference comes first, one document a topic, then each module's
docstrings, one document a module. A text that came before (an alias, an inherited docstring) is left out.
"""

import ast
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from weft.launch.errors import UserError

TOPICS = "pydoc_data/topics.py"

# Little prose, not on every machine, or dropped by a newer Python.
_LEFT_OUT = {
    *("test", "tests", "idlelib", "lib2to3", "distutils", "turtledemo", "encodings", "ensurepip", "pydoc_data"),
    *("site-packages", "dist-packages", "lib-dynload", "__pycache__"),
}


class Document(NamedTuple):
    """One text, and the relative name of the module that it comes from."""

    name: str
    text: str


def standard_library() -> Path:
    """The folder of the standard library.

    Raises:
        UserError: this Python came without its language reference.
    """
    root = Path(sysconfig.get_path("stdlib"))
    if not (root / TOPICS).is_file():
        raise UserError(
            f"corpus.path builtin needs {root / TOPICS}, which this Python lacks; "
            "install Python's full standard library, or give a text file or folder"
        )
    return root


def module_names(root: Path) -> list[str]:
    """Relative names of the files to read, in reading order."""
    names: list[str] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _LEFT_OUT and not name.startswith("config-")]
        names += [(Path(folder) / file).relative_to(root).as_posix() for file in files if file.endswith(".py")]
    return [TOPICS, *sorted(names)]


def documents(root: Path) -> Iterator[Document]:
    """The language reference and the docstrings of every module under `root`."""
    seen: set[str] = set()
    for name in module_names(root):
        tree = ast.parse((root / name).read_bytes())
        texts = _topics(tree) if name == TOPICS else _docstrings(tree)
        new = [text for text in dict.fromkeys(texts) if text not in seen]
        seen.update(new)
        if name == TOPICS:
            yield from (Document(name, text) for text in new)
        elif new:
            yield Document(name, "\n\n".join(new) + "\n")


def _topics(tree: ast.Module) -> Iterator[str]:
    """The values of the one dictionary that the module of topics assigns."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            yield from ast.literal_eval(node).values()
            return


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Docstrings of a module, its classes and functions, in the order of the source."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text:
            yield text
    for child in ast.iter_child_nodes(node):
        yield from _docstrings(child)

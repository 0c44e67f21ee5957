"""Names that do not fit, in one sentence: each is there, those that differ only in a number together."""

import re
from collections.abc import Iterable


def listed(names: Iterable[str]) -> str:
    """The names, sorted; `a.0.w` and `a.1.w` become `a.{0…1}.w`, `a.{0, 2}.w` where one between is missing."""
    groups: dict[tuple[str, str], list[int]] = {}
    for name in sorted(set(names)):
        match = re.fullmatch(r"(.*?\.)([0-9]{1,9})(\..*)", name, re.DOTALL)
        if match is None:
            groups[name, ""] = []
        else:
            groups.setdefault((match[1], match[3]), []).append(int(match[2]))
    return ", ".join(f"{head}{_numbers(sorted(found))}{tail}" for (head, tail), found in groups.items())


def _numbers(found: list[int]) -> str:
    if len(found) < 2:
        return "".join(map(str, found))
    runs: list[list[int]] = []
    for number in found:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "{" + ", ".join(str(a) if a == b else f"{a}…{b}" for a, b in runs) + "}"

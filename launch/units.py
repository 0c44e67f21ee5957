"""Numbers as people read them: sizes, rates and times, for the progress line and the report."""

import re

DURATION = r"^([0-9]{1,5}d)?([0-9]{1,5}h)?([0-9]{1,5}m)?([0-9]{1,5}s)?$"


def seconds_of(duration: str) -> int:
    """The seconds of a duration as people write it: `3h50m`, `90s`, `1d12h`."""
    units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
    return sum(int(number) * units[unit] for number, unit in re.findall(r"([0-9]+)([dhms])", duration))


def bytes_text(size: float) -> str:
    """A size in decimal units of bytes, three digits: `412 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 999.5:
            return f"{_three_digits(size) if unit != 'B' else round(size)} {unit}"
        size /= 1000
    return f"{_three_digits(size)} TB"


def count_text(number: float) -> str:
    """A count or rate, three digits: `21.3k`."""
    for suffix in ("", "k", "M", "G"):
        if abs(number) < 999.5:
            return f"{_three_digits(number) if suffix else f'{number:.3g}'}{suffix}"
        number /= 1000
    return f"{_three_digits(number)}T"


def seconds_text(seconds: float) -> str:
    """A duration as minutes and seconds, or hours and minutes: `0:31`, `1:04:00`, `2 d 3 h`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def milliseconds_text(seconds: float) -> str:
    """The time of one step: `385 ms`, or `12.3 s` from one second on."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 999.5 else f"{seconds:.0f} s"


def _three_digits(number: float) -> str:
    return f"{number:.2f}" if abs(number) < 9.995 else f"{number:.1f}" if abs(number) < 99.95 else f"{number:.0f}"

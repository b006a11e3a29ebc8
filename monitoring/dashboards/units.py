"""Numbers with Grafana's units, as a person reads them.

Left to whom: which unit a value has is said in `boards`.
"""

import math
from collections.abc import Callable, Mapping

_SHORT = ("", " K", " Mil", " Bil", " Tri")
_BINARY = (" B", " KiB", " MiB", " GiB", " TiB", " PiB")
_DECIMAL = (" B/s", " kB/s", " MB/s", " GB/s", " TB/s")
_TIMES = ((1e-6, "µs"), (1e-3, "ms"), (1.0, "s"), (60.0, "mins"), (3600.0, "hours"), (86400.0, "days"), (604800.0, "weeks"))


def format_value(value: float, unit: str) -> str:
    """`value` in `unit`, with three digits that count; `No data` for NaN."""
    if math.isnan(value):
        return "No data"
    return _FORMATS[unit](value)


def _format_seconds(seconds: float) -> str:
    size, name = next(((size, name) for size, name in reversed(_TIMES) if abs(seconds) >= size), (1.0, "s"))
    return f"{_trim(seconds / size)} {name}"


def _scale(value: float, base: int, names: tuple[str, ...]) -> str:
    power = min(len(names) - 1, int(math.log(abs(value), base) + 1e-9)) if abs(value) >= base else 0
    return f"{_trim(value / base**power)}{names[power]}"


def _trim(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


_FORMATS: Mapping[str, Callable[[float], str]] = {
    "percentunit": lambda value: f"{_trim(100 * value)}%",
    "s": _format_seconds,
    "bytes": lambda value: _scale(value, 1024, _BINARY),
    "Bps": lambda value: _scale(value, 1000, _DECIMAL),
    "cps": lambda value: f"{_scale(value, 1000, _SHORT)} c/s",
    "short": lambda value: _scale(value, 1000, _SHORT),
}

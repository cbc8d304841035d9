"""The benchmark reports as Markdown tables, with each goal (`goals.json`) beside what was measured."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
_TARGETS = json.loads((FOLDER / "goals.json").read_text())
GOALS: dict[tuple[int, ...], dict[str, float]] = {
    tuple(goal["shape"]): {name: value for name, value in goal.items() if name != "shape"} for goal in _TARGETS["lookup"]
}
LIMITS: dict[str, float] = _TARGETS["limits"]
RELATIVES: dict[str, dict[str, float]] = _TARGETS["relatives"]
PEERS = ("addmm + argmin", "chunked addmm", "torch.compile", "cdist + argmin", "FAISS", "FAISS, BLAS", "FAISS at its best",
         "vector-quantize-pytorch", "transformers EnCodec")  # fmt: skip
MAIN_PEERS = ("addmm + argmin", "torch.compile", "FAISS at its best", "vector-quantize-pytorch", "transformers EnCodec")
MIDDLE_OF_FEW = (2, 4, 8)
Row = dict[str, Any]


def load(name: str) -> Any:
    """A committed report."""
    return json.loads((FOLDER / name).read_text())


def short_table(report: dict[str, Any]) -> str:
    """What a reader wants to know: our time, our share of the peak, how many times longer the others take, memory."""
    rows = [row for row in report["rows"] if row["shape"][0] not in MIDDLE_OF_FEW]
    columns: dict[str, Callable[[Row], str]] = {
        "N, K, D": _shape,
        "ms": _ms,
        "of peak": lambda row: _percent(row.get("of peak")),
    }
    for name in MAIN_PEERS:
        columns[name] = lambda row, name=name: _times(row["ratio"].get(name))  # type: ignore[misc]
    columns["extra MiB, ours / addmm"] = lambda row: " / ".join(
        _number(row.get("memory", {}).get(name)) for name in ("tokenzoo", "addmm + argmin")
    )
    return _table(rows, columns)


def lookup_table(report: dict[str, Any]) -> str:
    """All peers, with goals."""
    columns: dict[str, Callable[[Row], str]] = {"N, K, D": _shape, "ms": _ms}
    columns["of peak"] = lambda row: _beside(row.get("of peak"), _goal(row, "of peak"), _percent)
    for name in PEERS:
        columns[name] = lambda row, name=name: _beside(row.get("ratio", {}).get(name), _goal(row, name), _times)  # type: ignore[misc]
    return _table(report["rows"], columns)


def cost_table(report: dict[str, Any]) -> str:
    """What entries and loss, and EMA statistics, add to the ids; two threads against one; the fallback; with limits."""
    rows = [row for row in report["rows"] if "of peak" in row or row["shape"][0] > 16]

    def ema(row: Row) -> str:
        return _beside(row.get("EMA"), LIMITS["EMA"] if row["shape"][1] <= LIMITS["EMA up to K"] else None, _percent, most=True)

    def fallback(row: Row) -> str:
        steps = _TARGETS["fallback, by largest D"]
        goal = next((goal for width, goal in steps if row["shape"][2] <= width), None)
        return _beside(row.get("fallback beside addmm"), goal, _times)

    return _table(rows, {
        "N, K, D": _shape,
        "entries and loss": lambda row: _beside(row.get("entries and loss"), LIMITS["entries and loss"], _percent, most=True),
        "and EMA": ema,
        "all threads against one": lambda row: _beside(row.get("threads against one"), LIMITS["two threads"], _times),
        "fallback against addmm + argmin": fallback,
    })  # fmt: skip


def memory_table(report: dict[str, Any]) -> str:
    """MiB beyond inputs and outputs."""
    limit = LIMITS["extra MiB per thread"] * report["machine"]["threads"]
    columns: dict[str, Callable[[Row], str]] = {"N, K, D": _shape}
    columns["tokenzoo"] = lambda row: _beside(row["memory"].get("tokenzoo"), limit, _number, most=True)
    columns["its packed codebook"] = lambda row: _number(row.get("packed"))
    for name in ("fallback", *PEERS):
        columns[name] = lambda row, name=name: _number(row["memory"].get(name))  # type: ignore[misc]
    return _table([row for row in report["rows"] if "memory" in row], columns)


def relatives_table(report: dict[str, Any]) -> str:
    """One line per operation and peer."""
    lines = ["| operation | ms | peer | times longer |", "|---|---:|---|---:|"]
    for row in report["rows"]:
        for peer, value in row["ratio"].items():
            goal = RELATIVES.get(row["what"], {}).get(peer)
            lines.append(f"| {row['what']} | {row['ms']:g} | {peer} | {_beside(value, goal, _times)} |")
    return "\n".join(lines)


def exactness_table(report: dict[str, Any]) -> str:
    """Wrong ids of each kind of data."""
    names = list(report["rows"][0]["wrong"])
    lines = ["| data | N, K, D | rows with ties | " + " | ".join(names) + " |", "|---|---|---:|" + "---:|" * len(names)]
    for row in report["rows"]:
        shape = ", ".join(map(str, row["shape"]))
        lines.append(f"| {row['kind']} | {shape} | {row['ties']} | " + " | ".join(str(row["wrong"][n]) for n in names) + " |")
    return "\n".join(lines)


def machine_line(report: dict[str, Any]) -> str:
    """What it was measured on, in words."""
    found = report["machine"]
    core = f", its OpenBLAS told it is {found[_CORE]}" if found.get(_CORE) else ""
    return f"{found['cpu']}, {found['threads']} threads, {found['kernels']}, torch {found['torch']}; FAISS from PyPI{core}."


_CORE = "FAISS's OpenBLAS"


def _table(rows: Sequence[Row], columns: dict[str, Callable[[Row], str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    return "\n".join(lines + ["| " + " | ".join(cell(row) for cell in columns.values()) + " |" for row in rows])


def _goal(row: Row, name: str) -> float | None:
    return GOALS.get(tuple(row["shape"]), {}).get(name)


def _beside(value: float | None, goal: float | None, text: Callable[[float | None], str], *, most: bool = False) -> str:
    """The figure and its goal, or its limit: `1.53 ≥ 1.5` where it is met, bold where it is not."""
    if value is None or goal is None:
        return text(value)
    if most:
        return f"{text(value)} ≤ {text(goal)}" if value <= goal else f"**{text(value)} > {text(goal)}**"
    return f"{text(value)} ≥ {text(goal)}" if value >= goal else f"**{text(value)} < {text(goal)}**"


def _shape(row: Row) -> str:
    return ", ".join(map(str, row["shape"]))


def _ms(row: Row) -> str:
    return _number(row.get("ms"))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _times(value: float | None) -> str:
    """Two decimals below 10, one below 100: no more than the measurement holds."""
    if value is None:
        return ""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.3g} %" if abs(value) < 0.1 else f"{100 * value:.0f} %"

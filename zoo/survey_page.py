"""The report of `tokenzoo complexity`: one HTML file that needs nothing else, light or dark as the reader's system is."""

import base64
from collections.abc import Callable, Iterable, Sequence
from html import escape
from statistics import mean, median

from tokenzoo.survey import Measured, Survey

Thumbnails = Callable[[Measured], tuple[bytes, bytes] | None]

WIDTH, HEIGHT, LEFT, BOTTOM = 880, 240, 44, 28
MOST_BARS = 32

_STYLE = """
:root { color-scheme: light dark; --page: #f7f7f5; --card: #fff; --ink: #1d1d1f; --soft: #6b6b70; --line: #e2e2e0;
  --bar: #3b6fb6; --short: #c96442; }
@media (prefers-color-scheme: dark) { :root { --page: #161618; --card: #212124; --ink: #ececee; --soft: #a0a0a8;
  --line: #37373c; --bar: #7aa7e6; --short: #e58b6b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 960px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 6px; }
h2 { font-size: 18px; margin: 40px 0 4px; }
p { margin: 0 0 12px; color: var(--soft); max-width: 70ch; }
p b { color: var(--ink); font-weight: 600; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(max(132px, 22%), 1fr)); gap: 12px; margin: 24px 0 0; }
dl div, figure, .plot { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
dl div { padding: 10px 14px; }
dt { color: var(--soft); font-size: 13px; }
dd { margin: 0; font-size: 22px; font-variant-numeric: tabular-nums; }
.plot { padding: 16px 16px 8px; }
svg { display: block; width: 100%; height: auto; font: 12px system-ui, sans-serif; fill: var(--soft); }
rect { fill: var(--bar); } rect.short { fill: var(--short); } line { stroke: var(--line); }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(208px, 1fr)); gap: 14px; margin-top: 12px; }
figure { margin: 0; padding: 10px; }
figure div { display: grid; grid-template-columns: 1fr 1fr; gap: 6px; }
img { width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--page); border-radius: 6px; display: block; }
figcaption { margin-top: 8px; font-size: 13px; color: var(--soft); overflow-wrap: anywhere; }
figcaption b { color: var(--ink); font-size: 16px; font-variant-numeric: tabular-nums; }
figcaption span { display: block; }
.missed { color: var(--short); }
ul { padding-left: 20px; color: var(--soft); font-size: 14px; overflow-wrap: anywhere; }
details { margin-top: 40px; } summary { cursor: pointer; font-weight: 600; }
table { border-collapse: collapse; width: 100%; margin-top: 8px; font-size: 14px; }
td { border-top: 1px solid var(--line); padding: 3px 8px 3px 0; overflow-wrap: anywhere; }
td:first-child { width: 5em; text-align: right; font-variant-numeric: tabular-nums; padding-right: 16px; }
"""


def page(survey: Survey, thumbnails: Thumbnails, *, show: int) -> str:
    """The report as HTML.

    Args:
        survey: What was measured; at least one picture.
        thumbnails: Gives a picture and its reconstruction as JPEGs, or `None` where they cannot be had.
        show: Pictures to show at each end; no picture is shown at both.
    """
    ordered, unit = survey.ordered, survey.unit
    shown = min(show, (len(ordered) + 1) // 2)
    simplest, most_complex = ordered[:shown], ordered[max(shown, len(ordered) - shown) :][::-1]
    target = ", ".join(f"{name} = {value:g}" for name, value in survey.target.items())
    title = f"How many {unit} {len(ordered):,} picture{'s' * (len(ordered) > 1)} take"
    parts = [
        f"<h1>{title}</h1>",
        f"<p>The code that <b>{escape(survey.model)}</b> chooses to reach <b>{escape(target)}</b>, of up to {survey.limit} "
        f"{unit}.{_interrupted(survey)}</p>",
        _numbers(survey),
        f"<h2>All pictures</h2><p>How many pictures took how many {unit}.{_colours(survey)}</p>",
        f'<div class="plot">{_histogram(survey)}</div>',
        _gallery("The simplest", simplest, thumbnails, unit),
        _gallery("The most complex", most_complex, thumbnails, unit),
        _failures(survey.failed),
        _table(ordered, unit),
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    body = "\n".join(part for part in parts if part)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>{head}\n<title>{title}</title>\n<style>{_STYLE}</style></head>\n'
        f"<body><main>\n{body}\n</main></body>\n</html>\n"
    )


def summary(survey: Survey) -> dict[str, float | int]:
    """The numbers at the top of the report."""
    lengths = sorted(picture.length for picture in survey.pictures)
    return {
        "pictures": len(lengths),
        "median": median(lengths),
        "mean": round(mean(lengths), 1),
        "shortest": lengths[0],
        "longest": lengths[-1],
        "target missed": sum(not picture.met for picture in survey.pictures),
        "unreadable": len(survey.failed),
    }


def _interrupted(survey: Survey) -> str:
    done = len(survey.pictures) + len(survey.failed)
    return f" Interrupted after {done:,} of {survey.asked:,} files." if done < survey.asked else ""


def _numbers(survey: Survey) -> str:
    total = sum(picture.length for picture in survey.pictures)
    share = total / (survey.limit * len(survey.pictures))
    values = {**summary(survey), "of the full length": f"{share:.0%}"}
    cells = (f"<div><dt>{name}</dt><dd>{_number(value)}</dd></div>" for name, value in values.items())
    return f"<dl>{''.join(cells)}</dl>"


def _number(value: float | int | str) -> str:
    return value if isinstance(value, str) else f"{value:,.10g}"


def _colours(survey: Survey) -> str:
    missed = sum(not picture.met for picture in survey.pictures)
    if not missed:
        return ""
    return f' <span class="missed">Not all of them get there: {missed:,} miss the target.</span>'


def bins(limit: int) -> list[tuple[int, int]]:
    """Ranges (first, last) of token counts from 1 to `limit`, of equal width, at most `MOST_BARS` of them."""
    width = -(-limit // MOST_BARS)
    return [(first, min(first + width - 1, limit)) for first in range(1, limit + 1, width)]


def _histogram(survey: Survey) -> str:
    ranges = bins(survey.limit)
    met, missed = [0] * len(ranges), [0] * len(ranges)
    width = ranges[0][1] - ranges[0][0] + 1
    for picture in survey.pictures:
        (met if picture.met else missed)[(picture.length - 1) // width] += 1
    top = max(a + b for a, b in zip(met, missed, strict=True))
    step, floor = (WIDTH - LEFT) / len(ranges), HEIGHT - BOTTOM
    drawn = [
        f'<line x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{count:,}</text>'
        for count in _ticks(top)
        for y in [_height(count, top, floor)]
    ]
    for i, (first, last) in enumerate(ranges):
        x = LEFT + i * step
        label = f"{first}" if first == last else f"{first} to {last}"
        title = f"{label} {survey.unit}: {met[i] + missed[i]:,} pictures"
        title += f", {missed[i]:,} miss the target" if missed[i] else ""
        middle, peak = _height(met[i], top, floor), _height(met[i] + missed[i], top, floor)
        bars = _bar(x, step, middle, floor) + _bar(x, step, peak, middle, 'class="short"')
        drawn.append(f"<g><title>{title}</title>{bars}</g>")
        if i % max(1, len(ranges) // 8) == 0:
            drawn.append(f'<text x="{x + step / 2:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{first}</text>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Histogram">{"".join(drawn)}</svg>'


def _bar(x: float, step: float, top: float, bottom: float, attributes: str = "") -> str:
    if bottom <= top:
        return ""
    size = f'width="{max(1.0, step - 2):.1f}" height="{bottom - top:.1f}"'
    return f'<rect {attributes} x="{x + 1:.1f}" y="{top:.1f}" {size}/>'


def _height(count: int, top: int, floor: float) -> float:
    return floor - (floor - 12) * count / top


def _ticks(top: int) -> list[int]:
    """Round counts from 0 to `top`, at most five of them."""
    step = next(m * 10**e for e in range(20) for m in (1, 2, 5) if top / (m * 10**e) <= 4)
    return list(range(0, top + 1, step))


def _gallery(title: str, pictures: Sequence[Measured], thumbnails: Thumbnails, unit: str) -> str:
    if not pictures:
        return ""
    note = f"Each picture, and beside it what its {unit} decode to."
    return f'<h2>{title}</h2><p>{note}</p><div class="grid">{"".join(_figure(p, thumbnails, unit) for p in pictures)}</div>'


def _figure(picture: Measured, thumbnails: Thumbnails, unit: str) -> str:
    pair = thumbnails(picture)
    images = "".join(
        f'<img alt="{alt}" src="data:image/jpeg;base64,{base64.b64encode(data).decode()}">'
        for alt, data in ([] if pair is None else zip(("original", "decoded"), pair, strict=True))
    )
    missed = "" if picture.met else '<span class="missed">misses the target</span>'
    name = f"<span>{escape(picture.file.name)}</span>"
    count = f"<b>{picture.length}</b> {_counted(picture.length, unit)}"
    shown = f"<div>{images}</div>" if images else ""
    return f"<figure>{shown}<figcaption>{count}{missed}{name}</figcaption></figure>"


def _counted(count: int, unit: str) -> str:
    return unit.removesuffix("s") if count == 1 else unit


def _failures(failed: Sequence[str]) -> str:
    if not failed:
        return ""
    return f"<h2>Could not be read</h2><ul>{''.join(f'<li>{escape(reason)}</li>' for reason in failed)}</ul>"


def _table(ordered: Iterable[Measured], unit: str) -> str:
    rows = "".join(f"<tr><td>{picture.length}</td><td>{escape(str(picture.file))}</td></tr>" for picture in ordered)
    return f"<details><summary>Every picture and its {unit}</summary><table>{rows}</table></details>"

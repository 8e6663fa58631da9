"""Pages as one file: plotly's script included once, jinja2 templates, nothing from a network.

Colours of text and lines are CSS variables, so that a page follows the reader's light or dark setting; traces have colours
that can be told apart on both.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from typing import Any

from recray import log, strict_json

_LAYOUT: dict[str, Any] = {
    **{"showlegend": False, "autosize": True, "margin": {"l": 10, "r": 15, "t": 10, "b": 10}},
    **{"paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)"},
    "font": {"family": "system-ui, sans-serif", "size": 12},
    "hoverlabel": {"bgcolor": "#1c2733", "font": {"color": "#fff"}},
}
COLOURS = ("#2f80c4", "#e07b1a", "#1b9e77", "#9270d6", "#d1493f", "#8c99a6", "#c2569a", "#8a7d1f", "#17a2b8")
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "x", "star", "hexagon", "pentagon")


def available(stage: str, file: str) -> bool:
    """Whether pages can be made; if not, says how to get what is missing."""
    missing = [name for name in ("plotly", "jinja2") if importlib.util.find_spec(name) is None]
    if missing:
        needs = " and ".join(missing)
        log.warning(
            stage, f"{file} was not written: it needs {needs}. pip install 'recray[report]', then run this again"
        )
    return not missing


def page(template: str, **values: Any) -> str:
    """A page from one of the templates next to this module. Strings are escaped; `Markup` is not."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=PackageLoader("recray.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    script = Markup(get_plotlyjs())  # nosec: the library's own file
    return environment.get_template(template).render(plotly=script, **values)


def figure(
    traces: Sequence[Mapping[str, Any]],
    caption: str,
    x: str | Mapping[str, Any],
    y: str | Mapping[str, Any],
    height: int = 320,
    legend: Sequence[tuple[str, str]] = (),
    **layout: Any,
) -> Any:
    """A plot with its caption, which is also what a screen reader gets; the numbers stand in tables.

    x, y: title of the axis with its unit, or plotly's settings of it. legend: (name, colour) of each series.
    """
    from markupsafe import Markup, escape

    axes = {f"{name}axis": _axis(one) for name, one in (("x", x), ("y", y))}
    body = [*map(dict, traces)], {**_LAYOUT, "height": height, **axes, **layout}
    data, shape = (strict_json.dumps(one).replace("</", "<\\/") for one in body)
    keys = "".join(f'<li><i style="background:{colour}"></i>{escape(name)}</li>' for name, colour in legend)
    text = escape(caption)
    return Markup(  # nosec: text is escaped, data is JSON without "</"
        f'<figure>{f"<ul class=legend>{keys}</ul>" if keys else ""}<div class="plot" role="img" aria-label="{text}" '
        f'style="height:{height}px"></div><script>{{const plot = document.currentScript.previousElementSibling; '
        # Drawn when the page's columns have their widths.
        f'addEventListener("DOMContentLoaded", () => Plotly.newPlot(plot, {data}, {shape}, '
        f"{{responsive: true, displayModeBar: false}}))}}</script><figcaption>{text}</figcaption></figure>"
    )


def _axis(given: str | Mapping[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {"title": {"text": given}} if isinstance(given, str) else dict(given)
    return {"automargin": True, "tickfont": {"size": 12}, **settings}


def table(
    heads: Sequence[str],
    rows: Sequence[Sequence[Any]],
    text: Sequence[int] = (0,),
    marked: Sequence[bool] = (),
    label: str = "",
    look: str = "winner",
) -> Any:
    """A table that sorts by a click on a head. text: columns that are left-aligned; the last of them wraps, if it is last.

    A cell is a text, a number, None, or (what is shown, what sorts). marked: rows that have the class `look`.
    """
    from markupsafe import Markup, escape

    def classes(column: int) -> str:
        wraps = " wrap" if column == len(heads) - 1 and column in text else ""
        return f' class="text{wraps}"' if column in text else ""

    head = "".join(
        f'<th scope="col"{classes(i).replace(" wrap", "")}><button type="button">{escape(name)}</button></th>'
        for i, name in enumerate(heads)
    )
    body = []
    for number, row in enumerate(rows):
        cells = [one if isinstance(one, tuple) else (show(one), one) for one in row]
        mark = f' class="{look}"' if number < len(marked) and marked[number] else ""
        inner = "".join(
            f'<td{classes(i)} data-sort="{escape("" if key is None else str(key))}">{escape(shown)}</td>'
            for i, (shown, key) in enumerate(cells)
        )
        body.append(f"<tr{mark}>{inner}</tr>")
    return Markup(  # nosec: every cell is escaped
        f'<div class="scroll" tabindex="0" role="region" aria-label="table: {escape(label or heads[0])}"><table><thead><tr>{head}'
        f"</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def paragraph(text: str) -> Any:
    from markupsafe import Markup

    return Markup("<p>{}</p>").format(text)


def grid(plots: list[Any]) -> Any:
    from markupsafe import Markup

    return Markup('<div class="two">{}</div>').format(Markup("").join(plots))


def details(summary: str, parts: list[Any]) -> Any:
    from markupsafe import Markup

    return Markup("<details><summary>{}</summary>{}</details>").format(summary, Markup("").join(parts))


def link(address: str, text: str) -> Any:
    from markupsafe import Markup

    return Markup('<a href="{}">{}</a>').format(address, text)


def show(value: Any) -> Any:
    """A number with the digits that are worth reading."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if isinstance(value, float):
        return f"{value:.4f}" if math.isfinite(value) else "undefined"
    return f"{value:,}"

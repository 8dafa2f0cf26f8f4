"""The report's plots, as inline SVG with the page's colours: one drawing for light and dark."""

import io
import itertools
import logging
import re
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from batchgen.errors import BatchgenError
from batchgen.review.report.counts import Timeline
from batchgen.review.report.markup import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Doubles = npt.NDArray[np.float64]

WIDTH, HEIGHT = 4.6, 2.3  # inches of 72 units; on the narrowest page about as many pixels
BINS = 40  # of a histogram, at most
STEPS = 30  # of the speed, at most: finer steps show when completions end, not how fast the run is
_COLOURS = {"#000001": "var(--ink)", "#000002": "var(--accent)", "#000003": "var(--line)"}
_INK, _ACCENT, _LINE = _COLOURS
_TO_INLINE = [
    (re.compile(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", re.DOTALL), ""),
    (re.compile(r'(?<=<svg) ([^>]*?)(?:width|height)="[^"]*" ([^>]*?)(?:width|height)="[^"]*"'), r" \1\2"),
    (re.compile(r'<g id="[^"]*"'), "<g"),  # only paths are referred to by id
    (re.compile(r"font: ?([\d.]+px)[^;\"]*"), r"font-size: \1"),
    (re.compile(r" font-family:[^;]*;"), ""),
    (re.compile(r"\s*\n\s*"), "\n"),
]
_STYLE = {
    "svg.fonttype": "none",  # text stays text: screen readers can read it, and it has the page's font
    "font.size": 9.5,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
}


def check_plotting() -> None:
    """Raise a BatchgenError that says how to install the plotting library, if it is missing."""
    try:
        import matplotlib  # noqa: F401, ICN001
    except ImportError as error:
        raise BatchgenError("a report needs matplotlib; install it with: pip install matplotlib") from error
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # not its warnings about a font cache


def token_histogram(counts: Counter[int], label: str, unit: str) -> Markup:
    """Rows (`unit`) by number of tokens: bins of equal width, 1, 2 or 5 times a power of ten."""
    lowest, highest = min(counts), max(counts)
    width = bin_width(lowest, highest)
    first = lowest // width * width
    edges = first + width * np.arange(highest // width - lowest // width + 2, dtype=np.float64)
    bins = Counter({(tokens - first) // width: 0 for tokens in counts})
    for tokens, rows in counts.items():
        bins[(tokens - first) // width] += rows

    def paint(axes: "Axes") -> None:
        at = edges[list(bins)] + (width / 2 if width > 1 else 0)  # the bar of a single number is centred on it
        axes.bar(at, list(bins.values()), 0.92 * width, color=_ACCENT, linewidth=0)
        axes.set_xlabel("tokens" if width == 1 else f"tokens, {width:,} to a bar")
        axes.set_ylabel(unit)

    return _draw(f"{label}: from {lowest:,} to {highest:,} tokens", paint)


def histogram(values: Doubles, label: str, unit: str) -> Markup:
    """Rows (`unit`) by a measure; the bins end at percentiles 1 and 99, and their last ones hold what is beyond."""
    low, high = np.percentile(values, [1, 99])
    bins, edges = np.histogram(values.clip(low, high), BINS)

    def paint(axes: "Axes") -> None:
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        axes.bar(edges[:-1], bins, np.diff(edges), align="edge", color=_ACCENT, linewidth=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
        axes.set_ylabel(unit)

    return _draw(f"{label}: from {values.min():,.4g} to {values.max():,.4g}", paint)


def bin_width(lowest: int, highest: int) -> int:
    """The smallest of 1, 2, 5, 10, 20 ... that needs at most BINS bins; 0, 39 -> 1; 0, 1023 -> 50."""
    widths = (mantissa * int(10**power) for power in itertools.count() for mantissa in (1, 2, 5))
    return next(width for width in widths if highest // width - lowest // width < BINS)


def speed(timeline: Timeline) -> Markup:
    """Completion tokens per second over a run's time, from points of (seconds, rows, completion tokens) so far."""
    edges, rates = rates_between(timeline)

    def paint(axes: "Axes") -> None:
        axes.stairs(rates, edges, color=_ACCENT, linewidth=1.5)
        axes.stairs(rates, edges, color=_ACCENT, alpha=0.15, fill=True, linewidth=0)
        axes.set_xlim(0, edges[-1])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("seconds")
        axes.set_ylabel("tokens/s")

    return _draw(f"Speed: {rates.max():,.0f} tokens a second at most", paint)


def rates_between(timeline: Timeline) -> tuple[Doubles, Doubles]:
    """Edges [n + 1] in seconds and tokens/s between them [n], n <= STEPS; the rate is constant between two points."""
    seconds, _, tokens = np.array(timeline, np.float64).T
    later = np.r_[True, np.diff(seconds) > 0]
    seconds, tokens = seconds[later], tokens[later]
    edges = np.linspace(seconds[0], seconds[-1], min(len(seconds) - 1, STEPS) + 1)
    return edges, np.diff(np.interp(edges, seconds, tokens)) / np.diff(edges)


def _draw(title: str, paint: Callable[["Axes"], None]) -> Markup:
    """Draw with `paint` on axes with whole numbers; the title is for screen readers."""
    check_plotting()
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # not pyplot, which would look for a display
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    file = io.StringIO()
    with rc_context(_STYLE | {"svg.hashsalt": title}):  # type: ignore[arg-type]  # the salt makes ids unique and stable
        figure = Figure((WIDTH, HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5, integer=True))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        paint(axes)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _inline(file.getvalue(), title)


def _inline(svg: str, title: str) -> Markup:
    """An SVG file's text as an element of a page: without preamble, size and font, in the page's colours."""
    body = svg[svg.index("<svg") :]
    for pattern, replacement in _TO_INLINE:
        body = pattern.sub(replacement, body)
    for colour, variable in _COLOURS.items():
        body = body.replace(colour, variable)
    return Markup(body.replace("<svg", f'<svg role="img" aria-label="{title}"', 1).strip())

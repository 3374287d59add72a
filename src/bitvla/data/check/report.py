"""The report of a dataset's check: one HTML file with its drawings, nothing to fetch."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from bitvla.data.check import Checkup
from bitvla.data.check.rules import CAMERA_SHIFT
from bitvla.files import write_whole
from bitvla.pages import template

BLUE, RED, GRAY = "#2563b8", "#b3382c", "#626a78"


def report(checkup: Checkup, out: Path) -> Path:
    """Write the report of `checkup` to `out` and return it. BitvlaError when `out` cannot be written."""
    style: Any = {"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": "bitvla", "text.parse_math": False}
    with mpl.rc_context(style):  # a sentence may hold dollars
        drawings = {
            "lengths": _lengths(checkup),
            "cameras": [(camera, _light(camera), _shifts(camera)) for camera in checkup.cameras],
            "workspace": _workspace(checkup),
            "tasks": _tasks(checkup),
        }
    page = template("bitvla.data.check", "report.html.j2").render(c=checkup, **drawings)
    write_whole(out, page.encode())
    return out


def _axes(height: float = 2.4) -> tuple[Figure, Any]:
    figure = Figure(figsize=(7.2, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Figure) -> Markup:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    # matplotlib escapes the texts it draws; its metadata only holds addresses.
    return Markup(re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL))


def _lengths(checkup: Checkup) -> Markup:
    figure, axes = _axes(2.0)
    axes.hist(checkup.lengths, bins=40, color=BLUE)
    axes.axvline(checkup.horizon, color=RED)
    axes.set(xlabel=f"frames in an episode (red: the horizon, {checkup.horizon})", ylabel="episodes")
    return _svg(figure)


def _light(camera: Any) -> Markup:
    figure, axes = _axes()
    for name, color in (("luminance", BLUE), ("contrast", GRAY)):
        axes.plot(getattr(camera, name), ".", markersize=3, color=color, label=name)
    axes.set(xlabel="episode", ylabel="gray levels", ylim=(0, 255))
    axes.legend(frameon=False, ncols=2)
    return _svg(figure)


def _shifts(camera: Any) -> Markup | None:
    if camera.moves_with_robot:
        return None
    figure, axes = _axes(1.8)
    axes.plot(100 * np.array(camera.shift), ".", markersize=3, color=BLUE)
    axes.axhline(100 * CAMERA_SHIFT, color=RED)
    axes.set(xlabel="episode (red: the threshold)", ylabel="shift, % of width", ylim=(-0.3, None))
    return _svg(figure)


def _workspace(checkup: Checkup) -> Markup | None:
    coverage = checkup.coverage
    if coverage is None:
        return None
    figure, axes = _axes(3.6)
    points, clusters = np.array(coverage.axes), np.array(coverage.clusters)
    for cluster, size in enumerate(coverage.sizes):
        inside, held = clusters == cluster, cluster == coverage.held_out
        label = f"{cluster}: {size} episodes" + (", held out" if held else "")
        axes.scatter(*points[inside].T, s=22 if held else 9, marker="x" if held else "o", label=label, linewidths=0.9)
    axes.set(xlabel="first main axis of the initial states", ylabel="second")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return _svg(figure)


def _tasks(checkup: Checkup) -> Markup:
    shown = list(checkup.tasks.items())
    if len(shown) > 30:  # the most and the least frequent
        shown = shown[:15] + shown[-15:]
    figure, axes = _axes(0.5 + 0.22 * len(shown))
    axes.barh(range(len(shown)), [count for _, count in shown], color=BLUE)
    axes.set_yticks(range(len(shown)), [name if len(name) < 50 else name[:47] + "..." for name, _ in shown])
    axes.invert_yaxis()
    axes.set(xlabel="episodes")
    return _svg(figure)

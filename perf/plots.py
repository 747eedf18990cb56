"""Plots of a comparison, as PNG files. Needs matplotlib (the extra "perf")."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter

from perf.plain import count
from perf.summary import LIMITS, MEMCPY, Record, Results

_DPI = 130
_THROUGHPUT = ("4k-randread-d32", "4k-randwrite-d32", "4k-randrw-d32", "128k-read-d32", "128k-write-d32")
_LATENCY = ("4k-randread-d1", "4k-randread-d1-sleeping", "4k-randread-d32")
_CPU = ("4k-randread-d1", "4k-randread-d1-sleeping", "4k-randread-d32", "4k-randwrite-d32", "128k-read-d32")
_PERCENTILES = (("p50", "o"), ("p90", "|"), ("p99", "s"), ("p99.9", "D"))
#: First what is vvupipe's over a socket, then over VFIO, then the rival's.
_COLOURS = {
    "vvupipe socket": ("#08519c", "#3182bd", "#6baed6", "#9ecae1"),
    "vvupipe vfio": ("#006d2c", "#31a354", "#74c476", "#a1d99b"),
    "qsd": ("#a63603", "#e6550d", "#fdae6b", "#fdd0a2"),
}

plt.rcParams.update(
    {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.axisbelow": True,
        "grid.color": "#dddddd",
        "grid.linewidth": 0.8,
    }
)


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each back-end: a family has shades of one hue."""
    found, used = {}, dict.fromkeys(_COLOURS, 0)
    for name in names:
        family = next((key for key in _COLOURS if name.startswith(key)), "qsd")
        shades = _COLOURS[family]
        found[name] = shades[used[family] % len(shades)]
        used[family] += 1
    return found


def _backends(results: Results, cases: Sequence[str]) -> list[str]:
    return [name for name in results.backends if name not in LIMITS and any(results.of(case, name) for case in cases)]


def _title(figure: Any, text: str) -> None:
    """A title a third of an inch above the panels, whatever the figure's height."""
    _, height = figure.get_size_inches()
    figure.subplots_adjust(top=1 - 0.62 / height, bottom=0.5 / height)
    figure.suptitle(text, x=0.01, ha="left", y=1 - 0.12 / height, fontsize=11, fontweight="bold")


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=_DPI, bbox_inches="tight")
    plt.close(figure)
    return path


def _bars(
    results: Results,
    cases: Sequence[str],
    value: Callable[[Record], float],
    label: str,
    title: str,
    path: Path,
    *,
    limits: bool = False,
) -> Path | None:
    """A panel for each case, a bar for each back-end: the median, a line from the first quartile to the third."""
    cases = [case for case in cases if case in results.cases]
    names = _backends(results, cases)
    if not cases or not names:
        return None
    palette = colours(names)
    figure, panels = plt.subplots(
        1, len(cases), figsize=(2.3 * len(cases) + 1.8, 0.3 * len(names) + 1.5), sharey=True, squeeze=False
    )
    for panel, case in zip(panels[0], cases, strict=True):
        most = 0.0
        for row, name in enumerate(names):
            spread = results.spread(case, name, value)
            if spread is None:
                panel.text(0, row, " not measured", va="center", color="#999999", fontsize=7)
                continue
            errors = [[spread.median - spread.low], [spread.high - spread.median]]
            panel.barh(row, spread.median, xerr=errors, color=palette[name], height=0.72, ecolor="#444444")
            panel.text(spread.high, row, f" {count(spread.median)}", va="center", fontsize=7.5)
            most = max(most, spread.high)
        if limits and (limit := results.iops(case, MEMCPY)):
            panel.axvline(limit.median, color="#444444", linestyle="--", linewidth=1)
            panel.text(limit.median, 1.0, f"memcpy {count(limit.median)}", ha="center", va="bottom", fontsize=7,
                       color="#444444", transform=panel.get_xaxis_transform())  # fmt: skip
            most = max(most, limit.median)
        panel.set_title(case.partition("/")[2], pad=12 if limits else 6)
        panel.set_xlim(0, most * 1.28 or 1)
        panel.xaxis.set_major_formatter(FuncFormatter(lambda number, _: count(number)))
        panel.xaxis.set_major_locator(plt.MaxNLocator(3))
        panel.grid(axis="x")
        panel.set_xlabel(label)
    panels[0][0].set_yticks(range(len(names)), names)
    panels[0][0].invert_yaxis()
    _title(figure, title)
    return _save(figure, path)


def throughput(results: Results, place: str, folder: Path) -> Path | None:
    """Requests a second."""
    cases = [f"{place}/{work}" for work in _THROUGHPUT]
    title = f"Throughput, {place} (median, first to third quartile)"
    path = folder / f"throughput-{place}.png"
    return _bars(results, cases, lambda record: record["iops"], "requests/s", title, path, limits=True)


def cpu(results: Results, place: str, folder: Path) -> Path | None:
    """CPU time of the back-end for a request."""
    cases = [f"{place}/{work}" for work in _CPU]
    title = f"CPU time of the back-end's processes for a request, {place}"
    path = folder / f"cpu-{place}.png"
    return _bars(results, cases, lambda record: record["cpu_us_per_request"], "us/request", title, path)


def latency(results: Results, place: str, folder: Path) -> Path | None:
    """Percentiles of 4 KiB random reads: a mark for each, medians of the rounds."""
    cases = [case for work in _LATENCY if (case := f"{place}/{work}") in results.cases]
    names = _backends(results, cases)
    if not cases or not names:
        return None
    palette = colours(names)
    figure, panels = plt.subplots(
        1, len(cases), figsize=(3.4 * len(cases) + 1.8, 0.3 * len(names) + 1.6), sharey=True, squeeze=False
    )
    for panel, case in zip(panels[0], cases, strict=True):
        for row, name in enumerate(names):
            places = []
            for key, mark in _PERCENTILES:
                spread = results.spread(
                    case, name, lambda record, key=key: record["result"]["read"]["latency_ns"][key] / 1e3
                )
                if spread is None:
                    continue
                places.append(spread.median)
                panel.plot(spread.median, row, mark, color=palette[name], markersize=9 if mark == "|" else 5)
            if places:
                panel.hlines(row, places[0], places[-1], color=palette[name], linewidth=1.2, alpha=0.6)
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
        panel.grid(axis="x", which="both", linewidth=0.5)
        panel.set_title(case.partition("/")[2])
        panel.set_xlabel("us")
    panels[0][0].set_yticks(range(len(names)), names)
    panels[0][0].invert_yaxis()
    marks = [plt.Line2D([], [], marker=mark, linestyle="", color="#444444", label=key) for key, mark in _PERCENTILES]
    panels[0][-1].legend(handles=marks, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    _title(figure, f"Latency percentiles of 4 KiB random reads, {place}")
    return _save(figure, folder / f"latency-{place}.png")


def _lines(
    results: Results,
    groups: Sequence[tuple[str, Sequence[tuple[int, str]]]],
    label: str,
    title: str,
    path: Path,
) -> Path | None:
    """A panel for each group, a line for each back-end: IOPS over a number that the cases differ in."""
    groups = [
        (name, present)
        for name, points in groups
        if len(present := [point for point in points if point[1] in results.cases]) > 1
    ]
    every = [case for _, points in groups for _, case in points]
    # Engines are told apart over a socket already.
    names = [name for name in _backends(results, every) if "vfio" not in name or name == results.ours("vfio")]
    if not names:
        return None
    palette = colours(names)
    figure, panels = plt.subplots(1, len(groups), figsize=(3.3 * len(groups) + 1.6, 3.2), squeeze=False)
    for panel, (group, points) in zip(panels[0], groups, strict=True):
        for name in names:
            found = [
                (number, spread) for number, case in points if (spread := results.iops(case, name)) is not None
            ]  # fmt: skip
            if not found:
                continue
            numbers, spreads = [number for number, _ in found], [spread for _, spread in found]
            dashed = "--" if "vfio" in name else "-"
            panel.plot(numbers, [each.median for each in spreads], dashed, marker="o", markersize=3.5,
                       color=palette[name], label=name, linewidth=1.6)  # fmt: skip
            panel.fill_between(numbers, [each.low for each in spreads], [each.high for each in spreads],
                               color=palette[name], alpha=0.15, linewidth=0)  # fmt: skip
        panel.set_xscale("log", base=2)
        panel.set_xticks([number for number, _ in points], [str(number) for number, _ in points])
        panel.minorticks_off()
        panel.set_ylim(0)
        panel.yaxis.set_major_formatter(FuncFormatter(lambda number, _: count(number)))
        panel.grid(axis="y")
        panel.set_title(group)
        panel.set_xlabel(label)
    panels[0][0].set_ylabel("requests/s")
    shown = {}
    for panel in panels[0]:
        shown.update(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    panels[0][-1].legend(shown.values(), shown.keys(), loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    figure.subplots_adjust(wspace=0.28)
    _title(figure, title)
    return _save(figure, path)


def depths(results: Results, place: str, folder: Path) -> Path | None:
    """IOPS over the depth."""
    groups = [
        (workload, [(depth, f"{place}/4k-{workload}-d{depth}") for depth in (1, 8, 32, 128)])
        for workload in ("randread", "randwrite", "randrw")
    ]
    title = f"4 KiB requests over the depth, one queue, {place}"
    return _lines(results, groups, "requests in flight", title, folder / f"depth-{place}.png")


def queues(results: Results, places: Sequence[str], folder: Path) -> Path | None:
    """IOPS over the number of queues."""
    groups = []
    for place in places:
        base = f"{place}/4k-randread-d32"
        groups.append((place, [(1, base), (2, f"{base}-q2"), (4, f"{base}-q4")]))
    title = "4 KiB random reads over the number of queues, depth 32 each, one CPU for all"
    return _lines(results, groups, "queues", title, folder / "queues.png")


def all_of(results: Results, folder: Path) -> list[Path]:
    """Every plot that there are results for."""
    places = list(dict.fromkeys(case.partition("/")[0] for case in results.cases))
    made = [plot(results, place, folder) for place in places for plot in (throughput, latency, cpu, depths)]
    return [path for path in (*made, queues(results, places, folder)) if path]

"""The plot of perf/growth.py: a panel for each thing that grows. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perf import growth
from perf.plots import plt

_COLOURS = {32: "#08519c", 1: "#e6550d"}


def draw(records: Sequence[dict[str, Any]], folder: Path) -> Path:
    """growth.png: medians (lines) and each round's result (dots)."""
    curves = [curve for curve in growth.CURVES if any(record["curve"] == curve for record in records)]
    figure, panels = plt.subplots(1, len(curves), figsize=(3.1 * len(curves) + 0.5, 3.1), squeeze=False)
    for panel, curve in zip(panels[0], curves, strict=True):
        for depth in growth.DEPTHS:
            own = [record for record in records if record["curve"] == curve and record["depth"] == depth]
            line = growth.medians(records, curve, depth)
            if not own:
                continue
            key, words = growth.VALUES[depth]
            colour = _COLOURS[depth]
            xs, ys = [record["x"] for record in own], [record[key] for record in own]
            panel.plot(xs, ys, ".", markersize=4, color=colour, alpha=0.35)
            xs, ys = [x for x, _ in line], [y for _, y in line]
            panel.plot(xs, ys, "-", linewidth=1.8, color=colour, label=f"depth {depth}:\n{words}")
        if curve != "uptime":
            panel.set_xscale("log", base=2)
            ticks = sorted({record["x"] for record in records if record["curve"] == curve})
            panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks], rotation=45 if max(ticks) > 1000 else 0)
            panel.minorticks_off()
        panel.set_ylim(0)
        panel.grid(axis="y")
        panel.set_xlabel(growth.CURVES[curve].replace(", ", ",\n", 1).replace(" (", "\n("))
    panels[0][0].set_ylabel("us for a request")
    panels[0][-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    name = records[0]["backend"]
    figure.suptitle(f"What a 4 KiB random read costs as things grow: {name}", x=0.01, ha="left", fontweight="bold")
    figure.tight_layout()
    path = folder / "growth.png"
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
    return path

"""A flame graph as SVG: width is samples, a frame stands on its caller; a browser shows shares when hovering."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape

_WIDTH, _ROW, _MARGIN, _TOP = 1200, 17, 10, 42
_LEAST_PX = 0.4  # narrower frames are left out
_CHAR_PX = 6.4
#: Hue by what a frame is: a kernel of ours, libc and others, Linux.
_HUES = {"kernels.": 18, "": 210}


@dataclass
class _Node:
    count: int = 0
    below: dict[str, _Node] = field(default_factory=dict)


def _tree(stacks: Mapping[tuple[str, ...], int]) -> _Node:
    root = _Node()
    for frames, count in stacks.items():
        node = root
        node.count += count
        for name in frames:
            node = node.below.setdefault(name, _Node())
            node.count += count
    return root


def _depth(node: _Node) -> int:
    return 1 + max((_depth(each) for each in node.below.values()), default=0)


def _colour(name: str) -> str:
    hue = next(hue for start, hue in _HUES.items() if name.startswith(start))
    shade = hashlib.md5(name.encode(), usedforsecurity=False).digest()[0]
    return f"hsl({hue + shade % 22},{62 + shade % 15}%,{62 + shade % 14}%)"


def draw(stacks: Mapping[tuple[str, ...], int], title: str) -> str:
    """The SVG. stacks: frames, the outermost first, and how often each was seen; at least one."""
    root = _tree(stacks)
    height = _TOP + _ROW * _depth(root) + _MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}" font-family="monospace" font-size="11">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{_MARGIN}" y="18" font-size="14" font-weight="bold">{escape(title)}</text>',
        f'<text x="{_MARGIN}" y="34" fill="#666">width: share of samples; orange: kernels of vvupipe, '
        "blue: libc, Linux and others</text>",
    ]
    scale = (_WIDTH - 2 * _MARGIN) / root.count

    def add(node: _Node, name: str, left: float, level: int) -> None:
        width = node.count * scale
        if width < _LEAST_PX:
            return
        top = height - _MARGIN - _ROW * (level + 1)
        share = f"{name}: {node.count} samples, {100 * node.count / root.count:.1f} %"
        parts.append(
            f'<g><title>{escape(share)}</title><rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{_ROW - 1}" '
            f'fill="{_colour(name) if level else "#dddddd"}" rx="1"/>'
        )
        room = int((width - 4) / _CHAR_PX)
        if room >= 3:
            text = name if len(name) <= room else name[: room - 1] + "…"
            parts.append(f'<text x="{left + 2:.1f}" y="{top + 12}">{escape(text)}</text>')
        parts.append("</g>")
        for child, below in sorted(node.below.items()):
            add(below, child, left, level + 1)
            left += below.count * scale

    add(root, "all", _MARGIN, 0)
    return "\n".join([*parts, "</svg>", ""])

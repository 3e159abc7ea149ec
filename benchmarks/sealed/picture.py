"""Bars as SVG, without a plotting library."""

from __future__ import annotations

from html import escape

ROW, LEFT, WIDTH = 34, 340, 520


def bars(title: str, rows: dict[str, list[float]]) -> str:
    """Return an SVG with a bar for the middle value of each row and a line from the first to the last."""
    longest = max(max(values) for values in rows.values())
    height = 60 + ROW * len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 90}" height="{height}" '
        f'font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="12" y="26" font-weight="bold">{escape(title)}</text>',
    ]
    for position, (name, (low, middle, high)) in enumerate(rows.items()):
        y = 48 + position * ROW
        scale = WIDTH / longest
        colour = "#0b6e4f" if name.startswith("sealed") else "#8a8f98"
        parts += [
            f'<text x="{LEFT - 10}" y="{y + 15}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{LEFT}" y="{y}" width="{middle * scale:.1f}" height="20" fill="{colour}"/>',
            f'<line x1="{LEFT + low * scale:.1f}" x2="{LEFT + high * scale:.1f}" y1="{y + 10}" y2="{y + 10}" '
            f'stroke="black" stroke-width="2"/>',
            f'<text x="{LEFT + max(middle, high) * scale + 8:.1f}" y="{y + 15}">{middle:.2f}</text>',
        ]
    return "\n".join([*parts, "</svg>\n"])

"""SVG drawings with their own background: legible in print, on a light and on a dark screen."""

from collections.abc import Sequence
from html import escape

STYLE = """
  .back { fill: #ffffff; } .box { fill: #eef2f7; stroke: #5b6b80; }
  .mark { fill: #f7d9b8; stroke: #a8580a; } .ink { fill: #1a2330; } .soft { fill: #4a5768; }
  .edge { stroke: #5b6b80; fill: none; } .head { fill: #5b6b80; } .grid { stroke: #d5dbe3; }
  .s0 { stroke: #0072b2; } .s1 { stroke: #c24e00; } .s2 { stroke: #00805c; }
  .s3 { stroke: #9b4f96; } .s4 { stroke: #86690a; } .s5 { stroke: #505a66; }
  .t0 { fill: #0072b2; } .t1 { fill: #c24e00; } .t2 { fill: #00805c; }
  .t3 { fill: #9b4f96; } .t4 { fill: #86690a; } .t5 { fill: #505a66; }
  text { font-family: Helvetica, Arial, sans-serif; font-size: 13px; }
  .small { font-size: 11.5px; } .bold { font-weight: bold; }
  @media (prefers-color-scheme: dark) {
    .back { fill: #1c222b; } .box { fill: #2b3542; stroke: #8fa1b8; }
    .mark { fill: #5a3a17; stroke: #e8a456; } .ink { fill: #eef2f7; } .soft { fill: #b6c2d0; }
    .edge { stroke: #8fa1b8; } .head { fill: #8fa1b8; } .grid { stroke: #3a4553; }
    .s0 { stroke: #56b4e9; } .s1 { stroke: #f0954a; } .s2 { stroke: #3ecf9f; }
    .s3 { stroke: #d99bd0; } .s4 { stroke: #e3c44a; } .s5 { stroke: #c3ccd6; }
    .t0 { fill: #56b4e9; } .t1 { fill: #f0954a; } .t2 { fill: #3ecf9f; }
    .t3 { fill: #d99bd0; } .t4 { fill: #e3c44a; } .t5 { fill: #c3ccd6; }
  }
"""
COLOURS = 6  # of series: classes s0 ... of lines, t0 ... of texts
LINE = 17  # height of a line of text


class Drawing:
    """A drawing of a fixed size; coordinates are pixels from the upper left corner."""

    def __init__(self, width: int, height: int, title: str) -> None:
        """Start with the background."""
        self.head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        self.head += f' width="{width}" height="{height}" role="img">'
        self.parts = [f"<title>{escape(title)}</title>", f"<style>{STYLE}</style>"]
        self.rectangle(0, 0, width, height, "back", radius=8)

    def rectangle(self, x: float, y: float, w: float, h: float, kind: str, radius: int = 5) -> None:
        """A rectangle of a class of the style."""
        shape = f'x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{radius}"'
        self.parts.append(f'<rect class="{kind}" {shape}/>')

    def text(self, x: float, y: float, text: str, kind: str = "ink", at: str = "start") -> None:
        """A line of text; ``at`` is what of it stands at x: start, middle or end."""
        place = f'x="{x:g}" y="{y:g}" text-anchor="{at}"'
        self.parts.append(f'<text class="{kind}" {place}>{escape(text)}</text>')

    def box(self, x: float, y: float, w: float, lines: Sequence[str], h: float = 0) -> None:
        """A box around lines of text, the first one in bold."""
        h = h or LINE * len(lines) + 14
        self.rectangle(x, y, w, h, "box")
        top = y + (h - LINE * len(lines)) / 2 + 12.5
        for number, line in enumerate(lines):
            kind = "soft small" if number else "ink bold"
            self.text(x + w / 2, top + number * LINE, line, kind, "middle")

    def cells(self, x: float, y: float, names: Sequence[str], marked: Sequence[int] = ()) -> None:
        """Items of a sequence, side by side, each 30 pixels wide."""
        for number, name in enumerate(names):
            kind = "mark" if number in marked else "box"
            self.rectangle(x + 32 * number, y, 30, 26, kind, radius=3)
            self.text(x + 32 * number + 15, y + 17.5, name, "ink", "middle")

    def arrow(self, *points: tuple[float, float]) -> None:
        """A line through the points, with a head at the last one; its end is along an axis."""
        way = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.parts.append(f'<polyline class="edge" points="{way}"/>')
        (x_0, y_0), (x, y) = points[-2:]
        dx, dy = (x > x_0) - (x < x_0), (y > y_0) - (y < y_0)
        tip = [(x, y), (x - 8 * dx + 4 * dy, y - 8 * dy + 4 * dx)]
        tip.append((x - 8 * dx - 4 * dy, y - 8 * dy - 4 * dx))
        way = " ".join(f"{a:g},{b:g}" for a, b in tip)
        self.parts.append(f'<polygon class="head" points="{way}"/>')

    def line(self, points: Sequence[tuple[float, float]], kind: str, dashes: str = "") -> None:
        """A thin line, or a curve of two pixels if it has a class of a series."""
        way = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        width = 2 if kind.startswith("s") else 1
        dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
        shape = f'class="{kind}" fill="none" stroke-width="{width}"{dashed}'
        self.parts.append(f'<polyline {shape} points="{way}"/>')

    def __str__(self) -> str:
        """The file."""
        return "\n".join([self.head, *self.parts, "</svg>"]) + "\n"

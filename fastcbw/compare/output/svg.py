"""Small plots as SVG text: lines over a linear or logarithmic scale, and bars. No script, no font, no network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 12, 40
#: Colours that differ for most eyes, and dashes for those of which there are more.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7a5195", "#e69f00", "#56b4e9", "#444444")
DASHES = ("", "6 3", "2 2", "8 3 2 3")

Points = Sequence[tuple[float | None, float | None]]


def style(number: int) -> tuple[str, str]:
    """Return colour and dashes of line NUMBER."""
    return COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Return round numbers from LOW to HIGH, about COUNT of them."""
    rough = (high - low) / count or 1.0
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, int(high / step + 1e-9) + 1)]


def decades(low: float, high: float) -> list[float]:
    return [10.0 ** power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]


class Scale:
    """From values between LOW and HIGH to pixels from BEGIN to END."""

    def __init__(self, low: float, high: float, begin: float, end: float, logarithmic: bool = False):
        self.logarithmic = logarithmic
        self.low, self.high = (math.log10(low), math.log10(high)) if logarithmic else (low, high)
        self.begin, self.end = begin, end

    def __call__(self, value: float) -> float:
        if self.logarithmic:
            value = math.log10(max(value, 1e-12))
        share = (value - self.low) / (self.high - self.low or 1.0)
        return round(self.begin + min(max(share, 0.0), 1.0) * (self.end - self.begin), 1)


def lines(named: list[tuple[str, Points, int]], *, x_label: str, y_label: str, y_text: Callable[[float], str], logarithmic: bool = False,
          x_ticks: list[tuple[float, str]] | None = None, mark: float | None = None, height: int = HEIGHT) -> str:
    """Return a plot of lines: name, points and number (see style) of each. A point without a value interrupts its line.

    mark: an x with a vertical line, the instant. logarithmic: of the y axis. x_ticks: value and text, default round numbers.
    """
    whole = [(x, y) for _, points, _ in named for x, y in points if x is not None and y is not None and not (logarithmic and y <= 0)]
    if not whole:
        return "<p>nothing to draw</p>"
    xs, ys = [x for x, _ in whole], [y for _, y in whole]
    if logarithmic:
        y_marks = decades(min(ys), max(ys) * 1.001)
        if len(y_marks) < 2:
            y_marks = [y_marks[0] / 10, y_marks[0], y_marks[0] * 10]
        low, high = y_marks[0], y_marks[-1]
    else:
        low, high = 0.0, max(ys) * 1.05 or 1.0
        y_marks = ticks(low, high, 5)
    x_marks = x_ticks if x_ticks is not None else [(value, f"{value:g}") for value in ticks(min(xs), max(xs))]
    x_low, x_high = (x_marks[0][0], x_marks[-1][0]) if x_ticks else (min(xs), max(xs))
    to_x = Scale(x_low, x_high, LEFT, WIDTH - RIGHT)
    to_y = Scale(low, high, height - BOTTOM, TOP, logarithmic)
    parts = frame(height, [(to_x(value), text) for value, text in x_marks], [(to_y(value), y_text(value)) for value in y_marks], x_label, y_label)
    if mark is not None:
        parts.append(f'<line x1="{to_x(mark)}" x2="{to_x(mark)}" y1="{TOP}" y2="{height - BOTTOM}" stroke="#888" stroke-dasharray="4 3"/>')
    for name, points, number in named:
        colour, dash = style(number)
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        for piece in pieces(points, logarithmic):
            if len(piece) == 1:
                parts.append(f'<circle cx="{to_x(piece[0][0])}" cy="{to_y(piece[0][1])}" r="1.5" fill="{colour}"><title>{escape(name)}</title></circle>')
            else:
                path = " ".join(f"{to_x(x)},{to_y(y)}" for x, y in piece)
                parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"{dashes}><title>{escape(name)}</title></polyline>')
    return wrap(parts, height)


def pieces(points: Points, logarithmic: bool) -> list[list[tuple[float, float]]]:
    """Return POINTS cut where a value is missing."""
    found: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if x is None or y is None or (logarithmic and y <= 0):
            found.append([])
        else:
            found[-1].append((x, y))
    return [piece for piece in found if piece]


def bars(rows: list[tuple[str, list[tuple[str, float]]]], *, x_label: str, x_text: Callable[[float], str]) -> str:
    """Return horizontal bars: for each row a name and its parts, name and value, one after the other. A part has one colour in all rows."""
    if not rows:
        return "<p>nothing to draw</p>"
    height = TOP + BOTTOM + 22 * len(rows)
    left = 150
    most = max(sum(value for _, value in parts) for _, parts in rows) or 1.0
    to_x = Scale(0, most, left, WIDTH - RIGHT - 60)
    colours: dict[str, str] = {}
    out = [f'<line x1="{to_x(value)}" x2="{to_x(value)}" y1="{TOP}" y2="{height - BOTTOM}" stroke="#ddd"/>'
           f'<text x="{to_x(value)}" y="{height - BOTTOM + 14}" text-anchor="middle">{escape(x_text(value))}</text>' for value in ticks(0, most, 5)]
    for number, (name, parts) in enumerate(rows):
        y = TOP + 22 * number
        out.append(f'<text x="{left - 6}" y="{y + 14}" text-anchor="end">{escape(name)}</text>')
        at = 0.0
        for part, value in parts:
            colour = colours.setdefault(part, COLOURS[len(colours) % len(COLOURS)])
            out.append(f'<rect x="{to_x(at)}" y="{y + 3}" width="{max(to_x(at + value) - to_x(at), 0):.1f}" height="15" fill="{colour}">'
                       f"<title>{escape(f'{name}, {part}: {x_text(value)}')}</title></rect>")
            at += value
        out.append(f'<text x="{to_x(at) + 4}" y="{y + 14}">{escape(x_text(at))}</text>')
    out.append(f'<text x="{WIDTH / 2}" y="{height - 6}" text-anchor="middle">{escape(x_label)}</text>')
    return wrap(out, height) + legend([(part, colour, "") for part, colour in colours.items()])


def frame(height: int, x_marks: list[tuple[float, str]], y_marks: list[tuple[float, str]], x_label: str, y_label: str) -> list[str]:
    """Return the grid, what is written at it, and the names of the axes."""
    bottom = height - BOTTOM
    parts = [f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="#ddd"/><text x="{LEFT - 5}" y="{y + 4}" text-anchor="end">{escape(text)}</text>'
             for y, text in y_marks]
    parts += [f'<line x1="{x}" x2="{x}" y1="{bottom}" y2="{bottom + 4}" stroke="#888"/>'
              f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{escape(text)}</text>' for x, text in x_marks]
    parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}" stroke="#888"/>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{height - 6}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text transform="translate(13 {(TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>')
    return parts


def wrap(parts: list[str], height: int) -> str:
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
            f'font-family="sans-serif" font-size="11" fill="#222"><rect width="{WIDTH}" height="{height}" fill="#fff"/>{"".join(parts)}</svg>')


def legend(entries: list[tuple[str, str, str]]) -> str:
    """Return the names of lines or parts with their colours and dashes, as HTML."""
    items = []
    for name, colour, dash in entries:
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        items.append(f'<span><svg width="26" height="8"><line x1="0" x2="26" y1="4" y2="4" stroke="{colour}" stroke-width="3"{dashes}/></svg> '
                     f"{escape(name)}</span>")
    return f'<p class="legend">{" ".join(items)}</p>'


def alone(plot: str, entries: list[tuple[str, str, str]]) -> str:
    """Return PLOT, an SVG of lines(), with the names of ENTRIES (see legend) below it, as a file of its own."""
    height = int(plot.split('height="', 1)[1].split('"', 1)[0])
    items, x, y = [], LEFT, height + 14
    for name, colour, dash in entries:
        if x > LEFT and x + 34 + 7 * len(name) > WIDTH:
            x, y = LEFT, y + 16
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        items.append(f'<line x1="{x}" x2="{x + 26}" y1="{y - 4}" y2="{y - 4}" stroke="{colour}" stroke-width="3"{dashes}/>'
                     f'<text x="{x + 31}" y="{y}">{escape(name)}</text>')
        x += 50 + 7 * len(name)
    old, new = f'{WIDTH} {height}" width="{WIDTH}" height="{height}"', f'{WIDTH} {y + 8}" width="{WIDTH}" height="{y + 8}"'
    grown = plot.replace(old, new, 1).replace(f'<rect width="{WIDTH}" height="{height}" fill', f'<rect width="{WIDTH}" height="{y + 8}" fill', 1)
    return grown.removesuffix("</svg>") + "".join(items) + "</svg>\n"

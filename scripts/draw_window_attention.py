"""Draw docs/images/window_attention.svg: usual window attention beside the fused kernel.

python scripts/draw_window_attention.py
"""

from pathlib import Path

TARGET = Path(__file__).parents[1] / "docs" / "images" / "window_attention.svg"
WIDTH, HEIGHT = 760, 400
TEAL, ORANGE, INK, GREY = "#0f766e", "#c2410c", "#222222", "#9ca3af"
STEPS = ("roll", "pad, cut", "scores", "bias, mask", "softmax, times v", "join, roll")


def text(x: float, y: float, words: str, size: int = 13, colour: str = INK, anchor: str = "middle") -> str:
    """Return a line of text."""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}" text-anchor="{anchor}">{words}</text>'


def grid(x: float, y: float, cells: int, side: float, window: int, shift: int = 0) -> str:
    """Return a map of tokens with its windows outlined, their borders moved by ``shift`` tokens."""
    size = cells * side
    lines = [f'<rect x="{x:g}" y="{y:g}" width="{size:g}" height="{size:g}" fill="#f0fdfa"/>']
    for i in range(cells + 1):
        at = i * side
        border = i in (0, cells) or (i - shift) % window == 0
        style = f'stroke="{TEAL if border else GREY}" stroke-width="{2 if border else 0.5}"'
        lines.append(f'<path d="M{x + at:g} {y:g}v{size:g}M{x:g} {y + at:g}h{size:g}" {style} fill="none"/>')
    return "".join(lines)


def arrow(x: float, y: float, length: float, colour: str) -> str:
    """Return an arrow to the right."""
    end = x + length
    return f'<path d="M{x:g} {y:g}H{end:g}m-6 -4l6 4l-6 4" stroke="{colour}" stroke-width="1.8" fill="none"/>'


def usual() -> str:
    """Return the upper row: six steps, each with a trip to memory."""
    parts = [text(20, 30, "Usual: each step reads and writes memory", 15, INK, "start"), grid(20, 52, 8, 9, 4)]
    for number, step in enumerate(STEPS):
        x = 118 + number * 92
        parts.append(arrow(x - 20, 88, 16, ORANGE))
        parts.append(f'<rect x="{x:g}" y="66" width="66" height="44" rx="5" fill="#fff7ed" stroke="{ORANGE}"/>')
        words = step.split(", ")
        parts += [text(x + 33, 92 + 14 * (line - (len(words) - 1) / 2), word, 11) for line, word in enumerate(words)]
        parts.append(f'<path d="M{x + 33:g} 110v34m-4 -6l4 6l4 -6" stroke="{ORANGE}" stroke-width="1.5" fill="none"/>')
    parts.append(arrow(664, 88, 16, ORANGE))
    parts.append(grid(684, 61, 6, 9, 3))
    parts.append(f'<rect x="118" y="146" width="526" height="24" rx="4" fill="#ffedd5" stroke="{ORANGE}"/>')
    parts.append(text(381, 163, "memory: copies of the map, padded windows, all scores", 12, ORANGE))
    return "".join(parts)


def fused() -> str:
    """Return the lower row: one program reads a shifted window where it lies and writes the result there."""
    top = 240
    parts = [text(20, top - 24, "Fused: one read, one write", 15, INK, "start"), grid(20, top, 8, 14, 4, 2)]
    parts.append(f'<rect x="48" y="{top + 28}" width="56" height="56" fill="{TEAL}" fill-opacity="0.35"/>')
    parts.append(text(20, top + 130, "q, k, v of one shifted window", 11, INK, "start"))
    parts.append(arrow(142, top + 56, 56, TEAL))
    parts.append(f'<rect x="206" y="{top - 4}" width="330" height="120" rx="8" fill="#f0fdfa" stroke="{TEAL}"/>')
    parts.append(text(371, top + 18, "registers of one program", 12, TEAL))
    for number, words in enumerate(
        ("q k<tspan dy='-4' font-size='9'>T</tspan><tspan dy='4'> + bias</tspan>", "softmax", "times v")
    ):
        x = 220 + number * 104
        parts.append(f'<rect x="{x}" y="{top + 36}" width="92" height="40" rx="5" fill="#ffffff" stroke="{TEAL}"/>')
        parts.append(text(x + 46, top + 61, words, 12))
    parts.append(text(371, top + 100, "regions of the shift: two numbers are compared", 11))
    parts.append(arrow(542, top + 56, 56, TEAL))
    parts.append(grid(606, top, 8, 14, 4, 2))
    parts.append(f'<rect x="634" y="{top + 28}" width="56" height="56" fill="{TEAL}" fill-opacity="0.35"/>')
    parts.append(text(718, top + 130, "the result, where it belongs", 11, INK, "end"))
    return "".join(parts)


def figure() -> str:
    """Return the whole drawing, on a white ground so that it is legible on a dark page."""
    frame = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">'
    return f"{head}{frame}{usual()}{fused()}</svg>\n"


if __name__ == "__main__":
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(figure(), encoding="utf-8")

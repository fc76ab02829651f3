"""The drawing of the method in README: ``python tools/draw_method.py > docs/method.svg``."""

import math
import sys

WIDTH, HEIGHT = 900, 640
LEFT, RIGHT = 40, 470  # where the two steps begin
SLOT = 96  # from one position to the next
BOX = 24
CENTRE = BOX // 2
TOKENS, EMBEDDED, MODEL, TARGETS, LOSS = 84, 160, 216, 298, 346  # heights of the rows
HUES = ('a', 'b', 'c', 'd', 'e')
CURVES = (380, 600)  # top and bottom of the loss
START, SWITCH, END = 90, 300, 850

# Without a preference, colours that can be read on white and on black.
STYLE = """
text { font: 14px system-ui, sans-serif; fill: #768390; }
.head { font-size: 17px; font-weight: 600; }
.quiet, .note { font-size: 13px; }
.line, .plain { stroke: #768390; fill: none; stroke-width: 1.3; }
.plain, .tst { stroke-width: 2.5; }
.model { fill: #768390; fill-opacity: .12; stroke: #768390; }
.tst, .bags { stroke: #2f81f7; fill: none; }
.bags { stroke-width: 2; stroke-dasharray: 2 4; }
.note { fill: #2f81f7; }
.a { fill: #a5d6ff; } .b { fill: #ffd8a8; } .c { fill: #b2e8c8; } .d { fill: #f3c4de; } .e { fill: #e2d9b5; }
.box { stroke: #768390; stroke-opacity: .5; }
.box + text { fill: #24292f; }
@media (prefers-color-scheme: light) {
  text { fill: #24292f; } .quiet { fill: #57606a; } .note { fill: #0969da; } .tst, .bags { stroke: #0969da; }
}
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; } .quiet { fill: #9da7b1; } .note { fill: #58a6ff; } .tst, .bags { stroke: #58a6ff; }
  .line, .plain { stroke: #9da7b1; }
}
"""


def text(x: float, y: float, words: str, kind: str = '', anchor: str = 'middle') -> str:
    """Words at a place."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{words}</text>'


def box(x: float, y: float, hue: str, letter: str = '', width: float = BOX) -> str:
    """A token, or a vector, in the colour of its bag."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{BOX}" rx="4" class="box {hue}"/>' + text(
        x + width / 2, y + 17, letter
    )


def arrow(x0: float, y0: float, x1: float, y1: float) -> str:
    """A line with a head at its end."""
    return f'<path d="M{x0:g},{y0:g} L{x1:g},{y1:g}" class="line" marker-end="url(#head)"/>'


def step(left: int, title: str, about: str, bag: int) -> list[str]:
    """One step, from its tokens at the top to its loss at the bottom, with four positions in the model."""
    parts = [text(left, 30, title, 'head', 'start'), text(left, 52, about, 'quiet', 'start')]
    letters = 'abcdefghijklmno'
    for position in range(4):
        middle = left + 44 + position * SLOT
        for k in range(bag):
            x = middle + (k - (bag - 1) / 2) * (BOX + 3) - CENTRE
            parts.append(box(x, TOKENS, HUES[position], letters[position * bag + k]))
            parts.append(arrow(x + CENTRE, TOKENS + BOX, middle + (k - (bag - 1) / 2) * 5, EMBEDDED - 3))
        parts.append(box(middle - CENTRE - 8, EMBEDDED, HUES[position], width=BOX + 16))
        parts.append(arrow(middle, EMBEDDED + BOX, middle, MODEL - 3))
        parts.append(arrow(middle, MODEL + 44, middle, TARGETS - 3))
        following = letters[(position + 1) * bag : (position + 2) * bag]
        wide = 20 + 18 * len(following)
        parts.append(box(middle - wide / 2, TARGETS, HUES[position + 1], ' '.join(following), wide))
    model = f'<rect x="{left}" y="{MODEL}" width="{3 * SLOT + 88}" height="44" rx="6" class="model"/>'
    return [*parts, model, text(left + 44 + 1.5 * SLOT, MODEL + 27, 'the model, unchanged: four positions')]


def curve(x0: float, x1: float, level: float, drop: float, pace: float) -> str:
    """A path that falls from ``level`` by ``drop``, fast at first."""
    points = [x0 + (x1 - x0) * i / 60 for i in range(61)]
    return 'M' + ' L'.join(f'{x:.1f},{level + drop * (1 - math.exp(-(x - x0) / pace)):.1f}' for x in points)


def losses() -> list[str]:
    """The loss over steps: a plain run, and one with superposition."""
    top, bottom = CURVES
    return [
        f'<path d="M{START},{top + 10} V{bottom} H{END}" class="line"/>',
        text(START - 12, top + 20, 'loss', 'quiet', 'end'),
        text(END, bottom + 20, 'steps', 'quiet', 'end'),
        f'<path d="M{SWITCH},{top + 10} V{bottom}" class="line" stroke-dasharray="5 4"/>',
        text((START + SWITCH) / 2, bottom + 20, 'superposition: bags, s times the data', 'note'),
        text((SWITCH + END) / 2, bottom + 20, 'recovery: plain tokens', 'note'),
        f'<path d="{curve(START + 4, END, top + 30, 152, 150)}" class="plain"/>',
        f'<path d="{curve(START + 4, SWITCH, top + 22, 66, 80)}" class="bags"/>',
        f'<path d="{curve(SWITCH, END, top + 62, 138, 62)}" class="tst"/>',
        text(START + 46, top + 22, 'the loss of a bag', 'note', 'start'),
        text(SWITCH + 12, top + 52, 'the jump: from here on it is the next-token loss', 'note', 'start'),
        text(SWITCH + 100, top + 142, 'the overtaking', 'note', 'start'),
        text(END, top + 160, 'a plain run of as many steps', 'quiet', 'end'),
        text(END, bottom - 6, 'ends lower', 'note', 'end'),
        text(END, top + 20, 'a sketch', 'quiet', 'end'),
    ]


def drawing() -> str:
    """The whole of it."""
    parts = [
        *step(LEFT, 'A plain step', 'each position reads a token and predicts the next', 1),
        *step(RIGHT, 'A superposed step', 'each position reads the mean of a bag, of s = 3 tokens', 3),
        text(LEFT + 44 + 1.5 * SLOT, LOSS, 'cross-entropy with the next token'),
        text(RIGHT + 44 + 1.5 * SLOT, LOSS, 'multi-hot cross-entropy with the next bag, as a set'),
        *losses(),
    ]
    label = 'A plain and a superposed step of token superposition, and the loss of a run over its steps'
    return '\n'.join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">',
            f'<style>{STYLE}</style>',
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" '
            'orient="auto"><path d="M0,0 L8,4 L0,8" class="line"/></marker></defs>',
            *parts,
            '</svg>',
            '',
        ]
    )


if __name__ == '__main__':
    sys.stdout.write(drawing())

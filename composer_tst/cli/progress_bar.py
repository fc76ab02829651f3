"""How far a command has come: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from tqdm import tqdm

EVERY = 30.0  # s between lines where there is no terminal
_LINE = '{desc}: {n_fmt} of {total_fmt} {unit}, {elapsed} gone, about {remaining} left'


class _Lines:
    """A stream on which each state of a bar is a line of its own."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> None:
        if text := text.strip('\r\n '):
            self._stream.write(text.replace(', about ? left', '') + '\n')

    def flush(self) -> None:
        self._stream.flush()


def progress(total: int, unit: str, name: str, position: int = 0, every: float = EVERY, **settings: Any) -> tqdm:
    """A bar to ``update`` and ``close``.

    Args:
        total: Units in all.
        unit: What is counted, in the plural.
        name: What it is the progress of.
        position: The bar's line on a terminal, where there are several.
        every: Seconds between lines where there is no terminal.
        settings: Of tqdm, such as ``unit_scale`` and ``initial``.
    """
    common: dict[str, Any] = {'total': total, 'unit': f' {unit}', 'desc': name, **settings}
    if sys.stderr is None:  # closed
        return tqdm(disable=True)
    if sys.stderr.isatty():
        return tqdm(position=position, dynamic_ncols=True, **common)
    lines: Any = _Lines(sys.stderr)
    # Every update is asked for the time: how many fit into an interval cannot be told from the first.
    line = _LINE.replace(' {unit}', '{unit}')
    return tqdm(
        file=lines, position=0, mininterval=every, maxinterval=every, miniters=1, bar_format=line, **common
    )  # fmt: skip

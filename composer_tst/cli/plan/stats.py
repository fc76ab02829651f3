"""The data there is: the part of a `stats.json` that a run reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composer_tst.cli.main import CommandError


@dataclass(frozen=True)
class Data:
    """Splits in numbers."""

    rows: int
    tokens: int
    bytes: int


def read_data(path: str, splits: Sequence[str], length: int) -> Data:
    """Read some splits from a `stats.json`, whose rows must have `length` tokens."""
    try:
        stats = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise CommandError(f'--stats {path}: cannot be read: {error}') from error
    if not isinstance(stats, dict) or 'seq_len' not in stats or not isinstance(stats.get('splits'), dict):
        raise CommandError(f'--stats {path}: it is not what prepare-data writes: give its stats.json')
    if stats['seq_len'] != length:
        raise CommandError(
            f'max_seq_len is {length}, and the rows of --stats {path} have {stats["seq_len"]} tokens: set max_seq_len: '
            f'{stats["seq_len"]}, or prepare the data with --seq-len {length}'
        )
    of_each = [_read_split(path, stats['splits'], split) for split in splits]
    return Data(*(sum(counts) for counts in zip(*of_each, strict=True)))


def _read_split(path: str, splits: dict[str, Any], split: str) -> tuple[int, int, int]:
    """Rows, tokens and bytes."""
    found = splits.get(split) or {'rows': 0, 'tokens': 0, 'bytes': 0}
    counts: list[Any] = [found.get(key) for key in ('rows', 'tokens', 'bytes')] if isinstance(found, dict) else [None]
    if not all(isinstance(count, int) for count in counts):
        raise CommandError(f'--stats {path}: split {split!r} lacks rows, tokens or bytes: give what prepare-data wrote')
    rows, tokens, size = counts
    if not tokens:
        raise CommandError(f'--stats {path}: it has no split {split!r} with rows in it: prepare one')
    return rows, tokens, size

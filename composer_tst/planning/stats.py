"""The data there is: the part of a `stats.json` that a run reads."""

from __future__ import annotations

import json
from pathlib import Path

from .config import PlanError, Run


def read_stats(path: str) -> dict:
    """Read a `stats.json`."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise PlanError(f'--stats {path}: cannot be read: {error}') from error


def split_of(stats: dict, split: str, run: Run) -> dict:
    """The rows, tokens and bytes of a split, which must fit the run's `max_seq_len`."""
    if stats.get('seq_len') != run.length:
        raise PlanError(
            f'--stats: its rows have {stats.get("seq_len")} tokens and max_seq_len is {run.length}: '
            f'prepare the data with --seq-len {run.length}'
        )
    found = stats.get('splits', {}).get(split)
    if not found or not found['tokens']:
        raise PlanError(f'--stats: it has no split {split!r} with rows in it: prepare one')
    return found

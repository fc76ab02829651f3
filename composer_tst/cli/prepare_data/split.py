"""Which split a document belongs to: a function of its text alone."""

import hashlib
import math
import re
from collections.abc import Sequence

from composer_tst.cli.main import CommandError

Splits = tuple[tuple[str, float], ...]
NAME = re.compile(r'[A-Za-z0-9_][A-Za-z0-9_-]*')


def parse_splits(text: str) -> Splits:
    """Read `train=0.99,val=0.01`.

    Raises:
        CommandError: if a share is not a positive number, a name is unfit or repeated, or the sum is not 1.
    """
    splits = []
    for item in text.split(','):
        name, _, share = item.strip().partition('=')
        try:
            value = float(share)
        except ValueError:
            value = math.nan
        if not value > 0:
            raise CommandError(f'--split {text}: {item.strip()!r} is not NAME=SHARE with a share above 0')
        if not NAME.fullmatch(name):
            raise CommandError(f'--split {text}: {name!r} is no name of a folder: use letters, digits, _ and -')
        if name.lower() == 'tokenizer':
            raise CommandError(f'--split {text}: the folder {name} is that of the tokenizer: use another name')
        splits.append((name, value))
    # On some disks, names that differ in case alone are one.
    names = [name.lower() for name, _ in splits]
    if len(set(names)) < len(names):
        raise CommandError(f'--split {text}: a name is given twice')
    if not math.isclose(sum(share for _, share in splits), 1.0, abs_tol=1e-6):
        raise CommandError(f'--split {text}: the shares do not sum to 1')
    return tuple(splits)


def content_hash() -> hashlib.blake2b:
    """The hash that is fed a document's UTF-8 bytes to place it."""
    return hashlib.blake2b(digest_size=8)


def choose_split(digest: bytes, splits: Sequence[tuple[str, float]]) -> str:
    """Place a document by the hash of its text.

    The same text goes to the same split whatever its name and whatever else is prepared with it, so no
    document is ever in two splits, and files added later move none.

    Args:
        digest: 8 bytes from `content_hash`.
        splits: names and shares, the shares summing to 1.
    """
    position = int.from_bytes(digest, 'big') / 2**64
    edge = 0.0
    for name, share in splits:
        edge += share
        if position < edge:
            return name
    return splits[-1][0]

"""A file that a command writes: never over another one, and with the folders above it."""

from __future__ import annotations

from pathlib import Path

from composer_tst.cli.main import CommandError


def check_new(option: str, path: Path) -> None:
    """Refuse a path where there is something, named by the option that gave it."""
    if path.is_dir():
        raise CommandError(f'{option} {path} is a folder: name a file')
    if path.exists():
        raise CommandError(f'{option} {path}: it exists: remove it or name another')


def write_new(option: str, path: Path, text: str) -> None:
    """Write a file where there is none."""
    check_new(option, path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise CommandError(f'{option} {path}: {error.strerror}') from error

"""Scalars of TensorBoard event files, with a word where a file is cut short."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.util.tensor_util import make_ndarray

from composer_tst.cli.main import CommandError

_HEADER = struct.Struct('<QI')  # a record: its length, a checksum of that, the record, a checksum of it
_CHECKSUM = 4


@dataclass(frozen=True)
class Series:
    """A logged scalar: ``values[N]`` at ``steps[N]``, steps strictly increasing.

    A step is Composer's batch counter when the value was logged: train values of the first batch are at 0, an
    evaluation after ``n`` batches is at ``n``.
    """

    steps: NDArray[np.int64]
    values: NDArray[np.float64]


def read_scalars(folder: Path, wanted: Callable[[str], bool]) -> tuple[dict[str, Series], dict[str, str], list[str]]:
    """Every wanted scalar of the one run under ``folder``, merged over its event files, and its hyperparameters.

    Composer starts a new file at every flush and every resumption. Files are read in the order they were begun; from
    its first step of a scalar on, a file replaces what earlier ones hold of that scalar. So the steps that a resumed
    run trains again count once, as trained last. A file that begins where the earliest did, or before, is of a run that
    was begun anew in the same folder, and replaces them all.

    Returns:
        tuple: The scalars by tag; the hyperparameters as they were logged last; and a sentence for each file that
            ends in the middle of a record.

    Raises:
        CommandError: If the folder is missing, holds no event file, or holds several runs.
    """
    if not folder.is_dir():
        raise CommandError(f'{folder} is not a folder; give the one that holds a run and its TensorBoard files')
    paths = sorted(path for path in folder.rglob('*tfevents*') if path.is_file())
    if not paths:
        raise CommandError(f'{folder} holds no TensorBoard event file; add a tensorboard logger to that run')
    files, cut = [], []
    logged: tuple[float, dict[str, str]] = (0.0, {})
    for path in paths:
        begun, scalars, settings, whole = _read_file(path, wanted)
        if settings and begun >= logged[0]:
            logged = begun, settings
        if not whole:
            cut.append(
                f'{path} ends in the middle of a record: copy it again, or take it that its run was killed there.'
            )
        if scalars:  # a killed run leaves files with nothing in them
            files.append((begun, path, scalars))

    places = sorted({path.parent for _, path, _ in files})
    if len(places) > 1:
        names = ', '.join(str(place.relative_to(folder)) for place in places)
        raise CommandError(
            f'{folder} holds {len(places)} runs ({names}): give the folder of one, or, if they are parts of one run, '
            'put their event files into one folder'
        )

    merged: dict[str, Series] = {}
    for _, _, scalars in sorted(files, key=lambda file: (file[0], file[1].name)):
        if merged and _first_step(scalars) <= min(int(series.steps[0]) for series in merged.values()):
            merged = {}  # the run was begun anew in the same folder
        for tag, by_step in scalars.items():
            later = _series(by_step)
            earlier = merged.get(tag, Series(later.steps[:0], later.values[:0]))
            kept = earlier.steps < later.steps[0]
            merged[tag] = Series(
                np.concatenate([earlier.steps[kept], later.steps]),
                np.concatenate([earlier.values[kept], later.values]),
            )
    return merged, logged[1], cut


def _first_step(scalars: dict[str, dict[int, float]]) -> int:
    return min(step for by_step in scalars.values() for step in by_step)


def _series(by_step: dict[int, float]) -> Series:
    steps = sorted(by_step)
    return Series(np.array(steps, np.int64), np.array([by_step[step] for step in steps], np.float64))


def _read_file(
    path: Path, wanted: Callable[[str], bool]
) -> tuple[float, dict[str, dict[int, float]], dict[str, str], bool]:
    """When a file was begun, its wanted scalars by tag and step, its hyperparameters, and if it is whole.

    Of a scalar that was logged twice at a step the last counts.

    TensorBoard's own reader stops in silence at a record that is cut short, so the records are read here.
    """
    begun = 0.0
    scalars: dict[str, dict[int, float]] = {}
    settings: dict[str, str] = {}
    whole = True
    for index, record in enumerate(_records(path.read_bytes())):
        if record is None:
            whole = False
            break
        event: Any = Event()
        try:
            event.ParseFromString(record)
        except DecodeError:
            raise CommandError(f'{path} is damaged: copy it again, or remove it to leave out what it logged') from None
        begun = begun if index else event.wall_time
        for value in event.summary.value:
            if wanted(value.tag):
                is_tensor = value.HasField('tensor')
                number = float(make_ndarray(value.tensor)) if is_tensor else value.simple_value
                scalars.setdefault(value.tag, {})[event.step] = number
            elif value.tag == SESSION_START_INFO_TAG:
                logged: Any = HParamsPluginData()
                logged.ParseFromString(value.metadata.plugin_data.content)
                known = logged.session_start_info.hparams
                settings = {name: each.string_value for name, each in known.items() if each.string_value}
    return begun, scalars, settings, whole


def _records(content: bytes) -> Iterator[bytes | None]:
    """The records of a file, None at the end of one that is cut short."""
    at = 0
    while at < len(content):
        if at + _HEADER.size > len(content):
            yield None
            return
        length, _ = _HEADER.unpack_from(content, at)
        at += _HEADER.size
        if at + length + _CHECKSUM > len(content):
            yield None
            return
        yield content[at : at + length]
        at += length + _CHECKSUM

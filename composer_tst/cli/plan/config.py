"""The YAML: what of it decides a run's cost, and the one to run, filled in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from composer.core import Time, Timestamp, TimeUnit
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from composer_tst import TokenSuperposition, WarmupStableDecayScheduler
from composer_tst.cli.main import CommandError
from composer_tst.settings import Phase


@dataclass(frozen=True)
class Run:
    """What of a YAML decides its cost: B rows of L tokens a loader batch, how long, and the superposition."""

    rows: int
    length: int
    max_duration: Time
    phases: tuple[Phase, ...]
    superpose: str
    expand: str
    weighting: Any

    @property
    def draws(self) -> list[int]:
        """Loader batches that one step of each phase reads."""
        return [phase.bag_size if self.expand != 'none' else 1 for phase in self.phases]


def load(path: str, overrides: list[str]) -> DictConfig:
    """Read a llm-foundry YAML and the overrides of its command line."""
    try:
        config = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(overrides))
        OmegaConf.to_container(config, resolve=True)
    except OSError as error:
        raise CommandError(f'cannot read {path}: {error.strerror}') from error
    except Exception as error:
        # YAML and OmegaConf fail in many ways, with advice over several lines.
        why = ' '.join(str(error).split())
        raise CommandError(f'{path} is no YAML that OmegaConf reads: {why}') from error
    if not isinstance(config, DictConfig):
        raise CommandError(f'{path} is a list, not a config of llm-foundry with keys')
    return config


def value(config: DictConfig, key: str, kind: type | tuple[type, ...], what: str) -> Any:
    """A key of the YAML, or one sentence if it is missing or of another kind."""
    try:
        found = OmegaConf.select(config, key)
    except OmegaConfBaseException as error:
        raise CommandError(f'{key} cannot be resolved: {" ".join(str(error).split())}') from error
    if found is None:
        raise CommandError(f'{key} is missing: give {what}')
    if not isinstance(found, kind) or isinstance(found, bool) or (isinstance(found, int) and found < 1):
        raise CommandError(f'{key} is {found!r}: give {what}')
    return found


def read_run(config: DictConfig) -> Run:
    """Check the keys that decide the cost."""
    rows = value(config, 'global_train_batch_size', int, 'the rows of a step, a positive integer')
    length = value(config, 'max_seq_len', int, 'the tokens of a row, a positive integer')
    text = value(config, 'max_duration', (str, int), 'a Composer Time in ba, tok, sp or ep, as 20000ba')
    try:
        max_duration = Time.from_timestring(text) if isinstance(text, str) else Time.from_epoch(text)
    except (TypeError, ValueError, OverflowError):
        raise CommandError(f'max_duration is {text!r}: give a Composer Time in ba, tok, sp or ep, as 20000ba') from None
    if max_duration.unit not in (TimeUnit.BATCH, TimeUnit.TOKEN, TimeUnit.SAMPLE, TimeUnit.EPOCH):
        raise CommandError(f'max_duration is {text}: give it in ba, tok, sp or ep')
    if max_duration.value < 1:
        raise CommandError(f'max_duration is {text}: give a positive time')
    check_scheduler(config, max_duration)
    settings = superposition_settings(config)
    if settings is None:
        return Run(rows, length, max_duration, (), 'both', 'sequence', 'uniform')
    try:
        found = TokenSuperposition(**settings).settings
    except (TypeError, ValueError) as error:
        raise CommandError(f'algorithms.token_superposition: {error}') from error
    return Run(rows, length, max_duration, found.phases, found.superpose, found.expand, found.weighting)


def check_scheduler(config: DictConfig, max_duration: Time) -> None:
    """Refuse what the published scheduler refuses in training, where the YAML names it."""
    found: Any = OmegaConf.select(config, 'scheduler')
    if found is not None and not isinstance(found, DictConfig):
        raise CommandError(f'scheduler is {found!r}: give its settings by name, as name: warmup_stable_decay')
    if found is None or found.get('name') != 'warmup_stable_decay':
        return
    settings: Any = OmegaConf.to_container(found, resolve=True)
    del settings['name']
    state: Any = SimpleNamespace(max_duration=max_duration, timestamp=Timestamp(), dataloader_len=None)
    try:
        WarmupStableDecayScheduler(**settings)(state)
    except (TypeError, ValueError) as error:
        if 'batches in an epoch' not in str(error):  # which only the loader knows
            raise CommandError(f'scheduler: {error}') from error


def superposition_settings(config: DictConfig) -> dict[str, Any] | None:
    """What the YAML says of `token_superposition`, None if it does not name it."""
    algorithms: Any = OmegaConf.select(config, 'algorithms')
    if algorithms is None:
        return None
    if not isinstance(algorithms, DictConfig):
        raise CommandError(f'algorithms is {algorithms!r}: give its settings by name')
    if 'token_superposition' not in algorithms:
        return None
    found: Any = algorithms.token_superposition
    if found is not None and not isinstance(found, DictConfig):
        raise CommandError(f'algorithms.token_superposition is {found!r}: give its settings by name')
    settings: Any = OmegaConf.to_container(found, resolve=True) if found is not None else {}
    return settings


def change_settings(config: DictConfig, bag_size: int | None, duration: str | None) -> None:
    """Put one phase, or a part of it, into the YAML in place of what it says."""
    given = {key: item for key, item in (('bag_size', bag_size), ('duration', duration)) if item is not None}
    if given:
        kept = {key: item for key, item in (superposition_settings(config) or {}).items() if key != 'phases'}
        OmegaConf.update(config, 'algorithms.token_superposition', {**kept, **given}, merge=False, force_add=True)


def train_split(config: DictConfig) -> str:
    """The split that the train loader reads."""
    dataset: Any = OmegaConf.select(config, 'train_loader.dataset') or {}
    if not isinstance(dataset, (dict, DictConfig)):
        raise CommandError(f'train_loader.dataset is {dataset!r}: give its settings by name')
    streams = dataset.get('streams') or {}
    if not isinstance(streams, (dict, DictConfig)) or not all(
        isinstance(s, (dict, DictConfig)) for s in streams.values()
    ):
        raise CommandError(f'train_loader.dataset.streams is {streams!r}: give its settings by name')
    splits = [stream.get('split') for stream in streams.values()] or [dataset.get('split')]
    return splits[0] or 'train'


def equal_steps(run: Run) -> Time:
    """The steps of the plain run that `max_duration` describes."""
    per_batch = {TimeUnit.BATCH: 1, TimeUnit.TOKEN: run.rows * run.length, TimeUnit.SAMPLE: run.rows}
    if run.max_duration.unit not in per_batch:
        raise CommandError(f'max_duration is {run.max_duration.to_timestring()}: give it in ba, tok or sp')
    return Time.from_batch(math.ceil(run.max_duration.value / per_batch[run.max_duration.unit]))

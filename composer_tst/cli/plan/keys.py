"""The keys of a YAML, and the stats.json beside its shards, checked in a moment: nothing heavy is imported."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from composer_tst.cli.main import CommandError
from composer_tst.cli.recipe import names

# What README recommends.
RECIPE = '{token_superposition: {bag_size: 6, duration: 0.3dur}}'


def load(path: str, overrides: list[str]) -> DictConfig:
    """Read a llm-foundry YAML and the overrides of its command line."""
    if (name := path.removesuffix('.yaml')) in names() and not Path(path).exists():
        raise CommandError(
            f'{path} is the name of a recipe, not a file: composer-tst recipe {name} --output {name}.yaml writes it'
        )
    if Path(path).is_dir():
        raise CommandError(f'{path} is a folder: give the YAML in it')
    for override in overrides:
        if '=' not in override:
            raise CommandError(
                f'{override} is no override and no option: give overrides as KEY=VALUE, options before --'
            )
    try:
        text = Path(path).read_text()
    except FileNotFoundError:
        raise CommandError(
            f'there is no {path}: give the path of a YAML, or write one with composer-tst recipe NAME --output {path}'
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f'cannot read {path}: {getattr(error, "strerror", None) or "it is no text"}') from error
    try:
        config: Any = OmegaConf.create(text)
        if isinstance(config, DictConfig):
            config = OmegaConf.merge(config, OmegaConf.from_dotlist(overrides))
            if '${oc.env:' in str(OmegaConf.to_container(config)):
                raise CommandError(
                    f'{path} reads the environment by oc.env, which llm-foundry does not resolve: give the value, or '
                    'an override on the command line'
                )
            OmegaConf.to_container(config, resolve=True)
    except CommandError:
        raise
    except Exception as error:
        # YAML and OmegaConf fail in many ways, with advice over several lines.
        problem, mark = str(getattr(error, 'problem', '')), getattr(error, 'problem_mark', None)
        if mark is not None and problem.startswith('found duplicate key'):
            key = problem.removeprefix('found duplicate key ')
            raise CommandError(f'{path} has {key} twice, again in line {mark.line + 1}: keep one of them') from error
        why = ' '.join(str(error).split())
        raise CommandError(f'{path} is no YAML that OmegaConf reads: mend it: {why}') from error
    if not isinstance(config, DictConfig):
        raise CommandError(f'{path} is a list: give a config that llm-foundry trains, with a key in each line')
    return config


def check(config: DictConfig) -> None:
    """Refuse what can be told without Composer and llm-foundry."""
    value(config, 'global_train_batch_size', int, 'the rows of a step, a positive integer')
    length = value(config, 'max_seq_len', int, 'the tokens of a row, a positive integer')
    duration = str(value(config, 'max_duration', (str, int), 'a Composer Time in ba, tok, sp or ep, as 20000ba'))
    if duration.isdecimal():
        raise CommandError(
            f'max_duration is {duration} without a unit, which Composer takes for epochs: give {duration}ba for steps, '
            f'or {duration}ep for epochs'
        )
    superposition_settings(config)
    of_rows = _dataset(config).get('max_seq_len', length)
    if of_rows != length:
        raise CommandError(
            f'max_seq_len is {length} and train_loader.dataset.max_seq_len {of_rows}: give one length for both'
        )
    for folder, stats in shards(config):
        if stats['seq_len'] != length:
            raise CommandError(
                f'max_seq_len is {length}, and the rows in {folder} have {stats["seq_len"]} tokens: set max_seq_len: '
                f'{stats["seq_len"]}, or prepare the data with --seq-len {length}'
            )


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


def superposition_settings(config: DictConfig) -> dict[str, Any] | None:
    """What the YAML says of `token_superposition`, None if it does not name it."""
    algorithms: Any = OmegaConf.select(config, 'algorithms')
    if algorithms is None:
        return None
    if not isinstance(algorithms, DictConfig):
        raise CommandError(f'algorithms is {algorithms!r}: give settings by name, as algorithms: {RECIPE}')
    if 'token_superposition' not in algorithms:
        return None
    found: Any = algorithms.token_superposition
    if found is not None and not isinstance(found, DictConfig):
        raise CommandError(
            f'algorithms.token_superposition is {found!r}: give settings by name, as algorithms: {RECIPE}'
        )
    settings: Any = OmegaConf.to_container(found, resolve=True) if found is not None else {}
    return settings


def change_settings(config: DictConfig, bag_size: int | None, duration: str | None) -> None:
    """Put one phase, or a part of it, into the YAML in place of what it says."""
    given = {key: item for key, item in (('bag_size', bag_size), ('duration', duration)) if item is not None}
    if given:
        kept = {key: item for key, item in (superposition_settings(config) or {}).items() if key != 'phases'}
        OmegaConf.update(config, 'algorithms.token_superposition', {**kept, **given}, merge=False, force_add=True)


def train_splits(config: DictConfig) -> list[str]:
    """The splits that the streams of the train loader read, each once."""
    return [*dict.fromkeys(stream.get('split') or 'train' for stream in _streams(config))]


def shards(config: DictConfig) -> list[tuple[str, dict[str, Any]]]:
    """Each folder on this machine that the train loader reads, and what prepare-data says of it in stats.json."""
    found = []
    for stream in _streams(config):
        folder = str(stream.get('remote') or stream.get('local'))
        with suppress(OSError, ValueError):
            stats = json.loads((Path(folder) / 'stats.json').read_text())
            if isinstance(stats, dict) and {'seq_len', 'vocab_size'} <= set(stats):
                found.append((folder, stats))
    return found


def _dataset(config: DictConfig) -> Any:
    dataset: Any = OmegaConf.select(config, 'train_loader.dataset') or {}
    if not isinstance(dataset, (dict, DictConfig)):
        raise CommandError(f'train_loader.dataset is {dataset!r}: give its settings by name')
    return dataset


def _streams(config: DictConfig) -> list[dict[str, Any]]:
    dataset = _dataset(config)
    streams = dataset.get('streams') or {}
    if not isinstance(streams, (dict, DictConfig)) or not all(
        isinstance(s, (dict, DictConfig)) for s in streams.values()
    ):
        raise CommandError(f'train_loader.dataset.streams is {streams!r}: give its settings by name')
    found: Any = [*streams.values()] or [dataset]
    return found

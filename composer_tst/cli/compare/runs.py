"""A run as the comparison sees it, read from its TensorBoard files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from composer_tst.cli.compare.events import Series, read_scalars
from composer_tst.cli.main import CommandError

TRAIN_LOSS = 'loss/train/total'
BAG_SIZE = 'superposition/bag_size'
DATA_TOKENS = 'superposition/data_tokens'
S_TOKENS = 'superposition/s_tokens'
TIME_TOKEN = 'time/token'
EVAL_LOSS = 'metrics/eval/LanguageCrossEntropy'
LEARNING_RATE = re.compile(r'lr-.+/group0')
ANY_EVAL_LOSS = re.compile(r'metrics/(?!train/).+/LanguageCrossEntropy')


@dataclass(frozen=True)
class Run:
    """What the comparison needs of one run.

    Args:
        name: The folder's name.
        measured: What its validation loss is called in the log, which names the validation set.
        validation: Next-token validation loss, in nats per token.
        train: Train loss, in nats; multi-hot cross-entropy wherever the bag size is above 1.
        tokens: Cumulative data tokens.
        positions: Cumulative model positions, s-tokens; the data tokens for a run without superposition.
        bag_size: Bag size; empty for a run without superposition.
        rate: Learning rate; empty if it was not logged.
        settings: Hyperparameters by name, as text; empty if none were logged.
        cut: A sentence for each event file that ends in the middle of a record.
    """

    name: str
    measured: str
    validation: Series
    train: Series
    tokens: Series
    positions: Series
    bag_size: Series
    rate: Series
    settings: Mapping[str, str]
    cut: tuple[str, ...] = ()

    @property
    def final_loss(self) -> float:
        """Validation loss at the last evaluation."""
        return float(self.validation.values[-1])

    @property
    def final_step(self) -> int:
        """Steps at the last evaluation."""
        return int(self.validation.steps[-1])

    @property
    def trained_steps(self) -> int:
        """Steps at the last train loss, which is logged under the steps before it."""
        return int(self.train.steps[-1]) + 1

    @property
    def superposed(self) -> bool:
        """Whether any step was trained on bags."""
        return bool((self.bag_size.values > 1).any())

    @property
    def switches(self) -> list[int]:
        """Steps at which the bag size changes: the first step of each new phase."""
        changed = np.flatnonzero(np.diff(self.bag_size.values)) + 1
        return self.bag_size.steps[changed].tolist()

    @property
    def phases(self) -> list[tuple[int, int, int]]:
        """Bag size, first step and end of each phase, recovery included; empty without superposition."""
        if not self.superposed:
            return []
        starts = [int(self.bag_size.steps[0]), *self.switches]
        ends = [*self.switches, max(self.final_step, self.trained_steps)]
        return [(self.bag_size_at(start), start, end) for start, end in zip(starts, ends, strict=True)]

    def bag_size_at(self, step: int) -> int:
        """Bag size of a step, judged by the last one logged by then."""
        latest = int(np.searchsorted(self.bag_size.steps, step, side='right')) - 1
        return int(self.bag_size.values[max(latest, 0)]) if len(self.bag_size.steps) else 1

    def tokens_at(self, steps: NDArray[np.int64] | Sequence[int]) -> NDArray[np.float64]:
        """Cumulative data tokens at ``steps[N]``, linear between logged steps and from none before the first."""
        return np.interp(steps, [0, *self.tokens.steps], [0, *self.tokens.values])

    def superposed_at(self, steps: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether each of ``steps[N]`` was trained on bags, judged by the last bag size logged by then."""
        if not len(self.bag_size.steps):
            return np.zeros(len(steps), dtype=bool)
        latest = np.searchsorted(self.bag_size.steps, steps, side='right') - 1
        return self.bag_size.values[np.maximum(latest, 0)] > 1


def label_of(tag: str) -> str:
    """The label of the eval loader that a validation loss is of: `eval` of a single one."""
    label = tag.removeprefix('metrics/').removesuffix('/LanguageCrossEntropy')
    return label.removeprefix('eval/')


def _is_wanted(tag: str) -> bool:
    known = (TRAIN_LOSS, BAG_SIZE, DATA_TOKENS, S_TOKENS, TIME_TOKEN)
    return tag in known or any(pattern.fullmatch(tag) for pattern in (ANY_EVAL_LOSS, LEARNING_RATE))


def read_run(folder: Path, label: str | None = None) -> Run:
    """Read the run whose event files lie somewhere under ``folder``.

    Args:
        folder: The run's.
        label: Of the eval loader to compare, if the run has several.

    Returns:
        Run: The run, named by its folder.

    Raises:
        CommandError: If the folder is missing, has no event file or several runs, if validation loss, train loss or
            tokens were not logged, if several validation losses were and ``label`` names none of them, or if the last
            validation loss is not finite or of step 0.
    """
    scalars, settings, cut = read_scalars(folder, _is_wanted)
    eval_tags = [EVAL_LOSS] if EVAL_LOSS in scalars else sorted(filter(ANY_EVAL_LOSS.fullmatch, scalars))
    labels = {label_of(tag): tag for tag in eval_tags}
    if label is not None and label not in labels:
        raise CommandError(f'--eval {label}: {folder} logged {", ".join(labels) or "no validation loss"}')
    if label is not None:
        eval_tags = [labels[label]]
    if len(eval_tags) > 1:
        raise CommandError(
            f'{folder} logged the validation losses of {", ".join(labels)}: name one of them, as '
            f'--eval {next(iter(labels))}'
        )
    cut_short = f' {cut[0]}' if cut else ''  # which may be why
    if not eval_tags:
        raise CommandError(
            f'{folder} logged no validation loss ({EVAL_LOSS}); give that run an eval loader and an eval interval.'
            f'{cut_short}'
        )
    tokens_tag = DATA_TOKENS if DATA_TOKENS in scalars else TIME_TOKEN
    for tag in (TRAIN_LOSS, tokens_tag):
        if tag not in scalars:
            raise CommandError(f'{folder} logged no {tag}, which every Composer run on tokens logs.{cut_short}')
    validation = scalars[eval_tags[0]]
    if not np.isfinite(validation.values[-1]):
        raise CommandError(f'{folder} diverged: its last validation loss is {validation.values[-1]}')
    if validation.steps[-1] < 1:
        raise CommandError(f'{folder} was evaluated before its first step alone: give that run an eval interval')
    nothing = Series(np.empty(0, np.int64), np.empty(0))
    bag_size = scalars.get(BAG_SIZE, nothing)
    return Run(
        name=folder.resolve().name,
        measured=eval_tags[0],
        validation=validation,
        train=scalars[TRAIN_LOSS],
        tokens=scalars[tokens_tag],
        positions=scalars.get(S_TOKENS, scalars[tokens_tag]),
        # Composer logs a step's loss under the steps before it, and what is known at its end under one more.
        bag_size=Series(bag_size.steps - 1, bag_size.values),
        rate=next((scalars[tag] for tag in sorted(scalars) if LEARNING_RATE.fullmatch(tag)), nothing),
        settings=settings,
        cut=tuple(cut),
    )

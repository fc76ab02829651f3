"""What the package leaves out and the evidence tries: other learning rates, and weightings, from phase to phase."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from composer.core import State, Time
from llmfoundry.registry import algorithms, schedulers

from composer_tst import TokenSuperposition, WarmupStableDecayScheduler
from composer_tst.settings import Settings, Weighting, target_weights


class RateOfItsOwn(WarmupStableDecayScheduler):
    """Warmup, stable, decay, with another learning rate while superposed and a second warmup after it.

    Args:
        until: The share of steps that is superposed.
        factor: What the learning rate is multiplied by until then.
        rewarm: The share of steps after it over which the rate rises from 0 again.
        others: Settings of the schedule.
    """

    def __init__(self, until: float, factor: float = 1.0, rewarm: float = 0.0, **others: Any):
        super().__init__(**others)
        self.until, self.factor, self.rewarm = until, factor, rewarm

    def __call__(self, state: State, ssr: float = 1.0) -> float:
        """The multiplier at ``state.timestamp``."""
        rate = super().__call__(state, ssr)
        elapsed: Time | None = state.get_elapsed_duration()
        share = 0.0 if elapsed is None else float(elapsed)
        if share < self.until:
            return rate * self.factor
        return rate * min(1.0, (share - self.until) / self.rewarm) if self.rewarm else rate


class WeightsByPhase(TokenSuperposition):
    """Token superposition with a weighting for each phase.

    Args:
        weightings: One for each phase.
        others: Settings of the algorithm.
    """

    def __init__(self, weightings: Sequence[Weighting], **others: Any):
        super().__init__(**others)
        fields = {**vars(self.settings), 'weighting': tuple(weightings)}
        self.settings = _SettingsByPhase(**fields, ended=lambda: len(self.schedule.progress.ended))


@dataclass(frozen=True)
class _SettingsByPhase(Settings):
    """Settings whose ``weighting`` has one for each phase."""

    ended: Callable[[], int] = lambda: 0

    def weights(self, bag_size: int) -> torch.Tensor:
        """Weights of a bag's targets in the phase under way."""
        weightings: Any = self.weighting
        return target_weights(weightings[self.ended()], bag_size)


def register() -> None:
    """Let llm-foundry's YAMLs name both."""
    schedulers.register('rate_of_its_own', func=RateOfItsOwn)
    algorithms.register('weights_by_phase', func=WeightsByPhase)

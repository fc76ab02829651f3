"""A published model at its own size: the step of its recipe, superposed, recovering and plain.

Width, depth, vocabulary, bag size and sequence length are those of `yamls/pretrain/270m_tst.yaml`. The microbatch is
one that fits a card of 80 GB. Tokens are random, so that no data set is needed.
"""

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from composer_tst import TokenSuperposition
from composer_tst.cli.recipe import folder
from tools.benchmarks.measure import alone
from tools.benchmarks.stepping import SUPERPOSED, Shape, Steps

NAME, BATCH_SIZE = '270m_tst', 8
# An algorithm's duration and `expand`.
STEPS = {
    'plain': None,
    'sequence': (SUPERPOSED, 'sequence'),
    'batch': (SUPERPOSED, 'batch'),
    'recovery': ('1ba', 'sequence'),
}


@dataclass(frozen=True)
class Recipe(Shape):
    """The shape of a recipe's model, with the rest of what its YAML says of the architecture."""

    bag_size: int
    architecture: dict[str, Any]

    @classmethod
    def published(cls, batch_size: int = BATCH_SIZE, length: int | None = None, **overrides: Any) -> 'Recipe':
        """That of the recipe; overrides are of the model's config, and make it small enough for a test."""
        from omegaconf import OmegaConf

        settings: Any = OmegaConf.load(Path(folder(), f'{NAME}.yaml'))
        if length:
            settings.max_seq_len = length
        of_recipe: Any = OmegaConf.to_container(settings.model.config_overrides, resolve=True)
        config = json.loads(Path(folder(), 'llama', 'config.json').read_text()) | of_recipe | overrides
        return cls(
            batch_size,
            settings.max_seq_len,
            config['hidden_size'],
            config['num_hidden_layers'],
            config['vocab_size'],
            settings.algorithms.token_superposition.bag_size,
            config,
        )

    def config(self) -> LlamaConfig:
        """The model's, with torch's own fused attention."""
        return LlamaConfig(**self.architecture, attn_implementation='sdpa')


@dataclass(frozen=True)
class Rate:
    """What one kind of step takes, and how its time and memory compare with those of the plain step.

    Memory is the peak in two steps; on a GPU all of it, weights and optimizer included, on a CPU what the steps
    allocate. Tokens are those of data that a step reads.
    """

    step: str
    compiled: bool
    ms: float
    ms_quartiles: tuple[float, float]
    tokens_per_second: float
    positions_per_second: float
    peak_mib: float
    time_ratio: float
    memory_ratio: float


def rates(device: torch.device, recipe: Recipe, compiled: bool, seconds: float = 5.0) -> Iterator[Rate]:
    """Each kind of step, one training after the other, the plain one first."""
    plain: tuple[float, float] | None = None
    for name, superposed in STEPS.items():
        algorithm = superposed and TokenSuperposition(recipe.bag_size, superposed[0], expand=superposed[1])
        held: list[int] = []

        def make(algorithm: Any = algorithm, held: list[int] = held) -> Steps:
            steps = Steps(device, recipe, algorithm, compiled)
            held.append(torch.cuda.memory_allocated(device) if device.type == 'cuda' else 0)
            return steps

        measured = alone(make, seconds, device)
        low, middle, high = statistics.quantiles(measured.seconds, n=4, method='inclusive')
        peak = held[0] + measured.peak
        plain = plain or (middle, peak)
        bag_size = recipe.bag_size if superposed and superposed[0] == SUPERPOSED else 1
        row = recipe.length // bag_size * bag_size if name == 'batch' else recipe.length
        tokens = bag_size * recipe.batch_size * row
        yield Rate(
            step=name,
            compiled=compiled,
            ms=1e3 * middle,
            ms_quartiles=(1e3 * low, 1e3 * high),
            tokens_per_second=tokens / middle,
            positions_per_second=tokens / bag_size / middle,
            peak_mib=peak / 2**20,
            time_ratio=middle / plain[0],
            memory_ratio=peak / plain[1],
        )

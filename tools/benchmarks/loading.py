"""Grouping the loader batches of one step, beside drawing them one by one."""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from streaming import MDSWriter
from transformers import PreTrainedTokenizerFast

from composer_tst.loader import BagLoader, Resumption
from tools.benchmarks.measure import Case, Other
from tools.benchmarks.operations import BAG_SIZES

ROWS, LENGTH, BATCH_SIZE = 4096, 2048, 4
# Streaming sleeps and wakes in steps of milliseconds, so a call draws many batches: a multiple of every bag size.
BATCHES = 48
SECONDS = 40.0


def loader_cases(device: torch.device) -> Iterator[Case]:
    """The batches of a few steps, from llm-foundry's own text loader over shards on disk."""
    del device
    with tempfile.TemporaryDirectory() as folder:
        # Streaming wants a folder for each reader.
        loaders = [_text_loader(Path(folder, name)) for name in ('ours', 'plain')]
        for bag_size in BAG_SIZES:
            ours = _forever(BagLoader(loaders[0], True, None, Resumption(), lambda s=bag_size: s))
            plain = _forever(loaders[1])
            yield Case(
                f'loader s={bag_size} B={BATCH_SIZE} L={LENGTH}, {BATCHES} loader batches',
                lambda ours=ours, s=bag_size: [next(ours) for _ in range(BATCHES // s)],
                (
                    Other(
                        's plain calls of next',
                        lambda plain=plain: [next(plain) for _ in range(BATCHES)],
                        time_at_most=1.02,
                    ),
                ),
                SECONDS,
            )


def _forever(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from loader


def _text_loader(folder: Path) -> Any:
    from llmfoundry.data.dataloader import build_dataloader

    generator = np.random.default_rng(0)
    with MDSWriter(out=str(folder / 'train'), columns={'tokens': f'ndarray:int32:{LENGTH}'}) as writer:
        for _ in range(ROWS):
            writer.write({'tokens': generator.integers(0, 50257, LENGTH, dtype=np.int32)})
    config = {
        'name': 'text',
        'dataset': {'local': str(folder), 'split': 'train', 'shuffle': True, 'max_seq_len': LENGTH},
        'drop_last': True,
        'num_workers': 0,
        'prefetch_factor': None,
        'persistent_workers': False,
    }
    return build_dataloader(config, _tokenizer(), BATCH_SIZE).dataloader


def _tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer, which the loader asks for its padding token alone."""
    from tokenizers import Tokenizer, models

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({'<pad>': 0}, unk_token='<pad>')), pad_token='<pad>'
    )

"""Runs of one llm-foundry YAML under every kind of parallelism, in the processes it is launched in.

Started by test_parallel.py: `composer -n 2 parallel_runs.py OUTPUT TST_YAML BASELINE_YAML OVERRIDE...`. Rank 0 writes
what the runs came to, as JSON.
"""

import gc
import json
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from composer.core import DataSpec
from composer.loggers import InMemoryLogger
from composer.models import HuggingFaceModel
from composer.utils import dist
from llmfoundry.command_utils.train import train_from_yaml
from streaming import MDSWriter, StreamingDataset
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp._common_utils import clean_tensor_name
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module
from torch.nn import functional

from common.profiled import Collectives
from composer_tst import TokenSuperposition
from composer_tst.functional import fold_batch, superposed
from composer_tst.ops import superposed as superposing

FULL_SHARD = ['fsdp_config.sharding_strategy=FULL_SHARD']
CHECKPOINTED = [*FULL_SHARD, 'fsdp_config.activation_checkpointing=true']
TIED = ['model.tie_word_embeddings=true']
SEQUENCE = ['algorithms.token_superposition.expand=sequence']


class Case(NamedTuple):
    """A run on two processes, and the run on two that it must equal; if none, the same on one process."""

    overrides: list[str]
    fsdp_version: int = 1
    equals: str | None = None


CASES = {
    'ddp': Case([]),
    'ddp, packed, uneven microbatches': Case(
        [
            'device_train_microbatch_size=3',
            'train_loader.dataset.eos_token_id=222',  # a space: many short sequences in a row
            'train_loader.dataset.override_eos_token_id_mismatch_error=true',
            'model.attn_config.attn_uses_sequence_id=true',
        ]
    ),
    'ddp, tied': Case(TIED),
    'fsdp1': Case(FULL_SHARD, 1, 'ddp'),
    'fsdp1, tied, shard_grad_op': Case([*TIED, 'fsdp_config.sharding_strategy=SHARD_GRAD_OP'], 1, 'ddp, tied'),
    'fsdp2': Case(FULL_SHARD, 2, 'ddp'),
    'fsdp2, tied, checkpointed, mixed': Case([*TIED, *CHECKPOINTED, 'model.init_device=mixed'], 2, 'ddp, tied'),
    # Weights made on the meta device are drawn otherwise than on a single process.
    'fsdp1, checkpointed, meta': Case([*CHECKPOINTED, 'model.init_device=meta'], 1, 'fsdp2, checkpointed, meta'),
    'fsdp2, checkpointed, meta': Case([*CHECKPOINTED, 'model.init_device=meta'], 2, 'fsdp1, checkpointed, meta'),
    # Which rows a process joins depends on the rows that it is dealt.
    'ddp, sequence': Case(SEQUENCE, 1, 'fsdp2, sequence'),
    'fsdp2, sequence': Case([*FULL_SHARD, *SEQUENCE], 2, 'ddp, sequence'),
}


def weights_of(model: torch.nn.Module) -> dict[str, float]:
    """The sum of the magnitudes of each parameter, whole, under its name in a model that is not wrapped."""
    wrapped = any(isinstance(module, FSDP1) for module in model.modules())
    with FSDP1.summon_full_params(model, writeback=False) if wrapped else nullcontext():
        weights = {}
        for name, weight in model.named_parameters():
            whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
            weights[clean_tensor_name(name).removeprefix('module.')] = float(whole.detach().double().abs().sum())
    return weights


def run(yaml: str, overrides: list[str]) -> dict[str, Any]:
    trainer = train_from_yaml(yaml, overrides)
    logger = next(d for d in trainer.logger.destinations if isinstance(d, InMemoryLogger))
    return {
        'losses': [float(value) for _, value in logger.data['loss/train/total']],
        'eval': [float(value) for _, value in logger.data['metrics/eval/LanguageCrossEntropy']],
        'weights': weights_of(trainer.state.model),
        'counts': {
            key: [float(value) for _, value in logger.data[f'superposition/{key}']]
            for key in ('bag_size', 'data_tokens', 's_tokens', 'samples_left_out')
            if f'superposition/{key}' in logger.data
        },
    }


def counts_of_epochs(added_later: bool = False) -> dict[str, list[float]]:
    """What is counted where a run in epochs leaves samples out, on any ranks, and drops the ends of rows.

    Args:
        added_later: Whether the algorithm is added to a Trainer that is made, and has wrapped its model.
    """
    from common.trainers import Rows, llama, logged, make_trainer

    dataset = Rows(22, 9)
    ranks = dist.get_world_size()
    sampler = dist.get_sampler(dataset, drop_last=True)
    loader = torch.utils.data.DataLoader(dataset, batch_size=4 // ranks, sampler=sampler, drop_last=True)
    algorithm = TokenSuperposition(4, '0.5dur', expand='batch')
    trainer, logger = make_trainer(llama(), loader, None if added_later else algorithm, '3ep')
    if added_later:
        trainer.state.algorithms.append(algorithm)
    trainer.fit()
    keys = ('bag_size', 'data_tokens', 's_tokens', 'samples_left_out')
    return {key: logged(logger, f'superposition/{key}') for key in keys}


def epochs_of_unequal_length() -> list[float]:
    """The bag sizes of a run of which one process has less data: Composer ends the epoch of all with it."""
    from common.trainers import Rows, llama, logged, make_trainer

    class Iterated(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            rows = Rows(40 if dist.get_global_rank() == 0 else 24, 9)
            yield from (rows[index] for index in range(len(rows)))

    loader = torch.utils.data.DataLoader(Iterated(), batch_size=4, drop_last=True)
    trainer, logger = make_trainer(llama(), loader, TokenSuperposition(3, '3ba'), '8ba')
    trainer.fit()
    return logged(logger, 'superposition/bag_size')


def loss_of_all_ranks() -> list[float]:
    """The losses of a run whose loss reduces over ranks, of which one has rows of another length without labels."""
    from common.trainers import Rows, llama, logged, make_trainer

    class Labels(Rows):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            row = super().__getitem__(index)
            if index == 1:  # the first row of rank 1
                row['labels'] = torch.full_like(row['labels'], -100)
            return row

    class Reduces(HuggingFaceModel):
        def loss(self, outputs: Any, batch: Any) -> torch.Tensor:
            targets = batch['labels'][:, 1:].flatten()
            count = targets.ne(-100).sum().float()
            dist.all_reduce(count)
            logits = outputs['logits'][:, :-1].flatten(0, 1)
            return functional.cross_entropy(logits, targets, reduction='sum') / count * dist.get_world_size()

    model: Any = llama()
    model.__class__ = Reduces
    dataset = Labels(48, 12 - 4 * dist.get_global_rank())
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, sampler=dist.get_sampler(dataset))
    stack = TokenSuperposition(3, '2ba', expand='none')
    trainer, logger = make_trainer(model, loader, stack, '4ba', device_train_microbatch_size=1)
    trainer.fit()
    return logged(logger, 'loss/train/total')


def resumed_with_replicated_rows(folder: Path) -> list[list[float]]:
    """The losses of a run on processes that read the same rows, and of one that goes on from its second step."""
    from common.trainers import llama, logged, make_trainer

    if dist.get_global_rank() == 0:
        with MDSWriter(out=str(folder / 'rows'), columns={'tokens': 'ndarray:int64:12'}) as out:
            for first in range(48):
                out.write({'tokens': np.arange(first, first + 12)})
    dist.barrier()

    def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(np.stack([row['tokens'] for row in rows]))
        return {'input_ids': ids, 'labels': ids.clone()}

    def losses(load: Path | None) -> list[float]:
        ranks = dist.get_world_size()
        rows = StreamingDataset(local=str(folder / 'rows'), batch_size=4, replication=ranks, num_canonical_nodes=1)
        loader = torch.utils.data.DataLoader(rows, batch_size=4, collate_fn=collate, drop_last=True)
        spec = DataSpec(loader, get_num_samples_in_batch=lambda batch: len(batch['input_ids']) / ranks)
        saves = {'save_folder': str(folder / 'saved'), 'save_interval': '2ba', 'save_overwrite': True}
        trainer, logger = make_trainer(
            llama(), spec, TokenSuperposition(3, '3ba'), '2ep', load_path=load and str(load), **saves
        )
        trainer.fit()
        return logged(logger, 'loss/train/total')

    whole = losses(None)
    return [whole, losses(folder / 'saved' / 'ep0-ba2-rank0.pt')]


def tensor_parallel_embedding() -> str:
    """What superposition says to an embedding of which each process has a part."""
    from common.trainers import llama

    model = llama()
    mesh = init_device_mesh('cpu', (dist.get_world_size(),))
    parallelize_module(model.model, mesh, {'model.embed_tokens': RowwiseParallel(input_layouts=Replicate())})
    batch = fold_batch({key: torch.ones(4, 6, dtype=torch.long) for key in ('input_ids', 'labels')}, 2)
    try:
        with superposed(model, batch) as inputs:
            model(inputs)
    except ValueError as error:
        return str(error)
    return ''


def main() -> None:
    torch.set_num_threads(1)
    gc.freeze()  # a training collects garbage as it begins: not among all that was imported
    # FSDP1 asks CUDA for the device, and Composer makes parameters there that were on the meta device: on a CPU,
    # that is all that stands in the way of both.
    torch.cuda.current_device = lambda: torch.device('cpu')  # type: ignore
    to_empty = torch.nn.Module.to_empty
    torch.nn.Module.to_empty = lambda self, *, device, recurse=True: to_empty(self, device='cpu', recurse=recurse)

    output, yaml, plain_yaml, *overrides = sys.argv[1:]
    results: dict[str, Any] = {'runs': {}, 'collectives': {}}
    for name, case in CASES.items():
        os.environ['FSDP_VERSION'] = str(case.fsdp_version)
        results['runs'][name] = run(yaml, [*overrides, *case.overrides])
        if name in ('ddp', 'fsdp1', 'fsdp2'):
            # As a run begins, a watched pass and a pass of the first batch have their own.
            watched = mock.patch.object(superposing, 'is_watched', return_value=True)
            checked = mock.patch('composer_tst.algorithm.check_first_batch')
            with watched, checked, Collectives() as collectives:
                run(yaml, [*overrides, *case.overrides])
            plain = [override for override in overrides if not override.startswith('algorithms')]
            with Collectives() as of_plain_run:
                run(plain_yaml, [*plain, *case.overrides])
            results['collectives'][name] = collectives.counts, of_plain_run.counts
    results['counts of epochs, added later'] = counts_of_epochs(added_later=True)
    results['tensor parallel embedding'] = tensor_parallel_embedding()
    results['counts of epochs'] = counts_of_epochs()
    results['a loss of all ranks'] = loss_of_all_ranks()
    results['epochs of unequal length'] = epochs_of_unequal_length()
    results['replicated rows'] = resumed_with_replicated_rows(Path(output).parent)
    if dist.get_global_rank() == 0:
        Path(output).write_text(json.dumps(results))


if __name__ == '__main__':
    main()

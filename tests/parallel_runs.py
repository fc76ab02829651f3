"""Runs of one llm-foundry YAML under every kind of parallelism, in the processes it is launched in.

Started by test_parallel.py through the composer launcher: `composer -n N parallel_runs.py FOLDER OVERRIDE...`.
Rank 0 writes FOLDER/ranksN.json: for each run its losses, its last weights, and the collectives it called.
"""

import json
import os
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from composer.loggers import InMemoryLogger
from composer.utils import dist
from llmfoundry.command_utils.train import train_from_yaml
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp._common_utils import clean_tensor_name
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

from composer_tst.attach import Superposition
from composer_tst.folding import fold_batch

torch.set_num_threads(1)
# FSDP1 asks CUDA for the device, and Composer makes parameters there that were on the meta device: on a CPU,
# that is all that stands in the way of both.
torch.cuda.current_device = lambda: torch.device('cpu')  # type: ignore
to_empty = torch.nn.Module.to_empty
torch.nn.Module.to_empty = lambda self, *, device, recurse=True: to_empty(self, device='cpu', recurse=recurse)

# Overrides, and whether FSDP is FSDP2. llm-foundry leaves the parallelism out in a single process.
CASES: dict[str, tuple[list[str], bool]] = {
    'ddp': ([], False),
    'ddp, packed, uneven microbatches': (
        [
            'device_train_microbatch_size=3',
            'train_loader.dataset.eos_token_id=0',
            'model.attn_config.attn_uses_sequence_id=true',
        ],
        False,
    ),
    'fsdp1 full_shard': (['fsdp_config.sharding_strategy=FULL_SHARD'], False),
    'fsdp1 shard_grad_op': (['fsdp_config.sharding_strategy=SHARD_GRAD_OP'], False),
    'fsdp2': (['fsdp_config.sharding_strategy=FULL_SHARD'], True),
    'fsdp2, tied': (['fsdp_config.sharding_strategy=FULL_SHARD', 'model.tie_word_embeddings=true'], True),
    'fsdp1, tied': (['fsdp_config.sharding_strategy=FULL_SHARD', 'model.tie_word_embeddings=true'], False),
    'fsdp1, meta': (
        [
            'fsdp_config.sharding_strategy=FULL_SHARD',
            'fsdp_config.activation_checkpointing=true',
            'model.init_device=meta',
        ],
        False,
    ),
    'fsdp2, meta': (
        [
            'fsdp_config.sharding_strategy=FULL_SHARD',
            'fsdp_config.activation_checkpointing=true',
            'model.init_device=meta',
        ],
        True,
    ),
    'fsdp2, mixed': (
        [
            'fsdp_config.sharding_strategy=FULL_SHARD',
            'fsdp_config.activation_checkpointing=true',
            'model.init_device=mixed',
        ],
        True,
    ),
}


class Collectives(TorchDispatchMode):
    """Counts the collectives that are called, from Python or from DDP's reducer."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if 'c10d' in func.namespace:
            self.counts[func.__name__] += 1
        return func(*args, **(kwargs or {}))


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
    }


def tensor_parallel_embedding() -> str:
    """What superposition says to an embedding of which each process has a part."""
    from trainers import llama

    model = llama()
    mesh = init_device_mesh('cpu', (dist.get_world_size(),))
    parallelize_module(model.model, mesh, {'model.embed_tokens': RowwiseParallel(input_layouts=Replicate())})
    superposition = Superposition(model)
    batch = fold_batch({key: torch.ones(4, 6, dtype=torch.long) for key in ('input_ids', 'labels')}, 2)
    try:
        model(batch)
    except ValueError as error:
        return str(error)
    finally:
        superposition.remove()
    return ''


def main() -> None:
    folder, yaml, plain_yaml, *overrides = sys.argv[1:]
    results: dict[str, Any] = {'runs': {}, 'collectives': {}}
    for name, (case, fsdp2) in list(CASES.items())[int(os.environ.get('SKIP', 0)) :]:
        os.environ['FSDP_VERSION'] = '2' if fsdp2 else '1'
        results['runs'][name] = run(yaml, [*overrides, *case])
        print('done', name, results['runs'][name]['losses'], flush=True)
    if dist.get_world_size() > 1:
        results['tensor parallel embedding'] = tensor_parallel_embedding()
        for name in ('ddp', 'fsdp1 full_shard', 'fsdp2'):
            case, fsdp2 = CASES[name]
            os.environ['FSDP_VERSION'] = '2' if fsdp2 else '1'
            for which in (yaml, plain_yaml):
                with Collectives() as collectives:
                    run(which, [*(o for o in overrides if which == yaml or not o.startswith('algorithms')), *case])
                results['collectives'].setdefault(name, []).append(collectives.counts)
                print(name, collectives.counts, flush=True)
    if dist.get_global_rank() == 0:
        (Path(folder) / f'ranks{dist.get_world_size()}.json').write_text(json.dumps(results))


if __name__ == '__main__':
    main()

"""A plain loop of two processes under every kind of sharding: `torchrun --nproc-per-node 2 sharded_loops.py OUTPUT`.

Started by ops/test_sharded.py. Rank 0 writes what each case came to, as JSON: the largest relative error of a gradient
against the definition on one process, or the sentence that refused it.
"""

import copy
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp._common_utils import clean_tensor_name
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

from common import reference
from common.profiled import Collectives
from composer_tst import functional as F_tst
from composer_tst.ops import watch

V, D, S = 40, 16, 2


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.checkpointed = nn.Linear(D, D), False

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed:
            found: Any = checkpoint(self.after, x, use_reentrant=False)
            return found
        return self.after(x)

    def after(self, x: Tensor) -> Tensor:
        return x + self.mix(x).tanh().cumsum(1)


class Model(nn.Module):
    """A decoder of one's own with value embeddings, tied or not. ``how`` says what it does wrong."""

    def __init__(self, tied: bool = False, how: str = ''):
        super().__init__()
        torch.manual_seed(1)
        self.wte, self.value, self.how = nn.Embedding(V, D), nn.Embedding(V, D), how
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = nn.BatchNorm1d(D), nn.Linear(D, V, bias=False)
        if tied:
            self.head.weight = self.wte.weight

    def get_input_embeddings(self) -> nn.Embedding:
        return self.wte

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.wte(input_ids)
        if self.how == 'documents':
            x = x * (input_ids == 7).cumsum(1)[..., None]
        if self.how == 'in place':
            input_ids.fill_(3)
        x = x * self.value(input_ids.roll(1, 1))
        for block in self.blocks:
            x = block(x)
        if self.how == 'norm':
            x = self.norm(x.flatten(0, 1)).view(x.shape)
        return self.head(x)


def ddp(model: Any) -> nn.Module:
    return DDP(model, find_unused_parameters=True)


def fsdp1(model: Any, own: bool = False, **options: Any) -> nn.Module:
    units = {Block, nn.Embedding} if own else {Block}
    return FSDP1(model, auto_wrap_policy=ModuleWrapPolicy(units), device_id=torch.device('cpu'), **options)


def fsdp2(model: Any, own: bool = False, **options: Any) -> nn.Module:
    options['mesh'] = init_device_mesh('cpu', (dist.get_world_size(),))
    for module in (*([model.wte, model.value] if own else []), *model.blocks):
        fully_shard(module, **options)
    return fully_shard(model, **options)  # pyright: ignore


class Case(NamedTuple):
    wrap: Callable[[Any], nn.Module]
    tied: bool = False
    checkpointed: bool = False
    compiled: bool = False
    tolerance: float = 1e-4
    how: str = ''


HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
CASES = {
    'ddp': Case(ddp),
    'ddp, tied, checkpointed': Case(ddp, tied=True, checkpointed=True),
    'ddp, compiled': Case(ddp, compiled=True),
    'fsdp1': Case(fsdp1, tolerance=1e-3),
    'fsdp1, tied, original parameters': Case(functools.partial(fsdp1, use_orig_params=True), True, tolerance=1e-3),
    'fsdp1, embeddings of their own': Case(functools.partial(fsdp1, own=True), False, True, tolerance=1e-3),
    'fsdp2': Case(fsdp2),
    'fsdp2, tied, checkpointed': Case(fsdp2, tied=True, checkpointed=True),
    'fsdp2, embeddings of their own': Case(functools.partial(fsdp2, own=True)),
    'fsdp2, embeddings of their own, checkpointed': Case(functools.partial(fsdp2, own=True), checkpointed=True),
    'fsdp2, kept whole': Case(functools.partial(fsdp2, own=True, reshard_after_forward=False)),
    'fsdp2, compiled': Case(fsdp2, compiled=True),
    'fsdp2, bfloat16': Case(functools.partial(fsdp2, mp_policy=HALF), tolerance=0.05),
    'fsdp2, bfloat16, own embeddings': Case(functools.partial(fsdp2, own=True, mp_policy=HALF), tolerance=0.05),
    'fsdp2, offloaded': Case(functools.partial(fsdp2, offload_policy=CPUOffloadPolicy(pin_memory=False))),
    'documents, ddp': Case(ddp, how='documents'),
    'documents, fsdp1': Case(fsdp1, how='documents'),
    'documents, fsdp2': Case(functools.partial(fsdp2, own=True), how='documents'),
    'in place, ddp': Case(ddp, how='in place'),
    'in place, fsdp2': Case(fsdp2, how='in place'),
}  # fmt: skip


def fold_of(rank: int) -> dict[str, Any]:
    ids = torch.randint(V, (4, 6), generator=torch.Generator().manual_seed(rank))
    mask = (torch.arange(6) < torch.tensor([[6], [3], [6], [1]])).long()
    return F_tst.fold_batch({'input_ids': ids, 'attention_mask': mask} if rank else {'input_ids': ids}, S)


def definition(model: Any, plain: bool) -> dict[str, Tensor]:
    """The gradients on one process, the mean over the ranks' batches; of plain tokens, or of bags."""
    gradients: dict[str, Tensor] = {}
    for rank in range(dist.get_world_size()):
        copied, folded = copy.deepcopy(model), fold_of(rank)
        if plain:
            copied(folded['input_ids'][..., 0]).square().mean().backward()
        else:
            rows = reference.rows_of(folded)
            copied.wte, copied.value = reference.Extended(copied.wte, rows), reference.Extended(copied.value, rows)
            ids = torch.arange(V, V + folded['labels'][..., 0].numel()).view(folded['labels'].shape[:2])
            reference.multi_hot_loss(copied(ids), rows, [1.0] * S).backward()
        for name, p in copied.named_parameters():
            if p.grad is not None:
                name = name.replace('.embedding', '')
                gradients[name] = gradients.get(name, torch.zeros(())) + p.grad / dist.get_world_size()
    return gradients


def gradients_of(model: nn.Module, wrapped: nn.Module) -> dict[str, Tensor]:
    """Whole gradients under their names in a model that is not wrapped."""
    if isinstance(wrapped, FSDP1):  # which gives whole weights alone: the gradient is what a step takes off them
        before = weights_of(wrapped)
        with torch.no_grad():
            for sign in (-1, 1):
                for p in wrapped.parameters():
                    if p.grad is not None:
                        p.add_(p.grad, alpha=sign)
                if sign == -1:
                    after = weights_of(wrapped)
        found = {name: before[name] - after[name] for name in before}
    else:
        found = {
            name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad.clone()
            for name, p in model.named_parameters()
            if p.grad is not None
        }
    return {name: gradient for name, gradient in found.items() if gradient.any()}


def weights_of(wrapped: nn.Module) -> dict[str, Tensor]:
    with FSDP1.summon_full_params(wrapped, writeback=False):
        return {clean_tensor_name(name): p.detach().clone() for name, p in wrapped.named_parameters()}


def error(mine: dict[str, Tensor], expected: dict[str, Tensor], scale: float) -> float:
    assert mine.keys() == expected.keys(), (sorted(mine), sorted(expected))
    errors = [
        float(torch.linalg.norm(mine[name] / scale - value) / torch.linalg.norm(value))
        for name, value in expected.items()
    ]
    return max(errors)


def make(case: Case) -> tuple[Any, nn.Module, Any]:
    model = Model(case.tied, case.how)
    for block in model.blocks:
        block.checkpointed = case.checkpointed  # pyright: ignore
    plain = copy.deepcopy(model)
    wrapped = case.wrap(model)
    if case.compiled:
        wrapped = torch.compile(wrapped, backend='aot_eager')  # pyright: ignore
    return plain, model, wrapped


def step(wrapped: Any, folded: dict[str, Any]) -> None:
    with F_tst.superposed(wrapped, folded) as inputs:
        logits = wrapped(**inputs)
        F_tst.multi_hot_cross_entropy(logits.flatten(0, 1), folded['labels'].flatten(0, 1)).backward()


def run(case: Case) -> dict[str, Any]:
    """The error of a gradient in two passes, and the collectives of a pass, of bags and of tokens."""
    torch._dynamo.reset()
    folded = fold_of(dist.get_rank())
    # gloo's reduce-scatter of torch 2.7 sums where it should average: FSDP2's gradients on a CPU are too large, in
    # plain training, too. So they are measured by those.
    plain, model, wrapped = make(case._replace(compiled=False))
    tokens = folded['input_ids'][..., 0]
    if not case.how:
        wrapped(tokens).square().mean().backward()
        found, expected = gradients_of(model, wrapped), definition(plain, plain=True)
        name = 'wte.weight' if case.tied else 'head.weight'
        scale = round(float(torch.linalg.norm(found[name]) / torch.linalg.norm(expected[name])))
        assert scale in (1, 2)
        assert error(found, expected, scale) < case.tolerance
    plain, model, wrapped = make(case)
    try:
        errors = []
        for _ in range(2):
            wrapped.zero_grad()
            step(wrapped, folded)
            errors.append(error(gradients_of(model, wrapped), definition(plain, plain=False), scale))
    except ValueError as refused:
        return {'refused': str(refused), 'given back': type(model.wte).__name__}
    with Collectives() as of_bags:
        step(wrapped, folded)
    with Collectives() as of_tokens:
        wrapped(tokens).square().mean().backward()
    return {'errors': errors, 'of bags': of_bags.counts, 'of tokens': of_tokens.counts}


def buffers_of_ddp(watched: bool) -> list[float]:
    """DDP hands rank 0's buffers round in a pass that follows one with a gradient."""
    model = Model(how='norm')
    wrapped = ddp(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    folded = fold_of(dist.get_rank())
    if not watched:
        watch._WATCHED[True, True].add(wrapped)
    for turn in range(3):  # another pass would hand them round again
        optimizer.zero_grad()
        if turn < 2:
            wrapped(folded['input_ids'][..., 0]).square().mean().backward()
        else:
            step(wrapped, folded)
        optimizer.step()
    sums = torch.stack([value.double().sum() for value in (*model.parameters(), *model.buffers())])
    each = [torch.zeros_like(sums) for _ in range(dist.get_world_size())]
    dist.all_gather(each, sums.detach())
    return torch.cat(each).tolist()


def buffer_of_fsdp1() -> str:
    """FSDP1 casts buffers in its first call, for all calls that follow."""
    model: Any = Model()
    model.blocks[0].register_buffer('scale', torch.ones(1))
    step(fsdp1(model, mixed_precision=MixedPrecision(buffer_dtype=torch.bfloat16)), fold_of(dist.get_rank()))
    return str(dict(model.named_buffers())['blocks.0._fsdp_wrapped_module.scale'].dtype)


class Keeps(Model):
    """Assigns a buffer anew, and writes to a view of another."""

    mean: Tensor
    sums: Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer('mean', torch.zeros(D))
        self.register_buffer('sums', torch.zeros(4))
        self.view = self.sums[1:3]

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        self.mean = self.mean * 0.9 + self.wte.weight.detach().mean()
        self.view += 1
        return super().forward(input_ids, attention_mask) + self.mean.sum() + self.sums.sum()


def buffers_of_fsdp1(watched: bool) -> list[float]:
    model = Keeps()
    wrapped, folded = fsdp1(model), fold_of(dist.get_rank())
    if not watched:
        watch._WATCHED[True, True].add(wrapped)
    for _ in range(2):
        step(wrapped, folded)
    return [value.double().sum().item() for value in (model.mean, model.sums, model.view)]


class Averages(Model):
    """Keeps a frozen, moving average of a weight."""

    def __init__(self):
        super().__init__()
        self.average = nn.Linear(D, D, bias=False).requires_grad_(False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        self.average.weight.mul_(0.5).add_(1)
        return self.average(super().forward(input_ids, attention_mask) @ self.value.weight) @ self.value.weight.T


def frozen_of_fsdp2(watched: bool) -> list[float]:
    model = Averages()
    fully_shard(model.average)
    wrapped, folded = fsdp2(model), fold_of(dist.get_rank())
    if not watched:
        watch._WATCHED[True, True].add(wrapped)
    step(wrapped, folded)
    whole: Any = model.average.weight
    return whole.full_tensor().flatten().tolist()


def checkpoint_of_fsdp2() -> list[str]:
    """The kinds of weights in a checkpoint that follows an evaluation. FSDP2 shards them by hooks of its first call."""
    model = Model()
    wrapped, folded = fsdp2(model), fold_of(dist.get_rank())
    step(wrapped, folded)
    with torch.no_grad():
        wrapped(folded['input_ids'][..., 0])
    weights = {name for name, _ in model.named_parameters()}
    return sorted({type(value).__name__ for name, value in wrapped.state_dict().items() if name in weights})


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group('gloo')
    results: dict[str, Any] = {name: run(case) for name, case in CASES.items()}
    results['buffers'] = [buffers_of_ddp(watched) for watched in (False, True)]
    results['cast buffer'] = buffer_of_fsdp1()
    results['buffers of fsdp1'] = [buffers_of_fsdp1(watched) for watched in (False, True)]
    results['frozen of fsdp2'] = [frozen_of_fsdp2(watched) for watched in (False, True)]
    results['checkpoint'] = checkpoint_of_fsdp2()
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == '__main__':
    main()

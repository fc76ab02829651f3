"""Token-superposition with FSDP2 (``fully_shard``) in a plain PyTorch loop, with torch alone.

    pip install --no-deps WHEEL      # beside any torch from 2.7; README says where the wheel is from
    torchrun --nproc-per-node 2 examples/fsdp2.py [STEPS]

It runs on GPUs (nccl), or without any (gloo). Each rank draws and folds its own rows. Superposition adds the same four
calls to the loop as without FSDP (examples/plain_pytorch.py). They are marked.

With gloo, torch 2.7 adds the gradients of the ranks up, and does not average them. Plain training has that bug too.
AdamW does not mind the scale; clip gradients only with nccl or a newer torch.
"""

import os
import sys
import sysconfig
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

from composer_tst import functional as F_tst

BAG_SIZE, SHARE = 6, 0.3
ROWS, LENGTH, WIDTH, HEADS, LAYERS = 8, 64, 64, 4, 2  # rows of a rank


class Model(nn.Module):
    """A decoder over bytes, whose output layer is its input embedding."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        options: dict[str, Any] = {'dropout': 0.0, 'activation': 'gelu', 'batch_first': True, 'norm_first': True}
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, **options) for _ in range(LAYERS)
        )
        self.norm = nn.LayerNorm(WIDTH)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, L) bytes to (B, L, 256) logits."""
        length, device = input_ids.shape[1], input_ids.device
        x = self.tokens(input_ids) + self.positions(torch.arange(length, device=device))
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=device)
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return self.norm(x) @ self.tokens.weight.t()


def source() -> list[dict[str, Tensor]]:
    """The standard library's top-level modules as bytes, in rows ``(L,)``."""
    files = sorted(Path(sysconfig.get_paths()['stdlib']).glob('*.py'))
    data = torch.frombuffer(bytearray(b''.join(file.read_bytes() for file in files)), dtype=torch.uint8)
    return [{'input_ids': row} for row in data.unfold(0, LENGTH, LENGTH).long()]


def batches_of(rank: int, ranks: int) -> Iterator[dict[str, Tensor]]:
    """A rank's plain batches, epoch after epoch."""
    dataset: Any = source()
    sampler = DistributedSampler(dataset, ranks, rank, seed=0, drop_last=True)
    loader = DataLoader(dataset, ROWS, sampler=sampler, drop_last=True)
    for epoch in count():
        sampler.set_epoch(epoch)
        yield from loader


def main(steps: int) -> None:
    """Train superposed, then plain; rank 0 prints the loss, averaged over the ranks."""
    device = torch.device('cuda', int(os.environ['LOCAL_RANK'])) if torch.cuda.is_available() else torch.device('cpu')
    if device.type == 'cuda':
        torch.cuda.set_device(device)
    dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
    rank, ranks = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)
    model = Model().to(device)
    mesh = init_device_mesh(device.type, (ranks,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))

    superposed_steps = int(SHARE * steps)
    # Superposition, 1 of 4: a superposed step draws 6 of the rank's batches as one.
    batches = F_tst.draw(batches_of(rank, ranks), lambda step: BAG_SIZE if step < superposed_steps else 1)
    for step, batch in zip(range(1, steps + 1), batches, strict=False):
        # 2 of 4: their rows become rows of bags, (6 * B, L) to (B, L, 6). With bags of 1, all this is plain training.
        folded = F_tst.fold_batch({key: value.to(device) for key, value in batch.items()}, batches.bag_size)
        # 3 of 4: in this block the embedding looks up the mean of a bag. FSDP gathers its weights as ever.
        with F_tst.superposed(model, folded, model.tokens) as inputs:
            logits = model(**inputs)
            # 4 of 4: each bag predicts the 6 bytes of the next one. The labels are shifted already.
            loss = F_tst.multi_hot_cross_entropy(logits.flatten(0, 1), folded['labels'].flatten(0, 1))
            loss.backward()  # in the block, so that recomputed activations look bags up too
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / ranks
        dist.all_reduce(mean)
        if rank == 0:
            kind = f'bags of {batches.bag_size}' if batches.bag_size > 1 else 'plain'
            print(f'step {step} ({kind}): train loss {mean.item():.4f}', flush=True)
    dist.destroy_process_group()


if __name__ == '__main__':
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)

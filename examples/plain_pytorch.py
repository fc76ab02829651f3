"""Token-superposition in a plain PyTorch loop: a byte-level transformer on Python's own source, with torch alone.

    pip install --no-deps WHEEL      # beside any torch from 2.7; README says where the wheel is from
    python examples/plain_pytorch.py [STEPS]

The first 30 % of the steps read bags of 6 bytes, the rest read bytes. Four calls are marked: they are all that
superposition adds to the loop. The model does not know of it.
"""

import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from composer_tst import functional as F_tst

BAG_SIZE, SHARE = 6, 0.3
ROWS, LENGTH, WIDTH, HEADS, LAYERS = 16, 128, 128, 4, 3
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


class Block(nn.Module):
    """Causal self-attention and a feed-forward network, each before a residual sum."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, d) to (B, L, d)."""
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.norms[0](x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Model(nn.Module):
    """A decoder over bytes, whose output layer is its input embedding."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks, self.norm = nn.Sequential(*(Block() for _ in range(LAYERS))), nn.LayerNorm(WIDTH)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, L) bytes to (B, L, 256) logits."""
        x = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        return self.norm(self.blocks(x)) @ self.tokens.weight.t()


def source() -> tuple[Tensor, Tensor]:
    """The standard library's top-level modules as bytes, to train and, its last twentieth, to validate on."""
    files = sorted(Path(sysconfig.get_paths()['stdlib']).glob('*.py'))
    data = torch.frombuffer(bytearray(b''.join(file.read_bytes() for file in files)), dtype=torch.uint8)
    return data[: -len(data) // 20], data[-len(data) // 20 :]


def random_batches(data: Tensor, rows: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """What stands for a loader: batches of ``rows`` random rows ``(rows, L)``, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(data) - LENGTH, (rows, 1), generator=generator)
        yield {'input_ids': data[starts + torch.arange(LENGTH)].long().to(DEVICE)}


def next_byte_loss(model: Model, ids: Tensor) -> float:
    """Plain evaluation, in either phase."""
    with torch.no_grad():
        return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


def main(steps: int) -> None:
    """Train superposed, then plain, and print the validation loss on plain bytes all along."""
    torch.manual_seed(0)
    superposed_steps = int(SHARE * steps)
    train, held_out = source()
    validation = next(random_batches(held_out, 64, seed=1))['input_ids']
    model = Model().to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))

    # Superposition, 1 of 4: a superposed step draws 6 batches as one.
    batches = F_tst.draw(random_batches(train, ROWS, seed=0), lambda step: BAG_SIZE if step < superposed_steps else 1)
    for step, batch in zip(range(1, steps + 1), batches, strict=False):
        # 2 of 4: their rows become rows of bags, (6 * B, L) to (B, L, 6). With bags of 1, all this is plain training.
        folded = F_tst.fold_batch(batch, batches.bag_size)
        # 3 of 4: in this block the embedding looks up the mean of a bag.
        with F_tst.superposed(model, folded, model.tokens) as inputs:
            logits = model(**inputs)
            # 4 of 4: each bag predicts the 6 bytes of the next one. The labels are shifted already.
            loss = F_tst.multi_hot_cross_entropy(logits.flatten(0, 1), folded['labels'].flatten(0, 1))
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (superposed_steps, steps) or step % 50 == 0:
            kind = f'bags of {batches.bag_size}' if batches.bag_size > 1 else 'plain'
            validation_loss = next_byte_loss(model, validation)
            print(f'step {step} ({kind}): train loss {loss.item():.3f}, validation loss {validation_loss:.3f}')


if __name__ == '__main__':
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 600)

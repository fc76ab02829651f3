"""Token-superposition in a plain PyTorch loop: a byte-level transformer on Python's own source, with torch alone.

    python examples/plain_pytorch.py [STEPS]

The first 30 % of the steps read bags of 6 bytes, the rest plain bytes. What superposition adds to a plain loop is
marked: three calls, and six times the data for a step.
"""

import sys
import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from composer_tst import functional as F_tst

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 600
BAG_SIZE, SUPERPOSED = 6, int(0.3 * STEPS)
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

    def forward(self, ids: Tensor) -> Tensor:
        """(B, L) bytes, or (B, L, s) bags of them, to (B, L, 256) logits."""
        # Superposition, 1 of 3: a bag is embedded as the mean of its tokens.
        x = F_tst.bag_embedding(self.tokens, ids) if ids.ndim == 3 else self.tokens(ids)
        x = x + self.positions(torch.arange(x.shape[1], device=ids.device))
        return self.norm(self.blocks(x)) @ self.tokens.weight.t()


def next_token_loss(model: Model, ids: Tensor) -> Tensor:
    """What a plain step minimises: each token predicts the next one."""
    return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def superposed_loss(model: Model, ids: Tensor) -> Tensor:
    """What a superposed step minimises, on s times the rows: each bag predicts the tokens of the next one."""
    # Superposition, 2 of 3: s rows become one row of bags, (s*B, L) to (B, L, s).
    batch = F_tst.fold_batch({'input_ids': ids}, bag_size=BAG_SIZE)
    logits = model(batch['input_ids'])
    # Superposition, 3 of 3: the cross-entropy with s targets.
    return F_tst.multi_hot_cross_entropy(logits.flatten(0, 1), batch['labels'].flatten(0, 1))


def source() -> tuple[Tensor, Tensor]:
    """The standard library's top-level modules as bytes, to train and, its last twentieth, to validate on."""
    files = sorted(Path(sysconfig.get_paths()['stdlib']).glob('*.py'))
    data = torch.frombuffer(bytearray(b''.join(file.read_bytes() for file in files)), dtype=torch.uint8)
    return data[: -len(data) // 20], data[-len(data) // 20 :]


def rows_of(data: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(count, L) random rows."""
    starts = torch.randint(len(data) - LENGTH, (count, 1), generator=generator)
    return data[starts + torch.arange(LENGTH)].long().to(DEVICE)


def main() -> None:
    """Train superposed, then plain, and print the validation loss on plain tokens all along."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    train, held_out = source()
    validation = rows_of(held_out, 64, generator)
    model = Model().to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    for step in range(STEPS):
        superposed = step < SUPERPOSED
        ids = rows_of(train, ROWS * BAG_SIZE if superposed else ROWS, generator)
        loss = superposed_loss(model, ids) if superposed else next_token_loss(model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 in (SUPERPOSED, STEPS) or (step + 1) % 50 == 0:
            with torch.no_grad():
                plain = next_token_loss(model, validation)
            kind = f'bags of {BAG_SIZE}' if superposed else 'plain'
            print(f'step {step + 1} ({kind}): train loss {loss.item():.3f}, validation loss {plain:.3f}')


if __name__ == '__main__':
    main()

"""The loss and the embedding, beside what they replace and the published listings."""

import importlib.util
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from composer_tst.ops.cross_entropy import multi_hot_cross_entropy
from composer_tst.ops.embedding import bag_embedding
from tools.benchmarks.measure import Call, Case, Other

BAG_SIZES = (2, 6, 16)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The plain step's loss, one target a row: (N, V) logits, upcast as autocast does, (N,) targets."""
    return F.cross_entropy(logits.float(), targets)


def loop_of_cross_entropies(logits: Tensor, targets: Tensor) -> Tensor:
    """The published listing of TST: (N, V) logits, (N, s) targets, one cross-entropy a target."""
    losses = [F.cross_entropy(logits.float(), targets[:, k]) for k in range(targets.shape[1])]
    return sum(losses, start=logits.new_zeros((), dtype=torch.float32)) / len(losses)


def one_log_softmax(logits: Tensor, targets: Tensor) -> Tensor:
    """The published listing of patch-level training (arXiv 2407.12665): one log-softmax, one nll a target."""
    log_probs = F.log_softmax(logits.float(), dim=-1)
    losses = [F.nll_loss(log_probs, targets[:, k]) for k in range(targets.shape[1])]
    return sum(losses, start=log_probs.new_zeros(())) / len(losses)


def loss_cases(device: torch.device) -> Iterator[Case]:
    """Forward and backward of the loss, down to the gradient of the logits."""
    gpu = device.type == 'cuda'
    for dtype in (torch.float32, torch.bfloat16):
        for vocabulary in (32000, 50257, 131072, 151936) if gpu else (32768, 50257, 131072):
            for bag_size in BAG_SIZES:
                rows = (1 << (28 if gpu else 23)) // vocabulary
                yield loss_case(device, dtype, rows, vocabulary, bag_size, peers=gpu and bag_size == 6)


def loss_case(device: torch.device, dtype: torch.dtype, rows: int, vocabulary: int, bag_size: int, peers: bool) -> Case:
    """One setting of the loss, with or without what is compiled or brings kernels of its own."""
    logits = torch.randn(rows, vocabulary, device=device).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (rows, bag_size), device=device)
    copy = torch.empty_like(logits, requires_grad=False)

    def gradient(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor = logits) -> Call:
        return lambda: torch.autograd.grad(loss(logits, targets), logits)

    def plain(logits: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(logits, targets[:, 0])

    others = [
        Other('one cross-entropy', gradient(plain), time_at_most=1.05, memory_at_most=1.0),
        Other(
            'TST listing: s cross-entropies',
            gradient(loop_of_cross_entropies),
            time_at_most={6: 1 / 7, 16: 1 / 20}.get(bag_size),
        ),
        Other('patch-level listing: one log-softmax, s nll', gradient(one_log_softmax)),
    ]
    if peers:
        others += [
            # Were it as fast as the kernels, they would not earn their place.
            Other('the same compiled', gradient(compiled(one_log_softmax))),
            Other('one cross-entropy, compiled', gradient(compiled(plain)), time_at_most=1.0),
        ]
        liger = liger_cross_entropy()
        if liger:
            # It writes the gradient over the logits, so it has its own.
            its = logits.detach().clone().requires_grad_()
            others.append(
                Other("one cross-entropy, Liger's", gradient(lambda logits, targets: liger(logits, targets[:, 0]), its))
            )
    # On a GPU the loss reads the logits twice and writes a gradient, and a copy reads and writes once.
    gpu = device.type == 'cuda'
    others.append(
        Other(
            'a copy of the logits',
            lambda: copy.copy_(logits.detach()),
            time_at_most=1.5 / 0.8 if gpu else None,
            moves=1.5 if gpu else None,
        )
    )
    setting = f'loss s={bag_size} V={vocabulary} N={rows} {_name(dtype)}'
    return Case(setting, gradient(multi_hot_cross_entropy), tuple(others))


def compiled(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The call in one compiled graph for each shape; an error where it would run without."""
    return torch.compile(call, fullgraph=True, dynamic=False)


def liger_cross_entropy() -> Callable[[Tensor, Tensor], Tensor] | None:
    """Liger-Kernel's cross-entropy where it is installed."""
    if not importlib.util.find_spec('liger_kernel'):
        return None
    return importlib.import_module('liger_kernel.transformers.functional').liger_cross_entropy


def loop_of_lookups(weight: Tensor, input_ids: Tensor) -> Tensor:
    """The published listing of TST: (T, s) ids, one float32 lookup a token of the bag."""
    total = F.embedding(input_ids[:, 0], weight).float()
    for k in range(1, input_ids.shape[1]):
        total = total + F.embedding(input_ids[:, k], weight).float()
    return (total / input_ids.shape[1]).to(weight.dtype)


def mean_of_lookups(weight: Tensor, input_ids: Tensor) -> Tensor:
    """The short way, through a (T, s, d) tensor."""
    return F.embedding(input_ids, weight).mean(-2)


def embedding_cases(device: torch.device) -> Iterator[Case]:
    """Forward and backward of the bag embedding, down to the gradient of the weight."""
    vocabulary, width, positions = (131072, 2048, 16384) if device.type == 'cuda' else (50257, 512, 4096)
    for dtype in (torch.float32, torch.bfloat16):
        for bag_size in BAG_SIZES:
            yield embedding_case(device, dtype, vocabulary, width, positions, bag_size)
        yield embedding_case(device, dtype, vocabulary, width, positions, 6, half_one_token=True)


def embedding_case(
    device: torch.device,
    dtype: torch.dtype,
    vocabulary: int,
    width: int,
    positions: int,
    bag_size: int,
    half_one_token: bool = False,
) -> Case:
    """One setting of the bag embedding, on tokens as frequent as those of text, or half of them the same one."""
    weight = torch.randn(vocabulary, width, device=device).to(dtype).requires_grad_()
    # Tokens of text: the k-th most frequent comes 1/k as often as the first.
    frequency = torch.arange(1.0, vocabulary + 1, device=device).reciprocal()
    input_ids = frequency.multinomial(positions * bag_size, replacement=True).view(positions, bag_size)
    if half_one_token:
        input_ids[torch.rand(positions, bag_size, device=device) < 0.5] = 0
    upstream = torch.randn(positions, width, device=device).to(dtype)

    def gradient(embed: Callable[[Tensor, Tensor], Tensor]) -> Call:
        return lambda: torch.autograd.grad(embed(weight, input_ids), weight, upstream)

    name = f'embedding s={bag_size} V={vocabulary} d={width} T={positions} {_name(dtype)}'
    return Case(
        name + ', half of all tokens one' * half_one_token,
        gradient(bag_embedding),
        (
            Other('TST listing: s lookups in float32', gradient(loop_of_lookups), time_at_most=1 / 5),
            Other('embedding(ids).mean(-2)', gradient(mean_of_lookups), time_at_most=1 / 1.5),
            # Whatever computes a dense gradient writes this first.
            Other("zeros like the weight's gradient", lambda: torch.zeros_like(weight)),
        ),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix('torch.')

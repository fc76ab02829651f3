"""Multi-hot cross-entropy against its definition, in value and gradient."""

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from common.launches import launches
from common.profiled import WAITING, allocated_above, deterministic, errors_at_waits, operators
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.utils._python_dispatch import TorchDispatchMode

from composer_tst.ops.cross_entropy import multi_hot_cross_entropy

IGNORED = -100
INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'


def definition(
    logits: Tensor, targets: Tensor, weights: Sequence[float] | None, upstream: Sequence[float] | None = None
) -> tuple[list[float], Tensor, float]:
    """Losses of the rows, gradient of sum(upstream * losses), and summed weight of the valid targets."""
    rows, vocabulary = logits.shape
    bag_size = targets.shape[1]
    weights = weights or [1.0] * bag_size
    losses, total = [], 0.0
    gradient = torch.zeros(rows, vocabulary, dtype=torch.float64)
    for n in range(rows):
        z = [float(logit) for logit in logits[n].tolist()]
        top = max(z)
        lse = top + math.log(math.fsum(math.exp(logit - top) for logit in z))
        probabilities = torch.tensor([math.exp(logit - lse) for logit in z], dtype=torch.float64)
        loss = 0.0
        for k in range(bag_size):
            y, w = int(targets[n, k]), weights[k] / sum(weights)
            if y == IGNORED:
                continue
            loss += w * (lse - z[y])
            total += w
            factor = w * (upstream[n] if upstream else 1.0)
            gradient[n] += factor * probabilities
            gradient[n, y] -= factor
        losses.append(loss)
    return losses, gradient, total


def problem(rows: int, vocabulary: int, bag_size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits and targets, with ignored targets, a row that has only those, and a bag of one token repeated."""
    generator = torch.Generator().manual_seed(rows * vocabulary + bag_size)
    logits = 3 * torch.randn(rows, vocabulary, generator=generator)
    targets = torch.randint(0, vocabulary, (rows, bag_size), generator=generator)
    targets[torch.rand(rows, bag_size, generator=generator) < 0.2] = IGNORED
    if rows > 2:
        targets[0] = IGNORED
        targets[1] = vocabulary - 1
        targets[2, 0] = targets[2, -1] = 0
    return logits.to(dtype).requires_grad_(), targets


class Seen(TorchDispatchMode):
    """The operators that are called."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def check(
    logits: Tensor,
    targets: Tensor,
    weights: Sequence[float] | None,
    device: torch.device,
    loss_of: Callable[..., Tensor] = multi_hot_cross_entropy,
) -> None:
    """All reductions, in value and gradient; a gradient may be off by its own rounding and no more."""
    upstream = [math.sin(n + 1) for n in range(len(targets))]
    losses, gradient, total = definition(logits.cpu(), targets, weights, upstream)
    logits, targets = logits.detach().to(device).requires_grad_(), targets.to(device)
    if (INTERPRETED or device.type == 'cuda') and logits.dtype != torch.float64:
        with torch.no_grad(), Seen() as seen:
            multi_hot_cross_entropy(logits, targets, weights)
        assert 'composer_tst.row_losses.default' in seen.names
    tolerance = {
        torch.float64: 1e-12,
        torch.float32: 1e-5,
        # Triton's interpreter cuts off what a GPU rounds.
        torch.bfloat16: 2 ** (-7 if INTERPRETED and device.type == 'cpu' else -8) + 1e-5,
        torch.float16: 2**-11 + 1e-5,
    }[logits.dtype]

    def compare(loss: Tensor, weighting: Tensor, value: Tensor, expected: Tensor) -> None:
        (mine,) = torch.autograd.grad((loss * weighting.to(device)).sum(), logits)
        assert mine.dtype == logits.dtype
        assert loss.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(loss.detach().cpu().double(), value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(mine.cpu().double(), expected, rtol=tolerance, atol=1e-7)

    each = torch.tensor(losses, dtype=torch.float64)
    none = loss_of(logits, targets, weights, reduction='none')
    compare(none, torch.tensor(upstream), each, gradient)
    _, gradient, _ = definition(logits.detach().cpu(), targets.cpu(), weights)
    one = torch.tensor(1.0)
    compare(loss_of(logits, targets, weights, reduction='sum'), one, each.sum(), gradient)
    divisor = total or 1.0
    compare(loss_of(logits, targets, weights), one, each.sum() / divisor, gradient / divisor)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ('rows', 'vocabulary', 'bag_size'),
    [(1, 7, 2), (1, 1, 3), (4, 2, 1), (3, 2, 6), (5, 7, 16), (6, 33, 3), (9, 64, 6), (2, 90, 32), (3, 70, 64)],
)
def test_equals_the_definition(rows: int, vocabulary: int, bag_size: int, dtype: torch.dtype, device: torch.device):
    logits, targets = problem(rows, vocabulary, bag_size, dtype)
    check(logits, targets, None, device)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('bag_size', [2, 6, 16] if INTERPRETED else range(2, 17))
@pytest.mark.parametrize(
    'weight', [lambda k: 1 / k, lambda k: math.exp(-k), lambda k: float(k == 1), lambda k: 3.0 * k]
)
def test_weights_count_by_their_share(weight, bag_size: int, dtype: torch.dtype, device: torch.device):
    logits, targets = problem(4, 19, bag_size, dtype)
    check(logits, targets, [weight(k) for k in range(1, bag_size + 1)], device)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('vocabulary', [8191, 8192, 8193, 50257, 262144])
def test_vocabularies_of_real_size(vocabulary: int, dtype: torch.dtype, device: torch.device):
    """A kernel's block has 8192 logits: a whole one, one short, one over, and many."""
    logits, targets = problem(3 if vocabulary < 100_000 else 1, vocabulary, 6, dtype)
    check(logits, targets, None, device)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_blocks_of_nothing_but_masked_tokens(dtype: torch.dtype, device: torch.device):
    logits, targets = problem(4, 9000, 4, dtype)
    with torch.no_grad():
        logits[:2, 8192:] = -math.inf
        logits[2:, :8192] = -math.inf
    targets[2:] = targets[2:].where(targets[2:] == IGNORED, 8500)
    check(logits, targets.clamp(max=8999).where((targets < 8192) | (torch.arange(4)[:, None] > 1), 5), None, device)


def test_rows_that_begin_past_2_31_elements(device: torch.device):
    """Rows 2**30 elements apart, of which the system lends the memory that is touched."""
    storage = torch.empty(2**31 + 32, dtype=torch.bfloat16, device=device)
    logits, targets = problem(3, 19, 4, torch.bfloat16)
    apart = storage.as_strided((3, 19), (2**30, 1))
    apart.copy_(logits.detach())
    apart.requires_grad_()
    upstream = torch.tensor([1.0, 2.0, 3.0], device=device)
    loss = multi_hot_cross_entropy(apart, targets.to(device), reduction='none')
    (gradient,) = torch.autograd.grad(loss, apart, upstream)
    losses, expected, _ = definition(logits.detach(), targets, None, upstream.tolist())
    torch.testing.assert_close(loss.detach().cpu().double(), torch.tensor(losses).double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.cpu().double(), expected, rtol=2**-7, atol=1e-7)


@pytest.mark.slow  # and takes 13 GB
def test_gradients_of_more_than_2_31_logits(device: torch.device):
    rows, vocabulary = 16500, 131072
    logits = torch.randn(rows, vocabulary, device=device, dtype=torch.bfloat16)
    targets = torch.randint(vocabulary, (rows, 4), device=device)
    z = logits.detach().requires_grad_()
    losses = multi_hot_cross_entropy(z, targets, reduction='none')
    (gradient,) = torch.autograd.grad(losses.sum(), z)
    for row in (0, 16383, 16384, 16499):
        expected, expected_gradient, _ = definition(logits[[row]].cpu(), targets[[row]].cpu(), None, [1.0])
        assert losses[row].item() == pytest.approx(expected[0], rel=1e-5)
        torch.testing.assert_close(gradient[[row]].cpu().double(), expected_gradient, rtol=2**-7, atol=1e-7)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_rows_beyond_one_chunk(dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr('composer_tst.ops.cross_entropy._CHUNK_ELEMENTS', 40)
    logits, targets = problem(7, 19, 4, dtype)
    check(logits, targets, None, device)


def test_one_target_is_the_cross_entropy_of_torch(device: torch.device):
    logits, targets = (tensor.to(device) for tensor in problem(8, 33, 1))
    expected = torch.nn.functional.cross_entropy(logits, targets[:, 0], ignore_index=IGNORED)
    torch.testing.assert_close(multi_hot_cross_entropy(logits, targets), expected)


def test_weights_are_a_list_or_a_tensor(device: torch.device):
    logits, targets = (tensor.to(device) for tensor in problem(5, 9, 3))
    loss = multi_hot_cross_entropy(logits, targets, [3.0, 2.0, 1.0])
    for weights in (torch.tensor([6, 4, 2]), torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64), (3, 2, 1)):
        torch.testing.assert_close(multi_hot_cross_entropy(logits, targets, weights), loss)


def test_another_ignore_index(device: torch.device):
    logits, targets = (tensor.to(device) for tensor in problem(6, 9, 3))
    expected = multi_hot_cross_entropy(logits, targets)
    padded = targets.masked_fill(targets == IGNORED, -1)
    assert torch.equal(multi_hot_cross_entropy(logits, padded, ignore_index=-1), expected)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_an_ignored_token_of_the_vocabulary(dtype: torch.dtype, device: torch.device):
    """Its column has its probability, and nothing of the targets."""
    logits, targets = problem(6, 9, 3, dtype)
    targets[3:5, 1] = 2
    check(
        logits,
        targets.masked_fill(targets == 2, IGNORED),
        [3.0, 2.0, 1.0],
        device,
        lambda logits, _, weights, **options: multi_hot_cross_entropy(
            logits, targets.masked_fill(targets == IGNORED, 2).to(device), weights, ignore_index=2, **options
        ),
    )


@pytest.mark.parametrize('reduction', ['none', 'sum', 'mean'])
def test_nothing_but_padding_is_zero_with_zero_gradient(reduction: str, device: torch.device):
    logits = torch.randn(3, 7, device=device, requires_grad=True)
    loss = multi_hot_cross_entropy(logits, torch.full((3, 4), IGNORED, device=device), reduction=reduction)
    loss.sum().backward()
    assert torch.equal(loss, torch.zeros_like(loss))
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_no_rows(device: torch.device):
    logits = torch.randn(0, 7, device=device, requires_grad=True)
    loss = multi_hot_cross_entropy(logits, torch.zeros(0, 4, dtype=torch.int64, device=device))
    loss.backward()
    assert loss == 0
    assert logits.grad is not None
    assert logits.grad.shape == (0, 7)


def test_masked_tokens_cost_nothing_unless_they_are_the_target(device: torch.device):
    logits = torch.tensor([[-math.inf, 1.0, 2.0]], device=device, requires_grad=True)
    loss = multi_hot_cross_entropy(logits, torch.tensor([[1, 2, IGNORED, 0]], device=device), [1, 1, 1, 0])
    loss.backward()
    lse = math.log(math.exp(1) + math.exp(2))
    assert loss.item() == pytest.approx(lse - 1.5)
    p = 1 / (1 + math.exp(1))
    torch.testing.assert_close(logits.grad, torch.tensor([[0.0, p - 0.5, 0.5 - p]], device=device))


def test_large_logits_do_not_overflow(device: torch.device):
    logits = torch.tensor([[3e4, 0.0, -3e4]], dtype=torch.float16, device=device, requires_grad=True)
    loss = multi_hot_cross_entropy(logits, torch.tensor([[0, 1]], device=device))
    loss.backward()
    assert loss.item() == pytest.approx(1.5e4)
    torch.testing.assert_close(logits.grad, torch.tensor([[0.5, -0.5, 0.0]], dtype=torch.float16, device=device))


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
def test_targets_whose_probability_underflows(dtype: torch.dtype, device: torch.device):
    logits, targets = problem(6, 19, 4, dtype)
    with torch.no_grad():
        logits[1] = torch.linspace(0, -400, 19)
        logits[3] = torch.linspace(-90, 0, 19)
    check(logits, targets, None, device)


@pytest.mark.parametrize('offset', [1e2, 1e4, -1e4])
def test_logits_of_a_row_may_share_an_offset(offset: float, device: torch.device):
    """The loss is that of their differences, exact in float32; a log-sum-exp in one number would be rounded."""
    logits, targets = problem(6, 19, 4)
    shifted = (logits.detach() + offset).requires_grad_()
    check(shifted, targets, [4.0, 3.0, 2.0, 1.0], device)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_logits_of_any_strides(dtype: torch.dtype, device: torch.device):
    targets = torch.randint(0, 7, (9, 4))
    rows = torch.randn(9, 14, dtype=dtype, device=device)
    one = torch.randn(9, 1, dtype=dtype, device=device).expand(9, 7)
    for logits in (rows[:, ::2], rows[:, 3:10], torch.randn(7, 9, dtype=dtype, device=device).t(), one):
        assert not logits.is_contiguous()
        check(logits, targets, None, device)


@pytest.mark.parametrize('dtype', [torch.int64, torch.int32])
@pytest.mark.parametrize('weights', [None, [1.0, 0.0, 0.5, 0.25]])
def test_targets_of_either_dtype_and_any_strides(weights: list[float] | None, dtype: torch.dtype, device: torch.device):
    logits, targets = problem(6, 19, 4)
    targets = targets.to(device, dtype)
    wide = torch.full((12, 8), 5, device=device, dtype=dtype)
    wide[::2, 1::2] = targets
    for view in (targets.t().contiguous().t(), wide[::2, 1::2], targets[:1].expand(6, 4), targets[:, :1].expand(6, 4)):
        assert not view.is_contiguous()
        check(logits, view, weights, device)


def test_targets_far_apart(device: torch.device):
    """Beyond the numbers of 32 bits, counted from the first."""
    if device.type == 'cpu':
        pytest.skip('8 GB, which the interpreter of Triton would copy')
    logits, targets = problem(2, 19, 3)
    far = torch.empty(2 * (1 << 30) + 2, dtype=torch.int32, device=device).as_strided((2, 3), (1, 1 << 30))
    far.copy_(targets)
    check(logits, far, None, device)


def test_an_ignored_number_that_targets_cannot_hold(device: torch.device):
    logits, targets = on(device, *problem(6, 19, 4))
    targets.clamp_(min=0)
    of = [
        multi_hot_cross_entropy(logits, targets.to(dtype), ignore_index=-(2**40))
        for dtype in (torch.int32, torch.int64)
    ]
    assert torch.equal(*of)


def test_weights_and_upstream_gradients_of_any_strides(device: torch.device):
    logits, targets = on(device, *problem(6, 19, 4))
    weights = torch.tensor([[4.0, 9.0], [3.0, 9.0], [2.0, 9.0], [1.0, 9.0]], device=device)[:, 0]
    upstream = torch.randn(6, 2, device=device)[:, 0]
    losses = multi_hot_cross_entropy(logits, targets, weights, reduction='none')
    (gradient,) = torch.autograd.grad(losses, logits, upstream)
    expected, expected_gradient, _ = definition(logits.cpu(), targets.cpu(), [4.0, 3.0, 2.0, 1.0], upstream.tolist())
    torch.testing.assert_close(losses.detach().cpu().double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.cpu().double(), expected_gradient, rtol=1e-5, atol=1e-7)


def on(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    """The tensors there, as leaves."""
    return [tensor.detach().to(device).requires_grad_(tensor.requires_grad) for tensor in tensors]


def test_logits_can_be_read_after_backward(device: torch.device):
    logits, targets = on(device, *problem(6, 19, 4))
    before = logits.detach().clone()
    multi_hot_cross_entropy(logits, targets).backward()
    assert torch.equal(logits, before)


def test_backward_twice_gives_the_same_gradient_twice(device: torch.device):
    logits, targets = on(device, *problem(6, 19, 4))
    loss = multi_hot_cross_entropy(logits, targets)
    loss.backward(retain_graph=True)
    assert logits.grad is not None
    once = logits.grad.clone()
    loss.backward()
    torch.testing.assert_close(logits.grad, 2 * once)


def test_there_is_no_second_derivative():
    logits, targets = problem(6, 19, 4)
    squared = multi_hot_cross_entropy(logits, targets).square()
    (gradient,) = torch.autograd.grad(squared, logits, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        gradient.sum().backward()


def test_weights_receive_no_gradient():
    logits, targets = problem(6, 19, 4)
    weights = torch.ones(4, requires_grad=True)
    multi_hot_cross_entropy(logits, targets, weights).backward()
    assert weights.grad is None


def test_autocast_changes_nothing(device: torch.device):
    logits, targets = on(device, *problem(6, 19, 4, torch.bfloat16))
    (gradient,) = torch.autograd.grad(multi_hot_cross_entropy(logits, targets), logits)
    with torch.autocast(device.type, torch.bfloat16):
        loss = multi_hot_cross_entropy(logits, targets)
        (inside,) = torch.autograd.grad(loss, logits)
    assert torch.equal(loss, multi_hot_cross_entropy(logits, targets))
    assert torch.equal(inside, gradient)


def test_gradient_scaling_saves_small_gradients(device: torch.device):
    logits, targets = on(device, *problem(6, 19, 4, torch.float16))
    scaler = GradScaler(device.type, init_scale=2.0**14)
    share = 2.0**-20  # as one microbatch of many: below what float16 resolves
    scaler.scale(multi_hot_cross_entropy(logits, targets) * share).backward()
    assert logits.grad is not None
    _, gradient, total = definition(logits.detach().cpu(), targets.cpu(), None)
    unscaled = logits.grad.cpu().double() / scaler.get_scale() / share
    torch.testing.assert_close(unscaled, gradient / total, rtol=2e-3, atol=2e-6)


def test_compiles_whole(device: torch.device):
    logits, targets = on(device, *problem(6, 19, 4, torch.bfloat16))
    compiled = torch.compile(multi_hot_cross_entropy, fullgraph=True, backend='aot_eager')
    expected = multi_hot_cross_entropy(logits, targets, [4, 3, 2, 1])
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    loss = compiled(logits, targets, [4, 3, 2, 1])
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient, rtol=2**-7, atol=1e-7)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_one_buffer_of_the_shape_of_the_logits_and_none_without_gradient(dtype: torch.dtype):
    rows, vocabulary = 48, 131072
    logits = torch.zeros(rows, vocabulary, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, vocabulary, (rows, 16))
    chunk = 8 << 20

    def step() -> None:
        torch.autograd.grad(multi_hot_cross_entropy(logits, targets), logits)

    assert allocated_above(chunk, step) == [4 * logits.numel()]  # float32
    with torch.no_grad():
        assert allocated_above(chunk, lambda: multi_hot_cross_entropy(logits, targets)) == []


def test_no_step_waits_for_values():
    logits, targets = problem(6, 19, 4)
    # Tensors without values, which raise where one is read. A CPU, with nothing to wait for, may read them.
    there = logits.detach().to('meta').requires_grad_()
    multi_hot_cross_entropy(there, targets.to('meta'), [4, 3, 2, 1]).backward()
    assert there.grad is not None
    with pytest.raises(RuntimeError, match='meta'):
        there.grad.sum().item()
    if INTERPRETED:
        used = operators(lambda: multi_hot_cross_entropy(logits, targets, [4, 3, 2, 1]).backward())
        assert used
        assert not used.keys() & WAITING


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_deterministic_algorithms_do_the_same_and_a_gpu_is_not_waited_for(dtype: torch.dtype, device: torch.device):
    logits, targets = on(device, *problem(6, 50257, 4, dtype))
    weights = torch.tensor([4.0, 3.0, 2.0, 1.0], device=device)

    def loss_and_gradient() -> tuple[Tensor, Tensor]:
        loss = multi_hot_cross_entropy(logits, targets, weights)
        return loss.detach(), torch.autograd.grad(loss, logits)[0]

    expected = loss_and_gradient()
    with errors_at_waits(device), deterministic():
        got = [loss_and_gradient() for _ in range(3)]
    for loss, gradient in got:
        assert torch.equal(loss, expected[0])
        assert torch.equal(gradient, expected[1])


@pytest.mark.parametrize('reduction', ['none', 'sum', 'mean'])
@pytest.mark.parametrize('dtype', [torch.int64, torch.int32])
@pytest.mark.parametrize('weights', [None, [4.0, 3.0, 2.0, 1.0], torch.tensor([4.0, 3.0, 2.0, 1.0])])
def test_two_kernels_forward_and_one_backward(weights: Any, dtype: torch.dtype, reduction: str, device: torch.device):
    if device.type == 'cpu' and not INTERPRETED:
        pytest.skip('the kernels are of a GPU, and of the interpreter of Triton')
    from composer_tst.ops import cross_entropy_triton

    logits, targets = on(device, *problem(6, 19, 4, torch.bfloat16))
    logits = logits.detach().t().contiguous().t().requires_grad_()  # a copy would be seen
    targets = targets.to(dtype).t().contiguous().t()
    weights = weights.to(device) if isinstance(weights, Tensor) else weights
    upstream = torch.ones(6 if reduction == 'none' else (), device=device)

    def forward() -> Tensor:
        return multi_hot_cross_entropy(logits, targets, weights, reduction=reduction)

    loss = forward()
    ahead = launches(forward, device, cross_entropy_triton)
    back = launches(
        lambda: torch.autograd.grad(loss, logits, upstream, retain_graph=True), device, cross_entropy_triton
    )
    # Where weights are a list, a GPU gets a copy of them.
    copies = int(device.type == 'cuda' and isinstance(weights, list))
    assert len(ahead) == {'none': 1, 'sum': 2, 'mean': 2}[reduction] + copies, ahead
    assert len(back) == 1, back
    if device.type == 'cpu':
        assert ahead == ['_row_losses', *{'none': [], 'sum': ['sum'], 'mean': ['_mean_of_rows']}[reduction]]
        assert back == ['_logits_gradient']


def test_what_an_operator_of_the_package_launches_is_counted(device: torch.device):
    def twice(x: Tensor) -> Tensor:
        return torch.empty_like(x).copy_(x).mul_(2)

    def to_float(x: Tensor) -> Tensor:
        return x.contiguous().to(torch.float64)

    copies = torch.library.custom_op('composer_tst::to_float', to_float, mutates_args=())
    transposed = torch.ones(3, 2, device=device).t()
    assert len(launches(lambda: copies(transposed), device)) == 2

    operator = torch.library.custom_op('composer_tst::twice', twice, mutates_args=())
    x = torch.ones(3, device=device)
    assert len(launches(lambda: operator(x.view(3, 1)[:, 0]), device)) == 2
    with errors_at_waits(device):
        assert torch.equal(operator(x), 2 * x)


@pytest.mark.parametrize(
    ('logits', 'targets', 'options', 'message'),
    [
        ((2, 3, 7), (6, 4), {}, r'logits must be \(N, V\), but are \(2, 3, 7\)'),
        ((6, 7), (6,), {}, r'targets must be \(6, s\) with s >= 1, but are \(6,\)'),
        ((6, 7), (5, 4), {}, r'targets must be \(6, s\) with s >= 1, but are \(5, 4\)'),
        ((6, 7), (6, 0), {}, r'targets must be \(6, s\) with s >= 1, but are \(6, 0\)'),
        ((6, 7), (6, 2), {'weights': [1]}, r'weights must be \(2,\), one per target, but are \(1,\)'),
        ((6, 7), (6, 2), {'weights': [1, -1]}, r'not negative and not all zero, but are \[1.0, -1.0\]'),
        ((6, 7), (6, 2), {'weights': [0, 0]}, r'not all zero, but are \[0.0, 0.0\]'),
        ((6, 7), (6, 2), {'weights': [1e-46, 1e-46]}, r'not all zero, but are \[1e-46, 1e-46\]'),
        ((6, 7), (6, 2), {'weights': [3e38, 3e38]}, r'must be finite'),
        ((6, 7), (6, 2), {'weights': [1, math.inf]}, r'must be finite'),
        ((6, 7), (6, 2), {'weights': [1, math.nan]}, r'must be finite'),
        ((6, 7), (6, 2), {'reduction': 'avg'}, r"must be 'none', 'sum' or 'mean', but is 'avg'"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(logits, targets, options, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        multi_hot_cross_entropy(torch.zeros(logits), torch.zeros(targets, dtype=torch.int64), **options)
    assert re.fullmatch(r'[^\n]+\.', str(caught.value))


@pytest.mark.parametrize('target', [7, -1, 10**9])
def test_targets_outside_the_vocabulary_raise(target: int, device: torch.device):
    if device.type == 'cpu':
        with pytest.raises(RuntimeError, match='out of bounds'):
            multi_hot_cross_entropy(torch.zeros(2, 7), torch.tensor([[0, 1], [2, target]]))
        return
    # In a process of its own: a GPU's process is lost with it.
    code = (
        'import torch; from composer_tst.functional import multi_hot_cross_entropy as loss\n'
        f"loss(torch.zeros(2, 7, device='cuda'), torch.tensor([[0, 1], [2, {target}]], device='cuda')).item()"
    )
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert 'device-side assert' in result.stderr

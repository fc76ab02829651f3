"""Bag embedding against its definition, in value and gradient."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from common.launches import launches
from common.profiled import WAITING, allocated_above, deterministic, errors_at_waits, operators
from torch import Tensor, nn

from composer_tst.ops.embedding import bag_embedding


def definition(
    weight: Tensor, input_ids: Tensor, mask: Tensor | None, upstream: Tensor, padding_idx: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(T, d) means of (T, s) ids and of their magnitudes, and the gradient of sum(upstream * means) in the weight."""
    means = torch.zeros(upstream.shape, dtype=torch.float64)
    magnitudes = torch.zeros_like(means)
    gradient = torch.zeros(weight.shape, dtype=torch.float64)
    for t, bag in enumerate(input_ids.tolist()):
        attended = [token for k, token in enumerate(bag) if mask is None or mask[t, k]]
        for token in attended:
            means[t] += weight[token].double() / len(attended)
            magnitudes[t] += weight[token].double().abs() / len(attended)
            if token != padding_idx:
                gradient[token] += upstream[t].double() / len(attended)
    return means, magnitudes, gradient


def attended(*shape: int) -> Tensor:
    """A mask whose first bag is empty and whose second is full."""
    mask = torch.rand(shape) < 0.6
    mask.view(-1, shape[-1])[0] = False
    mask.view(-1, shape[-1])[1] = True
    return mask


def check(embedding: nn.Embedding, input_ids: Tensor, mask: Tensor | None, device: torch.device) -> None:
    """Value to half a unit in the last place, gradient to that of the mean's gradient and of the sum."""
    there = copy.deepcopy(embedding).to(device)
    means = bag_embedding(there, input_ids.to(device), None if mask is None else mask.to(device))
    upstream = torch.randn(means.shape).to(means.dtype)
    (gradient,) = torch.autograd.grad(means, there.weight, upstream.to(device))
    means, gradient = means.detach().cpu(), gradient.cpu()
    assert means.dtype == gradient.dtype == embedding.weight.dtype
    assert means.shape == (*input_ids.shape[:-1], embedding.embedding_dim)
    bags, width = input_ids.reshape(-1, input_ids.shape[-1]), embedding.embedding_dim
    value, magnitude, expected = definition(
        embedding.weight.detach(),
        bags,
        None if mask is None else mask.reshape(bags.shape),
        upstream.reshape(-1, width),
        embedding.padding_idx,
    )
    unit = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-9, torch.float16: 2**-12}
    rounding = unit[means.dtype]
    # What is summed may cancel: each addition errs by up to half a unit of what has been added so far.
    summed = bags.shape[1] * (1e-16 if means.dtype == torch.float64 else 2**-24) * magnitude
    assert ((means.reshape(-1, width).double() - value).abs() <= 2 * rounding * value.abs() + summed).all()
    torch.testing.assert_close(gradient.double(), expected, rtol=4 * rounding, atol=4 * rounding)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('bag_size', [1, 2, 3, 6, 16])
def test_equals_the_definition(bag_size: int, masked: bool, dtype: torch.dtype, device: torch.device):
    embedding = nn.Embedding(11, 5, dtype=dtype)
    input_ids = torch.randint(0, 11, (2, 4, bag_size))
    check(embedding, input_ids, attended(2, 4, bag_size) if masked else None, device)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_the_row_of_padding_idx_counts_forward_and_learns_nothing(dtype: torch.dtype, device: torch.device):
    embedding = nn.Embedding(7, 5, padding_idx=3, dtype=dtype)
    nn.init.normal_(embedding.weight)
    input_ids = torch.randint(2, 5, (4, 6))
    check(embedding, input_ids, None, device)
    check(embedding, input_ids, attended(4, 6), device)


def test_gradient_is_that_of_lookups(device: torch.device):
    embedding = nn.Embedding(7, 5, padding_idx=3).to(device)
    input_ids = torch.randint(0, 7, (2, 3, 4)).to(device)
    (expected,) = torch.autograd.grad(embedding(input_ids).mean(-2).square().sum(), embedding.weight)
    means = bag_embedding(embedding, input_ids)
    (gradient,) = torch.autograd.grad(means.square().sum(), embedding.weight)
    torch.testing.assert_close(gradient, expected)
    assert gradient.layout == torch.strided


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_a_frequent_token_loses_none_of_its_gradient(dtype: torch.dtype, device: torch.device):
    # 4096 ones added in bfloat16 one by one stop at 256, and in float16 at 2048.
    weight = torch.zeros(3, 8, dtype=dtype, device=device, requires_grad=True)
    bag_embedding(weight, torch.ones(4096, 2, dtype=torch.int64, device=device)).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad[1].cpu(), torch.full((8,), 4096, dtype=dtype))


def test_bfloat16_is_summed_in_float32(device: torch.device):
    # In bfloat16 1 + 2**-8 is 1, so the sum would be 0.
    weight = torch.tensor([[1.0], [2**-8], [2**-8], [-1.0]], dtype=torch.bfloat16, device=device)
    assert bag_embedding(weight, torch.tensor([0, 1, 2, 3], device=device)).item() == 2**-9


def test_takes_a_module_or_a_weight_and_ids_of_any_shape():
    embedding = nn.Embedding(7, 5)
    input_ids = torch.randint(0, 7, (2, 3, 4))
    expected = bag_embedding(embedding, input_ids)
    assert torch.equal(bag_embedding(embedding.weight, input_ids), expected)
    assert torch.equal(bag_embedding(embedding, input_ids[1, 2]), expected[1, 2])
    assert torch.equal(bag_embedding(embedding, input_ids.transpose(0, 1)), expected.transpose(0, 1))
    assert torch.equal(bag_embedding(embedding, input_ids, torch.ones(2, 3, 4, dtype=torch.int64)), expected)


def test_gradients_of_any_strides(device: torch.device):
    embedding = nn.Embedding(7, 5).to(device)
    input_ids = torch.randint(0, 7, (2, 3, 4)).to(device)
    upstream = torch.randn(5, 3, 2).to(device)
    (expected,) = torch.autograd.grad(embedding(input_ids).mean(-2), embedding.weight, upstream.permute(2, 1, 0))
    means = bag_embedding(embedding, input_ids)
    (gradient,) = torch.autograd.grad(means, embedding.weight, upstream.permute(2, 1, 0))
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_no_bags(dtype: torch.dtype, device: torch.device):
    embedding = nn.Embedding(7, 5, dtype=dtype).to(device)
    means = bag_embedding(embedding, torch.zeros(0, 3, 4, dtype=torch.int64, device=device))
    means.sum().backward()
    assert means.shape == (0, 3, 5)
    assert embedding.weight.grad is not None
    assert not embedding.weight.grad.any()


def test_a_frozen_weight_gets_no_gradient():
    embedding = nn.Embedding(7, 5).requires_grad_(False)
    assert not bag_embedding(embedding, torch.zeros(3, 2, dtype=torch.int64)).requires_grad


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_rows_beyond_one_chunk(dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr('composer_tst.ops.embedding._CHUNK_ELEMENTS', 15)
    check(nn.Embedding(7, 5, dtype=dtype), torch.randint(0, 7, (10, 4)), attended(10, 4), device)


def test_ids_as_frequent_as_those_of_text(device: torch.device):
    """Half of all positions are one token, and most tokens never occur."""
    input_ids = (torch.rand(64, 6) ** 6 * 1000).long()
    input_ids[torch.rand(64, 6) < 0.5] = 7
    check(nn.Embedding(1000, 5), input_ids, None, device)
    check(nn.Embedding(1000, 5, dtype=torch.bfloat16), input_ids, attended(64, 6), device)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('masked', [False, True])
def test_no_tensor_of_every_token(masked: bool, dtype: torch.dtype):
    rows, length, bag_size, width = 4, 32, 8, 64
    embedding = nn.Embedding(50, width, dtype=dtype)
    input_ids = torch.randint(0, 50, (rows, length, bag_size))
    mask = attended(rows, length, bag_size) if masked else None
    float32_means = rows * length * width * 4
    assert allocated_above(float32_means, lambda: bag_embedding(embedding, input_ids, mask).sum().backward()) == []


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_no_step_waits_for_values(dtype: torch.dtype):
    embedding = nn.Embedding(7, 5, padding_idx=3, dtype=dtype)
    input_ids, mask = torch.randint(0, 7, (2, 3, 4)), attended(2, 3, 4)
    used = operators(lambda: bag_embedding(embedding, input_ids, mask).sum().backward())
    assert used
    assert not used.keys() & WAITING


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_deterministic_algorithms_do_the_same_and_a_gpu_is_not_waited_for(
    dtype: torch.dtype, masked: bool, device: torch.device
):
    weight = torch.randn(50, 64, dtype=dtype, device=device, requires_grad=True)
    input_ids, mask = torch.randint(0, 50, (6, 3), device=device), attended(6, 3).to(device) if masked else None

    def gradient() -> Tensor:
        return torch.autograd.grad(bag_embedding(weight, input_ids, mask).square().sum(), weight)[0]

    expected = gradient()
    with errors_at_waits(device), deterministic():
        got = [gradient(), gradient()]
    assert torch.equal(*got)
    torch.testing.assert_close(got[0], expected)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_compiles_whole(dtype: torch.dtype, device: torch.device):
    embedding = nn.Embedding(7, 5, padding_idx=3, dtype=dtype).to(device)
    input_ids, mask = torch.randint(0, 7, (2, 3, 4)).to(device), attended(2, 3, 4).to(device)
    compiled = torch.compile(bag_embedding, fullgraph=True, backend='aot_eager')
    expected = bag_embedding(embedding, input_ids, mask)
    means = compiled(embedding, input_ids, mask)
    torch.testing.assert_close(means, expected)
    (gradient,) = torch.autograd.grad(means.square().sum(), embedding.weight)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), embedding.weight)
    torch.testing.assert_close(gradient, expected_gradient)


def test_autocast_changes_nothing(device: torch.device):
    embedding = nn.Embedding(7, 5).to(device)
    input_ids = torch.randint(0, 7, (2, 3, 4)).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        means = bag_embedding(embedding, input_ids)
    assert torch.equal(means, bag_embedding(embedding, input_ids))


def test_there_is_no_second_derivative():
    embedding = nn.Embedding(7, 5)
    squares = bag_embedding(embedding, torch.tensor([[1, 2]])).square().sum()
    (gradient,) = torch.autograd.grad(squares, embedding.weight, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        gradient.sum().backward()


@pytest.mark.parametrize(
    'option', [{'max_norm': 1.0}, {'sparse': True}, {'scale_grad_by_freq': True}], ids=lambda option: next(iter(option))
)
def test_options_that_lookups_alone_can_honour_are_refused(option):
    (name,) = option
    with pytest.raises(ValueError, match=f'An embedding with {name} cannot be averaged over bags; switch {name} off'):
        bag_embedding(nn.Embedding(7, 5, **option), torch.zeros(2, 3, dtype=torch.int64))


@pytest.mark.parametrize(
    ('ids', 'mask', 'message'),
    [
        ((), None, r'input_ids must be \(..., s\) with s >= 1, but have shape \(\)'),
        ((2, 0), None, r'input_ids must be \(..., s\) with s >= 1, but have shape \(2, 0\)'),
        ((2, 3), (2,), r'mask must be \(2, 3\) like input_ids, but is \(2,\)'),
    ],
)
def test_bad_shapes_are_refused_in_one_sentence(ids, mask, message: str):
    with pytest.raises(ValueError, match=message):
        bag_embedding(
            nn.Embedding(7, 5), torch.zeros(ids, dtype=torch.int64), None if mask is None else torch.ones(mask)
        )


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('token', [7, -1])
def test_ids_outside_the_vocabulary_raise(token: int, dtype: torch.dtype):
    with pytest.raises((RuntimeError, IndexError), match=f'takes value {token} .* valid range|index out of range'):
        bag_embedding(nn.Embedding(7, 5, dtype=dtype), torch.tensor([[1, token]]))


@pytest.fixture
def torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole bags as on a GPU: a CPU has the operators too, which what torch keeps to itself may change."""
    monkeypatch.setattr('composer_tst.ops.embedding._on_gpu', lambda weight: True)


@pytest.mark.usefixtures('torchs_own')
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('ids_dtype', [torch.int64, torch.int32])
@pytest.mark.parametrize('padding_idx', [None, 0, 3, -1])
def test_whole_bags_on_a_gpu(padding_idx: int | None, ids_dtype: torch.dtype, dtype: torch.dtype, device: torch.device):
    embedding = nn.Embedding(11, 5, dtype=dtype)
    embedding.padding_idx = None if padding_idx is None else padding_idx % 11
    nn.init.normal_(embedding.weight)
    for shape in ((2, 4, 1), (2, 4, 6), (9, 16)):
        check(embedding, torch.randint(11, shape, dtype=ids_dtype), None, device)
    check(embedding, torch.randint(11, (6, 9), dtype=ids_dtype).t(), None, device)
    if padding_idx == -1:
        weight: Any = nn.Module()  # no nn.Embedding, which would count its padding_idx from the start
        weight.weight, weight.padding_idx = embedding.weight, padding_idx
        bags = torch.tensor([[10, 3]])
        (gradient,) = torch.autograd.grad(bag_embedding(weight, bags).sum(), embedding.weight)
        assert gradient[3].all()
        assert not gradient[10].any()


@pytest.mark.usefixtures('torchs_own')
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_no_whole_bags_on_a_gpu(dtype: torch.dtype, device: torch.device):
    embedding = nn.Embedding(7, 5, dtype=dtype).to(device)
    means = bag_embedding(embedding, torch.zeros(0, 3, 4, dtype=torch.int64, device=device))
    means.sum().backward()
    assert means.shape == (0, 3, 5)
    assert embedding.weight.grad is not None
    assert not embedding.weight.grad.any()


@pytest.mark.usefixtures('torchs_own')
@pytest.mark.parametrize('backend', ['aot_eager', pytest.param('inductor', marks=pytest.mark.slow)])
def test_whole_bags_on_a_gpu_compile_whole(backend: str, device: torch.device):
    embedding = nn.Embedding(7, 5, padding_idx=3).to(device)
    input_ids = torch.randint(0, 7, (2, 3, 4)).to(device)
    compiled = torch.compile(bag_embedding, fullgraph=True, backend=backend)
    expected = bag_embedding(embedding, input_ids)
    means = compiled(embedding, input_ids)
    torch.testing.assert_close(means, expected)
    (gradient,) = torch.autograd.grad(means.square().sum(), embedding.weight)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), embedding.weight)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.usefixtures('torchs_own')
@pytest.mark.parametrize('padding_idx', [None, 3])
@pytest.mark.parametrize('ids_dtype', [torch.int64, torch.int32])
def test_whole_bags_launch_and_allocate_on_a_gpu_what_torchs_own_do(
    ids_dtype: torch.dtype, padding_idx: int | None, device: torch.device
):
    embedding = nn.Embedding(50, 64, padding_idx=padding_idx).to(device)
    input_ids = torch.randint(0, 50, (32, 8), dtype=ids_dtype, device=device)
    upstream = torch.randn(32, 64, device=device)

    def mine() -> Tensor:
        return bag_embedding(embedding, input_ids)

    def torchs() -> Tensor:
        return nn.functional.embedding_bag(input_ids, embedding.weight, mode='mean')

    def backward(means: Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(means, embedding.weight, upstream, retain_graph=True)

    assert len(launches(mine, device)) <= len(launches(torchs, device))
    assert len(launches(backward(mine()), device)) <= len(launches(backward(torchs()), device))
    if device.type == 'cpu':
        assert launches(mine, device) == ['arange', '_embedding_bag']
        assert launches(backward(mine()), device) == ['_embedding_bag_dense_backward']
        assert sum(allocated_above(0, mine)) <= sum(allocated_above(0, torchs))
        assert sum(allocated_above(0, backward(mine()))) <= sum(allocated_above(0, backward(torchs())))


@pytest.mark.parametrize('masked', [False, True])
def test_the_operator_that_a_gpu_takes_is_the_gradient(masked: bool):
    """What torch keeps to itself may change; a CPU has it too."""
    ids = torch.randint(11, (5, 3))
    grads, seen = torch.randn(5, 7), (torch.rand(15) < 0.7).float() if masked else None
    of_bag = torch.arange(15) // 3
    unused = of_bag[:0]
    gradient_of_bags: Any = torch.ops.aten._embedding_bag_dense_backward
    found = gradient_of_bags(grads, ids.flatten(), of_bag, unused, unused, 11, False, 0, seen)
    expected = torch.zeros(11, 7)
    for position, token in enumerate(ids.flatten().tolist()):
        expected[token] += grads[position // 3] * (1 if seen is None else seen[position])
    torch.testing.assert_close(found, expected)

"""The method without Composer: what it imports, what it accepts, and both operations against the definition."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from common import REPO, reference
from torch import Tensor, nn

from composer_tst import functional as F_tst

# What must not be needed. The finder comes first, and a module that is asked for raises.
REFUSED = ('composer', 'streaming', 'transformers', 'llmfoundry', 'wrapt', 'omegaconf', 'botocore')
REFUSING = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {REFUSED!r}:
            raise ModuleNotFoundError('refused: ' + name, name=name)
sys.meta_path.insert(0, Refuse())
"""


def run(code: str, *arguments: str) -> str:
    command = [sys.executable, '-c', REFUSING + code, *arguments]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_it_needs_torch_alone():
    code = """
import torch.distributed.tensor
before = set(sys.modules)
from composer_tst import functional as F
print(*sorted({name.split('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))
ids = torch.arange(24).view(4, 6)
batch = F.fold_batch({'input_ids': ids}, bag_size=2)
weight = torch.randn(24, 5, requires_grad=True)
h = F.bag_embedding(weight, batch['input_ids'])
F.multi_hot_cross_entropy((h @ weight.t()).flatten(0, 1), batch['labels'].flatten(0, 1)).backward()
assert weight.grad.any()
"""
    assert set(run(code).split()) <= {'composer_tst', 'torch'}


def test_what_needs_composer_is_imported_when_it_is_asked_for():
    code = """
before = set(sys.modules)
import composer_tst
assert {name.split('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names == {'composer_tst'}
assert set(composer_tst.__all__) <= set(dir(composer_tst))
for name in composer_tst.__all__:
    try:
        getattr(composer_tst, name)
    except ModuleNotFoundError as error:
        assert 'refused' in str(error), error
    else:
        raise SystemExit(name + ' needs no Composer')
try:
    composer_tst.nothing
except AttributeError as error:
    print(error)
"""
    assert "module 'composer_tst' has no attribute 'nothing'" in run(code)


def test_a_composer_run_imports_nothing_more_for_it_but_wrapt():
    code = """
import sys
import composer.models, streaming, transformers
before = set(sys.modules)
from composer_tst import PhaseCheckpointer, TokenSuperposition, WarmupStableDecayScheduler
print(*sorted({name.split('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))
"""
    command = [sys.executable, '-c', code]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    assert {'composer_tst'} <= set(result.stdout.split()) <= {'composer', 'composer_tst', 'transformers', 'wrapt'}


def test_labels_are_made_from_the_ids():
    ids = torch.randint(50, (4, 6))
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    for batch in ({'input_ids': ids}, {'input_ids': ids, 'attention_mask': mask}):
        folded = F_tst.fold_batch(batch, bag_size=2)
        rows = reference.fold([{**batch, 'labels': ids}], 2)
        assert folded['labels'].tolist() == [[p.targets for p in row] for row in rows]
        assert set(batch) <= {'input_ids', 'attention_mask'}  # which is left as it was


def folded_batch(padded: bool, ids_dtype: torch.dtype = torch.int64, size: int = 3) -> dict[str, Tensor]:
    ids = torch.randint(11, (2 * size, 4), dtype=ids_dtype)
    ids[0] = ids[0, 0]  # a token that comes often
    batch = {'input_ids': ids}
    if padded:
        batch['attention_mask'] = torch.arange(4) < torch.tensor([4, 2, 0, 4, 1, 3])[:, None]
    return F_tst.fold_batch(batch, size)


BACKENDS = [
    None,
    'aot_eager',
    pytest.param('inductor', marks=pytest.mark.slow),
]


def maybe_compiled(call: Any, backend: str | None) -> Any:
    torch._dynamo.reset()
    return call if backend is None else torch.compile(call, fullgraph=True, backend=backend)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('ids_dtype', [torch.int64, torch.int32])
@pytest.mark.parametrize('padded', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_embedding_eager_and_compiled(
    dtype: torch.dtype, padded: bool, ids_dtype: torch.dtype, backend: str | None, device: torch.device
):
    folded = folded_batch(padded, ids_dtype)
    embedding = nn.Embedding(11, 8, dtype=dtype)
    expected = reference.mean_embeddings(embedding, reference.rows_of(folded))
    upstream = torch.randn_like(expected)
    exact = nn.Embedding.from_pretrained(embedding.weight.detach().float(), freeze=False)
    means = reference.mean_embeddings(exact, reference.rows_of(folded))
    (expected_gradient,) = torch.autograd.grad(means, exact.weight, upstream.to(means.dtype))

    embedding = embedding.to(device)
    mask = folded.get('bag_mask')
    mine = maybe_compiled(F_tst.bag_embedding, backend)(
        embedding, folded['input_ids'].to(device), None if mask is None else mask.to(device)
    )
    (gradient,) = torch.autograd.grad(mine, embedding.weight, upstream.to(device))
    assert mine.dtype == gradient.dtype == dtype
    unit = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, 1e-6)
    torch.testing.assert_close(mine.cpu(), expected, rtol=2 * unit, atol=2 * unit)
    torch.testing.assert_close(gradient.cpu().float(), expected_gradient, rtol=4 * unit, atol=4 * unit)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('weights', [None, [3.0, 2.0, 0.0]])
@pytest.mark.parametrize('padded', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_loss_eager_and_compiled(
    dtype: torch.dtype, padded: bool, weights: list[float] | None, backend: str | None, device: torch.device
):
    folded = folded_batch(padded, torch.int32)
    logits = (3 * torch.randn(*folded['labels'].shape[:2], 11)).to(dtype)
    exact = logits.clone().requires_grad_()
    expected = reference.multi_hot_loss(exact, reference.rows_of(folded), weights or [1.0] * 3)
    (expected_gradient,) = torch.autograd.grad(expected, exact)

    # Not contiguous, as logits that leave out the last position are not.
    wide = torch.randn(*logits.shape[:2], 2 * 11, device=device).to(dtype)
    wide[..., ::2] = logits.to(device)
    mine = wide.flatten(0, 1)[:, ::2].requires_grad_()
    assert not mine.is_contiguous()
    loss = maybe_compiled(F_tst.multi_hot_cross_entropy, backend)(
        mine, folded['labels'].flatten(0, 1).to(device), weights
    )
    (gradient,) = torch.autograd.grad(loss, mine)
    unit = {torch.bfloat16: 2**-8, torch.float16: 2**-10}.get(dtype, 1e-6)
    torch.testing.assert_close(loss.cpu().float(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        gradient.cpu().double(), expected_gradient.flatten(0, 1).double(), rtol=4 * unit, atol=unit / 10
    )


class Tiny(nn.Module):
    """A model of bags and of tokens, as a plain loop has one."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.body = nn.Linear(8, 8)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = F_tst.bag_embedding(self.embedding, ids, mask) if ids.ndim == 3 else self.embedding(ids)
        return self.body(x).relu() @ self.embedding.weight.t()


def loss_of(model: Any, folded: dict[str, Tensor]) -> Tensor:
    logits = model(folded['input_ids'], folded.get('bag_mask'))
    return F_tst.multi_hot_cross_entropy(logits.flatten(0, 1), folded['labels'].flatten(0, 1))


def definition(model: Tiny, folded: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients, by the reference."""
    rows = reference.rows_of(folded)
    logits = model.body(reference.mean_embeddings(model.embedding, rows)).relu() @ model.embedding.weight.t()
    loss = reference.multi_hot_loss(logits, rows, [1.0] * 3)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return loss.detach(), dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def check(loss: Tensor, gradients: dict[str, Tensor], expected: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(loss.detach().cpu(), expected[0], rtol=tolerance, atol=tolerance)
    assert gradients.keys() == expected[1].keys()
    for name, gradient in gradients.items():
        error = torch.linalg.norm(gradient.cpu() - expected[1][name])
        assert error <= tolerance * torch.linalg.norm(expected[1][name]), name


def on(device: torch.device, folded: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.to(device) for key, value in folded.items()}


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('padded', [False, True])
def test_one_graph_of_model_and_loss(padded: bool, backend: str | None, device: torch.device):
    model, folded = Tiny(), folded_batch(padded)
    expected = definition(model, folded)
    model.to(device)
    loss = maybe_compiled(loss_of, backend)(model, on(device, folded))
    loss.backward()
    check(loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, expected)


@pytest.mark.parametrize('backend', BACKENDS)
def test_bags_of_another_size_and_plain_tokens_need_no_new_code(backend: str | None, device: torch.device):
    """One compiled step goes through the phases, each a graph of its own, and back to plain tokens."""
    model = Tiny()
    step = maybe_compiled(loss_of, backend)
    for size in (3, 2, 1):
        folded = (
            folded_batch(False, size=3)
            if size == 3
            else F_tst.fold_batch({'input_ids': torch.randint(11, (4, 5))}, size)
        )
        rows = reference.rows_of(folded)
        logits = model(folded['input_ids'])
        expected = reference.multi_hot_loss(logits, rows, [1.0] * size)
        model.to(device)
        torch.testing.assert_close(step(model, on(device, folded)).cpu(), expected)
        model.cpu()


def test_functional_call(device: torch.device):
    model, folded = Tiny(), folded_batch(True)
    expected = definition(model, folded)
    parameters = {name: p.detach().clone().to(device).requires_grad_() for name, p in model.named_parameters()}
    model.to(device).requires_grad_(False)

    def call(*inputs: Any) -> Tensor:
        return torch.func.functional_call(model, parameters, inputs)

    loss = loss_of(call, on(device, folded))
    check(loss, dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True)), expected)


@pytest.mark.parametrize('backend', BACKENDS)
def test_autocast(backend: str | None, device: torch.device):
    model, folded = Tiny(), folded_batch(True)
    expected = definition(model, folded)
    model.to(device)
    step = maybe_compiled(loss_of, backend)
    with torch.autocast(device.type, torch.bfloat16):
        loss = step(model, on(device, folded))
    loss.backward()
    assert loss.dtype == torch.float32
    check(loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, expected, 2e-2)


@pytest.mark.parametrize('mode', [torch.inference_mode, torch.no_grad])
def test_without_gradient(mode: Any, device: torch.device):
    model, folded = Tiny(), folded_batch(True)
    expected, _ = definition(model, folded)
    model.to(device)
    with mode():
        loss = loss_of(model, on(device, folded))
    assert not loss.requires_grad
    torch.testing.assert_close(loss.cpu(), expected)


def test_other_dtypes_of_ids_are_refused_in_one_sentence():
    with pytest.raises(ValueError, match=r'input_ids must be int64 or int32, but are torch.float32'):
        F_tst.bag_embedding(torch.zeros(3, 2), torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r'targets must be int64 or int32, but are torch.uint8'):
        F_tst.multi_hot_cross_entropy(torch.zeros(2, 3), torch.zeros(2, 2, dtype=torch.uint8))

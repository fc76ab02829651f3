"""Bags in any module's embedding, held to the definition in loss and gradients; what a model must not do with ids."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import reference
from torch import Tensor, nn

from composer_tst import functional as F_tst
from composer_tst.ops.superposed import superposed

S, V, D = 3, 60, 8


def fold(padded: bool = False, dtype: torch.dtype = torch.int64, rows: int = 6, length: int = 5, **how: Any) -> Any:
    ids = torch.randint(2, V, (rows, length), generator=torch.Generator().manual_seed(rows + length)).to(dtype)
    batch = {'input_ids': ids}
    if padded:
        lengths = torch.tensor([length, 2, 0, length, 1, 3])[:, None]
        batch['attention_mask'] = (torch.arange(length) < lengths).long()
    return F_tst.fold_batch(batch, S, **how)


class Extended(nn.Module):
    """The definition of an embedding that looks up bags: one with a row more for each bag of the batch."""

    def __init__(self, embedding: nn.Embedding, rows: Any):
        super().__init__()
        self.embedding, self.rows = embedding, rows

    def forward(self, ids: Tensor) -> Tensor:
        means = reference.mean_embeddings(self.embedding, self.rows).flatten(0, 1)
        return torch.cat([self.embedding(torch.arange(V)), means])[ids]


def logits_of(outputs: Any) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else outputs.logits


def definition(model: Any, folded: Any) -> tuple[Tensor, list[Tensor | None]]:
    """Loss and gradients: ids past the vocabulary stand for bags."""
    model, rows = copy.deepcopy(model), reference.rows_of(folded)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Embedding) and child.num_embeddings == V:
                setattr(module, name, Extended(child, rows))
    ids = torch.arange(V, V + folded['labels'].shape[:2].numel()).view(folded['labels'].shape[:2])
    rest = {key: value for key, value in folded.items() if key in ('attention_mask', 'token_type_ids')}
    loss = reference.multi_hot_loss(logits_of(model(input_ids=ids, **rest)), rows, [1.0] * S)
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


def step(model: Any, folded: Any, call: Any = None, **inputs: Any) -> tuple[Tensor, list[Tensor | None]]:
    """Loss and gradients as a training loop has them."""
    with superposed(model, folded, **inputs) as given:
        logits = logits_of((call or model)(**given))
        loss = F_tst.multi_hot_cross_entropy(logits.flatten(0, 1), folded['labels'].flatten(0, 1))
        loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


def check(mine: Any, expected: Any, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(mine[0].float(), expected[0].float(), rtol=tolerance / 10, atol=1e-5)
    assert len(mine[1]) == len(expected[1])
    for gradient, other in zip(mine[1], expected[1], strict=True):
        assert (gradient is None) == (other is None)
        if gradient is not None:
            error = torch.linalg.norm((gradient - other).float())
            assert error <= tolerance * torch.linalg.norm(other.float()) + 1e-7


class Model(nn.Module):
    """A model of one's own that mixes positions. ``look`` says how it looks ids up."""

    def __init__(self, look: Any = lambda self, ids: self.wte(ids), **options: Any):
        super().__init__()
        torch.manual_seed(1)
        self.look = look
        self.wte, self.mix, self.head = nn.Embedding(V, D, **options), nn.Linear(D, D), nn.Linear(D, V)
        self.value = nn.Embedding(V, D)  # of the same ids, where a model has one
        self.longer = nn.Embedding(V + 4, D)
        self.bag = nn.EmbeddingBag(V, D)
        self.register_buffer('kept', torch.zeros(4, 32, dtype=torch.long), persistent=False)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.wte

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Any = None) -> Tensor:
        x = self.look(self, input_ids)
        if attention_mask is not None:
            x = x * attention_mask[..., None]
        return self.head(F.gelu(self.mix(x)).cumsum(1))


def static_ids(self: Any, ids: Tensor) -> Tensor:
    kept = torch.zeros_like(self.kept)
    kept[: len(ids), : ids.shape[1]] = ids
    return self.wte(kept)[: len(ids), : ids.shape[1]]


LOOKS: dict[str, Any] = {
    'whole': lambda self, ids: self.wte(ids),
    'flat': lambda self, ids: self.wte(ids.view(-1)).view(*ids.shape, -1),
    'transposed': lambda self, ids: self.wte(ids.t()).transpose(0, 1),
    'one more axis': lambda self, ids: self.wte(ids[:, None])[:, 0],
    'in two parts': lambda self, ids: torch.cat([self.wte(ids[:, :2]), self.wte(ids[:, 2:])], 1),
    'row by row': lambda self, ids: torch.stack([self.wte(row) for row in ids]),
    'position by position': lambda self, ids: torch.stack([self.wte(ids[:, p]) for p in range(ids.shape[1])], 1),
    'as int32': lambda self, ids: self.wte(ids.int()),
    'as int64': lambda self, ids: self.wte(ids.long()),
    'a copy': lambda self, ids: self.wte(ids.detach().clone()),
    'rolled, twice': lambda self, ids: self.wte(ids) + self.wte(ids.roll(1, 1)),
    'shifted behind a token': lambda self, ids: self.wte(F.pad(ids[:, :-1], (1, 0), value=1)),
    'behind a token': lambda self, ids: self.wte(torch.cat([ids.new_ones(len(ids), 1), ids], 1))[:, 1:],
    'beside a prefix': lambda self, ids: self.wte(ids) + self.wte(torch.arange(3, device=ids.device)).sum(0),
    'permuted': lambda self, ids: self.wte(ids[:, torch.arange(ids.shape[1]).flip(0)]).flip(1),
    'gathered': lambda self, ids: self.wte(ids.gather(1, torch.arange(ids.shape[1]).flip(0).expand_as(ids))),
    'selected': lambda self, ids: self.wte(ids[torch.ones_like(ids, dtype=torch.bool)]).view(*ids.shape, -1),
    'repeated': lambda self, ids: self.wte(ids.repeat_interleave(2, 1))[:, ::2] + self.wte(ids.repeat(2, 1))[: len(ids)],
    'windows': lambda self, ids: self.wte(F.pad(ids, (1, 0), value=2).unfold(1, 2, 1)).mean(2),
    'in a buffer': static_ids,
    'value embeddings': lambda self, ids: self.wte(ids) + self.value(ids),
    'shifted value embeddings': lambda self, ids: self.wte(ids) * self.value(F.pad(ids[:, :-1], (1, 0), value=5)),
    'frozen': lambda self, ids: self.wte.requires_grad_(False)(ids),
}  # fmt: skip


@pytest.mark.parametrize('padded', [False, True])
@pytest.mark.parametrize('look', LOOKS)
def test_ids_moved_in_any_way_are_looked_up_as_bags(look: str, padded: bool):
    folded = fold(padded)
    check(step(Model(LOOKS[look]), folded), definition(Model(LOOKS[look]), folded))


@pytest.mark.parametrize('dtype', [torch.int32, torch.int64])
@pytest.mark.parametrize('how', [{'expand': 'batch'}, {'expand': 'none'}, {'superpose': 'input'}])
def test_every_fold(how: dict[str, str], dtype: torch.dtype):
    folded = fold(True, dtype, length=7, **how)
    check(step(Model(), folded), definition(Model(), folded))


def llama(**settings: Any) -> Any:
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(1)
    sizes = {'vocab_size': V, 'hidden_size': 16, 'intermediate_size': 32, 'num_hidden_layers': 2}
    heads = {'num_attention_heads': 2, 'num_key_value_heads': 1, 'pad_token_id': 0, 'attn_implementation': 'eager'}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(sizes | heads | settings)))


def gpt2(**settings: Any) -> Any:
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(1)
    sizes = {'vocab_size': V, 'n_positions': 64, 'n_embd': 16, 'n_layer': 2, 'n_head': 2, 'pad_token_id': 0}
    drops = dict.fromkeys(('resid_pdrop', 'embd_pdrop', 'attn_pdrop'), 0.0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**(sizes | drops | settings)))


def gemma(**settings: Any) -> Any:
    """Scales its embeddings, and is tied."""
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(1)
    sizes = {'vocab_size': V, 'hidden_size': 16, 'intermediate_size': 32, 'num_hidden_layers': 2, 'head_dim': 8}
    heads = {'num_attention_heads': 2, 'num_key_value_heads': 1, 'pad_token_id': 0, 'attn_implementation': 'eager'}
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**(sizes | heads | settings)))


FAMILIES: dict[str, Any] = {
    'llama': llama,
    'tied llama': lambda: llama(tie_word_embeddings=True),
    'gpt2': gpt2,
    'gemma': gemma,
}


@pytest.mark.parametrize('padded', [False, True])
@pytest.mark.parametrize('name', FAMILIES)
def test_models_of_transformers(name: str, padded: bool):
    """Without padding also without a mask, which transformers may only warn of."""
    folded = fold(padded)
    check(step(FAMILIES[name](), folded), definition(FAMILIES[name](), folded))


def test_token_types_that_gpt2_looks_up_in_the_same_embedding():
    folded = fold() | {'token_type_ids': torch.ones(2, 5, dtype=torch.long)}
    check(step(gpt2(), folded), definition(gpt2(), folded))


def test_single_tokens_that_predict_several_are_plain_on_the_input_side():
    folded = fold(expand='none', superpose='output')
    model = Model()
    with superposed(model, folded) as inputs:
        assert inputs['input_ids'] is folded['input_ids']
        assert type(model.wte) is nn.Embedding
        logits = model(**inputs)
    assert torch.equal(logits, model(folded['input_ids']))


def test_bags_of_one_token_are_plain_training_to_the_bit():
    ids = torch.randint(V, (4, 6))
    folded = F_tst.fold_batch({'input_ids': ids}, 1)
    model, calls = Model(), []
    model.register_forward_hook(lambda *_: calls.append(type(model.wte)))
    with superposed(model, folded) as inputs:
        logits = model(**inputs)
        F_tst.multi_hot_cross_entropy(logits.flatten(0, 1), folded['labels'].flatten(0, 1)).backward()
    assert calls == [nn.Embedding]
    plain = Model()
    expected = plain(ids)
    assert torch.equal(logits, expected)
    F_tst.multi_hot_cross_entropy(expected.flatten(0, 1), folded['labels'].flatten(0, 1)).backward()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        assert mine.grad is None or torch.equal(mine.grad, theirs.grad)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize('padded', [False, True])
def test_plain_ids_beside_bags_are_exact(padded: bool, dtype: torch.dtype):
    wte = nn.Embedding(V, D, padding_idx=0, dtype=dtype)
    model, plain = nn.Sequential(wte), copy.deepcopy(wte)
    folded, ids = fold(padded), torch.randperm(V)[: V // 2].view(5, -1)
    upstream = torch.randn(*ids.shape, D).to(dtype)
    with superposed(model, folded) as inputs:
        model(inputs['input_ids'])
        for some in (ids, ids.int(), ids[0, 0], ids[:0]):
            assert torch.equal(model(some), plain(some))
        model(ids).backward(upstream)
    plain(ids).backward(upstream)
    exact = dtype != torch.bfloat16 or padded  # in bfloat16, a third of the gradient, three times
    torch.testing.assert_close(wte.weight.grad, plain.weight.grad, **({'rtol': 0, 'atol': 0} if exact else {}))

"""Bags in any module's embedding, held to the definition in loss and gradients; what a model must not do with ids."""

import collections
import contextlib
import copy
import functools
import io
import random
import re
import threading
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import reference
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from composer_tst import functional as F_tst
from composer_tst.ops import watch
from composer_tst.ops.lookup import BagLookup
from composer_tst.ops.superposed import find_embedding, restore, superposed

S, V, D = 3, 60, 8


def fold(padded: bool = False, dtype: torch.dtype = torch.int64, rows: int = 6, length: int = 5, **how: Any) -> Any:
    ids = torch.randint(2, V, (rows, length), generator=torch.Generator().manual_seed(rows + length)).to(dtype)
    batch = {'input_ids': ids}
    if padded:
        lengths = torch.tensor([length, 2, 0, length, 1, 3])[:, None]
        batch['attention_mask'] = (torch.arange(length) < lengths).long()
    return F_tst.fold_batch(batch, S, **how)


def logits_of(outputs: Any) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else outputs.logits


def definition(model: Any, folded: Any) -> tuple[Tensor, list[Tensor | None]]:
    """Loss and gradients: ids past the vocabulary stand for bags."""
    model, rows = copy.deepcopy(model), reference.rows_of(folded)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Embedding) and child.num_embeddings == V:
                setattr(module, name, reference.Extended(child, rows))
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


def whole(self: Any, ids: Tensor) -> Tensor:
    return self.wte(ids)


class Unnamed(nn.Module):
    """A model of one's own that mixes positions. ``look`` says how it looks ids up."""

    def __init__(self, look: Any = whole, **options: Any):
        super().__init__()
        torch.manual_seed(1)
        self.look = look
        self.wte, self.mix, self.head = nn.Embedding(V, D, **options), nn.Linear(D, D), nn.Linear(D, V)
        self.value = nn.Embedding(V, D)  # of the same ids, where a model has one
        self.longer = nn.Embedding(V + 4, D)
        self.bag = nn.EmbeddingBag(V, D)
        self.register_buffer('kept', torch.zeros(4, 32, dtype=torch.long), persistent=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Any = None) -> Tensor:
        x = self.look(self, input_ids)
        if attention_mask is not None:
            x = x * attention_mask[..., None]
        return self.head(F.gelu(self.mix(x)).cumsum(1))


class Model(Unnamed):
    """One that says which its input embedding is."""

    def get_input_embeddings(self) -> nn.Embedding:
        return self.wte


def static_ids(self: Any, ids: Tensor) -> Tensor:
    kept = torch.zeros_like(self.kept)
    kept[: len(ids), : ids.shape[1]] = ids
    return self.wte(kept)[: len(ids), : ids.shape[1]]


LOOKS: dict[str, Any] = {
    'whole': whole,
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
    'repeated': lambda self, ids: self.wte(ids.repeat_interleave(2, 1))[:, ::2]
    + self.wte(ids.repeat(2, 1))[: len(ids)],
    'windows': lambda self, ids: self.wte(F.pad(ids, (1, 0), value=2).unfold(1, 2, 1)).mean(2),
    'in a buffer': static_ids,
    'value embeddings': lambda self, ids: self.wte(ids) + self.value(ids),
    'shifted value embeddings': lambda self, ids: self.wte(ids) * self.value(F.pad(ids[:, :-1], (1, 0), value=5)),
    'frozen': lambda self, ids: self.wte.requires_grad_(False)(ids),
}


@pytest.mark.parametrize('padded', [False, True])
@pytest.mark.parametrize('look', LOOKS)
def test_ids_moved_in_any_way_are_looked_up_as_bags(look: str, padded: bool):
    folded = fold(padded)
    check(step(Model(LOOKS[look]), folded), definition(Model(LOOKS[look]), folded))


@pytest.mark.parametrize('dtype', [torch.int32, torch.int64])
@pytest.mark.parametrize('how', [{'expand': 'batch'}, {'expand': 'none'}, {'superpose': 'input'}])
def test_every_fold(how: Any, dtype: torch.dtype):
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
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=0)


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
    torch.testing.assert_close(wte.weight.grad, plain.weight.grad, rtol=0 if exact else 0.02, atol=0)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_weights_of_other_dtypes(dtype: torch.dtype):
    folded = fold(True)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-4
    check(step(Model().to(dtype), folded), definition(Model().to(dtype), folded), tolerance)


def test_autocast_keeps_gradients_of_weights_that_the_watched_call_has_cast():
    """One region for several passes: what is cast without a gradient must not be cached."""
    folded, model = fold(True), Model()
    with torch.autocast('cpu', torch.bfloat16):
        model(folded['input_ids'][..., 0])
        mine = step(model, folded)
    assert all(p.grad is not None for p in (model.wte.weight, model.mix.weight, model.head.weight))
    check(mine, definition(Model(), folded), 0.05)


class Past(nn.Embedding):
    """Looks up past ``nn.Embedding.forward``."""

    def forward(self, input: Tensor) -> Tensor:
        return self.weight[input]


class Scaled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3


def test_embeddings_of_classes_of_ones_own():
    def make(kind: type[nn.Embedding]) -> Model:
        model = Model()
        model.wte.__class__ = kind
        return model

    check(step(make(Scaled), fold(True)), definition(make(Scaled), fold(True)))
    with pytest.raises(
        ValueError, match=r'^wte \(Past\) reads the ids of a superposed batch by value by index, test_sup'
    ):
        step(make(Past), fold(True))


class Halves(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        self.calls = getattr(self, 'calls', 0) + 1
        return weight / 2


def test_a_parametrised_weight():
    """It is computed as often as in plain training, and the embedding is copied as it is."""

    def make() -> Any:
        model = Model()
        parametrize.register_parametrization(model.wte, 'weight', Halves())
        return model

    model, folded = make(), fold(True)
    check(step(model, folded), definition(make(), folded))
    halves = model.wte.parametrizations.weight[0]
    calls = halves.calls
    with superposed(model, folded) as inputs:
        model(**inputs)
        copied = copy.deepcopy(model)
    assert halves.calls == calls + 1
    assert not isinstance(copied.wte, BagLookup)
    assert torch.equal(copied(folded['input_ids'][..., 0]), model(folded['input_ids'][..., 0]))


def test_an_embedding_that_is_named():
    model, folded = Unnamed(), fold(True)
    with pytest.raises(ValueError, match='has 3 nn.Embedding modules where its input embedding is looked for: define'):
        step(model, folded)
    check(step(model, folded, embedding=model.wte), definition(Model(), folded))


def test_the_embedding_is_found_behind_wrappers_and_base_classes():
    class Base(nn.Module):
        def get_input_embeddings(self) -> nn.Module:
            raise NotImplementedError

    outer: Any = Base()
    outer.model = Model()
    assert find_embedding(outer) is outer.model.wte
    assert find_embedding(torch.compile(outer)) is outer.model.wte  # pyright: ignore
    only = nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 2))
    assert find_embedding(only) is only[0]
    with pytest.raises(ValueError, match='Linear has 0 nn.Embedding modules .* define get_input_embeddings'):
        find_embedding(nn.Linear(2, 2))


@pytest.mark.parametrize('reentrant', [False, True])
@pytest.mark.parametrize('copies', [False, True])
def test_an_embedding_in_a_region_that_backward_runs_again(reentrant: bool, copies: bool):
    """Also where what it is run again on is a copy, as activation offloading keeps."""

    def look(self: Any, ids: Tensor) -> Tensor:
        anchor = torch.zeros(1, requires_grad=True)
        hooks = (
            torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone) if copies else contextlib.nullcontext()
        )
        with hooks:
            found: Any = checkpoint(
                lambda ids, anchor: self.wte(ids).tanh() + anchor, ids, anchor, use_reentrant=reentrant
            )
        return found

    folded = fold(True)
    check(step(Model(look), folded), definition(Model(lambda self, ids: self.wte(ids).tanh()), folded))


@pytest.mark.parametrize('reentrant', [False, True])
@pytest.mark.parametrize('make', [llama, gpt2])
def test_checkpointing_of_transformers(make: Any, reentrant: bool):
    model, folded = make(), fold(True)
    model.gradient_checkpointing_enable({'use_reentrant': reentrant})
    model.enable_input_require_grads()
    check(step(model.train(), folded), definition(make(), folded))


def test_a_backward_pass_after_the_block_is_an_error_where_it_would_look_bags_up():
    model = Model(lambda self, ids: checkpoint(lambda ids: self.wte(ids).tanh(), ids, use_reentrant=False))
    with superposed(model, fold()) as inputs:
        loss = model(**inputs).sum()
    with pytest.raises(IndexError):
        loss.backward()
    with pytest.raises(IndexError):
        model(**inputs)


COMPILED: dict[str, Any] = {
    'wrapped': lambda model, **how: (model, torch.compile(model, fullgraph=True, **how)),
    'in place': lambda model, **how: (model.compile(fullgraph=True, **how), (model, model))[1],
    'by blocks': lambda model, **how: (
        [m.compile(fullgraph=True, **how) for n, m in model.named_modules() if re.search(r'layers\.\d$|wte$|mix$', n)],
        (model, model),
    )[1],
}


@pytest.mark.parametrize(
    ('name', 'way', 'backend'),
    [
        *((name, way, 'aot_eager') for name in ('own', 'value embeddings', 'llama') for way in COMPILED),
        *(pytest.param('gemma', way, 'aot_eager', marks=pytest.mark.slow) for way in COMPILED),
        *(pytest.param(name, 'wrapped', 'inductor', marks=pytest.mark.slow) for name in ('own', 'llama')),
    ],
)
def test_compiled_models(name: str, way: str, backend: str):
    """Padded and not, and plain in between: one graph each, and no more at the next step."""
    torch._dynamo.reset()
    make: Any = {
        'own': Model,
        'value embeddings': lambda: Model(LOOKS['shifted value embeddings']),
        'llama': lambda: llama(num_hidden_layers=1, tie_word_embeddings=True),
        'gemma': lambda: gemma(num_hidden_layers=1),
    }[name]
    model, call = COMPILED[way](make(), backend=backend)
    graphs = []
    for _ in range(2):
        for padded in (False, True):
            folded = fold(padded) | {'attention_mask': fold(True)['attention_mask']}
            model.zero_grad()
            check(step(call, folded), definition(make(), folded))
            plain = {'input_ids': fold()['input_ids'][..., 1], 'attention_mask': folded['attention_mask']}
            torch.testing.assert_close(logits_of(call(**plain)), logits_of(make()(**plain)), rtol=1e-4, atol=1e-5)
        graphs.append(torch._dynamo.utils.counters['stats']['unique_graphs'])
    assert graphs[0] == graphs[1] > 0


@pytest.mark.parametrize('padded', [False, True])
@pytest.mark.parametrize(
    ('look', 'backend'),
    [
        *(
            (look, 'aot_eager')
            for look in ('as int64', 'as int32', 'flat', 'shifted behind a token', 'beside a prefix')
        ),
        pytest.param('as int64', 'inductor', marks=pytest.mark.slow),
    ],
)
def test_ids_of_32_bits_and_moves_compiled(look: str, padded: bool, backend: str):
    torch._dynamo.reset()
    folded = fold(padded, torch.int32)
    check(
        step(torch.compile(Model(LOOKS[look]), fullgraph=True, backend=backend), folded),
        definition(Model(LOOKS[look]), folded),
    )


def test_a_compiled_function_around_the_model_is_called_after_the_model_itself():
    """It cannot be watched from within: the first block refuses it, and says what to do."""
    torch._dynamo.reset()
    model, folded = Model(), fold(True)

    @torch.compile(backend='aot_eager', fullgraph=True)
    def loss_of(inputs: Any) -> Tensor:
        logits = model(**inputs)
        return F_tst.multi_hot_cross_entropy(logits.flatten(0, 1), folded['labels'].flatten(0, 1))

    with pytest.raises(ValueError, match='the first time call that outside of compiled functions'):  # noqa: SIM117
        with superposed(model, folded) as inputs:
            loss_of(inputs).backward()
    model.zero_grad()
    with superposed(model, folded) as inputs:
        with torch.no_grad():
            model(**inputs)
        loss = loss_of(inputs)
        loss.backward()
    check((loss.detach(), [p.grad for p in model.parameters()]), definition(Model(), folded))


@pytest.mark.parametrize('make', [Model, llama, gpt2, gemma])
def test_a_model_is_changed_in_the_block_alone(make: Any):
    model, folded, ids = make(), fold(True), torch.randint(V, (2, 6))
    classes = [type(module) for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    keys, plain = list(model.state_dict()), logits_of(model(input_ids=ids))

    def is_untouched(model: Any) -> bool:
        return (
            [type(module) for module in model.modules()] == classes
            and [set(vars(module)) for module in model.modules()] == attributes
            and torch.equal(logits_of(model(input_ids=ids)), plain)
        )

    for _ in range(2):
        with superposed(model, folded) as inputs:
            embedding = find_embedding(model)
            assert isinstance(embedding, BagLookup)
            assert isinstance(embedding, classes[list(model.modules()).index(embedding)])
            assert list(model.state_dict()) == keys
            model(**inputs)
            saved = io.BytesIO()
            torch.save(model, saved)
            saved.seek(0)
            for other in (copy.deepcopy(model), torch.load(saved, weights_only=False)):
                assert is_untouched(other)
        assert is_untouched(model)


@pytest.mark.parametrize('when', ['before', 'within', 'after'])
def test_an_exception_in_the_block_gives_the_model_back(when: str):
    def fails(self: Any, ids: Tensor) -> Tensor:
        if when == 'within':
            raise KeyboardInterrupt
        return self.wte(ids)

    model = Model(fails)
    before = set(vars(model)), vars(model.wte).keys()
    with pytest.raises(KeyboardInterrupt), superposed(model, fold()) as inputs:  # noqa: PT012
        if when != 'before':
            model(**inputs)
        raise KeyboardInterrupt
    assert type(model.wte) is type(model.value) is nn.Embedding
    assert (set(vars(model)), vars(model.wte).keys()) == before
    model.look = LOOKS['whole']
    check(step(model, fold()), definition(Model(), fold()))


def test_another_block_on_the_model_is_refused_and_the_first_goes_on():
    model, folded = Model(), fold()
    with superposed(model, folded) as inputs:
        with pytest.raises(ValueError, match='Model is superposed already: leave one block of superposed before the'):
            superposed(model, folded).__enter__()
        with pytest.raises(ValueError, match='Sequential is superposed already'):
            superposed(nn.Sequential(model), folded).__enter__()
        assert isinstance(model.wte, BagLookup)
        model(**inputs)
    assert type(model.wte) is nn.Embedding


def test_other_calls_in_the_block_neither_count_nor_are_watched():
    """Before, between and after: on plain ids, in training and evaluation."""
    model, folded, ids = Model(), fold(True), torch.randint(V, (2, 5))
    expected, calls = model(ids), []
    model.register_forward_hook(lambda *_: calls.append(1))
    with superposed(model, folded) as inputs:
        assert torch.equal(model(ids), expected)
        assert torch.equal(model.eval()(input_ids=ids), expected)
        model.train()
        assert len(calls) == 2
        first = model(**inputs)
        assert len(calls) == 4
        assert torch.equal(model(inputs['input_ids'], inputs['attention_mask']), first)
        assert torch.equal(model(ids), expected)
        assert len(calls) == 6


@pytest.mark.parametrize('how', ['keywords', 'positions', 'one mapping', 'an object', 'an object of copies', 'slices'])
def test_a_model_called_in_any_way(how: str):
    """Also on batches of a class of one's own, which the model may take apart."""

    class Batch:
        def __init__(self, **values: Any):
            vars(self).update(values)

    class Takes(Model):
        def forward(self, *args: Any, **inputs: Any) -> Tensor:
            if args and not isinstance(args[0], Tensor):
                inputs = args[0] if isinstance(args[0], dict) else vars(args[0])
                args = (inputs.pop('input_ids'), inputs.pop('attention_mask'))
            return super().forward(*args, **inputs)

    model, folded = Takes(), fold(True)
    with superposed(model, folded) as given:
        if how == 'keywords':
            logits = model(**given)
        elif how == 'positions':
            logits = model(given['input_ids'], given['attention_mask'])
        elif how == 'one mapping':
            logits = model(dict(given))
        elif how == 'slices':
            logits = torch.cat([model(**{key: value[row : row + 1] for key, value in given.items()}) for row in (0, 1)])
        else:
            values = {key: value.clone() for key, value in given.items()} if 'copies' in how else given
            logits = model(Batch(**values))
        loss = F_tst.multi_hot_cross_entropy(logits.flatten(0, 1), folded['labels'].flatten(0, 1))
        loss.backward()
    check((loss.detach(), [p.grad for p in model.parameters()]), definition(Model(), folded))


def test_in_inference_mode():
    folded = fold(True)
    with torch.inference_mode(), superposed(model := Model(), fold(True)) as inputs:
        logits = model(**inputs)
    loss = F_tst.multi_hot_cross_entropy(logits.flatten(0, 1), folded['labels'].flatten(0, 1))
    torch.testing.assert_close(loss, definition(Model(), folded)[0])


def in_place(self: Any, ids: Tensor) -> Tensor:
    ids[:, ::2] = 3
    return self.wte(ids)


def in_a_copy(self: Any, ids: Tensor) -> Tensor:
    ids = ids.clone()
    ids[:, ::2] = 3
    return self.wte(ids)


def out(self: Any, ids: Tensor) -> Tensor:
    return self.wte(torch.add(torch.zeros_like(ids), 1, out=ids))


def floats(self: Any, ids: Tensor) -> Tensor:
    return self.wte(torch.cat([ids, torch.zeros(len(ids), 1)], 1)[:, :-1].long())


def float_buffer(self: Any, ids: Tensor) -> Tensor:
    kept = torch.zeros(ids.shape)
    kept.copy_(ids)
    return self.wte(kept.long())


def hashed(self: Any, ids: Tensor) -> Tensor:
    return self.wte(ids) + self.value((ids * 31 + F.pad(ids[:, :-1], (1, 0))) % V)


def hashed_by_numpy(self: Any, ids: Tensor) -> Tensor:
    return self.wte(ids) + self.value(torch.from_numpy(np.asarray(ids.cpu()) % V))


def documents(self: Any, ids: Tensor) -> Tensor:
    ends = (ids == 7).cumsum(1)
    return (ends[:, :, None] == ends[:, None]).float() @ self.wte(ids)


def score(self: Any, ids: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    x = self.wte(ids)[:, None]
    same = lambda score, b, h, q, k: torch.where(ids[b, q] == ids[b, k], score, -1e9)  # noqa: E731
    return flex_attention(x, x, x, score_mod=same)[:, 0]  # pyright: ignore


def remade(self: Any, ids: Tensor) -> Tensor:
    return self.wte(torch.zeros_like(ids) + 5)


# What a forward may do with ids, and the operator that a refusal names.
READS: dict[str, tuple[Any, str]] = {
    'compared': (lambda self, ids: self.wte(ids) * (ids == 7)[..., None], 'reads .* by value by eq'),
    'documents': (documents, 'reads .* by value by eq'),
    'remainder': (lambda self, ids: self.wte(ids % 7), 'reads .* by value by remainder'),
    'hashed': (hashed, 'reads .* by value by mul'),
    'hashed by numpy': (hashed_by_numpy, 'reads .* by value by __array__'),
    'a list': (lambda self, ids: self.wte(torch.tensor(ids.tolist())), 'reads .* by value by tolist'),
    'applied': (lambda self, ids: self.wte(ids.clone().apply_(lambda v: v * 7 % V)), 'reads .* by value by apply_'),
    'map_': (lambda self, ids: self.wte(torch.zeros_like(ids).map_(ids, lambda _, v: v * 7 % V)), 'reads .* by map_'),
    'shifted': (lambda self, ids: self.wte(ids + 1), 'reads .* by value by add'),
    'where': (lambda self, ids: self.wte(torch.where(torch.rand(ids.shape) < 2, ids, 3)), 'reads .* by value by where'),
    'masked': (lambda self, ids: self.wte(ids.masked_fill(torch.rand(ids.shape) < 0.5, 3)), 'reads .* masked_fill'),
    'float': (lambda self, ids: self.wte(ids.float().long()), r'reads .* by value by _to_copy to torch.float32'),
    'bool': (lambda self, ids: self.wte(ids) * ids.bool()[..., None], r'reads .* by value by _to_copy to torch.bool'),
    'among floats': (floats, r'reads .* by value by cat to torch.float32'),
    'in a buffer of floats': (float_buffer, r'reads .* by value by copy_ to torch.float32'),
    'checked': (lambda self, ids: (self.wte(ids), (lambda: 1 / 0)() if ids.max() > V else 0)[0], 'reads .* by max'),
    'item': (lambda self, ids: self.wte(ids) * ids[0, 0].item(), 'reads .* by value by _local_scalar_dense'),
    'contains': (lambda self, ids: self.wte(ids) * (7 in ids), 'reads .* by value by eq'),
    'sorted': (lambda self, ids: self.wte(ids.sort(1)[0]), 'reads .* by value by sort'),
    'topk': (lambda self, ids: self.wte(ids.topk(5, 1)[0]), 'reads .* by value by topk'),
    'unique': (lambda self, ids: self.wte(ids) + len(ids.unique()), 'reads .* by value by _?unique'),
    'isin': (lambda self, ids: self.wte(ids) * torch.isin(ids, torch.tensor([1, 2]))[..., None], 'reads .* by isin'),
    'one hot': (lambda self, ids: F.one_hot(ids, V) @ self.wte.weight, 'reads .* by value by'),
    'counted': (lambda self, ids: self.wte(ids) + ids.flatten().bincount().sum(), 'reads .* by value by bincount'),
    'functional': (lambda self, ids: F.embedding(ids, self.wte.weight), 'reads .* by value by embedding'),
    'indexed': (lambda self, ids: self.wte.weight[ids], 'reads .* by value by index'),
    'index_select': (
        lambda self, ids: self.wte.weight.index_select(0, ids[0]).expand(2, -1, -1),
        'reads .* index_sele',
    ),
    'mapped': (lambda self, ids: self.wte(torch.arange(V).flip(0)[ids]), 'reads .* by value by index'),
    'gathered by': (lambda self, ids: self.wte(torch.arange(V).expand(len(ids), -1).gather(1, ids)), 'reads .* gather'),
    'added at': (
        lambda self, ids: torch.zeros(V, D).index_add(0, ids[0], self.wte(ids[0])).sum(0),
        'reads .* index_add',
    ),
    'another length': (
        lambda self, ids: self.wte(ids) + self.longer(ids),
        r'longer \(Embedding\) reads .* by embedding',
    ),
    'bag': (lambda self, ids: self.wte(ids) + self.bag(ids)[:, None], r'bag \(EmbeddingBag\) reads .* _embedding_bag'),
    'bags of ours': (lambda self, ids: F_tst.bag_embedding(self.wte, ids[..., None]), 'reads .* by value by'),
    'score of attention': (score, 'reads .* by value by flex_attention'),
    'remade': (remade, 'looks no ids of the batch up in its input embedding'),
    'not looked up': (lambda self, ids: torch.zeros(*ids.shape, D), 'looks no ids of the batch up in its input'),
    'in another table': (lambda self, ids: self.value(ids), 'looks no ids of the batch up in its input embedding'),
    'in place': (in_place, r'Model\)? changes .* by (fill_|copy_), test_superposed.py:\d+\. Each stands for a bag'),
    'in a copy': (in_a_copy, r'Model\)? changes .* by (fill_|copy_), test_superposed.py:\d+\. Each stands for a bag'),
    'filled': (lambda self, ids: self.wte(ids.fill_(3)), r'Model\)? changes .* by fill_, test_superposed.py:\d+'),
    'added in place': (lambda self, ids: self.wte(ids.add_(1)), 'changes .* by add_'),
    'out': (out, '(changes|reads) .* by add'),
}


@pytest.mark.parametrize('what', READS)
def test_a_model_that_does_more_with_ids_is_refused(what: str):
    """Before its first step, in one sentence with the operator, the module and the line; and then it is as it was."""
    look, message = READS[what]
    model = Model(look)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message) as raised:
        step(model, fold(True))
    text = str(raised.value)
    assert text.count('\n') == 0
    assert 'looks no ids' in text or re.search(r', test_superposed.py:\d+\. Each stands for a bag: check, change', text)
    assert type(model.wte) is nn.Embedding
    assert '_compiled_call_impl' not in vars(model)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('what', ['documents', 'in place', 'in a copy', 'another length', 'hashed by numpy', 'remade'])
@pytest.mark.parametrize(
    'way', ['wrapped', 'in place', 'checkpointed', 'reentrant', 'in evaluation', 'without gradient']
)
def test_it_is_refused_in_models_of_every_kind(way: str, what: str):
    look, message = READS[what]
    torch._dynamo.reset()
    model: Any = Model(look)
    call = model
    if way in COMPILED:
        model, call = COMPILED[way](model, backend='aot_eager')
    elif way in ('checkpointed', 'reentrant'):
        model = Model(lambda self, ids: checkpoint(lambda ids: look(self, ids), ids, use_reentrant=way == 'reentrant'))
        call = model
    elif way == 'in evaluation':
        model.eval()
    with pytest.raises(ValueError, match=message), torch.set_grad_enabled(way != 'without gradient'):
        step(call, fold(True))


def change(module: nn.Module, args: Any) -> None:
    args[0].fill_(3)


def replace(module: nn.Module, args: Any) -> Any:
    return (args[0] + 1, *args[1:])


def read(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * (args[0] != 7)[..., None]


@pytest.mark.parametrize('on', ['', 'wte'])
@pytest.mark.parametrize(
    ('hook', 'message'),
    [
        (change, 'changes .* by fill_, test_sup'),
        (replace, 'reads .* by add, test_sup'),
        (read, 'reads .* by ne, test_sup'),
    ],
)
def test_hooks_that_do_more_with_ids_are_refused(hook: Any, message: str, on: str):
    model = Model()
    module = model.get_submodule(on)
    name = r'wte \(Embedding\)' if on else 'Model'
    (module.register_forward_hook if hook is read else module.register_forward_pre_hook)(hook)
    with superposed(model, fold()) as inputs, pytest.raises(ValueError, match=f'^{name} {message}'):
        model(inputs['input_ids'])


def test_a_refusal_names_the_module():
    outer = nn.Sequential(Model(documents))
    with superposed(outer, fold()) as inputs, pytest.raises(ValueError, match=r'^0 \(Model\) reads the ids of a super'):
        outer(inputs['input_ids'])


@pytest.mark.parametrize('backend', [None, 'aot_eager'])
def test_ids_changed_in_place_in_a_later_step(backend: str | None):
    torch._dynamo.reset()

    def later(self: Any, ids: Tensor) -> Tensor:
        if self.late:
            ids[:, ::2] = 3
        return self.wte(ids)

    inner: Any = Model(later)
    inner.late = False
    model: Any = inner if backend is None else torch.compile(inner, backend=backend, fullgraph=True)
    step(model, fold())
    inner.late = True
    with pytest.raises(ValueError, match='The ids of a superposed batch were changed in place in the pass of'):
        step(model, fold())
    inner.late = False
    with pytest.raises(ValueError, match='were changed in place'), superposed(model, fold()) as inputs:  # noqa: PT012
        inputs['input_ids'].fill_(3)
        model(**inputs)


def test_a_branch_of_training_is_watched_too():
    """A first block may be one of evaluation."""

    def drops(self: Any, ids: Tensor) -> Tensor:
        return self.wte(torch.where(torch.rand(ids.shape) < 0.5, ids, 3) if self.training else ids)

    model = Model(drops).eval()
    with torch.no_grad(), superposed(model, fold()) as inputs:
        model(**inputs)
    with pytest.raises(ValueError, match='reads the ids of a superposed batch by value by where'):
        step(model.train(), fold())


class Reads(Model):
    def __init__(self, use: Any):
        super().__init__()
        self.use = use

    def forward(self, input_ids: Tensor, labels: Any = None, **rest: Any) -> Tensor:
        self.use(labels)
        return super().forward(input_ids, **rest)


@pytest.mark.parametrize('superpose', ['both', 'output'])
@pytest.mark.parametrize(
    ('use', 'operator'),
    [
        (lambda labels: labels == -100, 'eq'),
        (
            lambda labels: F.cross_entropy(torch.zeros(labels.numel(), V), labels.roll(1, 1).reshape(-1)),
            'roll',
        ),
        (lambda labels: labels.tolist(), 'tolist'),
        (lambda labels: labels.fill_(3), 'fill_'),
    ],
)
def test_a_forward_that_reads_labels_is_refused(use: Any, operator: str, superpose: str):
    """They may be given to hand them on, whole."""
    model = Reads(use)
    folded = fold(length=7, expand='none', superpose=superpose)
    labels = torch.zeros(2, 7, dtype=torch.long)
    block = superposed(model, folded)
    with block as inputs:
        block.follow_labels(labels)
        with pytest.raises(
            ValueError, match=f'Reads reads the labels by {operator}, test_superposed.py:.* in its forw'
        ):
            model(**inputs, labels=labels)
    model = Reads(lambda labels: (labels.shape, labels.clone().detach()))
    block = superposed(model, folded)
    with block as inputs:
        block.follow_labels(labels)
        model(**inputs, labels=labels)


def test_flex_attention_that_knows_nothing_of_ids_trains():
    from torch.nn.attention.flex_attention import flex_attention

    def attends(self: Any, ids: Tensor) -> Tensor:
        x = self.wte(ids)[:, None]
        bias = torch.arange(64)
        found = flex_attention(x, x, x, score_mod=lambda score, b, h, q, k: score - bias[q] + bias[k])
        return found[:, 0]  # pyright: ignore

    model, folded = Model(attends), fold()
    with torch.no_grad(), superposed(model, folded) as inputs:
        model(**inputs)


MISUSED: dict[str, tuple[Any, str]] = {
    'a tensor': (
        lambda: superposed(Model(), cast(Any, torch.zeros(2, 3))),
        'superposed was given no tensor of input_ids: give it a batch of int64 or int32 ids that',
    ),  # pyright: ignore
    'no ids': (lambda: superposed(Model(), {'x': 1}), 'superposed was given no tensor of input_ids: give it a batch'),
    'not folded': (
        lambda: superposed(Model(), {'input_ids': torch.zeros(4, 6).long(), 'labels': torch.zeros(4, 6).long()}),
        r'superposed was given input_ids of torch.int64, \(4, 6\): give it a batch of',
    ),
    'one row': (
        lambda: superposed(Model(), {'input_ids': torch.zeros(4).long()}),
        r', \(4,\): give it a batch of int64 or int32 ids that fold_batch has made',
    ),
    'floats': (
        lambda: superposed(Model(), {'input_ids': torch.zeros(1, 4, 2)}),
        'was given input_ids of torch.float32',
    ),
    'small': (
        lambda: superposed(Model(), {'input_ids': torch.zeros(1, 4, 2).short()}),
        'input_ids of torch.int16, ',
    ),
    'a weight': (
        lambda: superposed(Model(), fold(), Model().wte.weight).__enter__(),  # pyright: ignore
        'embedding is a Parameter: give the nn.Embedding that Model looks token ids up in',
    ),
    'another embedding': (lambda: step(Model(), fold(), embedding=nn.Embedding(7, 2)), '(reads|looks no) .*ids'),
    'a longer embedding': (
        lambda: step(m := Model(), fold(), embedding=m.longer),
        r'wte \(Embedding\) reads .* embeddi',
    ),
}


@pytest.mark.parametrize('what', MISUSED)
def test_misuse_gets_a_sentence(what: str):
    call, message = MISUSED[what]
    with pytest.raises(ValueError, match=message) as raised:
        call()
    assert '\n' not in str(raised.value)


@pytest.mark.parametrize('option', ['max_norm', 'sparse', 'scale_grad_by_freq'])
def test_an_embedding_that_does_more_with_a_lookup_is_refused(option: str):
    model = Model(**{option: 1.0 if option == 'max_norm' else True})
    with pytest.raises(ValueError, match=f'An embedding of Model has {option}, which is not defined for bags: make it'):
        step(model, fold())
    assert type(model.wte) is nn.Embedding


@pytest.mark.parametrize('call', [lambda model, inputs: None, lambda model, inputs: model.forward(**inputs)])
def test_a_model_that_is_not_called_is_refused(call: Any):
    message = 'superposed was given Model, which was not called on the inputs of its block'
    with pytest.raises(ValueError, match=message), superposed(model := Model(), fold()) as inputs:
        call(model, inputs)
    with pytest.raises(ValueError, match='superposed was given Sequential, which was not called'):  # noqa: SIM117
        with superposed(nn.Sequential(model), fold()) as inputs:
            model(**inputs)


CALLED: list[Any] = []  # where a watched call leaves its trace


class Restless(Model):
    """Draws random numbers of every kind, keeps running means and counts its calls."""

    def __init__(self):
        super().__init__()
        self.norm, self.calls, self.scale = nn.BatchNorm1d(D), 0, 1.0
        self.register_buffer('seen', torch.zeros(D))
        self.register_buffer('later', None)
        self.look = self.draws

    def draws(self, model: Any, ids: Tensor) -> Tensor:
        x = F.dropout(self.norm(self.wte(ids).flatten(0, 1)).view(*ids.shape, D), 0.3)
        self.seen += x.detach().mean((0, 1))  # pyright: ignore
        if not torch.compiler.is_compiling():
            CALLED.append(self)
            self.calls += 1
            self.scale *= 1.5
            self.later = x.detach()[0] if self.later is None else self.later + x.detach()[0]
            x = x * (1 + random.random()) * (1 + np.random.rand()) * self.scale + self.later + self.calls
        return x + self.seen


@pytest.mark.parametrize('how', ['eager', 'aot_eager', 'autocast', 'checkpointed'])
def test_the_watched_call_changes_no_bit(how: str):
    """Nor does it in a run that is killed and begun again, and watched anew."""
    CALLED.clear()

    def run(watched: bool) -> list[Tensor]:
        torch._dynamo.reset()
        torch.manual_seed(7)
        random.seed(7)
        np.random.seed(7)
        model: Any = Restless()
        call: Any = torch.compile(model, backend='aot_eager', fullgraph=True) if how == 'aot_eager' else model
        if how == 'checkpointed':
            model.look = lambda _, ids: checkpoint(model.draws, model, ids, use_reentrant=True)
        if not watched:
            watch._WATCHED[True, True].add(call)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        results = []
        for turn in range(3):
            folded = fold(turn == 1)
            with torch.autocast('cpu', torch.bfloat16, enabled=how == 'autocast'):
                loss, _ = step(call, folded)
            optimizer.step()
            optimizer.zero_grad()
            results.append(loss)
            if watched and turn == 1:
                restore(call)
        kept = [torch.tensor(model.calls), torch.tensor(model.scale), torch.rand(1), torch.tensor(np.random.rand())]
        return [*results, *model.parameters(), *model.buffers(), *kept]

    mine, calls = run(True), len(CALLED)
    theirs = run(False)
    assert len(CALLED) - calls < calls  # a watched call is one more
    for each, other in zip(mine, theirs, strict=True):
        assert torch.equal(each, other)


class Named(dict[str, Any]):
    """A dict whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Filled(set[int]):
    """What a copy by ``copy.copy`` does not equal."""

    def __init__(self, values: Any = ()):
        super().__init__([*values, len(values)])


class Hoards(Model):
    """Keeps what it is given in every kind of place that is neither buffer nor trained, and hooks its activations."""

    def __init__(self):
        super().__init__()
        self.look = self.hoards
        self.mean, self.losses, self.of_layers, self.generator = torch.zeros(D), [], {'seen': []}, torch.Generator()
        self.last, self.pair, self.shapes = collections.deque(maxlen=2), (torch.zeros(1), [0]), set()
        self.centers = nn.Parameter(torch.ones(D), requires_grad=False)
        self.named, self.filled = Named(sums=torch.zeros(1), calls=0), Filled()
        self.numpy = np.random.default_rng(0), np.random.RandomState(0)

    def hoards(self, model: Any, ids: Tensor) -> Tensor:
        x = self.wte(ids)
        x.retain_grad()
        x.register_hook(lambda gradient: gradient * 1.5)
        now = x.detach().mean((0, 1))
        self.mean += now
        self.centers.lerp_(now, 0.5)
        self.losses.append(now.sum())
        self.of_layers['seen'].append(len(self.losses))
        self.of_layers[f'at {len(self.losses)}'] = [now]
        self.last.append(now)
        self.pair[0].add_(1)
        self.pair[1][0] += 1
        self.shapes.add((len(self.losses), *ids.shape))
        self.named.sums.add_(1)
        self.named['calls'] += 1
        assert self.filled == {0}
        if not hasattr(self, 'first'):
            self.first = x.mean()
        x = x * self.numpy[0].random() * self.numpy[1].rand() * self.named.sums * self.named.calls
        noise = torch.rand(D, generator=self.generator)
        return x + self.mean + noise + self.centers + len(self.losses) + self.pair[0] + self.first


def test_the_watched_call_leaves_nothing_that_modules_keep_of_their_own():
    def run(watched: bool) -> Any:
        model = Hoards()
        if not watched:
            watch._WATCHED[True, True].add(model)
        losses = []
        for turn in range(2):
            if turn:
                del model.first
            loss, _ = step(model, fold())
            losses.append(loss)
            if watched:
                restore(model)
        kept = [model.mean, model.centers, *model.losses, *model.last, *model.pair[0], model.generator.get_state()]
        for name in ('at 1', 'at 2'):
            kept += model.of_layers.pop(name)
        assert (model.pair[1], model.of_layers, len(model.shapes)) == ([2], {'seen': [1, 2]}, 2)
        return [*losses, *kept, *(p.grad for p in model.parameters() if p.grad is not None)]

    mine, theirs = run(True), run(False)
    assert len(mine) == len(theirs)
    assert all(torch.equal(each, other) for each, other in zip(mine, theirs, strict=True))


def test_a_hook_that_removes_itself_is_called_in_the_real_call():
    def once(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        handle.remove()
        return output * 2

    losses = []
    for watched in (True, False):
        model = Model()
        handle = model.mix.register_forward_hook(once)
        if not watched:
            watch._WATCHED[True, True].add(model)
        losses += [step(model, fold())[0], step(model, fold())[0]]
    assert losses[0] == losses[2] != losses[1] == losses[3]


def test_lazy_modules_are_made_in_the_watched_call():
    model: Any = Model()
    model.norm, model.lazy = nn.LazyBatchNorm1d(), nn.LazyLinear(D)
    model.look = lambda self, ids: self.lazy(self.norm(self.wte(ids).flatten(0, 1))).view(*ids.shape, D)
    step(model, fold())
    assert model.lazy.in_features == D
    assert model.lazy.weight.grad is not None


def test_a_block_on_plain_ids_does_not_spare_one_on_bags_its_watched_call():
    model = Model(lambda self, ids: self.wte(ids) * (ids % 7 + 1)[..., None])
    with pytest.raises(ValueError, match='reads the ids of a superposed batch by value'):
        step(model, fold())
    restore(model)
    step(model, fold(expand='none', superpose='output'))
    with pytest.raises(ValueError, match='reads the ids of a superposed batch by value'):
        step(model, fold())


def test_each_mode_is_watched_in_a_block_that_calls_the_model_in_both():
    def look(self: Any, ids: Tensor) -> Tensor:
        return self.wte(ids) * (ids % 7 + 1)[..., None] if self.training else self.wte(ids)

    model = Model(look)
    with pytest.raises(ValueError, match='reads the ids of a superposed batch by value'):  # noqa: PT012, SIM117
        with superposed(model, fold()) as inputs:
            model.eval()(**inputs)
            model.train()(**inputs)


def test_a_cached_parametrisation_has_its_gradient():
    gradients = []
    for watched in (True, False):
        model = Model()
        parametrize.register_parametrization(model.mix, 'weight', nn.Tanh())
        if not watched:
            watch._WATCHED[True, True].add(model)
        with parametrize.cached():
            step(model, fold())
        gradients.append(model.mix.parametrizations.weight.original.grad)  # pyright: ignore
    assert torch.equal(*gradients)


def test_an_argument_that_cannot_be_copied_is_given_to_both_calls():
    """All other arguments are copied for the watched call: it may take a mapping apart."""

    class Takes(Model):
        def forward(self, batch: Any, prefix: Tensor) -> Tensor:  # pyright: ignore
            locks.append(batch.pop('lock'))
            return super().forward(batch.pop('input_ids')) + prefix.mul_(2)

    model, lock, locks, weight = Takes(), threading.Lock(), [], torch.ones(1, requires_grad=True)
    prefix = weight * 2
    with superposed(model, fold()) as inputs:
        model({**inputs, 'lock': lock}, prefix).sum().backward()
    assert locks == [lock, lock]
    assert prefix == 4
    assert weight.grad is not None


def test_the_watched_call_takes_no_copy_of_weights_that_are_trained():
    """Also not if a module has them in a list, as nn.LSTM does."""
    model: Any = Model()
    model.layers, model.kinds = nn.LSTM(D, D), {'mix': [model.mix.weight]}
    trained, seen = {id(weight) for weight in model.parameters()}, []

    def look(self: Any, ids: Tensor) -> Tensor:
        held = [*self.parameters(), *self.layers._flat_weights, *self.kinds['mix']]
        seen.append({id(weight) for weight in held} == trained and self.kept.data_ptr())
        return self.wte(ids)

    model.look = look
    step(model, fold())
    watched, counts = seen
    assert counts == model.kept.data_ptr()
    assert watched not in (False, counts)


def test_attributes_of_unusual_kinds_are_left_alone():
    model: Any = Model()
    model.sparse, model.nothing = torch.eye(2).to_sparse(), torch.zeros(2, device='meta')
    model.spread, model.counts = torch.full((), torch.nan).expand(3), collections.Counter(a=1)
    model.rows = torch.zeros(2)

    def look(self: Any, ids: Tensor) -> Tensor:
        self.rows.resize_(4)
        self.counts['a'] += 1
        return self.wte(ids)

    model.look = look
    with superposed(model, fold()) as inputs:
        model(**inputs)
        assert model.counts == {'a': 2}


@pytest.mark.parametrize('held', ['partial', 'object', 'method'])
def test_ids_that_a_score_function_of_flex_attention_holds_are_seen(held: str):
    flex_attention = pytest.importorskip('torch.nn.attention.flex_attention').flex_attention

    class Score:
        def __init__(self, ids: Tensor):
            self.ids = ids

        def __call__(self, score: Tensor, b: Any, h: Any, q: Any, k: Any) -> Tensor:
            return score + self.ids[b, k] % 2

    def look(self: Any, ids: Tensor) -> Tensor:
        score: Any = Score(ids)
        if held == 'method':
            score = score.__call__
        elif held == 'partial':
            score = functools.partial(lambda score, b, h, q, k, ids: score + ids[b, k] % 2, ids=ids)
        x = self.wte(ids)[:, None]
        return flex_attention(x, x, x, score_mod=score)[:, 0]

    with pytest.raises(ValueError, match='reads the ids of a superposed batch by value by flex_attention'):
        step(Model(look), fold())

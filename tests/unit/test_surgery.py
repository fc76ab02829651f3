"""The model for a superposed microbatch: what is changed for one pass, and given back."""

import copy
import io
from typing import Any

import pytest
import torch
from common.profiled import WAITING, operators
from common.trainers import VOCAB_SIZE, Bare, Superposed, hugging_face, llama, mpt
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from composer_tst.ops.cross_entropy import multi_hot_cross_entropy
from composer_tst.ops.fold import bag_rows, fold_batch, lay_out
from composer_tst.ops.lookup import BagLookup
from composer_tst.ops.superposed import find_embedding

TINY: dict[str, Any] = {'vocab_size': VOCAB_SIZE, 'hidden_size': 16, 'num_hidden_layers': 1, 'num_attention_heads': 2}


def gemma():
    config = Gemma3TextConfig(
        head_dim=8, intermediate_size=32, num_key_value_heads=1, attn_implementation='eager', **TINY
    )
    return hugging_face(Gemma3ForCausalLM(config))


@pytest.mark.parametrize('make', [llama, mpt, gemma])
def test_a_model_is_changed_for_one_pass_alone(make: Any):
    model = make()
    embedding = find_embedding(model)
    cls, keys, attributes = type(embedding), list(model.state_dict()), set(vars(embedding))

    def is_untouched() -> bool:
        return type(embedding) is cls and set(vars(embedding)) == attributes and set(vars(model)) == own

    own = set(vars(model))
    superposition = Superposed(model)
    assert is_untouched()
    loss = superposition.loss(folded_rows())
    assert isinstance(embedding, BagLookup)
    assert isinstance(embedding, cls)
    assert list(model.state_dict()) == keys
    loss.backward()
    superposition.at('after_backward')
    assert is_untouched()
    assert not model._forward_pre_hooks


def folded_rows(rows: int = 4, length: int = 6, bag_size: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, VOCAB_SIZE, (rows, length), generator=generator)
    return fold_batch({'input_ids': ids, 'labels': ids.clone()}, bag_size)


@pytest.mark.parametrize('make', [llama, mpt, gemma])
def test_a_copy_and_a_pickle_made_in_the_middle_of_a_pass_are_the_model(make: Any):
    model = make()
    ids = torch.randint(0, VOCAB_SIZE, (2, 6))
    plain = model.eval().model(input_ids=ids).logits
    Superposed(model.train()).loss(folded_rows())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert type(find_embedding(other)) is type(find_embedding(make()))
        assert vars(find_embedding(other)).keys() == vars(find_embedding(make())).keys()
        assert torch.equal(other.eval().model(input_ids=ids).logits, plain)


@pytest.mark.parametrize('make', [llama, mpt, gemma])
def test_other_ids_are_looked_up_as_ever_in_the_middle_of_a_pass(make: Any):
    """By a callback that calls the inner model, in training or evaluation, with ids of one shape or another."""
    model = make()
    ids = torch.randint(0, VOCAB_SIZE, (2, 6))
    plain = [model.model(input_ids=part).logits for part in (ids, ids[:, :5])]
    Superposed(model).loss(folded_rows())
    for part, expected in zip((ids, ids[:, :5]), plain, strict=True):
        assert torch.equal(model.model(input_ids=part).logits, expected)
        assert torch.equal(model.eval().model(input_ids=part).logits, expected)
        model.train()


def test_what_a_pass_that_failed_has_left_is_taken_off():
    """A plain batch is trained on as it is even so, and the next microbatches find the model as it was."""
    model = llama()
    embedding, ids = find_embedding(model), torch.randint(0, VOCAB_SIZE, (2, 6))
    batch = {'input_ids': ids, 'labels': ids.clone()}
    before = model(batch)
    superposition = Superposed(model)
    superposition.loss(folded_rows())
    superposition.at('before_loss')
    after = model(batch)
    assert torch.equal(after.logits, before.logits)
    assert torch.equal(model.loss(after, batch), before.loss)
    Superposed(model)
    assert type(embedding) is nn.Embedding
    assert 'loss' not in vars(model)


def test_a_loss_set_on_the_instance_is_given_back(caplog: pytest.LogCaptureFixture):
    model: Any = llama()
    superposition = Superposed(model)

    def own(outputs: Any, batch: Any) -> torch.Tensor:
        return outputs.logits.sum()

    model.loss = own
    for _ in range(2):
        superposition.step(folded_rows())
        assert model.loss is own
    assert caplog.text.count('superposed steps train on the multi-hot cross-entropy instead of it') == 1
    superposition.at('before_loss')
    assert model.loss is not own
    model.loss = own
    with pytest.raises(ValueError, match='The loss of HuggingFaceModel is set between BEFORE_LOSS and AFTER_LOSS'):
        superposition.at('after_loss')
    assert model.loss is own


def test_a_loss_that_is_no_method_is_refused():
    class Odd(Bare):
        loss = property(lambda self: lambda outputs, batch: outputs.sum())  # pyright: ignore

    with pytest.raises(ValueError, match='The loss of Odd is set between .* or is no method'):
        Superposed(Odd(nn.Embedding(VOCAB_SIZE, 4))).loss(folded_rows())


def test_logits_that_are_not_one_for_each_bag_are_refused():
    class Returns(Bare):
        def forward(self, batch: Any) -> Any:
            return change(super().forward(batch))

    def change(outputs: torch.Tensor) -> Any:
        return outputs

    for change, message in (  # noqa: B007
        (lambda outputs: outputs.transpose(0, 1), r'returns logits of shape \(6, 2, 4\) for bags of shape \(2, 6, 2\)'),
        (lambda outputs: {'lm_logits': outputs}, 'returns lm_logits from its forward: have it return logits'),
        (lambda outputs: 'x', 'returns str from its forward: have it return logits'),
    ):
        with pytest.raises(ValueError, match=f'Returns {message}'):
            Superposed(Returns(nn.Embedding(VOCAB_SIZE, 4))).loss(folded_rows())


@pytest.mark.parametrize(
    'use', [lambda v: v == 3, lambda v: nn.functional.relu(v), lambda v: v[:, 1:].tolist(), lambda v: v.view(-1).sum()]
)
def test_a_model_that_reads_labels_in_its_forward_is_refused(use: Any):
    class Reads(Bare):
        def forward(self, batch: Any) -> torch.Tensor:
            use(batch['labels'])
            return super().forward(batch)

    model = Reads(nn.Embedding(VOCAB_SIZE, 4))
    with pytest.raises(ValueError, match=r'Reads reads the labels by \w+, test_surgery.py:\d+ in its forward'):
        Superposed(model).loss(folded_rows())


@pytest.mark.parametrize('weights', [None, torch.tensor([1.0, 0.5])])
@pytest.mark.parametrize('make', [llama, mpt])
def test_a_superposed_step_reads_no_value_that_a_plain_step_does_not(make: Any, weights: torch.Tensor | None):
    """On a GPU each such reading would wait for it. What is read of a batch is read before it is moved there."""
    model = make().train()
    ids = torch.randint(0, VOCAB_SIZE, (4, 12))
    batch = {'input_ids': ids, 'labels': ids.clone(), 'attention_mask': torch.ones_like(ids)}
    plain = operators(lambda: model.loss(model(batch), batch).backward())
    superposition = Superposed(model, 'uniform' if weights is None else weights.tolist())
    laid_out, targets = lay_out(batch, 2, 'sequence', 'both').batch, fold_batch(batch, 2)['labels']

    def step() -> None:
        superposition.step({**bag_rows(laid_out, 2, 'both', padded=False), 'labels': targets})

    step()  # the first is watched
    superposed = operators(step)
    assert any('embedding_bag' in name for name in superposed - plain)
    # What the loss reads on a CPU alone; tests/ops/test_cross_entropy.py holds it to read nothing elsewhere.
    logits = torch.randn(targets.shape[:2].numel(), VOCAB_SIZE, requires_grad=True)
    loss = operators(lambda: multi_hot_cross_entropy(logits, targets.flatten(0, 1), weights).backward())
    assert all(superposed[name] <= plain[name] + loss[name] for name in WAITING)

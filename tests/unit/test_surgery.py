"""Which models can be superposed, and what is said of those that cannot."""

import copy
import io
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from common.profiled import WAITING, operators
from common.trainers import VOCAB_SIZE, hugging_face, llama, mpt, superposed_loss
from composer.models import ComposerModel
from peft import LoraConfig
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    JetMoeConfig,
    JetMoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from composer_tst.compatibility import check_model
from composer_tst.ops.cross_entropy import multi_hot_cross_entropy
from composer_tst.ops.fold import bag_rows, fold_batch, lay_out
from composer_tst.surgery import Attachment, find_embedding


class Bare(ComposerModel):
    """A user's own model: some embeddings, some head."""

    def __init__(self, *embeddings: nn.Embedding):
        super().__init__()
        self.embeddings = nn.ModuleList(embeddings)

    def forward(self, batch: Any) -> torch.Tensor:
        return self.embeddings[0](batch['input_ids'])

    def loss(self, outputs: Any, batch: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return outputs.sum()


class Detached(nn.Embedding):
    """Looks up past `nn.Embedding.forward`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.weight[input]


TINY: dict[str, Any] = {'vocab_size': VOCAB_SIZE, 'hidden_size': 16, 'num_hidden_layers': 1, 'num_attention_heads': 2}


JETMOE: dict[str, Any] = {
    'vocab_size': VOCAB_SIZE,
    'hidden_size': 16,
    'num_hidden_layers': 1,
    'num_key_value_heads': 2,
    'kv_channels': 8,
    'intermediate_size': 16,
    'num_local_experts': 2,
    'num_experts_per_tok': 1,
}


def peft_model():
    model = LlamaForCausalLM(LlamaConfig(intermediate_size=16, **TINY))
    return hugging_face(model, peft_config=LoraConfig(task_type='CAUSAL_LM', target_modules=['q_proj']))


def test_the_embedding_of_ones_own_model_is_its_only_one():
    embedding = nn.Embedding(7, 4)
    assert find_embedding(Bare(embedding)) is embedding
    check_model(Bare(embedding))


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: nn.Linear(2, 2), 'Linear is no ComposerModel'),
        (lambda: hugging_face(BertForMaskedLM(BertConfig(intermediate_size=16, **TINY))), 'no causal language model'),
        (
            lambda: hugging_face(
                T5ForConditionalGeneration(T5Config(VOCAB_SIZE, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
            ),
            'is an encoder-decoder',
        ),
        (peft_model, 'wrapped by PEFT: superposition is for pre-training'),
        (
            lambda: hugging_face(JetMoeForCausalLM(JetMoeConfig(**JETMOE, output_router_logits=True))),
            'JetMoeConfig does not keep the weight of its router loss',
        ),
        (lambda: Bare(nn.Embedding(7, 4), nn.Embedding(7, 4)), 'Bare has 2 nn.Embedding modules'),
        (lambda: Bare(), 'Bare has 0 nn.Embedding modules .* define get_input_embeddings'),
        (lambda: Bare(Detached(7, 4)), 'Detached does not look ids up through nn.Embedding.forward'),
    ],
)
def test_other_models_are_refused_in_one_sentence(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        check_model(make())


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

    def untouched() -> bool:
        return type(embedding) is cls and set(vars(embedding)) == attributes and 'loss' not in vars(model)

    attachment = Attachment(model)
    assert untouched()
    loss = superposed_loss(attachment, model, folded_rows())
    assert type(embedding) is not cls
    assert isinstance(embedding, cls)
    assert list(model.state_dict()) == keys
    outputs = model(attachment.begin(folded_rows()))
    attachment.check_forward()
    attachment.begin_loss(SimpleNamespace(outputs=outputs))
    assert float(model.loss(outputs, None)) == float(loss)
    attachment.end_loss()
    loss.backward()
    attachment.end()
    assert untouched()
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
    superposed_loss(Attachment(model), model.train(), folded_rows())
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
    superposed_loss(Attachment(model), model, folded_rows())
    for part, expected in zip((ids, ids[:, :5]), plain, strict=True):
        assert torch.equal(model.model(input_ids=part).logits, expected)
        assert torch.equal(model.eval().model(input_ids=part).logits, expected)
        model.train()


class Looks(Bare):
    """A model of one embedding that looks its ids up in some way."""

    def __init__(self, look: Any):
        super().__init__(nn.Embedding(VOCAB_SIZE, 4))
        self.look = look

    def forward(self, batch: Any) -> torch.Tensor:
        return self.look(self.embeddings[0], batch['input_ids'])


@pytest.mark.parametrize('frozen', [False, True])
@pytest.mark.parametrize(
    'look',
    [
        lambda wte, ids: wte(ids),
        lambda wte, ids: wte(ids.view(-1)).view(*ids.shape, -1),
        lambda wte, ids: wte(ids.t()).transpose(0, 1),
        lambda wte, ids: wte(ids[:, None])[:, 0],
        lambda wte, ids: torch.cat([wte(ids[:, :2]), wte(ids[:, 2:])], 1),
        lambda wte, ids: torch.stack([wte(row) for row in ids]),
        lambda wte, ids: wte(ids.long().detach()),
    ],
    ids=['whole', 'flat', 'transposed', 'one more axis', 'in two parts', 'row by row', 'as long'],
)
def test_any_view_of_the_ids_is_looked_up_as_bags(look: Any, frozen: bool):
    """Also in an embedding that is frozen, or in evaluation mode in a model in training."""
    model = Looks(look)
    embedding = find_embedding(model)
    if frozen:
        embedding.requires_grad_(False).eval()
    batch = folded_rows()
    expected = embedding(batch['input_ids']).mean(2)
    attachment = Attachment(model)
    found = model(attachment.begin(batch))
    attachment.check_forward()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ('look', 'message'),
    [
        (lambda wte, ids: functional.embedding(ids, wte.weight), 'Looks looks no ids of the batch up'),
        (lambda wte, ids: wte.weight[ids], 'Looks looks no ids of the batch up'),
        (lambda wte, ids: wte(torch.arange(VOCAB_SIZE).flip(0)[ids]), 'Looks looks up other ids than those of the'),
        (lambda wte, ids: wte((ids + 7) % VOCAB_SIZE), 'Looks looks up other ids than those of the batch'),
        (lambda wte, ids: wte(ids) + wte(ids.roll(1, 1)), 'Looks looks up other ids than those of the batch'),
        (lambda wte, ids: wte(torch.cat([ids[:, :1] * 0, ids], 1))[:, 1:], 'Looks looks up other ids than those of'),
        (lambda wte, ids: torch.cat([wte(torch.arange(3)).expand(len(ids), -1, -1), wte(ids)], 1), 'Looks looks up o'),
    ],
    ids=['functional', 'indexed', 'mapped', 'moved', 'twice', 'a token more', 'a prefix of its own'],
)
def test_a_model_that_looks_up_anything_else_is_refused_at_its_first_step(look: Any, message: str):
    model = Looks(look)
    attachment = Attachment(model)
    model(attachment.begin(folded_rows()))
    with pytest.raises(ValueError, match=message):
        attachment.check_forward()


@pytest.mark.parametrize(
    'option', [{'max_norm': 1.0}, {'sparse': True}, {'scale_grad_by_freq': True}], ids=lambda option: next(iter(option))
)
def test_an_embedding_that_does_more_with_a_lookup_is_refused(option: dict[str, Any]):
    with pytest.raises(ValueError, match=f'The input embedding of Bare has {next(iter(option))}'):
        check_model(Bare(nn.Embedding(7, 4, **option)))


def test_what_a_pass_that_failed_has_left_is_taken_off():
    """A plain batch is trained on as it is even so, and the next attachment finds the model as it was."""
    model = llama()
    embedding, ids = find_embedding(model), torch.randint(0, VOCAB_SIZE, (2, 6))
    batch = {'input_ids': ids, 'labels': ids.clone()}
    before = model(batch)
    attachment = Attachment(model)
    attachment.begin_loss(SimpleNamespace(outputs=model(attachment.begin(folded_rows()))))
    after = model(batch)
    assert torch.equal(after.logits, before.logits)
    assert torch.equal(model.loss(after, batch), before.loss)
    Attachment(model)
    assert type(embedding) is nn.Embedding
    assert 'loss' not in vars(model)


def test_a_loss_set_on_the_instance_is_given_back(caplog: pytest.LogCaptureFixture):
    model: Any = llama()
    attachment = Attachment(model)

    def own(outputs: Any, batch: Any) -> torch.Tensor:
        return outputs.logits.sum()

    model.loss = own
    for _ in range(2):
        outputs = model(attachment.begin(folded_rows()))
        attachment.begin_loss(SimpleNamespace(outputs=outputs))
        assert model.loss is not own
        model.loss(outputs, None).backward()
        attachment.end_loss()
        attachment.end()
        assert model.loss is own
    assert caplog.text.count('superposed steps train on the multi-hot cross-entropy instead of it') == 1
    attachment.begin(folded_rows())
    attachment.begin_loss(SimpleNamespace(outputs=None))
    model.loss = own
    with pytest.raises(ValueError, match='The loss of HuggingFaceModel is set between BEFORE_LOSS and AFTER_LOSS'):
        attachment.end_loss()
    assert model.loss is own


@pytest.mark.parametrize('reentrant', [False, True])
@pytest.mark.parametrize('copies', [False, True])
def test_a_lookup_in_a_region_that_backward_runs_again_has_the_gradient_of_the_means(reentrant: bool, copies: bool):
    """Also where what it is run again on is a copy, as activation offloading keeps."""

    def gradient(checkpointed: bool) -> torch.Tensor:
        torch.manual_seed(0)
        anchor = torch.zeros(1, requires_grad=True)

        def look(wte: Any, ids: torch.Tensor) -> torch.Tensor:
            def region(ids: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
                return wte(ids).tanh() + anchor

            if not checkpointed:
                return region(ids, anchor)
            hooks = torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone) if copies else nullcontext()
            with hooks:
                found: Any = checkpoint(region, ids, anchor, use_reentrant=reentrant)
            return found

        model = Looks(look)
        attachment = Attachment(model)
        outputs = model(attachment.begin(folded_rows()))
        attachment.check_forward()
        attachment.loss(torch.cat([outputs, -outputs], 2).repeat(1, 1, VOCAB_SIZE)).backward()
        attachment.end()
        grad: Any = find_embedding(model).weight.grad
        return torch.as_tensor(grad)

    torch.testing.assert_close(gradient(True), gradient(False))


def test_a_loss_that_is_no_method_is_refused():
    class Odd(Bare):
        loss = property(lambda self: lambda outputs, batch: outputs.sum())  # pyright: ignore

    model = Odd(nn.Embedding(VOCAB_SIZE, 4))
    attachment = Attachment(model)
    outputs = model(attachment.begin(folded_rows()))
    attachment.begin_loss(SimpleNamespace(outputs=outputs))
    model.loss(outputs, None)  # pyright: ignore
    with pytest.raises(ValueError, match='The loss of Odd is set between .* or is no method'):
        attachment.end_loss()


def test_logits_that_are_not_one_for_each_bag_are_refused():
    model = Bare(nn.Embedding(7, 4))
    attachment = Attachment(model)
    batch = {'input_ids': torch.zeros(2, 3, 2, dtype=torch.long), 'labels': torch.zeros(2, 3, 2, dtype=torch.long)}
    outputs = model(attachment.begin(batch))
    with pytest.raises(ValueError, match=r'Bare returns logits of shape \(3, 2, 4\) for bags of shape \(2, 3, 2\)'):
        attachment.loss(outputs.transpose(0, 1))
    for other, message in (({'lm_logits': outputs}, 'Bare returns lm_logits'), ('x', 'Bare returns str')):
        with pytest.raises(ValueError, match=f'{message} from its forward: have it return logits'):
            attachment.loss(other)


@pytest.mark.parametrize(
    'use', [lambda v: v[:, 1:], lambda v: v.view(-1), lambda v: functional.relu(v), lambda v: v == 3]
)
def test_a_model_that_reads_labels_in_its_forward_is_refused(use: Any):
    class Reads(Bare):
        def forward(self, batch: Any) -> torch.Tensor:
            use(batch['labels'])
            return super().forward(batch)

    model = Reads(nn.Embedding(VOCAB_SIZE, 4))
    with pytest.raises(ValueError, match=r"Reads reads batch\['labels'\] in its forward, and a bag has several"):
        model(Attachment(model).begin(folded_rows()))


@pytest.mark.parametrize('look', ['batch', 'mapped'])
def test_a_compiled_model_is_tried_out_uncompiled(look: str):
    """A compiler takes any ids of the same shape for those handed over."""
    mapping = torch.arange(VOCAB_SIZE).flip(0)
    model = Looks((lambda wte, ids: wte(mapping[ids])) if look == 'mapped' else (lambda wte, ids: wte(ids)))
    compiled = torch.compile(model, backend='aot_eager')
    attachment, batch = Attachment(model), folded_rows()
    compiled(attachment.begin(batch))
    attachment.check_forward()
    if look == 'mapped':
        with pytest.raises(ValueError, match='looks up other ids than those of the batch'):
            attachment.try_out(compiled, batch)
    else:
        attachment.try_out(compiled, batch)


@pytest.mark.parametrize('weights', [None, torch.tensor([1.0, 0.5])])
@pytest.mark.parametrize('make', [llama, mpt])
def test_a_superposed_step_reads_no_value_that_a_plain_step_does_not(make: Any, weights: torch.Tensor | None):
    """On a GPU each such reading would wait for it. What is read of a batch is read before it is moved there."""
    model = make().train()
    ids = torch.randint(0, VOCAB_SIZE, (4, 12))
    batch = {'input_ids': ids, 'labels': ids.clone(), 'attention_mask': torch.ones_like(ids)}
    plain = operators(lambda: model.loss(model(batch), batch).backward())
    attachment = Attachment(model)
    attachment.weights = weights
    laid_out = lay_out(batch, 2, 'sequence', 'both').batch

    def step() -> None:
        superposed_loss(attachment, model, bag_rows(laid_out, 2, 'both', padded=False)).backward()

    superposed = operators(step)
    assert any('embedding_bag' in name for name in superposed - plain)
    # What the loss reads on a CPU alone; tests/ops/test_cross_entropy.py holds it to read nothing elsewhere.
    targets = fold_batch(batch, 2)['labels'].flatten(0, 1)
    logits = torch.randn(len(targets), VOCAB_SIZE, requires_grad=True)
    loss = operators(lambda: multi_hot_cross_entropy(logits, targets, weights).backward())
    assert all(superposed[name] <= plain[name] + loss[name] for name in WAITING)

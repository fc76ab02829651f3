"""Which models can be superposed, and what is said of those that cannot."""

from typing import Any

import pytest
import torch
from composer.models import ComposerModel
from peft import LoraConfig
from profiled import WAITING, operators
from torch import nn
from trainers import VOCAB_SIZE, hugging_face, llama, mpt
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

from composer_tst.attach import Superposition, check_model, find_embedding
from composer_tst.folding import fold_batch
from composer_tst.loss import multi_hot_cross_entropy


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
def test_taking_superposition_off_leaves_the_model_as_it_was(make: Any):
    model = make()
    embedding = find_embedding(model)
    cls, keys, attributes = type(embedding), list(model.state_dict()), set(vars(embedding))
    superposition = Superposition(model)
    assert type(embedding) is not cls
    assert isinstance(embedding, cls)
    assert list(model.state_dict()) == keys
    superposition.remove()
    assert type(embedding) is cls
    assert set(vars(embedding)) == attributes
    assert 'loss' not in vars(model)
    assert not model._forward_pre_hooks


def test_a_plain_batch_passes_untouched_while_superposed():
    model = llama()
    ids = torch.randint(0, VOCAB_SIZE, (2, 6))
    batch = {'input_ids': ids, 'labels': ids.clone()}
    before = model(batch)
    superposition = Superposition(model)
    after = model(batch)
    assert torch.equal(after.logits, before.logits)
    assert model.loss(after, batch) == before.loss
    superposition.remove()


def test_logits_that_are_not_one_for_each_bag_are_refused():
    model = Bare(nn.Embedding(7, 4))
    Superposition(model)
    batch = {'input_ids': torch.zeros(2, 3, 2, dtype=torch.long), 'labels': torch.zeros(2, 3, 2, dtype=torch.long)}
    with pytest.raises(ValueError, match=r'Bare returns logits of shape \(3, 2, 4\) for bags of shape \(2, 3, 2\)'):
        model.loss(model(batch).transpose(0, 1), batch)


@pytest.mark.parametrize('weights', [None, torch.tensor([1.0, 0.5])])
@pytest.mark.parametrize('make', [llama, mpt])
def test_a_superposed_step_reads_no_value_that_a_plain_step_does_not(make: Any, weights: torch.Tensor | None):
    """On a GPU each such reading would wait for it. Batches are folded before they are moved there."""
    model = make().train()
    ids = torch.randint(0, VOCAB_SIZE, (4, 12))
    batch = {'input_ids': ids, 'labels': ids.clone(), 'attention_mask': torch.ones_like(ids)}
    plain = operators(lambda: model.loss(model(batch), batch).backward())
    superposition = Superposition(model)
    superposition.weights = weights
    folded = fold_batch(batch, 2)
    superposed = operators(lambda: model.loss(model(folded), folded).backward())
    assert any('embedding_bag' in name for name in superposed - plain)
    # What the loss reads on a CPU alone; tests/test_loss.py holds it to read nothing elsewhere.
    targets = folded['labels'].flatten(0, 1)
    logits = torch.randn(len(targets), VOCAB_SIZE, requires_grad=True)
    loss = operators(lambda: multi_hot_cross_entropy(logits, targets, weights).backward())
    assert all(superposed[name] <= plain[name] + loss[name] for name in WAITING)

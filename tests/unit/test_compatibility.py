"""Which models can be superposed, and what is said of those that cannot."""

from typing import Any

import pytest
from common.trainers import VOCAB_SIZE, Bare, hugging_face
from peft import LoraConfig
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from composer_tst.compatibility import check_model
from composer_tst.ops.superposed import find_embedding

TINY: dict[str, Any] = {'vocab_size': VOCAB_SIZE, 'hidden_size': 16, 'num_hidden_layers': 1, 'num_attention_heads': 2}


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
        (lambda: nn.Linear(2, 2), 'Linear is not a ComposerModel'),
        (
            lambda: hugging_face(BertForMaskedLM(BertConfig(intermediate_size=16, **TINY))),
            'is not a causal language model: use a decoder-only model',
        ),
        (
            lambda: hugging_face(
                T5ForConditionalGeneration(
                    T5Config(vocab_size=VOCAB_SIZE, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
                )
            ),
            'is an encoder-decoder',
        ),
        (peft_model, 'wrapped by PEFT: superposition is for pre-training'),
        (lambda: Bare(nn.Embedding(7, 4), nn.Embedding(7, 4)), 'Bare has 2 nn.Embedding modules'),
        (lambda: Bare(), 'Bare has 0 nn.Embedding modules .* define get_input_embeddings'),
    ],
)
def test_other_models_are_refused_in_one_sentence(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        check_model(make())

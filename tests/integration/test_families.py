"""Decoder families: each superposed by the same mechanism, held to the definition on its own weights."""

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from common import reference
from common.trainers import VOCAB_SIZE, Superposed, hugging_face, logged, make_trainer, mpt, random_loader
from composer.models import ComposerModel
from transformers import PreTrainedTokenizerBase

from composer_tst import TokenSuperposition
from composer_tst.ops.fold import fold_batch

S, L, ROWS = 3, 8, 6

SMALL = {
    'vocab_size': VOCAB_SIZE,
    'hidden_size': 16,
    'intermediate_size': 32,
    'num_hidden_layers': 2,
    'num_attention_heads': 2,
    'max_position_embeddings': 64,
    'pad_token_id': 0,
    'bos_token_id': 1,
    'eos_token_id': 1,
    'tie_word_embeddings': False,
}
GROUPED = SMALL | {'num_key_value_heads': 1}
MOE = GROUPED | {'output_router_logits': True, 'router_aux_loss_coef': 0.5}
CONFIGS = {
    'llama': GROUPED,
    'qwen2': GROUPED,
    'qwen3': GROUPED | {'head_dim': 8},
    'mistral': GROUPED | {'head_dim': 8},
    'gpt2': {'vocab_size': VOCAB_SIZE, 'n_positions': 64, 'n_embd': 16, 'n_layer': 2, 'n_head': 2},
    'gpt_neox': SMALL,
    'opt': SMALL | {'ffn_dim': 32, 'word_embed_proj_dim': 12},
    'gemma2': GROUPED | {'head_dim': 8, 'query_pre_attn_scalar': 8, 'final_logit_softcapping': 2.0},
    'gemma3_text': GROUPED | {'head_dim': 8, 'query_pre_attn_scalar': 8, 'tie_word_embeddings': True},
    'phi': SMALL,
    'olmo2': GROUPED,
    'bloom': {'vocab_size': VOCAB_SIZE, 'hidden_size': 16, 'n_layer': 2, 'n_head': 2},
    'falcon': SMALL | {'alibi': True, 'new_decoder_architecture': False},
    'granite': GROUPED
    | {'embedding_multiplier': 12.0, 'logits_scaling': 4.0, 'residual_multiplier': 0.2, 'attention_multiplier': 0.1},
    'mixtral': MOE | {'num_local_experts': 4},
    'qwen3_moe': MOE | {'head_dim': 8, 'num_experts': 4, 'num_experts_per_tok': 2, 'moe_intermediate_size': 16},
}
MPT = {
    'tied, learned positions': {},
    'untied': {'tie_word_embeddings': False},
    'alibi': {'attn_config': {'attn_impl': 'torch', 'alibi': True}, 'learned_pos_emb': False},
    'rope': {
        'attn_config': {'attn_impl': 'torch', 'rope': True, 'rope_impl': 'hf', 'rope_theta': 10000},
        'learned_pos_emb': False,
    },
    'gqa': {
        'n_heads': 4,
        'attn_config': {'attn_impl': 'torch', 'attn_type': 'grouped_query_attention', 'kv_n_heads': 2},
    },
    'logit_scale': {'logit_scale': 'inv_sqrt_d_model'},
    'softcap': {'final_logit_softcapping': 2.0},
    'embedding_fraction': {'embedding_fraction': 0.5},
    'dropout': {'emb_pdrop': 0.3, 'resid_pdrop': 0.3},
    'block_overrides': {
        'n_layers': 3,
        'block_overrides': {
            'order': [{'name': 'default'}, {'name': 'windowed', 'repeat': 2}],
            'overrides': {'windowed': {'attn_config': {'sliding_window_size': 4}}},
        },
        'attn_config': {'attn_impl': 'torch', 'attn_type': 'grouped_query_attention', 'kv_n_heads': 2},
    },
    'packed': {
        'attn_config': {'attn_impl': 'torch', 'attn_uses_sequence_id': True, 'alibi': True},
        'learned_pos_emb': False,
    },
}


def transformers_model(name: str) -> Any:
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(name, **CONFIGS[name])
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation='eager')


def batch_of(padded: bool = False, packed: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(2, VOCAB_SIZE, (ROWS, L), generator=generator)
    batch = {'input_ids': ids, 'labels': ids.clone(), 'attention_mask': torch.ones_like(ids)}
    if padded:
        for row, length in enumerate([8, 5, 1, 8, 8, 7]):
            batch['attention_mask'][row, length:] = 0
            batch['labels'][row, length:] = -100
    if packed:
        starts = torch.tensor([[3], [8], [5], [1], [8], [7]])
        batch['sequence_id'] = (torch.arange(L) >= starts).long()
    return batch


def check_superposed_is_the_definition(
    make: Callable[[], Any],
    batch: dict[str, torch.Tensor],
    device: torch.device,
    tolerance: float = 1e-3,
    **inputs: Any,
) -> None:
    """Loss and gradients, on a CPU with the same random numbers for dropout; the definition's are always the CPU's."""
    model, plain = make().train().to(device), make().train()
    if device.type != 'cpu':  # a GPU draws other random numbers
        for module in (*model.modules(), *plain.modules()):
            for name in ('p', 'dropout', 'attention_dropout'):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
    torch.manual_seed(5)
    expected = reference.loss_of(plain.model, reference.fold([batch], S), [1.0] * S, **inputs)
    expected.backward()
    expected_grads = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}

    superposition = Superposed(model, bag_size=S)
    torch.manual_seed(5)
    loss = superposition.step(on(device, fold_batch(batch, S)))
    logs = superposition.microbatches.end_batch()
    assert ('superposition/router_loss' in logs) == hasattr(plain.model.config, 'router_aux_loss_coef')
    torch.testing.assert_close(loss.detach().cpu(), expected.detach(), rtol=tolerance / 100, atol=1e-6)
    grads = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == expected_grads.keys()
    assert len(grads) > 5
    for name, grad in grads.items():
        assert (
            torch.linalg.norm(grad - expected_grads[name]) <= tolerance * torch.linalg.norm(expected_grads[name]) + 1e-6
        ), name


def on(device: torch.device, batch: dict[str, Any]) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def check_the_rest_is_plain(make: Callable[[], Any], batch: dict[str, torch.Tensor], device: torch.device) -> None:
    """Evaluation while superposed, and training afterwards, are to the bit those of a model that never was."""
    model, plain = make().train().to(device), make().to(device)
    batch = on(device, batch)
    superposition = Superposed(model, bag_size=S)
    superposition.loss(fold_batch(batch, S))
    with torch.no_grad():
        mine = model.eval().eval_forward(dict(batch))
        theirs = plain.eval().eval_forward(dict(batch))
    assert torch.equal(mine, theirs)
    superposition.microbatches.restore()

    losses = []
    for each in (model.train(), plain.train()):
        torch.manual_seed(5)
        loss = each.loss(each(dict(batch)), dict(batch))
        loss.backward()
        losses.append(loss)
    assert torch.equal(*losses)
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        assert mine.grad is None or torch.equal(mine.grad, theirs.grad), name


@pytest.mark.parametrize('padded', [False, True])
@pytest.mark.parametrize('name', CONFIGS)
def test_hugging_face(name: str, padded: bool, device: torch.device):
    def make() -> Any:
        return hugging_face(transformers_model(name))

    check_superposed_is_the_definition(make, batch_of(padded), device)
    check_the_rest_is_plain(make, batch_of(padded), device)


@pytest.mark.parametrize('padded', [False, True])
@pytest.mark.parametrize('name', MPT)
def test_mpt(name: str, padded: bool, device: torch.device):
    if name == 'dropout' and device.type != 'cpu':
        pytest.skip(
            'dropout on a GPU draws other random numbers than its definition on a CPU: pytest --device cpu has it'
        )

    def make() -> Any:
        return mpt(**MPT[name])

    batch = batch_of(padded, packed=name == 'packed')
    inputs = {}
    if name == 'packed':
        rows = reference.fold([batch], S)
        inputs['sequence_id'] = torch.tensor(
            [[ids.index(i) for i in ids] for ids in ([p.sequence_id for p in row] for row in rows)]
        )
    check_superposed_is_the_definition(make, batch, device, **inputs)
    check_the_rest_is_plain(make, batch, device)


@pytest.mark.parametrize('make', [lambda: hugging_face(transformers_model('gemma2')), mpt])
def test_under_autocast(make: Callable[[], Any], device: torch.device):
    """Composer runs amp_bf16 on a GPU alone; this is what it does there."""
    with torch.autocast('cpu', torch.bfloat16), torch.autocast(device.type, torch.bfloat16):
        check_superposed_is_the_definition(make, batch_of(padded=True), device, tolerance=0.05)


@pytest.mark.parametrize('name', CONFIGS)
def test_hf_causal_lm_of_llm_foundry(
    name: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, device: torch.device
):
    """Built from a folder with a config, as from the hub."""
    from llmfoundry.utils.builders import build_composer_model

    transformers.AutoConfig.for_model(name, **CONFIGS[name]).save_pretrained(tmp_path)
    settings = {
        'pretrained_model_name_or_path': str(tmp_path),
        'pretrained': False,
        'attn_implementation': 'eager',
        'init_device': 'cpu',
    }

    def make() -> Any:
        torch.manual_seed(1)
        return build_composer_model('hf_causal_lm', settings, tokenizer)

    check_superposed_is_the_definition(make, batch_of(padded=True), device)
    check_the_rest_is_plain(make, batch_of(padded=True), device)


class Own(ComposerModel):
    """A user's own model: a recurrent network that returns plain logits."""

    def __init__(self, positions: bool):
        super().__init__()
        torch.manual_seed(1)
        self.tokens = torch.nn.Embedding(VOCAB_SIZE, 16)
        self.rnn = torch.nn.GRU(16, 16, batch_first=True)
        self.head = torch.nn.Linear(16, VOCAB_SIZE)
        if positions:
            self.positions = torch.nn.Embedding(64, 16)
            self.get_input_embeddings = lambda: self.tokens

    def forward(self, batch: Any) -> torch.Tensor:
        return self.after_embedding(self.tokens(batch['input_ids']))

    def after_embedding(self, inputs: torch.Tensor) -> torch.Tensor:
        if hasattr(self, 'positions'):
            inputs = inputs + self.positions(torch.arange(inputs.shape[1], device=inputs.device))
        return self.head(self.rnn(inputs)[0])

    def loss(self, outputs: torch.Tensor, batch: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs[:, :-1].flatten(0, 1), batch['labels'][:, 1:].flatten())


@pytest.mark.parametrize('positions', [False, True])
def test_a_model_of_ones_own(positions: bool):
    model: Any = Own(positions)
    loader = random_loader()
    rows = reference.fold(list(itertools.islice(loader, S)), S)
    logits = model.after_embedding(reference.mean_embeddings(model.tokens, rows))
    expected = reference.multi_hot_loss(logits, rows, [1.0] * S)
    trainer, logger = make_trainer(model, loader, TokenSuperposition(bag_size=S, duration='2ba'), '4ba')
    trainer.fit()
    losses = logged(logger, 'loss/train/total')
    assert losses[0] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert len(losses) == 4


def test_a_mixture_of_experts_logs_its_router_loss_while_superposed():
    model = hugging_face(transformers_model('mixtral'))
    untouched: Any = copy.deepcopy(model)
    loader = random_loader()
    trainer, logger = make_trainer(model, loader, TokenSuperposition(bag_size=S, duration='2ba'), '4ba')
    trainer.fit()
    assert len(logged(logger, 'superposition/router_loss')) == 2
    rows = reference.fold(list(itertools.islice(loader, S)), S)
    embeddings = reference.mean_embeddings(untouched.model.get_input_embeddings(), rows)
    outputs = untouched.model(inputs_embeds=embeddings, attention_mask=torch.ones(embeddings.shape[:2]))
    router = float(MOE['router_aux_loss_coef'] * outputs.aux_loss.detach())
    mce = float(reference.multi_hot_loss(outputs.logits, rows, [1.0] * S).detach())
    assert logged(logger, 'superposition/router_loss')[0] == pytest.approx(router, rel=1e-5)
    assert logged(logger, 'loss/train/total')[0] == pytest.approx(mce + router, rel=1e-5)


@pytest.mark.parametrize('name', CONFIGS)
def test_a_family_without_a_mask_trains(name: str, device: torch.device):
    """Also where transformers reads ids, with a pad_token_id, to warn that there is none."""

    def make() -> Any:
        model: Any = hugging_face(transformers_model(name))
        model.model.config.pad_token_id = 0
        return model

    batch = {key: value for key, value in batch_of().items() if key != 'attention_mask'}
    superposition = Superposed(make().train().to(device), bag_size=S)
    torch.manual_seed(5)
    loss = superposition.step(on(device, fold_batch(batch, S)))
    other = Superposed(make().train().to(device), bag_size=S)
    torch.manual_seed(5)
    expected = other.step(on(device, fold_batch(batch_of(), S)))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)

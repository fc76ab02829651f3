"""Composer's other algorithms in the same run: the table in the README, a row at a time."""

import copy
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from common import REPO, reference
from common.trainers import VOCAB_SIZE, Grads, Superposed, hugging_face, logged, make_trainer, random_loader
from composer import algorithms
from composer.algorithms.low_precision_groupnorm import apply_low_precision_groupnorm
from composer.algorithms.low_precision_layernorm import apply_low_precision_layernorm
from composer.core import Algorithm, Precision
from llmfoundry.data.dataloader import build_dataloader
from torch.utils.data import DataLoader, Subset
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

from composer_tst import PhaseCheckpointer, TokenSuperposition
from composer_tst.ops.fold import fold_batch

L, S = 12, 3


def gpt2() -> Any:
    """Without dropout: a probe of SeqLengthWarmup draws random numbers, and a resumed run probes again."""
    torch.manual_seed(1)
    dropout: dict[str, Any] = {'resid_pdrop': 0.0, 'embd_pdrop': 0.0, 'attn_pdrop': 0.0}
    config = GPT2Config(vocab_size=VOCAB_SIZE, n_positions=64, n_embd=16, n_layer=2, n_head=2, **dropout)
    return hugging_face(GPT2LMHeadModel(config))


def cut(length: int) -> Callable:
    return lambda batches: [{key: rows[:, :length] for key, rows in batch.items()} for batch in batches]


def reshaped(length: int) -> Callable:
    return lambda batches: [{key: rows.reshape(-1, length) for key, rows in batch.items()} for batch in batches]


def clipped(grads: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    norm = torch.stack([(g**2).sum() for g in grads.values()]).sum().sqrt()
    assert norm > 0.1
    return {name: grad * 0.1 / norm for name, grad in grads.items()}


class Works(NamedTuple):
    make: Callable[[], Algorithm]
    batches: Callable = lambda batches: batches  # what it makes of a step's plain batches
    grads: Callable | None = lambda grads: grads  # and of the gradients, or None if it takes others
    resumes: bool = True  # without superposition, whether Composer resumes it exactly: it cannot save Alibi's optimizer


WORKS = {
    'Alibi': Works(
        lambda: algorithms.Alibi(max_sequence_length=64, train_sequence_length_scaling=0.5),
        batches=reshaped(L // 2),
        resumes=False,
    ),
    'EMA': Works(lambda: algorithms.EMA(half_life='2ba', update_interval='1ba')),
    'Factorize': Works(lambda: algorithms.Factorize(min_features=8, latent_features=4)),
    'GradientClipping': Works(lambda: algorithms.GradientClipping('norm', 0.1), grads=clipped),
    'LayerFreezing': Works(lambda: algorithms.LayerFreezing(freeze_start=0.0)),
    'SAM': Works(algorithms.SAM, grads=None, resumes=False),
    'SeqLengthWarmup': Works(
        lambda: algorithms.SeqLengthWarmup(duration=0.8, min_seq_length=4, max_seq_length=L, step_size=4),
        batches=cut(4),
    ),
    'SeqLengthWarmup, truncate=False': Works(
        lambda: algorithms.SeqLengthWarmup(
            duration=0.8, min_seq_length=4, max_seq_length=L, step_size=4, truncate=False
        ),
        batches=reshaped(4),
    ),
    'SWA': Works(lambda: algorithms.SWA(swa_start='0.2dur', swa_end='0.9dur', update_interval='1ba')),
}


@pytest.mark.parametrize('name', WORKS)
def test_works(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    make, batches_of, grads_of, resumes = WORKS[name]

    def run(ours: str | None, loader: Any, **settings: Any) -> tuple[Any, Any]:
        superposition = TokenSuperposition(bag_size=S, duration='3ba')
        stack = {'first': [superposition, make()], 'last': [make(), superposition], None: [make()]}[ours]
        return make_trainer(gpt2(), loader, stack, '14ba', **settings)

    grads = Grads()
    loader = random_loader(rows=72, length=L)
    trainer, logger = run('first', loader, callbacks=[grads, *([PhaseCheckpointer()] if resumes else [])])
    model = copy.deepcopy(trainer.state.model).train()
    trainer.fit()

    # The first superposed step is the definition, on the model and the batch as the other algorithm makes them.
    batches = batches_of(list(itertools.islice(loader, S)))
    rows = reference.fold(batches, S)
    loss = reference.loss_of(model.model, rows, [1.0] * S)
    losses = logged(logger, 'loss/train/total')
    assert losses[0] == pytest.approx(float(loss.detach()), rel=1e-5)
    if grads_of is not None:
        loss.backward()
        expected = grads_of({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
        for key, grad in expected.items():
            torch.testing.assert_close(grads.steps[0][key], grad, rtol=1e-3, atol=1e-6, msg=key)
    assert logged(logger, 'superposition/s_tokens')[0] == sum(len(row) for row in rows)
    read = sum(len(position.tokens) for row in rows for position in row)
    assert logged(logger, 'superposition/data_tokens')[0] == read

    # Order does not matter.
    other, other_logger = run('last', loader)
    other.fit()
    assert logged(other_logger, 'loss/train/total') == losses

    # After the switch it is the other algorithm's own run from that checkpoint, where Composer skips three batches.
    if resumes:
        checkpoint = next(tmp_path.glob('*/checkpoints/bag3-to-bag1/ep0-ba3-rank0.pt'))
        rest = DataLoader(Subset(loader.dataset, [*range(12), *range(36, 72)]), batch_size=4)
        plain, plain_logger = run(None, rest, load_path=str(checkpoint))
        plain.fit()
        assert logged(plain_logger, 'loss/train/total') == losses[3:]
        for key, value in plain.state.model.state_dict().items():
            assert torch.equal(trainer.state.model.state_dict()[key], value), key


@pytest.fixture(scope='module')
def losses_alone() -> list[float]:
    trainer, logger = make_trainer(gpt2(), random_loader(), TokenSuperposition(bag_size=S, duration='2ba'), '4ba')
    trainer.fit()
    return logged(logger, 'loss/train/total')


NOTHING: dict[str, Callable[[], Algorithm]] = {
    'BlurPool': algorithms.BlurPool,
    'ChannelsLast': algorithms.ChannelsLast,
    'GhostBatchNorm': algorithms.GhostBatchNorm,
    'LowPrecisionGroupNorm': algorithms.LowPrecisionGroupNorm,
    'SqueezeExcite': algorithms.SqueezeExcite,
    'StochasticDepth': lambda: algorithms.StochasticDepth('ResNetBottleneck'),
    'WeightStandardization': algorithms.WeightStandardization,
}


@pytest.mark.parametrize('name', NOTHING)
def test_changes_nothing(name: str, losses_alone: list[float]):
    """What acts on convolutions, batch norms, group norms or residual blocks of images finds none."""
    for order in (1, -1):
        stack = [NOTHING[name](), TokenSuperposition(bag_size=S, duration='2ba')][::order]
        trainer, logger = make_trainer(gpt2(), random_loader(), stack, '4ba')
        trainer.fit()
        assert logged(logger, 'loss/train/total') == losses_alone


@pytest.mark.parametrize('apply', [apply_low_precision_layernorm, apply_low_precision_groupnorm])
def test_low_precision_norms_under_autocast_equal_the_definition(apply: Callable):
    model: Any = gpt2().train()
    apply(model, precision=Precision.AMP_BF16)
    batches = list(itertools.islice(random_loader(length=L), S))
    with torch.autocast('cpu', torch.bfloat16):
        expected = reference.loss_of(model.model, reference.fold(batches, S), [1.0] * S)
        batch = fold_batch({key: torch.cat([b[key] for b in batches]) for key in batches[0]}, S)
        loss = Superposed(model, bag_size=S).loss(batch)
    assert float(loss) == pytest.approx(float(expected), rel=1e-3)


REFUSED: dict[str, str] = {
    'AugMix': 'it changes images',
    'ColOut': 'it changes images',
    'CutMix': 'it changes images',
    'CutOut': 'it changes images',
    'GyroDropout': 'its masks are for activations',
    'LabelSmoothing': 'it smooths one label at each position',
    'MixUp': 'it changes images',
    'NoOpModel': 'it leaves no model to train',
    'ProgressiveResizing': 'it changes images',
    'RandAugment': 'it changes images',
    'SelectiveBackprop': 'it calls the model with the input alone',
}


@pytest.mark.parametrize('name', REFUSED)
def test_is_refused(name: str):
    for stack in itertools.permutations([getattr(algorithms, name)(), TokenSuperposition(bag_size=S, duration='2ba')]):
        with pytest.raises(ValueError, match=f'cannot be combined with TokenSuperposition, because {REFUSED[name]}'):
            make_trainer(gpt2(), random_loader(), stack)


def test_gated_linear_units_are_for_bert_alone_and_composer_says_so():
    stack = [algorithms.GatedLinearUnits(), TokenSuperposition(bag_size=S, duration='2ba')]
    with pytest.raises(TypeError, match='only has a surgery policy defined for subclasses of transformers.Bert'):
        make_trainer(gpt2(), random_loader(), stack)


def test_a_finetuning_loader_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    row = json.dumps({'prompt': 'import', 'response': ' json'})
    (tmp_path / 'train.jsonl').write_text(f'{row}\n' * 40)
    config = {
        'name': 'finetuning',
        'dataset': {
            'hf_name': str(tmp_path),
            'split': 'train',
            'max_seq_len': 24,
            'decoder_only_format': True,
            'shuffle': False,
        },
        'drop_last': True,
        'num_workers': 0,
        'prefetch_factor': None,
        'persistent_workers': False,
    }
    loader = build_dataloader(config, tokenizer, 4)
    trainer, _ = make_trainer(gpt2(), loader, TokenSuperposition(bag_size=S, duration='2ba'))
    with pytest.raises(ValueError, match='The train loader is a finetuning loader: superposition is for pre-training'):
        trainer.fit()


def test_every_algorithm_of_composer_has_its_row():
    page = (REPO / 'docs' / 'compatibility.md').read_text()
    rows = dict(re.findall(r'^\| `(\w+)` \| (.+) \|$', page, re.M))
    says = {
        **{name.split(',')[0]: 'works' for name in WORKS},
        'LowPrecisionLayerNorm': 'works',
        **dict.fromkeys(NOTHING, 'changes nothing: '),
        **{name: f'refused: {reason}' for name, reason in REFUSED.items()},
        'GatedLinearUnits': 'Composer itself refuses it',
    }
    for name in algorithms.__all__:
        if isinstance(getattr(algorithms, name), type) and issubclass(getattr(algorithms, name), Algorithm):
            assert rows[name].startswith(says[name]), name

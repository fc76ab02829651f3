"""Trainer runs with superposition: each against the definition, or against plain training."""

import copy
import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from common import reference
from common.trainers import Grads, llama, logged, make_trainer, mpt, random_loader, text_loader
from composer import Callback, Evaluator, Trainer
from composer.callbacks import SpeedMonitor
from composer.core import DataSpec
from torch.utils.data import DataLoader, default_collate
from transformers import PreTrainedTokenizerBase

from composer_tst import PhaseCheckpointer, TokenSuperposition
from composer_tst.ops.superposed import find_embedding

pytestmark = pytest.mark.streaming

SUPERPOSE_AND_EXPAND = [
    ('both', 'sequence'),
    ('both', 'batch'),
    ('both', 'none'),
    ('input', 'sequence'),
    ('input', 'batch'),
    ('input', 'none'),
    ('output', 'none'),
]
MODELS = {'llama': llama, 'mpt-untied': lambda: mpt(tie_word_embeddings=False), 'mpt-tied': mpt}


def first_step_by_definition(model: Any, batches: list, weighting: Any = 'uniform', s: int = 3, **fold: str):
    """Loss and gradients of the first step, on a copy of the model."""
    model = copy.deepcopy(model).train()
    rows = reference.fold(batches, s, **fold)
    loss = reference.loss_of(model.model, rows, reference.weights_of(weighting, s))
    loss.backward()
    return float(loss), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_first_step(trainer_and_log: tuple, grads: Grads, loss: float, gradients: dict[str, torch.Tensor]) -> None:
    assert logged(trainer_and_log[1], 'loss/train/total')[0] == pytest.approx(loss, rel=1e-5)
    assert grads.steps[0].keys() == gradients.keys()
    for name, expected in gradients.items():
        torch.testing.assert_close(grads.steps[0][name], expected, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize(('superpose', 'expand'), SUPERPOSE_AND_EXPAND)
@pytest.mark.parametrize('family', MODELS)
def test_the_first_step_equals_the_definition(family: str, superpose: str, expand: str):
    model, grads = MODELS[family](), Grads()
    loader = random_loader()
    batches = list(itertools.islice(loader, 1 if expand == 'none' else 3))
    expected = first_step_by_definition(model, batches, expand=expand, superpose=superpose)
    algorithm = TokenSuperposition(bag_size=3, duration='1ba', superpose=superpose, expand=expand)
    run = make_trainer(model, loader, algorithm, max_duration='2ba', callbacks=[grads])
    run[0].fit()
    assert_first_step(run, grads, *expected)


@pytest.mark.parametrize('weighting', ['power_law', 'exponential', 'first', [0.5, 0, 2]])
@pytest.mark.parametrize('on_tokens', ['', 'counted', 'listed'])
def test_a_padded_batch_whole_or_in_uneven_microbatches_weighed_by_tokens(weighting: Any, on_tokens: str):
    """With llm-foundry's count of tokens, with or without its lists; without it, the whole batch alone is the same."""
    from llmfoundry.data.utils import LossGeneratingTokensCollatorWrapper, get_tokens_per_batch_func

    model, grads = llama(), Grads()
    length = 12
    loader = random_loader(length=length, pad_from=lambda i: length if i % 3 == 0 else 1 + i % length)
    if on_tokens:
        count = get_tokens_per_batch_func()
        lists = LossGeneratingTokensCollatorWrapper(default_collate, count)
        loader = DataLoader(
            loader.dataset, batch_size=4, collate_fn=lists if on_tokens == 'listed' else default_collate
        )
        train = DataSpec(loader, get_num_tokens_in_batch=count)
    else:
        train = loader
    batches = list(itertools.islice(loader, 3))
    expected = first_step_by_definition(model, batches, weighting, expand='sequence')
    algorithm = TokenSuperposition(bag_size=3, duration='1ba', weighting=weighting)
    run = make_trainer(
        model,
        train,
        algorithm,
        max_duration='2ba',
        callbacks=[grads],
        accumulate_train_batch_on_tokens=bool(on_tokens),
        device_train_microbatch_size=3 if on_tokens else 4,
    )
    run[0].fit()
    assert_first_step(run, grads, *expected)
    if on_tokens:
        assert logged(run[1], 'time/token')[1] == sum(int(batch['attention_mask'].sum()) for batch in batches)


def test_uneven_microbatches_of_full_rows_add_up_without_counting_tokens():
    model, grads, loader = llama(), Grads(), random_loader()
    expected = first_step_by_definition(model, list(itertools.islice(loader, 3)))
    algorithm = TokenSuperposition(bag_size=3, duration='1ba')
    run = make_trainer(model, loader, algorithm, '2ba', callbacks=[grads], device_train_microbatch_size=3)
    run[0].fit()
    assert_first_step(run, grads, *expected)


@pytest.mark.parametrize(
    ('expand', 'superpose', 'rows'),
    [
        ('sequence', 'both', [2, 2, 2, 2, 2, 2]),
        ('batch', 'both', [6, 6, 4, 4, 2, 2]),
        ('none', 'input', [4, 4, 2]),
        ('none', 'output', [2, 2, 2, 2, 2, 2]),
    ],
)
def test_a_microbatch_has_as_many_positions_as_in_plain_training(
    expand: str, superpose: str, rows: list[int], recwarn: pytest.WarningsRecorder
):
    """4 rows of 12 tokens in a loader batch, 2 rows in a microbatch; bags of 3 tokens, then of 2."""
    seen = []

    class Seen(Callback):
        def before_forward(self, state: Any, logger: Any) -> None:
            seen.append(len(state.batch['input_ids']))

    phases = [{'bag_size': 3, 'until': '1ba'}, {'bag_size': 2, 'until': '2ba'}]
    algorithm = TokenSuperposition(phases=phases, expand=expand, superpose=superpose)
    trainer, _ = make_trainer(
        llama(), random_loader(), algorithm, '3ba', callbacks=[Seen()], device_train_microbatch_size=2
    )
    trainer.fit()
    assert seen[: len(rows)] == rows
    assert seen[-1] == 2
    assert trainer.state.device_train_microbatch_size == 2
    assert not [each for each in recwarn if 'Cannot split tensor' in str(each.message)]


@pytest.mark.parametrize('config', [pytest.param({}, marks=pytest.mark.slow), {'backend': 'aot_eager'}])
def test_a_compiled_model_trains_as_the_model_itself(config: dict[str, Any]):
    def losses(compile_config: dict[str, Any] | None) -> list[float]:
        algorithm = TokenSuperposition(bag_size=3, duration='2ba')
        model = llama(num_hidden_layers=1)
        trainer, logger = make_trainer(model, random_loader(), algorithm, '4ba', compile_config=compile_config)
        trainer.fit()
        return logged(logger, 'loss/train/total')

    counters = torch._dynamo.utils.counters
    counters.clear()
    torch._dynamo.reset()
    compiled = losses(config)
    assert not counters['graph_break']
    assert counters['stats']['unique_graphs'] == 2  # one for each bag size
    assert compiled == pytest.approx(losses(None), rel=1e-4)


@pytest.mark.parametrize('family', ['llama', 'mpt-tied'])
@pytest.mark.parametrize('expand', ['sequence', 'batch'])
def test_recovery_is_plain_training_from_the_switch_to_the_bit(
    family: str, expand: str, dataset: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
):
    def run(model: Any, algorithms: Any, **settings: Any) -> tuple[Trainer, Any]:
        val = Evaluator(
            label='eval',
            dataloader=text_loader(dataset, tokenizer, 'val'),
            metric_names=['LanguageCrossEntropy'],
            eval_interval='2ba',
            subset_num_batches=1,
        )
        train = text_loader(dataset, tokenizer)
        trainer, logger = make_trainer(model, train, algorithms, eval_dataloader=val, **settings)
        keys = set(trainer.state.model.state_dict())
        trainer.fit()
        assert set(trainer.state.model.state_dict()) == keys
        trainer.close()
        return trainer, logger

    model = MODELS[family]()
    untouched = copy.deepcopy(model)
    algorithm = TokenSuperposition(
        phases=[{'bag_size': 4, 'until': '2ba'}, {'bag_size': 2, 'until': '4ba'}], expand=expand
    )
    ours, our_log = run(model, algorithm, callbacks=[PhaseCheckpointer()], save_folder=str(tmp_path))
    checkpoint = tmp_path / 'bag2-to-bag1' / 'ep0-ba4-rank0.pt'
    theirs, their_log = run(untouched, None, load_path=str(checkpoint))

    for (name, mine), plain in zip(
        ours.state.model.state_dict().items(), theirs.state.model.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, plain), name
    assert logged(our_log, 'loss/train/total')[4:] == logged(their_log, 'loss/train/total')
    for key in ('metrics/train/LanguageCrossEntropy', 'metrics/train/TokenAccuracy'):
        assert logged(our_log, key)[-4:] == logged(their_log, key)[-4:]
    assert logged(our_log, 'metrics/eval/LanguageCrossEntropy')[2:] == logged(
        their_log, 'metrics/eval/LanguageCrossEntropy'
    )
    assert ours.state.timestamp.token == theirs.state.timestamp.token


def test_epochs_that_leave_out_rows_of_each_stream_are_whole(dataset: Path, tokenizer: PreTrainedTokenizerBase):
    rows = {'train': 200, 'val': 40}  # 13 and 3 in each batch: after 13 batches, no more of the second
    streams = {split: {'local': str(dataset), 'split': split, 'choose': rows[split]} for split in rows}
    settings: dict[str, Any] = {'local': None, 'streams': streams, 'batching_method': 'stratified'}
    loader = text_loader(dataset, tokenizer, batch_size=16, **settings)
    batches = len(loader.dataloader)  # pyright: ignore[reportArgumentType]
    trainer, logger = make_trainer(mpt(vocab_size=300), loader, TokenSuperposition(bag_size=2, duration='2ba'), '1ep')
    trainer.fit()
    read = logged(logger, 'superposition/data_tokens')[-1] / 16 / tokenizer.model_max_length
    assert read < batches - 1


def test_nothing_is_left_after_the_last_phase():
    model, loader = llama(), random_loader()
    untouched = copy.deepcopy(model)
    embedding = find_embedding(model)
    trainer, _ = make_trainer(model, loader, TokenSuperposition(bag_size=3, duration='2ba'), max_duration='3ba')
    trainer.fit()
    assert type(embedding) is torch.nn.Embedding
    assert vars(embedding).keys() == vars(find_embedding(untouched)).keys()
    assert vars(model).keys() - {'logger'} == vars(untouched).keys() - {'logger'}
    assert not model._forward_pre_hooks
    assert trainer.state.dataloader is loader
    assert trainer.state.train_dataloader is loader


def test_superposition_does_not_come_back_unless_the_clock_does():
    trainer, logger = make_trainer(
        llama(), random_loader(), TokenSuperposition(bag_size=2, duration='0.5dur'), max_duration='4ba'
    )
    trainer.fit()
    trainer.fit(duration='20ba')
    assert logged(logger, 'superposition/bag_size') == [2.0] * 2 + [1.0] * 22
    trainer.fit(duration='4ba', reset_time=True)
    assert logged(logger, 'superposition/bag_size')[24:] == [2, 2, 1, 1]
    assert logged(logger, 'superposition/data_tokens')[24:] == [batches * 4 * 12 for batches in (2, 4, 5, 6)]
    assert logged(logger, 'superposition/s_tokens')[24:] == [step * 4 * 12 for step in range(1, 5)]


@pytest.mark.parametrize(
    ('duration', 'max_duration', 'steps'),
    [
        ('3ba', '8ba', 3),
        ('0.25dur', '8ba', 2),
        ('24sp', '8ba', 2),
        ('288tok', '8ba', 2),
        ('1ep', '8ba', 4),
        ('0.25dur', '96sp', 2),
        ('0.25dur', '1152tok', 2),
        ('0.5dur', '1ep', 3),
        ('1ep', '2ep', 4),
        ('0.25dur', '2ep', 4),
    ],
)
def test_a_phase_ends_in_any_unit_of_time(duration: str, max_duration: str, steps: int):
    """12 batches of 4 rows of 12 tokens an epoch; a superposed step reads 3 of them."""
    trainer, logger = make_trainer(
        llama(), random_loader(), TokenSuperposition(bag_size=3, duration=duration), max_duration=max_duration
    )
    trainer.fit()
    sizes = logged(logger, 'superposition/bag_size')
    assert sizes == [3.0] * steps + [1.0] * (len(sizes) - steps)
    assert 0 < steps < len(sizes)
    unit = max_duration.lstrip('0123456789')
    assert trainer.state.max_duration is not None
    assert trainer.state.timestamp.get(unit) >= trainer.state.max_duration


@pytest.mark.parametrize(('expand', 'positions'), [('sequence', 4 * 10), ('batch', 12 * 3), ('none', 4 * 3)])
def test_samples_and_tokens_are_counted_truly(expand: str, positions: int):
    trainer, logger = make_trainer(
        llama(), random_loader(length=10), TokenSuperposition(bag_size=3, duration='2ba', expand=expand), '4ba'
    )
    trainer.fit()
    read = 1 if expand == 'none' else 3
    superposed = 40 * read if expand == 'sequence' else 36 * read  # without a tail of 1 token in a row of 10
    assert logged(logger, 'superposition/data_tokens') == [
        superposed,
        2 * superposed,
        2 * superposed + 40,
        2 * superposed + 80,
    ]
    assert logged(logger, 'superposition/s_tokens') == [
        positions,
        2 * positions,
        2 * positions + 40,
        2 * positions + 80,
    ]
    assert trainer.state.timestamp.sample.value == 4 * (2 * read + 2)
    assert trainer.state.timestamp.token.value == 40 * (2 * read + 2)
    assert logged(logger, 'time/sample')[1] == 4 * read


@pytest.mark.parametrize(('pads_count', 'of_row', 'read'), [(True, 10, 9), (False, 8, 8)])
def test_the_ends_of_padded_rows_count_as_composer_counts_them(pads_count: bool, of_row: int, read: int):
    loader = random_loader(length=10, pad_from=lambda row: 8)  # a bag of 3 leaves the last token out
    count = None if pads_count else lambda batch: int(batch['attention_mask'].sum())
    spec = DataSpec(loader, get_num_tokens_in_batch=count)
    trainer, logger = make_trainer(llama(), spec, TokenSuperposition(3, '2ba', expand='batch'), '4ba')
    trainer.fit()
    assert trainer.state.timestamp.token == (12 + 12 + 4 + 4) * of_row
    rows = ((12, 0), (24, 0), (24, 4), (24, 8))
    assert logged(logger, 'superposition/data_tokens') == [bags * read + plain * of_row for bags, plain in rows]


def test_a_change_of_bag_size_is_one_line(caplog: pytest.LogCaptureFixture):
    phases = [{'bag_size': 4, 'until': '1ba'}, {'bag_size': 2, 'until': '3ba'}]
    trainer, _ = make_trainer(llama(), random_loader(), TokenSuperposition(phases=phases), '4ba')
    with caplog.at_level(logging.INFO, logger='composer_tst'):
        trainer.fit()
    messages = [record.getMessage() for record in caplog.records if record.name.startswith('composer_tst')]
    assert [message for message in messages if 'bag size goes' in message] == [
        'Superposition: bag size goes from 4 to 2 at batch 1, after 192 data tokens.',
        'Superposition: bag size goes from 2 to 1 (the recovery phase begins) at batch 3, after 384 data tokens.',
    ]


def test_train_metrics_are_absent_while_superposed_and_evaluation_is_plain():
    weights = []

    class Weights(Callback):
        def eval_start(self, state: Any, logger: Any) -> None:
            weights.append((state.dataloader_label, copy.deepcopy(state.model.model.state_dict())))

    val = random_loader(rows=8)
    names = ['LanguageCrossEntropy']
    trainer, logger = make_trainer(
        llama(),
        random_loader(),
        TokenSuperposition(bag_size=3, duration='2ba'),
        '4ba',
        eval_dataloader=[
            Evaluator(label=label, dataloader=val, metric_names=names, eval_interval='1ba') for label in ('a', 'b')
        ],
        callbacks=[Weights()],
    )
    trainer.fit()
    assert len(logged(logger, 'metrics/train/LanguageCrossEntropy')) == 2
    plain = llama().eval()
    for label in ('a', 'b'):
        values = logged(logger, f'metrics/{label}/LanguageCrossEntropy')
        states = [state for name, state in weights if name == label]
        assert len(states) >= 4
        for state, value in zip(states, values, strict=True):
            plain.model.load_state_dict(state)
            with torch.no_grad():
                losses = torch.stack([plain.model(**batch).loss for batch in val])
            assert value == pytest.approx(float(losses.mean()), rel=1e-5)


class LambdaAfterMonitor(Callback):
    def __init__(self, call: Any):
        self.call = call

    def batch_end(self, state: Any, logger: Any) -> None:
        self.call()


def test_expand_batch_says_once_what_it_drops(caplog: pytest.LogCaptureFixture):
    trainer, _ = make_trainer(
        llama(), random_loader(length=11), TokenSuperposition(bag_size=3, duration='2ba', expand='batch'), '3ba'
    )
    with caplog.at_level(logging.WARNING, logger='composer_tst'):
        trainer.fit()
    lines = [record.getMessage() for record in caplog.records if 'drops' in record.getMessage()]
    assert lines == ['bag_size 3 does not divide rows of 11 tokens: expand: batch drops 24 tokens a step on each rank.']


def test_a_share_of_tokens_says_what_share_of_steps_it_is(caplog: pytest.LogCaptureFixture, dataset, tokenizer):
    train = text_loader(dataset, tokenizer)
    trainer, _ = make_trainer(llama(), train, TokenSuperposition(bag_size=4, duration='0.5dur'), '1920tok')
    with caplog.at_level(logging.WARNING, logger='composer_tst'):
        trainer.fit()
    lines = [record.getMessage() for record in caplog.records if 'share' in record.getMessage()]
    assert len(lines) == 1
    assert '0.5dur of 1920tok is a share of tokens, not of steps' in lines[0]
    assert '3 of about 11 steps (27%)' in lines[0]


def test_a_run_stopped_while_superposed_says_so(caplog: pytest.LogCaptureFixture):
    trainer, _ = make_trainer(llama(), random_loader(), TokenSuperposition(bag_size=3, duration='6ba'), '8ba')

    class Stop(Callback):
        def batch_end(self, state: Any, logger: Any) -> None:
            if state.timestamp.batch == 2:
                state.stop_training()

    trainer.state.callbacks.append(Stop())
    with caplog.at_level(logging.WARNING, logger='composer_tst'):
        trainer.fit()
    assert any('has had no recovery phase' in record.getMessage() for record in caplog.records)


def test_the_speed_monitor_counts_the_flops_of_the_model_and_the_tokens_of_the_data():
    monitor = SpeedMonitor(window_size=1)
    loader = random_loader()
    plain = mpt().flops_per_batch(next(iter(loader)))
    trainer, logger = make_trainer(
        mpt(), loader, TokenSuperposition(bag_size=3, duration='3ba'), '5ba', callbacks=[monitor]
    )
    flops = []
    trainer.state.callbacks.append(LambdaAfterMonitor(lambda: flops.append(monitor.history_flops[-1])))
    trainer.fit()
    assert flops == [plain] * 5
    batches_per_second = logged(logger, 'throughput/batches_per_sec')
    tokens_per_second = logged(logger, 'throughput/tokens_per_sec')
    tokens_per_batch = [t / b for t, b in zip(tokens_per_second, batches_per_second, strict=True)]
    assert tokens_per_batch == pytest.approx([144, 144, 48, 48])


def test_samples_left_out_are_logged_at_the_end_of_each_epoch():
    # Batches of 4, 4, 4 and of 4, 4, 2 rows: the last of the 22 does not make a row of 3.
    trainer, logger = make_trainer(
        llama(), random_loader(rows=22, drop_last=False), TokenSuperposition(bag_size=3, duration='2ba'), '8ba'
    )
    trainer.fit()
    assert logged(logger, 'superposition/samples_left_out') == [1, 1]


def test_shares_of_epochs_beside_tokens_need_a_loader_that_says_how_many_it_has():
    phases = [{'bag_size': 4, 'until': '0.2dur'}, {'bag_size': 2, 'until': '900tok'}]
    loader = random_loader(pad_from=lambda row: 12 - row % 5)
    trainer, _ = make_trainer(llama(), loader, TokenSuperposition(phases=phases), '2ep')
    with pytest.raises(ValueError, match='0.2dur of 2ep cannot be placed because the train loader does not say what a'):
        trainer.fit()


def test_epochs_that_superposition_shortens_are_warned_of(caplog: pytest.LogCaptureFixture):
    algorithm = TokenSuperposition(bag_size=3, duration='0.5dur')
    trainer, _ = make_trainer(llama(), random_loader(rows=96), algorithm, '1ep')
    with caplog.at_level(logging.WARNING, logger='composer_tst'):
        trainer.fit()
    # 24 batches: 6 steps of 3, 6 of one.
    assert 'reads 1ep in about 12 steps' in caplog.text
    assert trainer.state.timestamp.batch == 12

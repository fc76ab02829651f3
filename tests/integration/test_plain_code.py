"""What plain runs accept, in a superposed one: each works as it does there, or is refused in one sentence."""

import copy
import io
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import reference
from common.trainers import VOCAB_SIZE, Rows, llama, logged, make_trainer, mpt, random_loader
from composer import Callback
from composer.algorithms import LabelSmoothing
from composer.core import DataSpec
from composer.models import ComposerModel, HuggingFaceModel
from torch import nn
from torch.utils.data import DataLoader, default_collate

from composer_tst import TokenSuperposition
from composer_tst.compatibility import check_batch

S = 3


def train(loader: Any = None, model: Any = None, algorithm: Any = None, max_duration: str = '4ba', **settings: Any):
    trainer, logger = make_trainer(
        model or llama(),
        random_loader() if loader is None else loader,
        algorithm or TokenSuperposition(S, '2ba'),
        max_duration,
        **settings,
    )
    trainer.fit()
    return logged(logger, 'loss/train/total')


@pytest.fixture(scope='module')
def losses() -> list[float]:
    return train()


def collated(change: Callable[[dict[str, Any]], dict[str, Any]]) -> DataLoader:
    return random_loader(collate_fn=lambda rows: change(default_collate(rows)))


def test_ids_of_32_bits(losses: list[float]):
    assert train(collated(lambda batch: {**batch, 'input_ids': batch['input_ids'].int()})) == losses


def test_a_tensor_without_dimensions_in_the_batch(losses: list[float]):
    spec = DataSpec(
        collated(lambda batch: {**batch, 'use_cache': torch.tensor(0)}),
        get_num_samples_in_batch=lambda batch: len(batch['input_ids']),
        split_batch=lambda batch, size: [batch],
    )
    assert train(spec) == losses


def test_a_batch_that_is_split_in_ones_own_way():
    def split(batch: Any, size: Any) -> list[dict[str, torch.Tensor]]:
        parts = zip(*(value.split(size) for value in batch.values()), strict=True)
        return [dict(zip(batch, part, strict=True)) for part in parts]

    for expand in ('sequence', 'batch'):
        algorithm = TokenSuperposition(S, '2ba', expand=expand)
        own = train(DataSpec(random_loader(), split_batch=split), algorithm=algorithm, device_train_microbatch_size=2)
        assert own == train(algorithm=algorithm, device_train_microbatch_size=2)


def test_callbacks_that_move_every_value_of_the_batch(losses: list[float]):
    class Moves(Callback):
        def batch_start(self, state: Any, logger: Any) -> None:
            state.batch = {key: value.to('cpu') for key, value in state.batch.items()}

    assert train(callbacks=[Moves()]) == losses


def test_the_model_called_from_callbacks_in_a_superposed_step(losses: list[float]):
    """By keyword, in evaluation and in training, whole and inner; and evaluation, generation and prediction."""
    ids = torch.randint(2, VOCAB_SIZE, (4, 12), generator=torch.Generator().manual_seed(1))
    seen = []

    class Calls(Callback):
        trainer: Any

        def call(self, state: Any, logger: Any) -> None:
            if state.timestamp.batch > 0:
                return
            with torch.no_grad(), torch.random.fork_rng():
                model = state.model
                plain = copy.deepcopy(model)
                expected = plain.model(input_ids=ids).logits
                for mode in (True, False):
                    model.train(mode)
                    assert torch.equal(model.model(input_ids=ids).logits, expected)
                    assert torch.equal(model(batch={'input_ids': ids})['logits'], expected)
                    assert torch.equal(model.forward({'input_ids': ids})['logits'], expected)
                model.train()
                seen.append(True)

        before_train_batch = before_forward = after_forward = before_loss = after_loss = call
        before_backward = after_backward = after_train_batch = batch_start = after_dataloader = call

        def batch_end(self, state: Any, logger: Any) -> None:
            if state.timestamp.batch == 1:
                self.trainer.eval(random_loader(rows=8))
                self.trainer.predict(random_loader(rows=8))
                state.model.generate(ids, max_new_tokens=2, pad_token_id=0)
                state.model.train()

    calls = Calls()
    trainer, logger = make_trainer(llama(), random_loader(), TokenSuperposition(S, '2ba'), '4ba', callbacks=[calls])
    calls.trainer = trainer
    trainer.fit()
    assert logged(logger, 'loss/train/total') == losses
    assert len(seen) == 10


@pytest.mark.parametrize('event', ['batch_start', 'after_forward', 'after_backward', 'batch_end', 'batch_checkpoint'])
@pytest.mark.parametrize('family', [llama, mpt])
def test_the_model_saved_and_copied_while_superposed(event: str, family: Any):
    class Saves(Callback):
        def save(self, state: Any, logger: Any) -> None:
            file = io.BytesIO()
            torch.save(state.model, file)
            file.seek(0)
            for other in (torch.load(file, weights_only=False), copy.deepcopy(state.model)):
                ids = torch.zeros(2, 4, dtype=torch.long)
                assert torch.equal(other.eval()({'input_ids': ids})['logits'], expected(state.model, ids))

    def expected(model: Any, ids: torch.Tensor) -> torch.Tensor:
        plain = family()
        plain.load_state_dict(model.state_dict())
        return plain.eval()({'input_ids': ids})['logits']

    saves = Saves()
    setattr(saves, event, saves.save)
    assert len(train(model=family(), callbacks=[saves])) == 4


class Own(ComposerModel):
    """A model of one's own that mixes positions; ``how`` it looks up, and what it gives and reads."""

    def __init__(self, how: str = ''):
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.wte, self.mix, self.head = nn.Embedding(VOCAB_SIZE, 16), nn.Linear(16, 16), nn.Linear(16, VOCAB_SIZE)

    def after_lookup(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.gelu(self.mix(x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None])))

    def forward(self, batch: Any) -> Any:
        ids = batch['input_ids']
        if self.how == 'functional':
            return self.after_lookup(F.embedding(ids, self.wte.weight))
        if self.how == 'remapped':
            return self.after_lookup(self.wte((ids + 7) % VOCAB_SIZE))
        if self.how == 'twice':
            return self.after_lookup(self.wte(ids) + self.wte(ids.roll(1, 1)))
        logits = self.after_lookup(self.wte(ids))
        if self.how == 'reads labels':
            return {'logits': logits, 'loss': self.next_token_loss(logits, batch['labels'])}
        return {'lm_logits': logits} if self.how == 'lm_logits' else logits

    @staticmethod
    def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    def loss(self, outputs: Any, batch: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if isinstance(outputs, dict):
            outputs = outputs.get('lm_logits', outputs.get('logits'))
        return self.next_token_loss(outputs, batch.get('labels', batch['input_ids']))

    def get_metrics(self, is_train: bool) -> dict:
        return {}


@pytest.mark.parametrize('how', ['', 'frozen', 'twice'])
def test_a_model_of_ones_own_trains_as_defined(how: str):
    model, loader = Own(how), random_loader()
    if how == 'frozen':
        model.wte.requires_grad_(False).eval()
    rows = reference.fold(list(itertools.islice(loader, S)), S)
    means = reference.mean_embeddings(model.wte, rows)
    logits = model.after_lookup(means + means.roll(1, 1) if how == 'twice' else means)
    expected = reference.multi_hot_loss(logits, rows, [1.0] * S)
    assert train(model=model)[0] == pytest.approx(float(expected.detach()), rel=1e-5)


@pytest.mark.parametrize(
    ('how', 'message'),
    [
        ('functional', 'Own reads the ids of a superposed batch by value by embedding, test_plain_code.py'),
        ('remapped', 'Own reads the ids of a superposed batch by value by add, test_plain_code.py'),
        ('reads labels', 'Own reads the labels by slice, test_plain_code.py'),
        ('lm_logits', 'Own returns lm_logits from its forward: have it return logits'),
    ],
)
def test_a_model_that_would_train_on_something_else_stops_at_its_first_step(how: str, message: str):
    model = Own(how)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        train(model=model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    trainer, logger = make_trainer(Own(how), random_loader(), None, '2ba')
    trainer.fit()
    assert len(logged(logger, 'loss/train/total')) == 2


def test_a_batch_without_labels():
    """A model of one's own may need none; Hugging Face's does."""
    without = collated(lambda batch: {'input_ids': batch['input_ids']})
    assert train(without, model=Own()) == train(model=Own())
    with pytest.raises(ValueError, match=r'The batch has no labels \(it has input_ids\): have the collator add them'):
        train(without)


def test_an_evaluation_of_ones_own_needs_no_labels():
    asked = []

    class Own(HuggingFaceModel):
        def eval_forward(self, batch: Any, outputs: Any = None) -> Any:
            asked.append(sorted(batch))
            return self.forward(batch)['logits']

        def update_metric(self, batch: Any, outputs: Any, metric: Any) -> None:
            pass

    class Unlabelled(Rows):
        def __getitem__(self, index: int) -> Any:
            return {'input_ids': super().__getitem__(index)['input_ids']}

    model = llama()
    model.__class__ = Own
    data = DataLoader(Unlabelled(8, 12), batch_size=4)
    make_trainer(model, random_loader(), TokenSuperposition(2, '2ba'), '4ba', eval_dataloader=data)[0].fit()
    assert ['input_ids'] in asked


def test_what_weighs_microbatches_does_not_reach_the_model():
    keys = []

    class Notes(Own):
        def forward(self, batch: Any) -> Any:
            keys.append(set(batch))
            return super().forward(batch)

    train(
        collated(lambda batch: {**batch, 'total_tokens': [12] * 4, 'loss_generating_tokens': [11] * 4}), model=Notes()
    )
    plain, watched, trained = keys[:3]  # the first batch is held against the model's own loss
    assert plain > watched == trained == {'input_ids', 'labels'}


@pytest.mark.parametrize('expand', ['sequence', 'batch', 'none'])
def test_a_model_of_ones_own_may_read_positions(expand: str):
    class Learned(Own):
        reads: bool

        def __init__(self):
            super().__init__()
            self.wpe = nn.Embedding(12, 16)

        def get_input_embeddings(self) -> nn.Embedding:
            return self.wte

        def forward(self, batch: Any) -> Any:
            positions = batch['position_ids'] if self.reads else torch.arange(batch['input_ids'].shape[1])
            return self.after_lookup(self.wte(batch['input_ids']) + self.wpe(positions))

    def losses(reads: bool) -> list[float]:
        Learned.reads = reads
        loader = collated(lambda batch: {**batch, 'position_ids': torch.arange(12).expand(4, -1)})
        return train(loader, Learned(), TokenSuperposition(S, '2ba', expand=expand))

    assert losses(reads=True) == losses(reads=False)


def test_recovery_does_not_touch_the_batch():
    class Anything(Callback):
        def after_dataloader(self, state: Any, logger: Any) -> None:
            if state.timestamp.batch >= 2:
                assert state.batch is given[-1]

    given = []

    def keep(batch: dict[str, Any]) -> dict[str, Any]:
        if len(given) >= 2:
            batch = {**batch, 'position_ids': torch.arange(12).expand(4, -1), 'position_ids_': 1}
            del batch['labels']
        given.append(batch)
        return batch

    spec = DataSpec(
        random_loader(rows=96), batch_transforms=keep, get_num_samples_in_batch=lambda batch: len(batch['input_ids'])
    )
    assert len(train(spec, model=Own(), callbacks=[Anything()])) == 4


class Padded(Rows):
    """Rows whose tail is id 0, of as many tokens as ``pad`` says, and some labels that are to be ignored."""

    def __init__(self, ignored: int = 0):
        super().__init__(48, 12)
        self.ignored = ignored
        for row in range(48):
            self.ids[row, 12 - row % 5 * 2 :] = 0

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = {'input_ids': self.ids[index], 'labels': self.ids[index].clone()}
        if self.ignored:
            row['labels'][::3] = self.ignored
        return row


def padded_loader(**settings: Any) -> DataLoader:
    return DataLoader(Padded(**settings), batch_size=4, drop_last=True)


def mask_padding(batch: dict[str, Any]) -> dict[str, Any]:
    return {**batch, 'labels': batch['labels'].masked_fill(batch['input_ids'] == 0, -100)}


def attend(batch: dict[str, Any]) -> dict[str, Any]:
    return {**batch, 'attention_mask': (batch['input_ids'] != 0).long()}


@pytest.mark.parametrize('transform', [mask_padding, attend])
@pytest.mark.parametrize('expand', ['sequence', 'batch'])
def test_a_transform_of_microbatches_is_one_of_batches(transform: Any, expand: str):
    def losses(how: str) -> list[float]:
        spec = DataSpec(padded_loader(), **{how: transform})
        return train(spec, algorithm=TokenSuperposition(S, '2ba', expand=expand), device_train_microbatch_size=4)

    assert losses('microbatch_transforms') == losses('batch_transforms')
    assert losses('batch_transforms') != train(padded_loader(), algorithm=TokenSuperposition(S, '2ba', expand=expand))


def count_targets(batch: Any) -> int:
    return int((batch['labels'] != -100).sum())


def count_next_tokens(batch: Any) -> dict[str, int]:
    return {
        'total': batch['input_ids'].numel(),
        'loss_generating': int((batch['labels'][:, 1:] != -100).sum()),
    }


@pytest.mark.parametrize('count', [count_targets, count_next_tokens])
@pytest.mark.parametrize('expand', ['sequence', 'batch'])
def test_a_count_of_tokens_of_ones_own_weighs_microbatches_to_one_loss(count: Any, expand: str):
    """Of padded rows: 4 microbatches of one row, 2 of two, and the whole."""

    def losses(size: int) -> list[float]:
        spec = DataSpec(
            padded_loader(), batch_transforms=lambda b: attend(mask_padding(b)), get_num_tokens_in_batch=count
        )
        algorithm = TokenSuperposition(S, '2ba', expand=expand)
        settings = {'device_train_microbatch_size': size, 'accumulate_train_batch_on_tokens': True}
        return train(spec, algorithm=algorithm, **settings)[:2]

    whole = losses(4)
    assert losses(1) == pytest.approx(whole, rel=1e-5)
    assert losses(2) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize('label', [-1, -99])
def test_labels_below_0_that_are_not_ignored_are_refused(label: int):
    with pytest.raises(ValueError, match=f'labels has {label}: mark tokens that are not to be predicted with -100'):
        train(padded_loader(ignored=label))
    assert len(train(padded_loader(ignored=-100))) == 4


@pytest.mark.parametrize('expand', ['sequence', 'batch', 'none'])
def test_what_the_model_does_not_take_may_be_anything(expand: str):
    count = itertools.count()

    def odd(batch: dict[str, Any]) -> dict[str, Any]:
        number = next(count)
        some = {'flag': torch.ones(len(batch['input_ids']))} if number % 3 == 0 else {}
        widths = torch.ones(len(batch['input_ids']), 3 + number % 3)
        return {**batch, **some, 'number': number, 'meta': {'url': ['a'] * 4}, 'widths': widths}

    spec = DataSpec(collated(odd), get_num_samples_in_batch=lambda batch: len(batch['input_ids']))
    assert train(spec, algorithm=TokenSuperposition(S, '2ba', expand=expand)) == train(
        algorithm=TokenSuperposition(S, '2ba', expand=expand)
    )


@pytest.mark.parametrize('kind', [np.array, torch.tensor, tuple, list, lambda w: [np.float32(x) for x in w]])
def test_weights_of_any_kind(kind: Any):
    weights = [1.0, 0.5, 0.25]
    algorithm = TokenSuperposition(S, '2ba', weighting=kind(weights))
    assert algorithm.state_dict()['settings']['weighting'] == weights
    assert train(algorithm=algorithm) == train(algorithm=TokenSuperposition(S, '2ba', weighting=weights))


def test_shares_are_exact():
    trainer, logger = make_trainer(llama(), random_loader(rows=800), TokenSuperposition(2, '0.29dur'), '100ba')
    trainer.fit()
    assert logged(logger, 'superposition/bag_size') == [2] * 29 + [1] * 71


def test_a_loader_set_in_the_middle_of_an_epoch_is_drawn_from_in_the_next():
    class Sets(Callback):
        def batch_end(self, state: Any, logger: Any) -> None:
            if state.timestamp.batch == 2:
                state.set_dataloader(other, 'train')
                state.train_dataloader = other

    other = random_loader(rows=24)
    other.dataset.ids = other.dataset.ids + 0  # pyright: ignore
    trainer, logger = make_trainer(
        llama(), random_loader(rows=48), TokenSuperposition(S, '6ba'), '12ba', callbacks=[Sets()]
    )
    trainer.fit()
    # 4 steps of an epoch of 12 batches, then 2 and the first of recovery of one of 6 batches.
    assert logged(logger, 'superposition/bag_size') == [3] * 6 + [1] * 6
    assert trainer.state.timestamp.sample == 4 * (12 + 6 + 6)
    assert trainer.state.dataloader is other


def test_a_loader_set_as_an_epoch_starts_is_drawn_from(losses: list[float]):
    """Composer asks algorithms first, callbacks then, and then the loader."""

    class Sets(Callback):
        def epoch_start(self, state: Any, logger: Any) -> None:
            state.set_dataloader(random_loader(), 'train')

    assert train(random_loader(rows=24), callbacks=[Sets()]) == losses


def test_an_algorithm_added_to_a_trainer_that_is_made(losses: list[float]):
    trainer, logger = make_trainer(llama(), random_loader(), None, '4ba')
    trainer.state.algorithms.append(TokenSuperposition(S, '2ba'))
    trainer.fit()
    assert logged(logger, 'loss/train/total') == losses
    trainer, _ = make_trainer(llama(), random_loader(), LabelSmoothing(), '4ba')
    trainer.state.algorithms.append(TokenSuperposition(S, '2ba'))
    with pytest.raises(ValueError, match='LabelSmoothing cannot be combined with TokenSuperposition'):
        trainer.fit()


def test_an_embedding_replaced_in_the_run(losses: list[float]):
    class Replaces(Callback):
        def batch_start(self, state: Any, logger: Any) -> None:
            model = state.model.model
            new = nn.Embedding(*model.get_input_embeddings().weight.shape)
            new.weight = model.get_input_embeddings().weight
            model.set_input_embeddings(new)

    assert train(callbacks=[Replaces()]) == losses


def test_a_loss_of_the_models_class_is_said_to_be_left_out(caplog: pytest.LogCaptureFixture):
    train()
    train(model=mpt())
    assert 'has a loss of its own' not in caplog.text
    train(model=Own())
    assert caplog.text.count('The Own has a loss of its own: superposed steps train on the multi-hot cross-ent') == 1


class Flash(nn.Module):
    """What is asked of an MPT with flash attention, which no CPU has."""

    def __init__(self, impl: str = 'flash', by_sequence: bool = True):
        super().__init__()
        transformer: Any = nn.Module()
        transformer.attn_impl, transformer.attn_uses_sequence_id = impl, by_sequence
        self.model = nn.Module()
        self.model.transformer = transformer


def test_padding_within_a_row_of_flash_attention_by_sequence_is_refused():
    rows = {'labels': torch.zeros(1, 6).long(), 'attention_mask': torch.tensor([[1, 1, 0, 0, 1, 1]])}
    with pytest.raises(ValueError, match='reads the attention mask as a length, and this row of bags has padding'):
        check_batch(rows, rows, 2, 'both', Flash())
    for model in (Flash('torch'), Flash(by_sequence=False)):
        check_batch(rows, rows, 2, 'both', model)
    rows['attention_mask'] = torch.tensor([[1, 1, 1, 0, 0, 0]])
    check_batch(rows, rows, 2, 'both', Flash())
    rows['sequence_id'] = torch.tensor([[0, 1, 2, 3, 3, 3]])
    with pytest.raises(ValueError, match='leaves out sequences numbered past the length of a row'):
        check_batch(rows, rows, 2, 'both', Flash())

"""What a model's own loss makes of the first batch, held against what superposition makes of it."""

import datetime
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common.trainers import VOCAB_SIZE, Rows, hugging_face, llama, logged, make_trainer, mpt
from composer import Algorithm, Callback, DataSpec, Event
from composer.models import ComposerModel, HuggingFaceModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import JetMoeConfig, JetMoeForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss

from composer_tst import TokenSuperposition

ALONE = ('alone', 'head in loss', 'two heads')  # their forward returns one tensor
HANDED_ON = ('labels handed on', 'a copy handed on')


class Own(ComposerModel):
    """A model of one's own; ``how`` its loss is one's own, too."""

    def __init__(self, how: str = '', width: int = 16):
        super().__init__()
        torch.manual_seed(0)
        self.how, self.wte, self.head = how, nn.Embedding(VOCAB_SIZE, width), nn.Linear(width, VOCAB_SIZE)

    def forward(self, batch: Any) -> Any:
        h = self.wte(batch['input_ids'])
        logits = self.head(h.cumsum(1) / 4)
        if self.how == 'head in loss':
            return h.cumsum(1) / 4
        if self.how == 'two heads':
            return torch.stack([logits, logits], 2)
        if self.how.endswith('handed on'):
            labels = batch['labels']
            return {'logits': logits, 'labels': labels.clone() if self.how == 'a copy handed on' else labels}
        return {'logits': logits, 'aux_loss': h.pow(2).mean(), 'hidden': h} if self.how != 'alone' else logits

    def loss(self, outputs: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        logits, labels = outputs if self.how in ALONE else outputs['logits'], batch['labels']
        if self.how == 'head in loss':
            logits = self.head(outputs)
        if self.how == 'two heads':
            logits = outputs[:, :, 0]
        if self.how == 'hidden':
            logits = self.head(outputs['hidden'].cumsum(1) / 4)
        if self.how.endswith('handed on'):
            labels = outputs['labels']
        if self.how == 'in place':
            logits.mul_(0.5)
        if self.how == 'padding in place':
            labels[labels == 0] = -100
        if self.how == 'shifts in place':
            labels[:, :-1], labels[:, -1] = labels[:, 1:].clone(), -100
        if self.how in ('not shifted', 'shifts in place'):
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        ahead, length = 2 if self.how == 'two ahead' else 1, labels.shape[1] - (self.how == 'but the last')
        logits, labels = logits[:, : length - ahead].flatten(0, 1), labels[:, ahead:length].flatten()
        if self.how == 'padding by weights':
            weights = (labels > 0) * 1.0
            return (F.cross_entropy(logits, labels, reduction='none') * weights).sum() / weights.sum()
        loss = F.cross_entropy(logits, labels, ignore_index=0 if self.how in ('padding', 'padding handed on') else -100)
        if self.how == 'of all positions':
            return loss + 0.01 * outputs['logits'].logsumexp(-1).pow(2).mean()
        return loss + 0.01 * outputs['aux_loss'] if self.how == 'more' else loss

    def get_metrics(self, is_train: bool) -> dict:
        return {}


def rows(change: Any = None) -> DataLoader:
    data = Rows(48, 12)
    if change is not None:
        change(data.ids)
    return DataLoader(data, batch_size=4, drop_last=True)


def pad(ids: torch.Tensor, first: int = 0) -> None:
    ids[first:, 6:] = 0


def repeat(ids: torch.Tensor) -> None:
    ids[:, 4:] = 5


class Shifted(Rows):
    """Rows whose labels are shifted; with ``ends``, the last is a token that ids do not have, and padding follows."""

    ends = False

    def __getitem__(self, index: int) -> Any:
        ids = self.ids[index].clone()
        if self.ends:
            ids[6:] = 0
        labels = ids.roll(-1)
        if self.ends:
            labels[5], labels[6:] = 1, -100
        return {'input_ids': ids, 'labels': labels}


class Ended(Shifted):
    ends = True


class Sparse(Shifted):
    """Rows of which every third token has a label; with ``ends``, the last of these tokens ids do not have."""

    def __getitem__(self, index: int) -> Any:
        row = super().__getitem__(index)
        row['labels'][torch.arange(len(row['labels'])) % 3 != 2] = -100
        return row


class SparseEnded(Sparse):
    ends = True


@pytest.mark.parametrize(
    ('how', 'loader', 'message'),
    [
        (
            'not shifted',
            lambda: DataLoader(Shifted(48, 12), batch_size=4),
            'labels are shifted already: at t they have',
        ),
        ('not shifted', rows, r'The loss of Own predicts another token than labels\[t \+ 1\] at 44 of 44 positions'),
        (
            'not shifted',
            lambda: rows(repeat),
            r'The loss of Own predicts another token than labels\[t \+ 1\] at 16 of 44 positions',
        ),
        ('two ahead', rows, r'The loss of Own predicts another token than labels\[t \+ 1\] at'),
        ('head in loss', rows, 'Own returns 16 values at each position, and labels have token 2'),
        ('padding', lambda: rows(pad), 'The loss of Own ignores token 0, which labels have 72 times in this batch'),
        (
            'padding by weights',
            lambda: rows(pad),
            'The loss of Own ignores token 0, which labels have 72 times in this',
        ),
        ('padding in place', lambda: rows(pad), 'The loss of Own ignores token 0, which labels have 72 times'),
        ('padding handed on', lambda: rows(pad), 'The loss of Own ignores token 0, which labels have 72 times'),
    ],
)
def test_other_targets_are_refused_before_a_step(how: str, loader: Any, message: str):
    trainer, logger = make_trainer(Own(how), loader(), TokenSuperposition(3, '2ba'), '4ba')
    with pytest.raises(ValueError, match=message):
        trainer.fit()
    assert not logged(logger, 'loss/train/total')


def test_logits_that_are_none_are_refused_in_a_wide_model_too():
    trainer, _ = make_trainer(Own('head in loss', width=2 * VOCAB_SIZE), rows(), TokenSuperposition(3, '2ba'), '4ba')
    with pytest.raises(ValueError, match=r'another token than labels\[t \+ 1\] .* have its forward return logits'):
        trainer.fit()


def test_logits_of_several_heads_are_refused():
    trainer, _ = make_trainer(Own('two heads'), rows(), TokenSuperposition(3, '2ba'), '4ba')
    with pytest.raises(ValueError, match=r'Own returns logits of shape \(4, 12, 2, 300\) .* one for each position'):
        trainer.fit()


def test_labels_that_are_shifted_and_end_in_a_token_of_their_own_are_refused():
    trainer, _ = make_trainer(llama(), DataLoader(Ended(48, 12), batch_size=4), TokenSuperposition(3, '2ba'), '4ba')
    with pytest.raises(ValueError, match='labels are shifted already'):
        trainer.fit()


def test_labels_that_are_shifted_and_have_no_neighbours_are_refused():
    trainer, _ = make_trainer(llama(), DataLoader(Sparse(48, 12), batch_size=4), TokenSuperposition(3, '2ba'), '4ba')
    with pytest.raises(ValueError, match='labels are shifted already'):
        trainer.fit()
    loader = DataLoader(SparseEnded(48, 12), batch_size=4)
    trainer, _ = make_trainer(Own('not shifted'), loader, TokenSuperposition(3, '2ba'), '4ba')
    with pytest.raises(ValueError, match=r'another token than labels\[t \+ 1\] at 8 of 8 positions'):
        trainer.fit()


class Labels(Rows):
    """Rows with labels of one's own."""

    def __init__(self, change: Callable[[torch.Tensor], None]):
        super().__init__(48, 12)
        self.change = change

    def __getitem__(self, index: int) -> Any:
        labels = self.ids[index].clone()
        self.change(labels)
        return {'input_ids': self.ids[index], 'labels': labels}


def every_third(labels: torch.Tensor) -> None:
    labels[torch.arange(len(labels)) % 3 != 2] = -100


def one(labels: torch.Tensor) -> None:
    labels[:-1] = -100


def other_tokens(labels: torch.Tensor) -> None:
    every_third(labels)
    labels[labels > 150] = 7


def no_label(labels: torch.Tensor) -> None:
    labels[:] = -100


@pytest.mark.parametrize('labels', [every_third, one, other_tokens, no_label])
@pytest.mark.parametrize('make', [llama, Own])
def test_labels_that_are_not_shifted_train_however_few_there_are(make: Any, labels: Any):
    trainer, logger = make_trainer(
        make(), DataLoader(Labels(labels), batch_size=4), TokenSuperposition(3, '2ba'), '4ba'
    )
    trainer.fit()
    assert len(logged(logger, 'loss/train/total')) == 4


@pytest.mark.parametrize(('first', 'steps'), [(1, 0), (11, 0), (12, 1)])
def test_what_a_loss_ignores_is_refused_wherever_labels_have_it(first: int, steps: int):
    """In microbatches of one row, of which the first has none of it; a step reads 12 rows."""
    loader = rows(lambda ids: pad(ids, first))
    stack = TokenSuperposition(3, '3ba', expand='batch')
    trainer, logger = make_trainer(Own('padding'), loader, stack, '4ba', device_train_microbatch_size=1)
    with pytest.raises(ValueError, match='The loss of Own ignores token 0, which labels have'):
        trainer.fit()
    assert len(logged(logger, 'loss/train/total')) == steps


def masks_padding(logits: Any, labels: Any, vocab_size: int, **settings: Any) -> Any:
    return ForCausalLMLoss(logits, labels.masked_fill(labels == 0, -100), vocab_size, **settings)


@pytest.mark.parametrize('function', [functools.partial(ForCausalLMLoss, ignore_index=0), masks_padding])
def test_what_the_loss_of_a_hugging_face_model_ignores_is_refused(function: Any, caplog: pytest.LogCaptureFixture):
    def train(loader: DataLoader) -> None:
        model: Any = llama()
        model.model.loss_function = function
        make_trainer(model, loader, TokenSuperposition(3, '2ba'), '4ba')[0].fit()

    train(rows())
    assert 'The loss of' not in caplog.text
    with pytest.raises(ValueError, match='The loss of HuggingFaceModel ignores token 0, which labels have 72 times'):
        train(rows(pad))


class Ignores(nn.Module):
    ignore_index = -100

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, targets.masked_fill(targets == 0, -100), reduction='none')


class AddsZ(nn.CrossEntropyLoss):
    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return super().forward(input, target) + 0.1 * input.logsumexp(-1).pow(2)


def train_mpt(loss_fn: Any, loader: DataLoader) -> Any:
    """An MPT with a ``loss_fn`` of one's own, if there is one; return its calls."""
    model: Any = mpt()
    model.loss_fn = loss_fn or model.loss_fn
    calls = []
    model.loss_fn.register_forward_hook(lambda *call: calls.append(call))
    make_trainer(model, loader, TokenSuperposition(3, '2ba'), '4ba')[0].fit()
    return calls


def test_what_the_loss_fn_of_an_mpt_ignores_is_refused(caplog: pytest.LogCaptureFixture):
    train_mpt(Ignores(), rows())
    assert 'The loss of' not in caplog.text
    with pytest.raises(ValueError, match='The loss of ComposerMPTCausalLM ignores token 0, which labels have 72 times'):
        train_mpt(Ignores(), rows(pad))


@pytest.mark.parametrize(
    'loss_fn', [AddsZ(reduction='none'), nn.CrossEntropyLoss(reduction='none', label_smoothing=0.3)]
)
def test_what_the_loss_fn_of_an_mpt_adds_is_said_to_be_left_out(loss_fn: Any, caplog: pytest.LogCaptureFixture):
    train_mpt(loss_fn, rows())
    assert caplog.text.count('The loss of ComposerMPTCausalLM is more than a cross-entropy') == 1


def test_an_mpt_as_it_is_trains_without_a_word_and_computes_no_other_loss(caplog: pytest.LogCaptureFixture):
    assert len(train_mpt(None, rows(pad))) == 2  # in recovery
    assert 'The loss of' not in caplog.text


def end(ids: torch.Tensor) -> None:
    ids[:, -1] = 1


@pytest.mark.parametrize('size', [1, 4])
def test_a_place_that_a_loss_leaves_out_is_no_token(size: int):
    trainer, logger = make_trainer(
        Own('but the last'), rows(end), TokenSuperposition(3, '2ba'), '4ba', device_train_microbatch_size=size
    )
    trainer.fit()
    assert len(logged(logger, 'loss/train/total')) == 4


@pytest.mark.parametrize('how', ['', 'alone', 'hidden', 'in place', 'shifts in place', *HANDED_ON])
def test_a_loss_of_ones_own_trains_without_a_word_of_the_rest(how: str, caplog: pytest.LogCaptureFixture):
    trainer, logger = make_trainer(Own(how), rows(), TokenSuperposition(3, '2ba'), '4ba')
    trainer.fit()
    assert len(logged(logger, 'loss/train/total')) == 4
    assert ('is more than a cross-entropy' in caplog.text) == (how == 'in place')  # whose logits are others


def test_what_a_loss_adds_is_said_to_be_left_out(caplog: pytest.LogCaptureFixture):
    make_trainer(Own('more'), rows(), TokenSuperposition(3, '2ba'), '4ba')[0].fit()
    assert caplog.text.count('The loss of Own is more than a cross-entropy') == 1

    def z_loss(logits: Any, labels: Any, vocab_size: int, **settings: Any) -> Any:
        return ForCausalLMLoss(logits, labels, vocab_size, **settings) + 0.1 * logits.logsumexp(-1).pow(2).mean()

    model: Any = llama()
    model.model.loss_function = z_loss
    make_trainer(model, rows(), TokenSuperposition(3, '2ba'), '4ba')[0].fit()
    assert caplog.text.count('The loss of HuggingFaceModel is more than a cross-entropy') == 1


def test_the_cross_entropy_in_the_warning_is_that_of_the_positions_with_a_next_label(caplog: pytest.LogCaptureFixture):
    model, loader = Own('of all positions'), DataLoader(Rows(48, 12, lambda i: 8), batch_size=4, drop_last=True)
    batch = next(iter(loader))
    logits, labels = model(batch)['logits'], batch['labels']
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    make_trainer(model, loader, TokenSuperposition(3, '2ba'), '4ba')[0].fit()
    assert f'where its cross-entropy is {float(expected):.4g}. Superposed' in caplog.text


def test_a_router_loss_whose_weight_is_not_known_is_said_to_be_left_out(caplog: pytest.LogCaptureFixture):
    sizes: dict[str, Any] = {'vocab_size': VOCAB_SIZE, 'hidden_size': 16, 'num_hidden_layers': 1, 'kv_channels': 8}
    sizes |= {'intermediate_size': 16, 'num_key_value_heads': 2, 'num_local_experts': 2, 'num_experts_per_tok': 1}
    model = hugging_face(JetMoeForCausalLM(JetMoeConfig(**sizes, output_router_logits=True)))
    make_trainer(model, rows(), TokenSuperposition(3, '2ba'), '4ba')[0].fit()
    assert caplog.text.count('The loss of HuggingFaceModel is more than a cross-entropy') == 1


def mask(batch: Any) -> None:
    batch['labels'] = batch['labels'].masked_fill(batch['labels'] > 150, -100)


def mask_unseen(batch: Any) -> None:
    batch['labels'].numpy()[batch['labels'].numpy() > 150] = -100


class Changes(Algorithm):
    """Changes a batch at an event; by default, labels above 150 are left out."""

    def __init__(self, event: Event, change: Callable[[Any], Any] = mask):
        self.event, self.change = event, change

    def match(self, event: Event, state: Any) -> bool:
        return event == self.event

    def apply(self, event: Event, state: Any, logger: Any) -> None:
        self.change(state.batch)


def losses(*algorithms: Algorithm, callbacks: Any = (), duration: str = '2ba') -> list[float]:
    stack = [*algorithms, TokenSuperposition(3, duration)]
    trainer, logger = make_trainer(llama(), rows(), stack, '4ba', callbacks=list(callbacks))
    trainer.fit()
    return logged(logger, 'loss/train/total')[:2]


@pytest.mark.parametrize('change', [mask, mask_unseen])
@pytest.mark.parametrize('event', [Event.BEFORE_FORWARD, Event.AFTER_FORWARD, Event.BEFORE_LOSS])
def test_labels_that_change_late_are_obeyed(event: Event, change: Any):
    obeyed = losses(Changes(Event.BATCH_START))
    assert losses(Changes(event, change)) == obeyed
    assert losses() != obeyed


@pytest.mark.parametrize('event', [Event.BEFORE_FORWARD, Event.BEFORE_LOSS])
@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda batch: batch.pop('labels'), r'The batch has no labels for the loss \(it has input_ids'),
        (lambda batch: batch.update(labels=batch['labels'][:, 1:]), r'labels are torch.int64 of shape \(4, 35\) for'),
        (lambda batch: batch.update(labels=batch['labels'].float()), 'labels are torch.float32 of shape'),
    ],
)
def test_labels_that_are_none_of_tokens_when_the_loss_reads_them_are_refused(event: Event, change: Any, message: str):
    with pytest.raises(ValueError, match=message):
        losses(Changes(event, change))


class Counts(Own):
    """Notes the shape of each batch."""

    note: Any

    def __init__(self, shapes: list[Any]):
        super().__init__()
        vars(self)['note'] = shapes.append

    def forward(self, batch: Any) -> Any:
        self.note(tuple(batch['input_ids'].shape))
        return super().forward(batch)


@pytest.mark.parametrize('expand', ['sequence', 'batch', 'none'])
def test_the_first_call_has_as_many_rows_as_a_plain_microbatch(expand: str):
    shapes: list[Any] = []
    stack = TokenSuperposition(3, '2ba', expand=expand)
    make_trainer(Counts(shapes), rows(), stack, '4ba', device_train_microbatch_size=2)[0].fit()
    assert shapes[0] == (2, 12)


def test_the_first_call_has_one_row_if_composer_is_to_find_how_many_fit():
    shapes: list[Any] = []
    trainer, _ = make_trainer(Counts(shapes), rows(), TokenSuperposition(3, '2ba'), '4ba')
    trainer.state.auto_microbatching = True  # Composer takes `auto` on a GPU alone
    trainer.fit()
    assert shapes[0] == (1, 12)


class Padded(Own):
    """The head has more rows than there are tokens, and the loss takes those there are."""

    def __init__(self, how: str):
        super().__init__(how)
        self.head = nn.Linear(16, VOCAB_SIZE + 20)

    def loss(self, outputs: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        logits, labels = outputs['logits'][:, :-1], batch['labels'][:, 1:].flatten()
        assert int(labels.max()) < VOCAB_SIZE
        if self.how == 'padding':
            labels = labels.masked_fill(labels == 0, -100)
        return F.cross_entropy(logits[..., :VOCAB_SIZE].flatten(0, 1), labels)


@pytest.mark.parametrize('how', ['', 'padding'])
def test_a_loss_is_asked_of_no_token_beyond_those_of_the_data(how: str):
    trainer, logger = make_trainer(Padded(how), rows(), TokenSuperposition(3, '2ba'), '4ba')
    trainer.fit()
    assert len(logged(logger, 'loss/train/total')) == 4
    if how:
        with pytest.raises(ValueError, match='The loss of Padded ignores token 0, which labels have 72 times'):
            make_trainer(Padded(how), rows(pad), TokenSuperposition(3, '2ba'), '4ba')[0].fit()


class Begins(Own):
    """Its loss insists that each row begins with the token of the data."""

    def loss(self, outputs: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        assert (batch['input_ids'][:, 0] == 7).all()
        return super().loss(outputs, batch)


def begin(ids: torch.Tensor) -> None:
    ids[:, 0] = 7


def test_a_loss_that_reads_labels_sees_the_ids_of_the_data():
    trainer, logger = make_trainer(Begins(), rows(begin), TokenSuperposition(3, '2ba'), '4ba')
    trainer.fit()
    assert len(logged(logger, 'loss/train/total')) == 4


class OfIds(Own):
    """Its loss predicts the ids, but for padding, and reads no labels."""

    def loss(self, outputs: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        return F.cross_entropy(
            outputs['logits'][:, :-1].flatten(0, 1), batch['input_ids'][:, 1:].flatten(), ignore_index=0
        )


def test_what_a_loss_of_the_ids_ignores_is_refused():
    make_trainer(OfIds(), rows(), TokenSuperposition(3, '2ba'), '4ba')[0].fit()
    with pytest.raises(ValueError, match='The loss of OfIds ignores token 0, which labels have 72 times'):
        make_trainer(OfIds(), rows(pad), TokenSuperposition(3, '2ba'), '4ba')[0].fit()


class HandsOn(Own):
    """Its forward leaves something in the batch for its loss."""

    def forward(self, batch: Any) -> Any:
        batch['hidden'] = self.wte(batch['input_ids'])
        return super().forward(batch)

    def loss(self, outputs: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        return super().loss(outputs, batch) + batch['hidden'].pow(2).mean()


def test_a_loss_sees_what_forward_has_left_in_the_batch(caplog: pytest.LogCaptureFixture):
    trainer, logger = make_trainer(HandsOn(), rows(), TokenSuperposition(3, '2ba'), '4ba')
    trainer.fit()
    assert len(logged(logger, 'loss/train/total')) == 4
    assert caplog.text.count('The loss of HandsOn is more than a cross-entropy') == 1


@pytest.mark.parametrize('value', [None, np.int64(3), datetime.date(2026, 1, 1), {'a': 1, 'b': 2, 'c': 3, 'd': 4}])
def test_a_value_that_says_nothing_of_rows_is_left_out(value: Any):
    def collate(samples: list[Any]) -> dict[str, Any]:
        return {**torch.utils.data.default_collate(samples), 'value': value}

    loader = DataLoader(Rows(48, 12), batch_size=4, collate_fn=collate)
    # Composer's own split no such value and count none.
    spec = DataSpec(
        loader, split_batch=lambda batch, _: [batch], get_num_samples_in_batch=lambda batch: len(batch['labels'])
    )
    losses = []
    for data in (spec, rows()):
        trainer, logger = make_trainer(llama(), data, TokenSuperposition(3, '2ba', expand='none'), '4ba')
        trainer.fit()
        losses.append(logged(logger, 'loss/train/total'))
    assert losses[0] == losses[1]


class Masked(Rows):
    """The first half of each row is not to be trained on."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {**super().__getitem__(index), 'loss_mask': (torch.arange(12) >= 6).long()}


class Masks(HuggingFaceModel):
    def loss(self, outputs: Any, batch: Any) -> Any:
        labels = batch['labels'].masked_fill(batch['loss_mask'] == 0, -100)
        return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize('expand', ['sequence', 'batch', 'none'])
def test_a_mask_that_a_loss_reads_is_refused(expand: str):
    model: Any = llama()
    model.__class__ = Masks
    loader = DataLoader(Masked(48, 12), batch_size=4)
    with pytest.raises(ValueError, match='The loss of Masks reads loss_mask, which superposed steps leave out: mark'):
        make_trainer(model, loader, TokenSuperposition(3, '2ba', expand=expand), '4ba')[0].fit()


def test_labels_that_a_loss_leaves_out_are_counted_in_a_warning(caplog: pytest.LogCaptureFixture):
    make_trainer(Own('but the last'), rows(), TokenSuperposition(3, '2ba'), '4ba')[0].fit()
    assert caplog.text.count('The loss of Own leaves out 4 of 44 labels of the first rows. Superposed steps train') == 1


def test_what_a_loss_of_ones_own_is_given_late_is_refused():
    stack = [
        Changes(Event.BEFORE_LOSS, lambda batch: batch.update(targets=batch['labels'])),
        TokenSuperposition(3, '2ba'),
    ]
    with pytest.raises(ValueError, match='Superposition cannot fold targets'):
        make_trainer(Own(), rows(), stack, '4ba')[0].fit()


def test_ids_and_labels_are_plain_for_callbacks_at_every_event():
    class Reads(Callback):
        def run_event(self, event: Any, state: Any, logger: Any) -> None:
            if event.value in ('before_forward', 'after_forward', 'before_loss', 'after_backward'):
                assert int(state.batch['input_ids'].max()) < VOCAB_SIZE
                assert state.batch['labels'].shape == state.batch['input_ids'].shape

    class Fills(Callback):
        def __init__(self, event: str):
            self.event = event

        def run_event(self, event: Any, state: Any, logger: Any) -> None:
            if event.value == self.event:
                state.batch['input_ids'][:, ::5] = 3

    assert losses(callbacks=[Reads()]) == losses()
    assert losses(callbacks=[Fills('before_forward')]) == losses(callbacks=[Fills('batch_start')])


def replace_ids(batch: Any) -> None:
    batch['input_ids'] = torch.full_like(batch['input_ids'], 3)


def add_mask(batch: Any) -> None:
    batch['attention_mask'] = (torch.arange(batch['input_ids'].shape[1]) < 24).long().expand(len(batch['labels']), -1)


@pytest.mark.parametrize('change', [replace_ids, add_mask])
def test_a_batch_that_changes_after_a_callback_has_called_the_model_is_folded_again(change: Any):
    class Scores(Callback):
        def __init__(self, calls: bool):
            self.calls = calls

        def before_forward(self, state: Any, logger: Any) -> None:
            if self.calls:
                with torch.no_grad():
                    state.model(state.batch)
            change(state.batch)

    obeyed = losses(callbacks=[Scores(calls=False)])
    assert losses(callbacks=[Scores(calls=True)]) == obeyed
    assert losses() != obeyed

"""One algorithm, one model, several fits: each is what its settings say, whatever became of the one before."""

import copy
import functools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from common.trainers import llama, logged, make_trainer, random_loader
from composer import Callback, Trainer
from composer.core import Event
from torch import nn

from composer_tst import TokenSuperposition, surgery
from composer_tst.ops.superposed import find_embedding


class Fails(Callback):
    """Raises at an event of a step."""

    def __init__(self, event: str, step: int = 1):
        self.step = step
        setattr(self, event, self.fail)

    def fail(self, state: Any, logger: Any) -> None:
        if int(state.timestamp.batch) == self.step:
            raise RuntimeError('made to fail')


EVENTS = [
    'epoch_start',
    'after_dataloader',
    'batch_start',
    'before_forward',
    'after_forward',
    'before_loss',
    'after_loss',
    'before_backward',
    'after_backward',
    'batch_end',
]


class Sizes(Callback):
    def __init__(self):
        self.seen: list[Any] = []

    def batch_start(self, state: Any, logger: Any) -> None:
        self.seen.append(state.device_train_microbatch_size)


def assert_untouched(trainer: Trainer, loader: Any, microbatch_size: int | None = None) -> None:
    model = trainer.state.model
    assert type(find_embedding(model)) is nn.Embedding  # pyright: ignore[reportArgumentType]
    assert vars(find_embedding(model)).keys() == vars(find_embedding(llama())).keys()  # pyright: ignore
    assert 'loss' not in vars(model)
    assert trainer.state.dataloader is loader
    assert trainer.state.train_dataloader is loader
    assert 'LanguageCrossEntropy' in (trainer.state.train_metrics or {})
    if microbatch_size is not None:
        assert trainer.state.device_train_microbatch_size == microbatch_size


def test_an_algorithm_in_two_trainers_runs_in_each_as_if_alone():
    """One after the other, and in turns."""

    def run(trainer: Trainer, logger: Any) -> tuple:
        return logged(logger, 'superposition/bag_size'), logged(logger, 'superposition/s_tokens')

    algorithm = TokenSuperposition(3, '2ba')
    expected = [3, 3, 1, 1], [48, 96, 144, 192]
    made = [make_trainer(llama(), random_loader(), algorithm, '4ba') for _ in range(2)]
    for trainer, _ in made:
        trainer.fit()
    assert [run(*each) for each in made] == [expected] * 2
    assert [each[0].state.algorithms[0].state_dict()['s_tokens'] for each in made] == [192, 192]

    made = [make_trainer(llama(), random_loader(), algorithm, None) for _ in range(2)]  # pyright: ignore
    for _ in range(4):
        for trainer, _ in made:
            trainer.fit(duration='1ba')
    assert [run(*each) for each in made] == [expected] * 2


@pytest.mark.parametrize('how', [copy.copy, copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
def test_a_copy_of_an_algorithm_starts_clean(how: Any):
    algorithm = TokenSuperposition(3, '2ba', weighting=[1, 0.5, 0.25])
    make_trainer(llama(), random_loader(), algorithm, '4ba')[0].fit()
    assert algorithm.schedule.finished
    other = how(algorithm)
    assert repr(other) == repr(algorithm)
    assert not other.schedule.finished
    trainer, logger = make_trainer(llama(), random_loader(), other, '4ba')
    trainer.fit()
    assert trainer.state.algorithms[0] is other
    assert logged(logger, 'superposition/bag_size') == [3, 3, 1, 1]


@pytest.mark.parametrize('event', EVENTS)
def test_a_trainer_closed_after_a_fit_that_failed_leaves_all_as_it_was(event: str):
    loader = random_loader()
    trainer, _ = make_trainer(
        llama(),
        loader,
        TokenSuperposition(3, '3ba', expand='batch'),
        '6ba',
        callbacks=[Fails(event, event != 'epoch_start')],
    )
    with pytest.raises(RuntimeError, match='made to fail'):
        trainer.fit()
    trainer.close()
    assert_untouched(trainer, loader, 4)


@pytest.mark.parametrize('event', EVENTS)
@pytest.mark.parametrize('closed', [False, True])
@pytest.mark.parametrize('superposed', [False, True])
def test_a_model_trains_after_a_fit_that_failed_as_one_that_never_was_in_it(event: str, closed: bool, superposed: bool):
    """In a Trainer with another algorithm, or with none."""
    model = llama()
    failed, _ = make_trainer(
        model, random_loader(), TokenSuperposition(3, '3ba'), '6ba', callbacks=[Fails(event, event != 'epoch_start')]
    )
    with pytest.raises(RuntimeError, match='made to fail'):
        failed.fit()
    if closed:
        failed.close()
    fresh = llama()
    fresh.load_state_dict({key: value.clone() for key, value in model.state_dict().items()})

    def losses(model: Any) -> list[float]:
        algorithm = TokenSuperposition(2, '2ba') if superposed else None
        trainer, logger = make_trainer(model, random_loader(), algorithm, '4ba')
        trainer.fit()
        return logged(logger, 'loss/train/total')

    assert losses(model) == losses(fresh)


@pytest.mark.parametrize('event', ['after_forward', 'after_backward', 'batch_end'])
@pytest.mark.parametrize('expand', ['sequence', 'batch'])
def test_a_fit_begun_again_in_the_same_trainer_goes_on_from_its_last_whole_step(event: str, expand: str):
    loader, sizes = random_loader(batch_size=8, rows=96), Sizes()
    algorithm = TokenSuperposition(4, '3ba', expand=expand)
    fails = Fails(event)
    trainer, logger = make_trainer(
        llama(), loader, algorithm, '5ba', device_train_microbatch_size=8, callbacks=[sizes, fails]
    )
    with pytest.raises(RuntimeError, match='made to fail'):
        trainer.fit()
    fails.step = -1
    trainer.fit()
    scale = 4 if expand == 'batch' else 1
    done = [3, 2] if event == 'batch_end' else [4, 2]  # steps begun while superposed, with that one
    assert sizes.seen == [8 * scale] * (done[0]) + [8] * done[1]
    assert logged(logger, 'superposition/bag_size') == [4, 4, 4, 1, 1]
    assert_untouched(trainer, loader, 8)


def test_a_fit_after_one_that_failed_has_the_microbatches_it_is_given():
    sizes, fails = Sizes(), Fails('after_backward')
    algorithm = TokenSuperposition(3, '3ba', expand='batch')
    trainer, _ = make_trainer(llama(), random_loader(), algorithm, '5ba', callbacks=[sizes, fails])
    with pytest.raises(RuntimeError, match='made to fail'):
        trainer.fit()
    fails.step = -1
    trainer.fit(device_train_microbatch_size=2)
    assert sizes.seen == [12, 12, 6, 6, 2, 2]


def test_a_fit_that_ends_superposed_leaves_all_as_it_was():
    loader = random_loader()
    trainer, _ = make_trainer(llama(), loader, TokenSuperposition(3, '4ba', expand='batch'), None)  # pyright: ignore
    trainer.fit(duration='2ba')
    assert_untouched(trainer, loader, 4)
    trainer.fit(duration='1ba')
    assert_untouched(trainer, loader, 4)


@pytest.mark.parametrize('chunks', [[2, 2, 2, 2], [1, 3, 4], [5, 3], [1] * 8])
@pytest.mark.parametrize('until', ['4ba', '1ep', '144sp'])
def test_a_run_in_several_fits_is_the_run_in_one(chunks: list[int], until: str):
    def run(*durations: int) -> tuple:
        trainer, logger = make_trainer(llama(), random_loader(rows=96), TokenSuperposition(3, until), None)  # pyright: ignore
        for duration in durations:
            trainer.fit(duration=f'{duration}ba')
        return tuple(
            logged(logger, key)
            for key in (
                'superposition/bag_size',
                'superposition/s_tokens',
                'superposition/data_tokens',
                'loss/train/total',
            )
        )

    assert run(*chunks)[:3] == run(8)[:3]
    assert run(*chunks)[3] == pytest.approx(run(8)[3], abs=0)


def test_a_trainer_whose_fit_was_refused_can_be_used_again():
    trainer, logger = make_trainer(llama(), random_loader(), TokenSuperposition(2, '4ba'), '4ba')
    with pytest.raises(ValueError, match='there would be no recovery phase'):
        trainer.fit()
    trainer.eval(random_loader())
    trainer.fit(duration='6ba')
    assert logged(logger, 'superposition/bag_size') == [2] * 4 + [1] * 2


def test_an_algorithm_of_one_trainer_that_is_added_to_another_is_a_copy_there():
    algorithm = TokenSuperposition(2, '2ba')
    first, _ = make_trainer(llama(), random_loader(), algorithm, '6ba')
    first.fit(duration='3ba')
    second, logger = make_trainer(llama(), random_loader(), None, '4ba')
    second.state.algorithms.append(algorithm)
    second.fit()
    assert logged(logger, 'superposition/bag_size') == [2, 2, 1, 1]
    assert algorithm.schedule.progress.s_tokens == 3 * 4 * 12


def test_an_algorithm_that_is_added_to_a_trainer_does_not_take_its_first_fit_for_all_of_training():
    trainer, logger = make_trainer(llama(), random_loader(96), None, '8ba')
    trainer.state.algorithms.append(TokenSuperposition(3, '4ba'))
    for steps in (2, 6):
        trainer.fit(duration=f'{steps}ba')
    assert logged(logger, 'superposition/bag_size') == [3] * 4 + [1] * 4


@pytest.mark.parametrize('fits', [(2, 3, 3), (8,), (5, 5, 2)])
def test_a_share_is_one_of_the_trainers_length_in_several_fits(fits: tuple[int, ...]):
    trainer, logger = make_trainer(llama(), random_loader(96), TokenSuperposition(3, '0.5dur'), '8ba')
    for steps in fits:
        trainer.fit(duration=f'{steps}ba')
    assert logged(logger, 'superposition/bag_size') == [3] * 4 + [1] * (sum(fits) - 4)
    trainer.fit(duration='6ba', reset_time=True)  # another run
    assert logged(logger, 'superposition/bag_size')[sum(fits) :] == [3] * 3 + [1] * 3


def test_a_run_resumed_at_an_epochs_last_step_expects_the_epochs_to_come(tmp_path: Path):
    """In tokens of epochs: which steps there are to come, only the first batch tells."""
    save: dict[str, Any] = {'save_folder': str(tmp_path), 'save_interval': '1ba', 'save_overwrite': True}
    trainer, whole = make_trainer(llama(), random_loader(), TokenSuperposition(2, '800tok'), '2ep', **save)
    trainer.fit()
    assert logged(whole, 'superposition/bag_size') == [2] * 9 + [1] * 6
    load = str(tmp_path / 'ep0-ba6-rank0.pt')
    trainer, logger = make_trainer(llama(), random_loader(), TokenSuperposition(2, '800tok'), '2ep', load_path=load)
    trainer.fit()
    assert logged(logger, 'superposition/bag_size') == [2] * 3 + [1] * 6


def test_phases_that_are_left_out_on_resuming_leave_nothing_behind(tmp_path: Path):
    phases = [{'bag_size': 3, 'until': '2ba'}, {'bag_size': 2, 'until': '4ba'}]
    save: dict[str, Any] = {'save_folder': str(tmp_path), 'save_interval': '1ba', 'save_overwrite': True}
    trainer, _ = make_trainer(llama(), random_loader(), TokenSuperposition(phases=phases), '6ba', **save)
    trainer.fit()
    algorithm = TokenSuperposition(phases=phases[:1])
    load = str(tmp_path / 'ep0-ba2-rank0.pt')
    trainer, logger = make_trainer(llama(), random_loader(), algorithm, '6ba', load_path=load)
    trainer.fit()
    assert logged(logger, 'superposition/bag_size') == [1] * 4
    assert len(trainer.state.algorithms[0].schedule.progress.ends) == 1  # pyright: ignore[reportAttributeAccessIssue]


def test_a_fit_that_is_not_the_last_does_not_miss_recovery(caplog: pytest.LogCaptureFixture):
    trainer, logger = make_trainer(llama(), random_loader(), TokenSuperposition(2, '4ba'), '6ba')
    for _ in range(2):
        trainer.fit(duration='3ba')
        assert 'recovery' not in caplog.text
    assert logged(logger, 'superposition/bag_size') == [2] * 4 + [1] * 2
    trainer, _ = make_trainer(llama(), random_loader(), TokenSuperposition(2, '4ba'), None)
    trainer.fit(duration='3ba')
    assert 'so there would be no recovery phase' in caplog.text
    assert 'the model has had no recovery phase' in caplog.text


def test_a_clock_that_begins_again_begins_superposition_again(tmp_path: Path):
    trainer, logger = make_trainer(
        llama(),
        random_loader(),
        TokenSuperposition(3, '2ba'),
        '4ba',
        save_folder=str(tmp_path),
        save_interval='1ba',
        save_overwrite=True,
    )
    trainer.fit()
    trainer.fit(duration='4ba', reset_time=True)
    assert logged(logger, 'superposition/bag_size') == [3, 3, 1, 1] * 2
    assert logged(logger, 'superposition/s_tokens') == [48, 96, 144, 192] * 2
    for step in (1, 3):
        again, logger = make_trainer(
            llama(),
            random_loader(),
            TokenSuperposition(3, '2ba'),
            '4ba',
            load_path=str(tmp_path / f'ep0-ba{step}-rank0.pt'),
            load_ignore_keys=['state/timestamp'],
        )
        again.fit()
        assert logged(logger, 'superposition/bag_size') == [3, 3, 1, 1]
        assert logged(logger, 'superposition/s_tokens') == [48, 96, 144, 192]


def test_a_loss_that_is_set_on_the_model_is_what_recovery_trains_on(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Set before, while superposed, or by another algorithm as the fit starts; as in a run resumed in recovery."""

    def set_loss(model: Any) -> None:
        plain = type(model).loss
        model.loss = lambda out, batch: plain(model, out, batch) + 0.1 * out['logits'].logsumexp(-1).pow(2).mean()

    class SetsLoss(Callback):
        def __init__(self, step: int):
            self.step = step

        def fit_start(self, state: Any, logger: Any) -> None:
            if self.step == 0:
                set_loss(state.model)

        def batch_start(self, state: Any, logger: Any) -> None:
            if int(state.timestamp.batch) == self.step > 0:
                set_loss(state.model)

    def run(when: str, **load: Any) -> tuple[list[float], Any]:
        model = llama()
        if when == 'before':
            set_loss(model)
        steps = {'before': -1, 'at the start': 0, 'while': 2, 'never': -1}
        trainer, logger = make_trainer(
            model, random_loader(), TokenSuperposition(3, '3ba'), '6ba', callbacks=[SetsLoss(steps[when])], **load
        )
        trainer.fit()
        return logged(logger, 'loss/train/total'), vars(model).get('loss')

    plain, none = run('never')
    assert none is None
    whole, own = run('before', save_folder=str(tmp_path), save_interval='1ba')
    assert own is not None
    assert whole[:3] == plain[:3]
    assert min(whole[3:]) > max(plain[3:]) + 1
    assert 'superposed steps train on the multi-hot cross-entropy instead of it' in caplog.text
    assert run('at the start')[0] == whole
    assert run('while')[0] == whole
    assert run('before', load_path=str(tmp_path / 'ep0-ba3-rank0.pt'))[0] == whole[3:]


def test_nothing_of_a_failed_try_at_a_microbatch_size_is_counted():
    """Composer halves the microbatches of a batch that did not fit, and tries again."""
    from common.trainers import hugging_face
    from test_families import transformers_model

    class DoesNotFit(Callback):
        tries = 0

        def after_backward(self, state: Any, logger: Any) -> None:
            if int(state.timestamp.batch) == 1 and state.device_train_microbatch_size > 2:
                self.tries += 1
                raise RuntimeError('CUDA out of memory.')

    def run(auto: bool) -> tuple:
        torch.manual_seed(0)
        model = hugging_face(transformers_model('mixtral'))
        callbacks = [DoesNotFit()] if auto else []
        trainer, logger = make_trainer(
            model, random_loader(batch_size=4), TokenSuperposition(3, '3ba'), '5ba', callbacks=callbacks
        )
        trainer.state.auto_microbatching = auto
        if not auto:
            trainer.state.device_train_microbatch_size = 2
        trainer.fit()
        sizes = trainer.state.device_train_microbatch_size
        return logged(logger, 'superposition/router_loss')[1:3], logged(logger, 'superposition/s_tokens'), sizes

    losses, s_tokens, size = run(auto=True)
    expected, expected_s_tokens, _ = run(auto=False)
    assert size == 2
    assert s_tokens == expected_s_tokens
    assert losses[0] == pytest.approx(expected[0], rel=1e-2)


@pytest.mark.parametrize('where', ['before_train_batch', 'forward', 'after_forward', 'loss', 'after_loss'])
@pytest.mark.parametrize('expand', ['sequence', 'none'])
def test_memory_may_run_out_anywhere_in_a_step(where: str, expand: str, caplog: pytest.LogCaptureFixture):
    """The tries that failed leave nothing behind: the same steps, counts, batches and model as where none has."""

    class RunsOut(Callback):
        """At two tries of the second step; and what each step leaves."""

        def __init__(self, where: str):
            self.where, self.left, self.now = where, 2, False
            self.batches: list[Any] = []

        def raise_at(self, where: str) -> None:
            if self.now and self.left and where == self.where:
                self.left -= 1
                raise RuntimeError('CUDA out of memory.')

        def run_event(self, event: Any, state: Any, logger: Any) -> None:
            self.raise_at(event.value)
            self.now = int(state.timestamp.batch) == 1
            if event == Event.BATCH_END:
                self.batches.append(state.batch['input_ids'].clone())
                assert 'loss' not in vars(state.model)
                assert not state.model._forward_pre_hooks
                assert type(state.model.model.get_input_embeddings()) is torch.nn.Embedding

    def run(where: str) -> tuple[Any, ...]:
        model = llama()
        runs_out = RunsOut(where)
        inner = model.model.forward

        @functools.wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            runs_out.raise_at('forward')
            return inner(*args, **kwargs)

        loss = surgery.multi_hot_cross_entropy

        def multi_hot(*args: Any, **kwargs: Any) -> Any:
            runs_out.raise_at('loss')
            return loss(*args, **kwargs)

        tst = TokenSuperposition(5, '3ba', expand=expand)  # rows of 12 have a tail
        trainer, logger = make_trainer(model, random_loader(), tst, '5ba', callbacks=[runs_out])
        trainer.state.auto_microbatching = True
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model.model, 'forward', forward)
            patch.setattr(surgery, 'multi_hot_cross_entropy', multi_hot)
            trainer.fit()
        assert runs_out.left == (0 if where else 2)
        names = ('superposition/s_tokens', 'superposition/data_tokens', 'loss/train/total')
        return *(logged(logger, name) for name in names), runs_out.batches

    s_tokens, data_tokens, losses, batches = run(where)
    expected = run('')
    assert (s_tokens, data_tokens) == expected[:2]
    assert losses == pytest.approx(expected[2], rel=1e-4)
    assert all(torch.equal(batch, plain) for batch, plain in zip(batches, expected[3], strict=True))
    assert 'loss of its own' not in caplog.text


def test_an_algorithm_that_is_taken_away_leaves_the_loader_alone():
    rows = []

    class Removes(Callback):
        def batch_start(self, state: Any, logger: Any) -> None:
            rows.append(state.batch['input_ids'].numel() // 12)

        def epoch_end(self, state: Any, logger: Any) -> None:
            state.algorithms.clear()

    stack = TokenSuperposition(3, '8ba')
    trainer, _ = make_trainer(llama(), random_loader(24), stack, '12ba', callbacks=[Removes()])
    trainer.fit()
    assert rows == [12] * 2 + [4] * 10

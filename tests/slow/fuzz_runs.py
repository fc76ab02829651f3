"""Whole runs, drawn by Hypothesis, against a plain simulation of what superposition is to do.

A case is a run: its settings, its data, its fits, where it fails, stops and resumes. :func:`simulate` trains the same
model step by step with loops, without the package's loader, schedule, folding, embedding or loss.

    python tests/slow/fuzz_runs.py --seed 1 --minutes 30
"""

import argparse
import collections
import contextlib
import dataclasses
import gc
import math
import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import torch
import torch.nn.functional as F
from common import reference
from composer import Callback, Trainer
from composer.core import DataSpec
from composer.loggers import InMemoryLogger
from composer.models import ComposerModel
from composer.utils import dist
from hypothesis import strategies as st
from llmfoundry.data.utils import get_tokens_per_batch_func
from streaming import MDSWriter, StreamingDataset
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from composer_tst import TokenSuperposition

VOCAB_SIZE, WIDTH = 23, 6


@dataclasses.dataclass(frozen=True)
class Case:
    """A run; times are (amount, unit), a share of the duration is (hundredths, 'dur')."""

    phases: tuple[tuple[int, tuple[int, str]], ...]
    superpose: str
    expand: str
    weighting: str
    data: str  # map-style, shuffled, iterable, streaming
    rows: int
    length: int
    batch_size: int
    drop_last: bool
    padded: bool
    packed: bool
    workers: tuple[int, ...]  # of each Trainer
    microbatch: int
    on_tokens: bool
    max_duration: tuple[int, str]
    chunks: int  # steps in a fit, 0 for one fit
    stops: tuple[int, ...]  # steps after which a new Trainer resumes
    fails: bool  # the first Trainer is stopped by an exception in the step after
    wrapped: tuple[str, str]  # how a callback wraps the loader: not, as it is, or one batch ahead; and at which event
    late: str  # how a callback changes labels before the loss: not, in place, or anew


@st.composite
def cases(draw: Any) -> Case:
    """A run that is small, and most often one that can be trained."""
    expand = draw(st.sampled_from(['sequence', 'sequence', 'batch', 'none']))
    sides = ['both', 'both', 'input', 'output'] if expand == 'none' else ['both', 'both', 'input']
    superpose = draw(st.sampled_from(sides))
    sizes = sorted(draw(st.lists(st.integers(2, 4), min_size=1, max_size=2)), reverse=True)
    batch_size = draw(st.integers(1, 4))
    batches = draw(st.integers(3, 14))
    rows = batches * batch_size + draw(st.integers(0, batch_size - 1))
    length = draw(st.integers(max(3, 2 * sizes[0] if expand != 'sequence' else 3), 9))
    data = draw(st.sampled_from(['map-style', 'map-style', 'shuffled', 'iterable', 'streaming']))
    unit = draw(st.sampled_from(['ba', 'ba', 'sp', 'tok'] + ['ep'] * (data != 'iterable')))
    steps = draw(st.integers(4, 18))
    amounts = {'ba': 1, 'sp': batch_size, 'tok': batch_size * length}
    if unit == 'ep':
        max_duration = draw(st.integers(1, 3)), unit
    else:
        max_duration = steps * amounts[unit] * (1 if unit == 'ba' else 2), unit
    until, ends = 0, []
    for size in sizes:
        until += draw(st.integers(1, max(1, steps // 3)))
        kind = draw(st.sampled_from(['ba', 'ba', 'sp', 'tok', 'ep', 'dur']))
        if kind == 'dur':
            end = min(95, 10 * until), kind
        elif kind == 'ep':
            end = draw(st.integers(1, 2)), kind
        else:
            end = until * amounts[kind] * (1 if kind == 'ba' else size), kind
        ends.append(end)
    stops = tuple(sorted(draw(st.sets(st.integers(1, steps), max_size=3))))
    # Of several fits each has its duration, and a share is one of that.
    in_parts = unit == 'ba' and data in ('map-style', 'iterable') and all(kind != 'dur' for _, kind in ends)
    on_tokens = draw(st.booleans())
    moments_are_known = all(kind == 'ba' or (kind, unit) == ('dur', 'ba') for _, kind in ends)
    # Composer shuffles anew only what is a DataLoader.
    wrappers = (
        ['no'] if data == 'shuffled' else ['no', 'no', 'as it is'] + ['ahead'] * (moments_are_known and not in_parts)
    )
    worker = st.sampled_from([0] * 15 + [2]) if data != 'iterable' else st.just(0)
    return Case(
        phases=tuple(zip(sizes, ends, strict=True)),
        superpose=superpose,
        expand=expand,
        weighting=draw(st.sampled_from(['uniform', 'uniform', 'power_law', 'first'])),
        data=data,
        rows=rows,
        length=length,
        batch_size=batch_size,
        drop_last=draw(st.booleans()),
        padded=draw(st.booleans()),
        packed=draw(st.booleans()),
        workers=tuple(draw(st.lists(worker, min_size=len(stops) + 1, max_size=len(stops) + 1))),
        microbatch=draw(st.integers(1, batch_size)),
        on_tokens=on_tokens,
        max_duration=max_duration,
        chunks=draw(st.sampled_from([0, 0, 0, 1, 2, 3])) if in_parts else 0,
        stops=stops,
        fails=draw(st.booleans()),
        wrapped=(draw(st.sampled_from(wrappers)), draw(st.sampled_from(['fit_start', 'epoch_start']))),
        # Losses are weighed by the labels of the batch, as Composer weighs them: before these are changed.
        late='no' if on_tokens else draw(st.sampled_from(['no', 'in place', 'anew'])),
    )


def row_of(case: Case, index: int) -> dict[str, torch.Tensor]:
    """The row of an index: its ids begin with it, so that a row tells which it is."""
    generator = np.random.default_rng(index)
    ids = generator.integers(1, VOCAB_SIZE, case.length)
    ids[:2] = index % VOCAB_SIZE, index // VOCAB_SIZE % VOCAB_SIZE
    labels = np.where(generator.random(case.length) < 0.15, -100, ids)
    labels[1] = ids[1]
    row = {'input_ids': ids, 'labels': labels}
    attended = np.arange(case.length) < generator.integers(2, case.length + 1)
    if case.padded:
        row['attention_mask'] = attended.astype(np.int64)
        row['labels'] = np.where(attended, labels, -100)
    if case.packed:
        sequences = np.cumsum(generator.random(case.length) < 0.3)
        row['sequence_id'] = np.where(attended, sequences, -1) if case.padded else sequences
    return {key: torch.from_numpy(value.astype(np.int64)) for key, value in row.items()}


def without_fifths(ids: torch.Tensor, labels: torch.Tensor, length: int) -> torch.Tensor:
    """Labels that leave each fifth id out, but for the second of a row: it has always one."""
    others = torch.arange(ids.shape[-1]) % length != 1
    return labels.masked_fill((ids % 5 == 0) & others, -100)


class Mapped(torch.utils.data.Dataset):
    def __init__(self, case: Case):
        self.case = case

    def __len__(self) -> int:
        return self.case.rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return row_of(self.case, index)


class Iterated(IterableDataset):
    def __init__(self, case: Case):
        self.case = case

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return (row_of(self.case, index) for index in range(self.case.rows))


class Streamed(StreamingDataset):
    case: Case

    def __getitem__(self, index: Any) -> dict[str, torch.Tensor]:
        return row_of(self.case, int(super().__getitem__(index)['index']))


def make_loader(case: Case, folder: str, workers: int) -> DataLoader:
    settings: dict[str, Any] = {'batch_size': case.batch_size, 'drop_last': case.drop_last, 'num_workers': workers}
    if case.data == 'streaming':
        dataset: Any = _streamed(case, folder)
    else:
        dataset = Iterated(case) if case.data == 'iterable' else Mapped(case)
        if case.data == 'shuffled':
            settings['sampler'] = dist.get_sampler(dataset, shuffle=True, drop_last=case.drop_last)
    return DataLoader(dataset, **settings)


def _streamed(case: Case, folder: str) -> Streamed:
    """Streaming wants a folder for each reader, and may find that another process has just taken the name it chose."""
    own = shutil.copytree(folder, tempfile.mkdtemp(dir=Path(folder).parent), dirs_exist_ok=True)
    for attempt in range(20):
        with contextlib.suppress(FileExistsError):
            dataset = Streamed(local=str(own), batch_size=case.batch_size, shuffle=True, shuffle_seed=5)
            dataset.case = case
            return dataset
        time.sleep(0.01 * attempt)
    raise RuntimeError('No name for the shared memory of a StreamingDataset is free.')


class Model(ComposerModel):
    """Mixes the attended positions of a sequence that are not to come."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.wte, self.mix = nn.Embedding(VOCAB_SIZE, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB_SIZE)

    def after_lookup(self, x: torch.Tensor, mask: torch.Tensor | None, sequence: torch.Tensor | None) -> torch.Tensor:
        seen = torch.ones(x.shape[1], x.shape[1]).tril().bool().expand(len(x), -1, -1)
        if mask is not None:
            seen = seen & mask.bool()[:, None]
        if sequence is not None:
            seen = seen & (sequence[:, :, None] == sequence[:, None])
        mixed = seen.float() @ x / seen.sum(2, keepdim=True).clamp_min(1)
        return self.head(x + F.gelu(self.mix(mixed)))

    def forward(self, batch: Any) -> torch.Tensor:
        return self.after_lookup(self.wte(batch['input_ids']), batch.get('attention_mask'), batch.get('sequence_id'))

    def loss(self, outputs: torch.Tensor, batch: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return F.cross_entropy(outputs[:, :-1].flatten(0, 1), batch['labels'][:, 1:].flatten())

    def get_metrics(self, is_train: bool) -> dict[str, Any]:
        return {}


@dataclasses.dataclass
class Step:
    """What one step was."""

    bag_size: int
    ids: list[list[int]]  # a row of the model a list, of all its tokens
    targets: list[list[list[int]]]
    microbatches: list[int]
    data_tokens: int
    s_tokens: int
    loss: float = math.nan


def epochs_of(case: Case, folder: str) -> Iterator[list[dict[str, torch.Tensor]]]:
    """The batches of one epoch after the other, as the loader gives them without superposition."""
    loader = make_loader(case, folder, case.workers[0])
    length = len(loader) if case.data != 'iterable' else None
    for epoch in range(1000):
        if case.data == 'shuffled':
            loader.sampler.set_epoch(epoch)  # pyright: ignore
        yield list(loader)[:length]


def simulate(case: Case, folder: str, observed_switches: list[int]) -> list[Step]:
    """The steps of a run, and how its model fares, from the contract."""
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    count_tokens = get_tokens_per_batch_func() if case.on_tokens else None
    steps: list[Step] = []
    done = {'ba': 0, 'sp': 0, 'tok': 0, 'ep': 0}
    ended = dropped = s_tokens = 0

    def moment(index: int) -> tuple[int, str]:
        amount, unit = case.phases[index][1]
        longest, of = case.max_duration
        if unit != 'dur':
            return amount, unit
        if of == 'ep':  # a share of the steps, which are as many as it leaves
            return (observed_switches + [sys.maxsize] * 9)[index], 'ba'
        return int(Fraction(amount, 100) * longest), of

    epochs = epochs_of(case, folder)
    batches = list(next(epochs))
    while done[case.max_duration[1]] < case.max_duration[0]:
        while ended < len(case.phases) and done[moment(ended)[1]] >= moment(ended)[0]:
            ended += 1
        s = case.phases[ended][0] if ended < len(case.phases) else 1
        draws = 1 if case.expand == 'none' else s
        group, batches = batches[:draws], batches[draws:]
        if not group:
            done['ep'] += 1
            batches = list(next(epochs))
            continue
        rows = [{key: value[i] for key, value in batch.items()} for batch in group for i in range(len(batch['labels']))]
        used = len(rows)
        if len(group) < draws and case.drop_last:
            used = 0
        if case.expand == 'sequence':
            used -= used % s
        if not used:
            continue
        rows = rows[:used]
        step, weighed = _step_of(case, rows, s, model)
        if case.late != 'no':
            changed = [row | {'labels': without_fifths(row['input_ids'], row['labels'], case.length)} for row in rows]
            _, weighed = _step_of(case, changed, s, model)
        optimizer.zero_grad()
        loss = torch.stack([weight * part for weight, part in weighed]).sum()
        loss.backward()
        optimizer.step()
        tokens = used * case.length
        if count_tokens is not None and case.padded:
            tokens = sum(int(row['attention_mask'].sum()) for row in rows)
        if s > 1 and case.expand != 'sequence' and case.superpose != 'output':
            kept = case.length // s * s
            dropped += used * (case.length - kept)
            if count_tokens is not None and case.padded:
                dropped += sum(int(row['attention_mask'][kept:].sum()) for row in rows) - used * (case.length - kept)
        done['ba'], done['sp'], done['tok'] = done['ba'] + 1, done['sp'] + used, done['tok'] + tokens
        s_tokens += sum(len(row) for row in step.targets) if s > 1 else used * case.length
        step.data_tokens, step.s_tokens, step.loss = done['tok'] - dropped, s_tokens, float(loss)
        steps.append(step)
    return steps


def _step_of(case: Case, rows: list[dict[str, torch.Tensor]], s: int, model: Model) -> tuple[Step, list]:
    """What a step reads, and the losses of its microbatches with their weights."""
    if s == 1:
        folded: Any = rows
        ids = [row['input_ids'].tolist() for row in rows]
        targets: list = []
        size = case.microbatch
    else:
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        folded = reference.fold([batch], s, case.expand, case.superpose)
        ids = [[token for position in row for token in position.tokens] for row in folded]
        targets = [[position.targets for position in row] for row in folded]
        size = case.microbatch * (1 if case.expand == 'sequence' or case.superpose == 'output' else s)
    parts = [folded[start : start + size] for start in range(0, len(folded), size)]
    weights = reference.weights_of(case.weighting, s)
    losses = [_plain_loss(model, part) if s == 1 else _bag_loss(model, part, weights, case.packed) for part in parts]
    if case.on_tokens:
        total = sum(norm for _, norm in losses)
        weighed = [(norm / total if total else 0.0, loss) for loss, norm in losses]
    else:
        weighed = [(len(part) / len(folded), loss) for part, (loss, _) in zip(parts, losses, strict=True)]
    return Step(s, ids, targets, [len(part) for part in parts], 0, 0), weighed


def _plain_loss(model: Model, rows: list[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, float]:
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    return model.loss(model(batch), batch), float((batch['labels'][:, 1:] != -100).sum())


def _bag_loss(model: Model, rows: list, weights: list[float], packed: bool) -> tuple[torch.Tensor, float]:
    x = reference.mean_embeddings(model.wte, rows)
    mask = torch.tensor([[any(position.attended) for position in row] for row in rows])
    sequence = torch.tensor([[position.sequence_id for position in row] for row in rows]) if packed else None
    logits = model.after_lookup(x, mask, sequence)
    norm = sum(
        weight
        for row in rows
        for position in row
        for weight, target in zip(weights, position.targets, strict=True)
        if target != -100
    )
    return (reference.multi_hot_loss(logits, rows, weights) if norm else x.sum() * 0), norm


class Failure(Exception):
    """What a case has raised in the middle of a step."""


class Records(Callback):
    """Notes what each step was, and fails in one."""

    def __init__(self, case: Case, steps: dict[int, Step], fails_at: int | None):
        self.case, self.steps, self.fails_at = case, steps, fails_at
        self.microbatches: list[int] = []

    def batch_start(self, state: Any, logger: Any) -> None:
        batch, s = state.batch, state.algorithms[0].schedule.bag_size
        targets: list = []
        if s > 1 and self.case.superpose == 'output':
            padded = F.pad(batch['labels'], (0, s), value=-100)
            targets = [[row[t + 1 : t + 1 + s].tolist() for t in range(self.case.length)] for row in padded]
        elif s > 1:
            padded = F.pad(batch['labels'], (0, s), value=-100)
            targets = [[row[t : t + s].tolist() for t in range(s, len(row) - s + 1, s)] for row in padded]
        self.current = Step(s, batch['input_ids'].tolist(), targets, [], 0, 0)
        self.microbatches = []

    def before_forward(self, state: Any, logger: Any) -> None:
        self.microbatches.append(len(state.batch['input_ids']))

    def before_loss(self, state: Any, logger: Any) -> None:
        labels = without_fifths(state.batch['input_ids'], state.batch['labels'], self.case.length)
        if self.case.late == 'in place':
            state.batch['labels'].copy_(labels)
        elif self.case.late == 'anew':
            state.batch['labels'] = labels

    def after_backward(self, state: Any, logger: Any) -> None:
        if self.fails_at == int(state.timestamp.batch):
            raise Failure

    def batch_end(self, state: Any, logger: Any) -> None:
        self.current.microbatches = self.microbatches
        self.steps[int(state.timestamp.batch) - 1] = self.current


def run(case: Case, folder: str) -> list[Step]:
    """The steps of the same run, in Trainers."""
    recorded: dict[int, Step] = {}
    values: dict[str, dict[int, float]] = collections.defaultdict(dict)
    ends = [*case.stops, None]
    with tempfile.TemporaryDirectory() as checkpoints:
        load = None
        for index, (workers, stop) in enumerate(zip(case.workers, ends, strict=True)):
            log = InMemoryLogger()
            fails = case.fails and index == 0 and stop is not None
            records = Records(case, recorded, stop if fails else None)
            trainer = _trainer(
                case, folder, workers, log, [records, StopsAt(stop), Wraps(*case.wrapped)], checkpoints, load
            )
            with contextlib.suppress(Failure):
                _fit(trainer, case)
            trainer.close()
            reached = int(trainer.state.timestamp.batch)
            for key in ('bag_size', 'data_tokens', 's_tokens'):
                for time_, value in log.data.get(f'superposition/{key}', []):
                    values[key][int(time_.batch) - 1] = float(value)
            for time_, value in log.data.get('loss/train/total', []):
                if int(time_.batch) < reached:
                    values['loss'][int(time_.batch)] = float(value)
            longest, unit = case.max_duration
            if stop is None or reached < stop or int(trainer.state.timestamp.get(unit).value) >= longest:
                break
            (load,) = (str(path) for path in Path(checkpoints).glob(f'ep*-ba{stop}-rank0.pt'))
    for step, record in recorded.items():
        assert record.bag_size == values['bag_size'][step]
        record.data_tokens, record.s_tokens = int(values['data_tokens'][step]), int(values['s_tokens'][step])
        record.loss = values['loss'][step]
    return [recorded[step] for step in sorted(recorded)]


class Wrapper:
    """A loader that is, in all but iteration, another."""

    def __init__(self, inner: Any, ahead: bool):
        self.inner, self.ahead = inner, ahead

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__['inner'], name)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.inner)
        held = [next(batches, None)] if self.ahead else []
        while (batch := next(batches, None)) is not None or held:
            held.append(batch)
            if (batch := held.pop(0)) is None:
                return
            yield batch


class Wraps(Callback):
    """Wraps the loader, wherever another is set."""

    def __init__(self, how: str, event: str):
        self.how, self.event = how, event

    def run_event(self, event: Any, state: Any, logger: Any) -> None:
        if event.value == self.event and self.how != 'no' and not isinstance(state.dataloader, Wrapper):
            length = -1 if state.dataloader_len is None else int(state.dataloader_len)
            state.set_dataloader(Wrapper(state.dataloader, self.how == 'ahead'), 'train', length)


class StopsAt(Callback):
    def __init__(self, step: int | None):
        self.step = step

    def batch_end(self, state: Any, logger: Any) -> None:
        if self.step == int(state.timestamp.batch):
            state.stop_training()


def _trainer(
    case: Case, folder: str, workers: int, log: Any, callbacks: list, checkpoints: str, load: str | None
) -> Trainer:
    phases = [
        {'bag_size': s, 'until': f'{amount / 100}dur' if unit == 'dur' else f'{amount}{unit}'}
        for s, (amount, unit) in case.phases
    ]
    model = Model()
    loader: Any = make_loader(case, folder, workers)
    if case.on_tokens:
        loader = DataSpec(loader, get_num_tokens_in_batch=get_tokens_per_batch_func())
    return Trainer(
        model=model,
        train_dataloader=loader,
        algorithms=TokenSuperposition(
            phases=phases, superpose=case.superpose, expand=case.expand, weighting=case.weighting
        ),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        max_duration=None if case.chunks else f'{case.max_duration[0]}{case.max_duration[1]}',
        device_train_microbatch_size=case.microbatch,
        accumulate_train_batch_on_tokens=case.on_tokens,
        callbacks=callbacks,
        loggers=[log],
        save_folder=checkpoints,
        save_interval='1ba',
        save_overwrite=True,
        load_path=load,
        progress_bar=False,
        seed=3,
        device='cpu',
    )


def _fit(trainer: Trainer, case: Case) -> None:
    if not case.chunks:
        trainer.fit()
        return
    stop = next(callback.step for callback in trainer.state.callbacks if isinstance(callback, StopsAt))
    last = case.max_duration[0] if stop is None else min(stop, case.max_duration[0])
    while int(trainer.state.timestamp.batch) < last:
        trainer.fit(duration=f'{min(case.chunks, last - int(trainer.state.timestamp.batch))}ba')


def kind_of(case: Case) -> str:
    """What a case is one of, for the count at the end."""
    how = 'failed and resumed' if case.fails and case.stops else 'resumed' if case.stops else 'in one go'
    loader = f'{case.data} {case.wrapped[0]}' if case.wrapped[0] != 'no' else case.data
    return f'{case.expand}/{case.superpose}, {loader}, {"in several fits, " if case.chunks else ""}{how}'


def check(case: Case, kinds: collections.Counter) -> None:
    """Run a case and compare it with its simulation, step for step.

    Raises:
        AssertionError: If they differ, or the one is refused and the other is not.
    """
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        data = f'{folder}/data'
        if case.data == 'streaming':
            with MDSWriter(out=data, columns={'index': 'int'}) as writer:
                for index in range(case.rows):
                    writer.write({'index': index})
        try:
            ours = run(case, data)
        except ValueError as refusal:
            ours, reason = None, str(refusal)
        switches: list[int] = []
        for step, record in enumerate(ours or []):
            sizes = [s for s, _ in case.phases] + [1]
            while sizes[len(switches)] != record.bag_size:
                switches.append(step)
        if ours is None:
            kinds[f'refused: {reason.split(" until ")[0].split(" has ")[-1][:60]}'] += 1
            _check_refusal(case, data, reason)
            return
        kinds[kind_of(case)] += 1
        theirs = simulate(case, data, switches)
        _check_shares(case, switches, len(theirs))
        assert len(ours) == len(theirs)
        for number, (mine, plain) in enumerate(zip(ours, theirs, strict=True)):
            for name in ('bag_size', 'ids', 'microbatches', 'data_tokens', 's_tokens'):
                assert getattr(mine, name) == getattr(plain, name), (number, name)
            assert mine.targets == plain.targets, number
            assert math.isclose(mine.loss, plain.loss, rel_tol=1e-4, abs_tol=1e-5), (number, mine.loss, plain.loss)


def _check_shares(case: Case, switches: list[int], total: int) -> None:
    """A share of epochs is met to the steps that one bag makes of an epoch's."""
    if case.max_duration[1] != 'ep':
        return
    for (amount, unit), switch in zip((until for _, until in case.phases), switches, strict=False):
        if unit == 'dur' and len({s for s, _ in case.phases}) == len(case.phases):  # else no switch is seen
            assert abs(switch - amount / 100 * total) <= case.phases[0][0] + 1


def _check_refusal(case: Case, folder: str, reason: str) -> None:
    """A run is refused only if it has an epoch too short, a phase without a step, or no recovery."""
    batches = len(next(epochs_of(case, folder)))
    draws = 1 if case.expand == 'none' else case.phases[0][0]
    if 'superposed step reads' in reason:
        assert draws > batches or batches * case.batch_size < 2 * draws, reason
        return
    units = {until[1] for _, until in case.phases}
    if 'does not say what a batch holds' in reason:
        assert (case.max_duration[1], units) == ('ep', {'dur', 'tok'}), reason
        return
    if 'does not say when an epoch does' in reason:
        assert case.data == 'iterable' and 'ep' in units, reason  # noqa: PT018
        return
    assert 'has no steps' in reason or 'no recovery phase' in reason or 'increasing times' in reason, reason
    if any(until[1] == 'dur' for _, until in case.phases) and case.max_duration[1] == 'ep':
        return
    if 'increasing times' in reason:
        return
    steps = simulate(dataclasses.replace(case, padded=False), folder, [])
    sizes = {step.bag_size for step in steps}
    assert (
        1 not in sizes
        or not {s for s, _ in case.phases} <= sizes
        or len({s for s, _ in case.phases}) < len(case.phases)
    ), reason


def fuzz(seed: int, examples: int, kinds: collections.Counter) -> None:
    """Try cases of a seed."""

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        print_blob=False,
        suppress_health_check=list(hypothesis.HealthCheck),  # pyright: ignore[reportArgumentType]
    )
    @hypothesis.given(cases())
    def tried(case: Case) -> None:
        try:
            check(case, kinds)
        finally:
            gc.collect()  # datasets hold files open

    tried()


def fuzz_in_a_process(seed: int, examples: int) -> collections.Counter:
    """Try cases of a seed in a process of their own: datasets leave files open. Give how many of which kind."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def work() -> None:
        kinds: collections.Counter = collections.Counter()
        try:
            fuzz(seed, examples, kinds)
        finally:
            sender.send(kinds)

    process = multiprocessing.get_context('fork').Process(target=work)
    process.start()
    kinds = receiver.recv()
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f'A run of seed {seed} is not what its simulation is: see above.')
    return kinds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument('--seed', type=int, default=1)
    parser.add_argument('--minutes', type=float, default=15)
    arguments = parser.parse_args()
    kinds: collections.Counter = collections.Counter()
    torch.set_num_threads(1)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    end, round_ = time.monotonic() + 60 * arguments.minutes, 0
    try:
        while time.monotonic() < end:
            kinds += fuzz_in_a_process(1000 * arguments.seed + round_, 20)
            round_ += 1
    finally:
        for kind, count in sorted(kinds.items()):
            print(f'{count:6}  {kind}')
        print(f'{sum(kinds.values()):6}  runs of seed {arguments.seed}', flush=True)


if __name__ == '__main__':
    main()

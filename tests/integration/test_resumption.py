"""A run that stops anywhere goes on as if it had not, to the bit: weights, optimizer, timestamps, and what is drawn."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import SEQ_LEN, VOCAB_SIZE
from common.runs import Run, assert_same_end, checkpoint, config, drawn, write_rows
from common.trainers import llama, logged, make_trainer, mpt, random_loader, text_loader
from composer import Callback
from streaming import MDSWriter, StreamingDataset
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from composer_tst import TokenSuperposition
from composer_tst.loader import check_epoch_is_whole

pytestmark = pytest.mark.streaming

ROWS = 59
STREAMING: dict[str, Any] = {}
WORKERS = {
    'train_loader__num_workers': 2,
    'train_loader__prefetch_factor': 2,
    'train_loader__persistent_workers': True,
}
MAP_STYLE = {
    'train_loader': {'name': 'map_rows', 'count': ROWS, 'shuffle': True, 'num_workers': 0},
}
# 14 loader batches an epoch: 3 + 3 + 3 and 2 + 2, which leaves one that does not fill a step of 2; the next epoch goes
# on with 2 and then plain ones, 13 steps more. So batch 5 is the epoch's last and batch 6 the first of recovery.
LOADERS = {'streaming': STREAMING, 'workers': WORKERS, 'map-style': MAP_STYLE}


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('rows')
    write_rows(folder, ROWS)
    return folder


@pytest.fixture(scope='module')
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Uninterrupted runs, by loader, made once."""
    made: dict[str, Path] = {}

    def run(loader: str) -> Path:
        if loader not in made:
            folder = made[loader] = tmp_path_factory.mktemp(loader)
            Run(config(data, folder, **LOADERS[loader]), folder / 'log').wait()
        return made[loader]

    return run


@pytest.mark.parametrize(
    ('loader', 'batch'),
    [
        *(('streaming', batch) for batch in (1, 3, 4, 5, 6, 13)),
        *(('workers', batch) for batch in (2, 5, 9)),
        *(('map-style', batch) for batch in (2, 5, 8)),
    ],
)
def test_a_run_resumed_after_any_batch_is_the_run_that_did_not_stop(
    loader: str, batch: int, whole: Any, data: Path, tmp_path: Path
):
    before = whole(loader)
    load = {'load_path': str(checkpoint(before, batch))}
    Run(config(data, tmp_path, **LOADERS[loader], **load), tmp_path / 'log').wait()
    assert_same_end(tmp_path, before)
    assert drawn(tmp_path) == {at: ids for at, ids in drawn(before).items() if at[1] >= batch}


@pytest.mark.parametrize('loader', LOADERS)
def test_every_sample_is_drawn_once_an_epoch_but_for_a_tail_that_is_counted(loader: str, whole: Any):
    folder = whole(loader)
    steps = drawn(folder)
    assert [len(ids) for ids in steps.values()] == [12] * 3 + [8] * 3 + [4] * 8
    first = list(itertools.chain(*(ids for (epoch, _), ids in steps.items() if epoch == 0)))
    assert len(first) == len(set(first)) == 52
    assert '4 samples on this rank are left out, because they do not fill a step' in (folder / 'log').read_text()
    algorithms = torch.load(checkpoint(folder), weights_only=False)['state']['algorithms']
    assert dict(algorithms)['TokenSuperposition']['left_out'] == 4


def test_a_run_killed_and_autoresumed_again_and_again_ends_with_the_same_weights(
    whole: Any, data: Path, tmp_path: Path
):
    for batch in (1, 3, 5, 6, 9):
        run = Run(config(data, tmp_path, callbacks__record_rows__die_at=batch), tmp_path / 'log')
        run.processes[0].join()
        assert run.processes[0].exitcode == -9, run.printed()[-4000:]
        assert checkpoint(tmp_path).name.split('-')[1] == f'ba{batch}'
    Run(config(data, tmp_path), tmp_path / 'log').wait()
    assert_same_end(tmp_path, whole('streaming'))
    assert drawn(tmp_path) == drawn(whole('streaming'))


def test_a_checkpoint_left_half_written_is_not_resumed_from(whole: Any, data: Path, tmp_path: Path):
    """It is in the way, as Composer says, unless save_overwrite lets it be written again."""
    Run(config(data, tmp_path, callbacks__record_rows__die_at=4), tmp_path / 'log').processes[0].join()
    half = tmp_path / 'checkpoints' / 'ep0-ba5-rank0.pt'
    half.write_bytes(checkpoint(tmp_path).read_bytes()[:3000])
    refused = Run(config(data, tmp_path, save_overwrite=False), tmp_path / 'refused.log').fails()
    assert 'may conflict with a future checkpoint' in refused
    Run(config(data, tmp_path), tmp_path / 'log').wait()
    assert_same_end(tmp_path, whole('streaming'))


@pytest.mark.parametrize(('until', 'resumed'), [('2ba', [1, 1]), ('5ba', [3, 3]), (None, [None, None])])
def test_a_loader_that_is_not_spun_begins_its_epoch_again(until: str | None, resumed: list, tmp_path: Path):
    """As in a plain run: in recovery, and superposed."""
    drawn = []

    class Rows(Callback):
        def after_dataloader(self, state: Any, logger: Any) -> None:
            drawn.append(state.batch['input_ids'].flatten().tolist())

    def train(**settings: Any) -> list[float]:
        algorithm = None if until is None else TokenSuperposition(bag_size=3, duration=until)
        trainer, logger = make_trainer(llama(), random_loader(96), algorithm, '12ba', callbacks=[Rows()], **settings)
        trainer.fit()
        return logged(logger, 'superposition/bag_size')

    train(save_folder=str(tmp_path), save_interval='3ba')
    drawn.clear()
    sizes = train(load_path=str(tmp_path / 'ep0-ba3-rank0.pt'), spin_dataloaders=False)
    assert len(drawn) == 9
    batches = [batch['input_ids'].flatten().tolist() for batch in random_loader(96)]
    begin = 0
    for rows, size in zip(drawn, resumed, strict=False):
        assert rows == list(itertools.chain(*batches[begin : begin + (size or 1)]))
        begin += size or 1
    assert sizes[:2] == (resumed if until else [])


def test_superposition_new_to_a_run_needs_a_loader_that_is_spun(tmp_path: Path):
    make_trainer(llama(), random_loader(), None, '1ba', save_folder=str(tmp_path))[0].fit()
    load = {'load_path': str(tmp_path / 'latest-rank0.pt')}
    trainer, _ = make_trainer(llama(), random_loader(), TokenSuperposition(3, '3ba'), spin_dataloaders=False, **load)
    with pytest.raises(ValueError, match='step 1 of the epoch but its data at step 0: set spin_dataloaders: true'):
        trainer.fit()
    trainer, logger = make_trainer(llama(), random_loader(), TokenSuperposition(3, '3ba'), **load)
    trainer.fit()
    assert logged(logger, 'superposition/bag_size') == [3, 3, 1, 1, 1, 1, 1]
    assert logged(logger, 'superposition/s_tokens')[0] == 2 * 4 * 12


@pytest.mark.parametrize(
    ('until', 'sizes', 's_tokens'),
    [
        ('5ba', [3, 3, 1, 1, 1], [192, 240, 288, 336, 384]),
        ('3ba', [1] * 5, [192, 240, 288, 336, 384]),  # exactly where it is added: past
        ('2ba', [1] * 5, [192, 240, 288, 336, 384]),
    ],
)
def test_superposition_added_to_a_run_under_way(until: str, sizes: list, s_tokens: list, tmp_path: Path):
    """After 3 plain steps of 48 tokens."""
    make_trainer(llama(), random_loader(96), None, '3ba', save_folder=str(tmp_path))[0].fit()
    algorithm = TokenSuperposition(3, until)
    load = {'load_path': str(tmp_path / 'latest-rank0.pt')}
    trainer, logger = make_trainer(llama(), random_loader(96), algorithm, '8ba', **load)
    trainer.fit()
    assert logged(logger, 'superposition/bag_size') == sizes
    assert logged(logger, 'superposition/s_tokens') == s_tokens
    assert algorithm.state_dict()['began'] == 3
    assert algorithm.state_dict()['ended'] == [max(3, int(until[:-2]))]


@pytest.mark.parametrize(('workers', 'missing'), [(0, 1), (1, 1), (2, 2), (3, 3)])
def test_an_epoch_is_whole_but_for_a_batch_of_each_worker(workers: int, missing: int, tmp_path: Path):
    with MDSWriter(out=str(tmp_path), columns={'x': 'int'}) as writer:
        for index in range(8):
            writer.write({'x': index})

    def loader(**settings: Any) -> DataLoader:
        dataset = StreamingDataset(local=str(tmp_path), batch_size=2, **settings)
        return DataLoader(dataset, batch_size=2, num_workers=workers)

    streaming = loader()
    check_epoch_is_whole(streaming, 10, 10 - missing)
    with pytest.raises(RuntimeError, match=f'The epoch ended after {9 - missing} of 10 loader batches: if data could'):
        check_epoch_is_whole(streaming, 10, 9 - missing)
    check_epoch_is_whole(random_loader(), 10, 0)  # says of itself how long it is
    dataset: Any = streaming.dataset
    dataset.batching_method = 'stratified'  # leaves out rows of each stream
    check_epoch_is_whole(streaming, 10, 0)


class Filtered(StreamingDataset):
    """Leaves out every fourth row, as a filter of quality would."""

    def __iter__(self) -> Iterator[Any]:
        return (row for row in super().__iter__() if row['tokens'][0] % 4)


class EverySecond(DataLoader):
    """Every second batch."""

    def __iter__(self) -> Any:
        return itertools.islice(super().__iter__(), 0, None, 2)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    with MDSWriter(out=str(tmp_path), columns={'tokens': 'ndarray:int64:8'}, size_limit=1000) as writer:
        for index in range(48):
            writer.write({'tokens': np.arange(index, index + 8)})
    return tmp_path


def loader_of(dataset: type[StreamingDataset], shards: Path, loader: type[DataLoader] = DataLoader) -> DataLoader:
    def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(np.stack([row['tokens'] for row in rows]))
        return {'input_ids': ids, 'labels': ids.clone()}

    return loader(dataset(local=str(shards), batch_size=4), batch_size=4, collate_fn=collate)


def test_a_run_whose_epoch_is_cut_short_is_stopped(shards: Path):
    (shards / 'shard.00002.mds').unlink()  # streaming prints why, and ends the epoch with no error
    trainer, logger = make_trainer(llama(), loader_of(StreamingDataset, shards), TokenSuperposition(3, '9ba'), '12ba')
    with pytest.raises(RuntimeError, match='The epoch ended after 6 of 12 loader batches: if data could not be read'):
        trainer.fit()
    assert len(logged(logger, 'superposition/bag_size')) == 2


@pytest.mark.parametrize(
    ('loader', 'batches'),
    [
        (lambda shards: loader_of(Filtered, shards), 9),
        (lambda shards: loader_of(StreamingDataset, shards, EverySecond), 6),
    ],
)
def test_what_leaves_data_out_by_itself_may_do_so(loader: Any, batches: int, shards: Path):
    trainer, logger = make_trainer(llama(), loader(shards), TokenSuperposition(2, '2ba'), '2ep')
    trainer.fit()
    assert logged(logger, 'superposition/bag_size') == [2, 2, *[1] * (2 * batches - 4)]


def test_raw_text_in_padded_rows_resumes_in_a_later_phase(tmp_path: Path, tokenizer: PreTrainedTokenizerBase):
    assert 'token_type_ids' in tokenizer('x')
    with MDSWriter(out=str(tmp_path / 'text' / 'train'), columns={'text': 'str'}) as writer:
        for _ in range(100):
            writer.write({'text': 'import json'})
    attended = len(tokenizer.encode('import json'))
    assert attended < SEQ_LEN / 2
    batch = 4 * attended
    folder = str(tmp_path / 'checkpoints')

    def train(**settings: Any) -> list[float]:
        phases = [{'bag_size': 3, 'until': '0.3dur'}, {'bag_size': 2, 'until': '0.5dur'}]
        trainer, logger = make_trainer(
            mpt(vocab_size=VOCAB_SIZE),
            text_loader(tmp_path / 'text', tokenizer),
            TokenSuperposition(phases=phases),
            f'{20 * batch}tok',
            save_folder=folder,
            save_interval='1ba',
            save_overwrite=True,
            **settings,
        )
        trainer.fit()
        return logged(logger, 'superposition/data_tokens')

    # 6 of 20 batches are 2 steps of 3, and 4 more are 2 of 2.
    steps = [count * batch for count in (3, 6, 8, *range(10, 21))]
    assert train() == steps
    assert train(load_path=f'{folder}/ep0-ba3-rank0.pt') == steps[3:]

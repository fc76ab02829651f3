"""A plain loop on two processes: DDP, FSDP1 and FSDP2 give the definition's gradients, or a sentence."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from common import REPO
from common.sharded_loops import CASES


@pytest.fixture(scope='module')
def on_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What all cases came to on two processes."""
    output = tmp_path_factory.mktemp('sharded') / 'results.json'
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    launched = subprocess.run(
        [*launcher, str(REPO / 'tests/common/sharded_loops.py'), str(output)],
        capture_output=True,
        text=True,
        env=os.environ
        | {'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', 'PYTHONPATH': f'{REPO}{os.pathsep}{REPO / "tests"}'},
    )
    assert launched.returncode == 0, launched.stdout[-3000:] + launched.stderr[-3000:]
    return json.loads(output.read_text())


@pytest.mark.parametrize('name', [name for name, case in CASES.items() if not case.how])
def test_gradients_are_those_of_the_definition_on_one_process(name: str, on_two: dict[str, Any]):
    """In the first pass, which is watched, and the next."""
    assert max(on_two[name]['errors']) < CASES[name].tolerance
    assert len(on_two[name]['errors']) == 2


@pytest.mark.parametrize('name', [name for name, case in CASES.items() if not case.how])
def test_a_pass_has_the_collectives_of_a_plain_one(name: str, on_two: dict[str, Any]):
    assert on_two[name]['of bags'] == on_two[name]['of tokens']
    assert sum(on_two[name]['of bags'].values()) > 1


@pytest.mark.parametrize('name', [name for name, case in CASES.items() if case.how])
def test_what_reads_or_changes_ids_is_refused(name: str, on_two: dict[str, Any]):
    done = 'changes the ids of a superposed batch by fill_' if CASES[name].how == 'in place' else 'by value by eq'
    assert f'{done}, sharded_loops.py:' in on_two[name]['refused']
    assert '(Model)' in on_two[name]['refused'] or on_two[name]['refused'].startswith('FSDPModel')
    assert 'Lookup' not in on_two[name]['given back']


def test_buffers_and_weights_of_ddp_are_to_the_bit_those_of_a_run_that_was_not_watched(on_two: dict[str, Any]):
    """Two plain steps come first, after which each rank has running means of its own."""
    unwatched, watched = on_two['buffers']
    assert watched == unwatched
    assert len(set(watched)) > len(watched) / 2 + 1


def test_a_buffer_that_fsdp1_casts_in_the_watched_call_stays_cast(on_two: dict[str, Any]):
    assert on_two['cast buffer'] == 'torch.bfloat16'


def test_buffers_of_fsdp1_are_those_of_a_run_that_was_not_watched(on_two: dict[str, Any]):
    """If forward assigns them anew, or writes to a view that it keeps."""
    unwatched, watched = on_two['buffers of fsdp1']
    assert watched == unwatched
    assert watched[1:] == [4, 4]


def test_frozen_shards_of_fsdp2_that_forward_changes_are_those_of_a_run_that_was_not_watched(on_two: dict[str, Any]):
    unwatched, watched = on_two['frozen of fsdp2']
    assert watched == unwatched


def test_a_checkpoint_of_fsdp2_is_sharded_after_an_evaluation(on_two: dict[str, Any]):
    assert on_two['checkpoint'] == ['DTensor']

"""The data set that composer-tst prepare-data makes, as training reads it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from common.preparing import TEXTS, L, define_rows, prepare, read_rows, refuse, succeed
from llmfoundry.data.text_data import StreamingTextDataset
from streaming import MDSWriter

pytest_plugins = ['common.preparing_fixtures']
pytestmark = pytest.mark.streaming


def test_what_was_made_before_is_refused_and_kept(common: list[object], tmp_path: Path):
    """A data set of the older format, which training reads as it does the new ones."""
    with MDSWriter(out=str(tmp_path / 'out' / 'train'), columns={'tokens': 'ndarray:int32'}) as writer:
        writer.write({'tokens': np.arange(L, dtype=np.int32)})
    assert 'out holds train and was not begun by this command' in refuse(*common, '--output', tmp_path / 'out')
    assert read_rows(tmp_path / 'out' / 'train') == [list(range(L))]


def test_rows_of_all_parts_are_those_of_the_definition(common: list[object], tokenizer_dir: str, tmp_path: Path):
    succeed(*common, '--output', tmp_path / 'out')
    stats = json.loads((tmp_path / 'out' / 'stats.json').read_text())['splits']['train']
    whole = define_rows(TEXTS, tokenizer_dir, 1)
    assert stats['tokens'] + stats['dropped_tokens'] == len(whole)
    assert stats['documents'] == len(TEXTS)
    ends = sum(row.count(0) for row in read_rows(tmp_path / 'out' / 'train'))
    assert stats['cut_documents'] == len(TEXTS) - ends
    assert prepare(*common, '--output', tmp_path / 'out').exit_code == 0


def test_the_end_says_how_to_train_on_it(common: list[object], tmp_path: Path):
    """The lines are YAML that llm-foundry's loader reads."""
    common = [*common[:-1], 'train=0.6,val=0.4']
    result = succeed(*common, '--output', tmp_path / 'out')
    said, _, lines = result.stdout.partition('to train on it:\n')
    assert re.match(r'train: documents \d+, cut documents \d+, rows \d+, tokens [\d,]+, dropped tokens', said)
    found = yaml.safe_load(lines)
    assert found['tokenizer']['name'] == common[4]
    for loader, split in (('train_loader', 'train'), ('eval_loader', 'val')):
        made = found[loader]['dataset']
        assert (made['local'], made['split'], made['max_seq_len']) == (str(tmp_path / 'out'), split, L)
        dataset = StreamingTextDataset(tokenizer=None, **made, batch_size=1)  # pyright: ignore
        assert len(dataset) == len(read_rows(tmp_path / 'out' / split))

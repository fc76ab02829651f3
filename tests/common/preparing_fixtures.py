"""Fixtures of the tests of composer-tst prepare-data: `pytest_plugins = ['common.preparing_fixtures']`."""

import uuid
from pathlib import Path

import boto3
import pytest

from common.preparing import TEXTS, Bucket, Folder, L, make_text, save_tokenizer, write_jsonl
from common.s3 import s3_server  # noqa: F401
from composer_tst.cli.prepare_data import parts, tokenizer


@pytest.fixture(scope='module')
def bpe() -> tokenizer.TextTokenizer:
    """Byte-level BPE of 400 tokens."""
    return tokenizer.train_tokenizer([make_text(number) for number in range(50)], 400)


@pytest.fixture(scope='module')
def tokenizer_dir(bpe: tokenizer.TextTokenizer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Its folder."""
    return save_tokenizer(bpe, tmp_path_factory.mktemp('tokenizer'))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Forty text files, of which two have the same text."""
    folder = tmp_path / 'corpus'
    (folder / 'deeper').mkdir(parents=True)
    for number in range(39):
        (folder / f'{number:02}.txt').write_text(make_text(number))
    (folder / 'deeper' / 'copy.txt').write_text(make_text(3))
    return folder


@pytest.fixture(params=['disk', 's3'])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Folder | Bucket:
    """A place of either kind."""
    if request.param == 'disk':
        return Folder(tmp_path / 'place')
    client = boto3.client('s3', endpoint_url=request.getfixturevalue('s3_server'))
    return Bucket(client, f'place-{uuid.uuid4().hex[:12]}')


@pytest.fixture
def common(tmp_path: Path, tokenizer_dir: str, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The arguments but for the output, for an input of several parts."""
    monkeypatch.setattr(parts, 'PART_BYTES', 2500)
    return [
        write_jsonl(tmp_path / 'a.jsonl', TEXTS), '--seq-len', L, '--tokenizer', tokenizer_dir, '--split', 'train=1',
    ]  # fmt: skip

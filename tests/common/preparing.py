"""`composer-tst prepare-data` within tests, run to its end or until it is killed, and what it must make."""

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from typer.testing import CliRunner, Result

from composer_tst.cli.prepare_data import command, inputs, parts, shards, tokenizer, workers

if __name__ != '__main__':
    # Tests want a worker at once; a single run imports this in the one worker that needs it.
    workers.PRELOADED.append('transformers.models.auto.tokenization_auto')

L = 16
SPLITS = (('train', 0.8), ('val', 0.2))
SETTINGS = parts.Settings(L, SPLITS)
WORDS = ('the', 'of', 'superposition', 'naïve', '東京', '🙂', 'tab\there', 'line\nbreak', '', '...', '3.14', 'f(x):')


def make_text(number: int, words: int = 60) -> str:
    """A document that differs from every other one."""
    return f'{number} ' + ' '.join(WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(words))


COMMAND = (sys.executable, '-m', 'composer_tst', 'prepare-data')
TEXTS = [make_text(number) for number in range(40)]


def prepare(*arguments: object) -> Result:
    """Run the command."""
    return CliRunner().invoke(command.app, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> Result:
    """Run the command, which must not fail."""
    result = prepare(*arguments)
    assert result.exit_code == 0, result.output
    return result


def refuse(*arguments: object) -> str:
    """Run the command, which must fail with one sentence; give that."""
    result = prepare(*arguments)
    assert result.exit_code == 1, result.output
    assert 'Traceback' not in result.output
    line = result.stderr.splitlines()[-1]
    assert line.startswith('error: ')
    return line.removeprefix('error: ')


def prepare_until_killed(*arguments: object) -> None:
    """Run the command in a process that dies by SIGKILL when three of its parts are finished."""
    dying = [sys.executable, __file__, str(parts.PART_BYTES), *map(str, arguments)]
    run = subprocess.run(dying, capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stdout + run.stderr


def _prepare_and_die(arguments: list[str]) -> None:
    parts.PART_BYTES = int(arguments[0])
    parallel = command.parallel

    def dying(*args: Any) -> Iterator[Any]:
        for done, result in enumerate(parallel(*args), 1):
            yield result
            if done == 3:
                os.kill(os.getpid(), signal.SIGKILL)

    command.parallel = dying
    command.app(arguments[1:])


def sources_of(*given: object, form: str = '') -> list[inputs.Source]:
    """List inputs, for an output elsewhere."""
    return inputs.list_sources([str(each) for each in given], '/nowhere/out', form)[0]


def source(path: object) -> inputs.Source:
    """List one file."""
    (found,) = sources_of(path)
    return found


def save_tokenizer(trained: tokenizer.TextTokenizer, folder: Path) -> str:
    """Write a trained tokenizer to a folder, which is made; give its path."""
    folder.mkdir(exist_ok=True)
    for name, text in tokenizer.files_of(trained).items():
        (folder / name).write_text(text)
    return str(folder)


def read_rows(folder: Path, length: int = L) -> list[list[int]]:
    """The rows of a split as streaming reads them."""
    from streaming.base.compression import decompress
    from streaming.base.local import LocalDataset

    for path in folder.rglob('*.zstd'):
        # The dataset class that needs no process group does not unpack.
        path.with_suffix('').write_bytes(decompress('zstd', path.read_bytes()))
    dataset = LocalDataset(str(folder))
    rows = [dataset[index]['tokens'] for index in range(len(dataset))]
    assert all(row.dtype == np.int32 and row.shape == (length,) for row in rows)
    return [row.tolist() for row in rows]


def shards_in(folder: Path) -> list[tuple[str, int]]:
    """The name and the rows of each shard of a split."""
    index = json.loads((folder / 'index.json').read_text())
    return [(shard['raw_data']['basename'], shard['samples']) for shard in index['shards']]


def read_shard(data: bytes, entry: dict[str, Any]) -> np.ndarray:
    """The rows of a shard, of which `entry` is what its index says, as streaming decodes them."""
    if entry['compression']:
        data = shards.streaming('compression').decompress(entry['compression'], data)
    reader = shards.streaming('format.mds.reader').MDSReader.from_json('', None, entry)
    ends = np.frombuffer(data, np.uint32, entry['samples'] + 1, 4)
    return np.stack([reader.decode_sample(data[start:end])['tokens'] for start, end in pairwise(ends)])


def stored(entry: dict[str, Any]) -> str:
    """The name of the file that an entry of an index is of."""
    return (entry['zip_data'] or entry['raw_data'])['basename']


def define_rows(texts: list[str], folder: str, length: int = L) -> list[list[int]]:
    """The definition: the tokenizer's output on the documents, joined by end-of-text, cut to length."""
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    hf = AutoTokenizer.from_pretrained(folder)
    stream: list[int] = []
    for text in texts:
        stream += hf(text, add_special_tokens=False, split_special_tokens=True)['input_ids']
        stream.append(hf.eos_token_id)
    return [stream[at : at + length] for at in range(0, len(stream) - length + 1, length)]


def of_split(texts: list[str], name: str, splits: Any = SPLITS) -> list[str]:
    """The definition: the hash of a text as a fraction, and the split whose share of [0, 1) holds it."""
    names, shares = [each for each, _ in splits], [share for _, share in splits]
    index = names.index(name)
    low, high = sum(shares[:index]), sum(shares[: index + 1]) if index + 1 < len(names) else 1.0
    found = []
    for text in texts:
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        if low <= int.from_bytes(digest, 'big') / 2**64 < high:
            found.append(text)
    return found


def tree(folder: Path) -> dict[str, bytes]:
    """All files of a folder but a lock, by path."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}
    return {name: data for name, data in found.items() if not name.endswith('.records/lock')}


class Folder:
    """A folder of its own on disk, for what a run writes and what is there besides."""

    def __init__(self, root: Path):
        self.root = str(root)

    def put(self, name: str, data: bytes) -> None:
        path = Path(self.root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def delete(self, name: str) -> None:
        Path(self.root, name).unlink()

    def files(self, below: str = '') -> dict[str, bytes]:
        return tree(Path(self.root, below))


class Bucket:
    """The same as a bucket of its own."""

    def __init__(self, client: Any, name: str):
        self.client, self.name, self.root = client, name, f's3://{name}'
        client.create_bucket(Bucket=name)

    def put(self, name: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=name, Body=data)

    def delete(self, name: str) -> None:
        self.client.delete_object(Bucket=self.name, Key=name)

    def files(self, below: str = '') -> dict[str, bytes]:
        prefix = f'{below}/' if below else ''
        pages = self.client.get_paginator('list_objects_v2').paginate(Bucket=self.name, Prefix=prefix)
        keys = [item['Key'] for page in pages for item in page.get('Contents', [])]
        return {
            key[len(prefix) :]: self.client.get_object(Bucket=self.name, Key=key)['Body'].read()
            for key in keys
            if not key.endswith('.records/lock')
        }


def write_jsonl(path: Path, texts: list[str]) -> Path:
    """Write JSON lines, packed where the name says so."""
    data = ''.join(json.dumps({'text': text}) + '\n' for text in texts).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)
    return path


if __name__ == '__main__':
    _prepare_and_die(sys.argv[1:])

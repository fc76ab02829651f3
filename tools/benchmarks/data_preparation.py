"""What preparing data costs: its speed beside other programs, from S3, and its memory.

    python -m tools.benchmarks.data_preparation speed [--megabytes 64] [--rounds 3] [--datatrove PYTHON]
    python -m tools.benchmarks.data_preparation s3 [--megabytes 64] [--rounds 3]
    python -m tools.benchmarks.data_preparation memory [--gigabytes 2]
    python -m tools.benchmarks.data_preparation document [--megabytes 16,64,256]
    python -m tools.benchmarks.data_preparation rows [--megabytes 1024]

All make their input of the source of Python's standard library, again and again, each time with other words.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

PREPARE = (sys.executable, '-m', 'composer_tst', 'prepare-data')
LLMFOUNDRY = Path(sys.executable).with_name('llmfoundry')
SEQ_LEN = 2048
VOCAB_SIZE = 32000
SAMPLE_SECONDS = 0.05

# In a worker of the plain pool.
_tokenizer: Any = None

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def documents() -> Iterator[str]:
    """The standard library's files, for ever; each time round, its words end in the number of the round."""
    paths = sorted(Path(sysconfig.get_paths()['stdlib']).glob('[!s]*/*.py'))
    texts = [text for path in paths if (text := path.read_text(errors='replace').strip())]
    for number in itertools.count():
        for text in texts:
            yield re.sub(r'\b(\w{6,})\b', rf'\g<1>{number}', text) if number else text


def fill(folder: Path, size: int, *, files: int = 0) -> int:
    """Write documents of `size` bytes in all, as text files or in some files of JSON lines; return their count."""
    folder.mkdir()
    texts = []
    for text in documents():
        if size <= 0:
            break
        size -= len(text.encode())
        texts.append(text)
    for number, text in enumerate(texts if not files else ()):
        (folder / f'{number:06}.txt').write_text(text)
    for number in range(files):
        with open(folder / f'{number:02}.jsonl', 'w') as lines:
            lines.writelines(json.dumps({'text': text}) + '\n' for text in texts[number::files])
    return len(texts)


def tokens_in(folder: Path) -> int:
    """The tokens of the data set of one split in a folder."""
    return SEQ_LEN * sum(shard['samples'] for shard in json.loads((folder / 'index.json').read_text())['shards'])


@app.command()
def speed(
    megabytes: Annotated[int, typer.Option(help='Of text.')] = 64,
    rounds: Annotated[int, typer.Option(help='Of one conversion by each.')] = 3,
    datatrove: Annotated[str, typer.Option(help='The Python of an environment that has datatrove[processing].')] = '',
) -> None:
    """Tokens per second of this package, llm-foundry's converter, a plain pool of processes and datatrove, by turns.

    Whole commands are timed, from start to finished data set, with the same text, tokenizer, length of rows and
    number of processes: that of the cores this process may use. llm-foundry reads text files, the last two JSON
    lines, and this package once each. datatrove's time is that of its tokenising alone, without rows or compression.
    """
    cores = len(os.sched_getaffinity(0))
    environment = os.environ | {'TOKENIZERS_PARALLELISM': 'false', 'HF_HUB_OFFLINE': '1'}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        text, lines = work / 'text', work / 'lines'
        count = fill(text, megabytes << 20)
        fill(lines, megabytes << 20, files=4 * cores)
        tokenizer = train(work, text, environment)
        end_of_text = json.loads((Path(tokenizer) / 'tokenizer_config.json').read_text())['eos_token']
        # The others compress by default, so this one is told to.
        ours = ['--tokenizer', tokenizer, '--compression', 'zstd', '--seq-len', str(SEQ_LEN), '--split', 'train=1']
        commands = {
            'text files': [*PREPARE, str(text), *ours, '--output'],
            'llm-foundry': [
                *(str(LLMFOUNDRY), 'data_prep', 'convert_text_to_mds'),
                *('--input-folder', str(text), '--tokenizer', tokenizer, '--eos-text', end_of_text),
                *('--concat-tokens', str(SEQ_LEN), '--processes', str(cores), '--output-folder'),
            ],
            'JSON lines': [*PREPARE, str(lines), *ours, '--output'],
            'plain pool': [sys.executable, __file__, 'pool', str(lines), tokenizer, str(cores)],
        }
        if datatrove:
            arguments = [str(lines), f'{tokenizer}/tokenizer.json', end_of_text, str(cores)]
            commands['datatrove'] = [datatrove, '-c', DATATROVE, *arguments]
        tokens = tokens_in(work / 'first' / 'train')
        speeds: dict[str, list[float]] = {name: [] for name in commands}
        for number in range(rounds):
            for name, command in commands.items():
                speeds[name].append(tokens / run([*command, str(work / f'{name}.{number}')], environment))
        print(f'{count:,} documents, {megabytes} MiB, {tokens:,} tokens, {cores} cores')
        show(speeds)
        for name, mine in (('llm-foundry', 'text files'), ('plain pool', 'JSON lines'), ('datatrove', 'JSON lines')):
            if name in speeds:
                ratios = [one / other for one, other in zip(speeds[mine], speeds[name], strict=True)]
                each = ', '.join(f'{ratio:.2f}' for ratio in ratios)
                print(f'{mine} over {name}: {statistics.median(ratios):.2f}, of {each}')


def train(work: Path, text: Path, environment: dict[str, str]) -> str:
    """Train the tokenizer that all use, by a run to `first`; return its folder."""
    options = ['--seq-len', str(SEQ_LEN), '--split', 'train=1', '--train-tokenizer', str(VOCAB_SIZE)]
    run([*PREPARE, str(text), *options, '--output', str(work / 'first')], environment)
    return str(work / 'first' / 'tokenizer')


def show(speeds: dict[str, list[float]]) -> None:
    """Print the median and all of each."""
    for name, values in speeds.items():
        print(f'{name:>12}: {statistics.median(values):>9,.0f} tokens/s, of {", ".join(f"{v:,.0f}" for v in values)}')


# What its documentation shows; a task is a file or more of its own.
DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
if __name__ == '__main__':
    lines, tokenizer, end_of_text, cores, output = sys.argv[1:]
    LocalPipelineExecutor(
        [JsonlReader(lines), DocumentTokenizer(output, tokenizer_name_or_path=tokenizer, eos_token=end_of_text)],
        tasks=int(cores), workers=int(cores), logging_dir=output + '.log', start_method='fork',
    ).run()
"""


@app.command(hidden=True)
def pool(lines: Path, tokenizer: str, cores: int, output: Path) -> None:
    """What one writes by hand: a pool that tokenises lines, and a writer that cuts what comes back into rows."""
    import multiprocessing

    import numpy as np
    from streaming import MDSWriter

    texts = (line for path in sorted(lines.iterdir()) for line in open(path))  # noqa: SIM115
    held = np.empty(0, np.int32)
    columns = {'tokens': 'ndarray:int32'}
    with (
        multiprocessing.Pool(cores, _load, (tokenizer,)) as workers,
        MDSWriter(out=str(output), columns=columns, compression='zstd') as writer,
    ):
        for tokens in workers.imap(_tokenize, texts, chunksize=16):
            held = np.concatenate([held, tokens])
            whole = len(held) // SEQ_LEN * SEQ_LEN
            for row in held[:whole].reshape(-1, SEQ_LEN):
                writer.write({'tokens': row})
            held = held[whole:]


def _load(name: str) -> None:
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    global _tokenizer
    _tokenizer = AutoTokenizer.from_pretrained(name)


def _tokenize(line: str) -> Any:
    import numpy as np

    return np.array([*_tokenizer(json.loads(line)['text'])['input_ids'], _tokenizer.eos_token_id], np.int32)


@app.command()
def s3(
    megabytes: Annotated[int, typer.Option(help='Of text, in JSON lines.')] = 64,
    rounds: Annotated[int, typer.Option(help='Of one conversion from each.')] = 3,
) -> None:
    """Tokens per second from a local file of JSON lines and from the same in a bucket, by turns.

    The bucket is moto's, a server in Python, which takes its time from the same cores.
    """
    import boto3

    sys.path.insert(0, str(Path(__file__).parents[2] / 'tests'))
    from common.s3 import BUCKET, serve  # pyright: ignore

    with tempfile.TemporaryDirectory() as name, serve() as (url, _):
        work = Path(name)
        fill(work / 'lines', megabytes << 20, files=1)
        environment = dict(os.environ)
        tokenizer = train(work, work / 'lines', environment)
        boto3.client('s3', endpoint_url=url).upload_file(str(work / 'lines' / '00.jsonl'), BUCKET, 'lines/00.jsonl')
        tokens = tokens_in(work / 'first' / 'train')
        options = ['--tokenizer', tokenizer, '--seq-len', str(SEQ_LEN), '--split', 'train=1', '--output']
        speeds: dict[str, list[float]] = {str(work / 'lines'): [], f's3://{BUCKET}/lines': []}
        for number in range(rounds):
            for at, values in speeds.items():
                out = str(work / f'{len(at)}.{number}')
                values.append(tokens / run([*PREPARE, at, *options, out], environment))
        show({'from disk': speeds[str(work / 'lines')], 'from S3': speeds[f's3://{BUCKET}/lines']})


@app.command()
def document(
    megabytes: Annotated[str, typer.Option(help='Of one document in a text file, several with commas.')] = '16,64,256',
) -> None:
    """The largest process of a run whose input is one document, by its size."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        fill(work / 'text', 8 << 20)
        tokenizer = train(work, work / 'text', dict(os.environ))
        for size in map(int, megabytes.split(',')):
            folder = work / f'{size}'
            folder.mkdir()
            written = 0
            with open(folder / 'one.txt', 'w') as file:
                for text in documents():
                    if written >= size << 20:
                        break
                    written += file.write(text)
            options = ['--tokenizer', tokenizer, '--seq-len', str(SEQ_LEN), '--split', 'train=1']
            command = [*PREPARE, str(folder), *options, '--output', str(work / f'out{size}')]
            process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            # The tokenizer was loaded by then, by a process of its own.
            _, largest = watch(process, work / f'out{size}' / '.records' / 'begun.json')
            print(f'one document of {size} MiB: the largest worker has {largest / 1e9:.2f} GB at its peak')


@app.command()
def rows(
    megabytes: Annotated[int, typer.Option(help='Of text in one row group of Parquet.')] = 1024,
) -> None:
    """The largest process of a run whose input is one row group of Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        fill(work / 'text', 8 << 20)
        tokenizer = train(work, work / 'text', dict(os.environ))
        texts, size = [], 0
        for text in documents():
            if size >= megabytes << 20:
                break
            texts.append(text)
            size += len(text.encode())
        pq.write_table(pa.table({'text': texts}), work / 'one.parquet', row_group_size=len(texts))
        group = pq.read_metadata(work / 'one.parquet').row_group(0)
        del texts
        options = ['--tokenizer', tokenizer, '--seq-len', str(SEQ_LEN), '--split', 'train=1']
        command = [*PREPARE, str(work / 'one.parquet'), *options, '--output', str(work / 'out')]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        _, largest = watch(process, work / 'out' / '.records' / 'begun.json')
        print(
            f'one row group of {group.total_byte_size / 1e6:,.0f} MB, {group.num_rows:,} rows, exit status '
            f'{process.returncode}: the largest worker has {largest / 1e6:,.0f} MB at its peak'
        )


def run(command: list[str], environment: dict[str, str]) -> float:
    """Run a command to its end; return its seconds."""
    start = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f'{" ".join(command)}\n{done.stderr[-3000:]}')
    return time.monotonic() - start


@app.command()
def memory(
    gigabytes: Annotated[float, typer.Option(help='Of text, in one file of JSON lines.')] = 2.0,
) -> None:
    """The peak memory of a run that trains a tokenizer, converts and verifies: that of all its processes together.

    Pages that several processes share are counted once (PSS), and, beside it, in each of them (RSS).
    """
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        count = fill(work / 'text', int(gigabytes * (1 << 30)), files=1)
        size = (work / 'text' / '00.jsonl').stat().st_size
        command = [*PREPARE, str(work / 'text'), '--output', str(work / 'out'), '--verify']
        start = time.monotonic()
        process = subprocess.Popen([*command, '--seq-len', str(SEQ_LEN), '--train-tokenizer', str(VOCAB_SIZE)])
        peaks, largest = watch(process)
        seconds = time.monotonic() - start
        if process.returncode:
            sys.exit(process.returncode)
        stats = json.loads((work / 'out' / 'stats.json').read_text())
        tokens = sum(split['tokens'] for split in stats['splits'].values())
        print(f'{count:,} documents in one file of {size / 1e9:.2f} GB, {tokens:,} tokens, {seconds:.0f} s')
        print(f'at the peak, all processes, shared pages counted once (PSS): {peaks["Pss"] / 1e9:.2f} GB')
        print(f'counted in each (RSS): {peaks["Rss"] / 1e9:.2f} GB; the largest process: {largest / 1e9:.2f} GB')


def watch(process: subprocess.Popen, since: Path = Path(__file__)) -> tuple[dict[str, int], int]:
    """Wait for a run's end; return the peaks of its processes together and of the largest, once a file exists."""
    peaks, largest = {'Pss': 0, 'Rss': 0}, 0
    while process.poll() is None:
        if not since.exists():
            continue
        used = [measure(pid) for pid in tree(process.pid)]
        for key in peaks:
            peaks[key] = max(peaks[key], sum(each[key] for each in used))
        largest = max([largest, *(each['Rss'] for each in used)])
        time.sleep(SAMPLE_SECONDS)
    return peaks, largest


def tree(root: int) -> list[int]:
    """A process and all that come of it."""
    children: dict[int, list[int]] = {}
    for folder in Path('/proc').glob('[0-9]*'):
        try:
            # After the name, which is in brackets and may hold anything: the state and the parent.
            parent = int((folder / 'stat').read_text().rpartition(')')[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(folder.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def measure(pid: int) -> dict[str, int]:
    """Bytes of memory of a process by kind; none if it is gone."""
    try:
        lines = Path(f'/proc/{pid}/smaps_rollup').read_text().splitlines()[1:]
    except OSError:
        lines = []
    kinds = {line.split(':')[0]: 1024 * int(line.split()[1]) for line in lines}
    return {'Pss': kinds.get('Pss', 0), 'Rss': kinds.get('Rss', 0)}


if __name__ == '__main__':
    app()

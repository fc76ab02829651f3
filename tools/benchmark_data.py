"""What preparing data costs: its speed beside llm-foundry's converter, and its memory on a large input.

    python tools/benchmark_data.py speed [--megabytes 64] [--rounds 3]
    python tools/benchmark_data.py memory [--gigabytes 2]

Both make their input of the source of Python's standard library, again and again, each time with other words.
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
from typing import Annotated

import typer

PREPARE = Path(__file__).with_name('prepare_data.py')
LLMFOUNDRY = Path(sys.executable).with_name('llmfoundry')
SEQ_LEN = 2048
VOCAB_SIZE = 32000
SAMPLE_SECONDS = 0.05

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def documents() -> Iterator[str]:
    """The standard library's files, for ever; each time round, its words end in the number of the round."""
    paths = sorted(Path(sysconfig.get_paths()['stdlib']).glob('[!s]*/*.py'))
    texts = [text for path in paths if (text := path.read_text(errors='replace').strip())]
    for number in itertools.count():
        for text in texts:
            yield re.sub(r'\b(\w{6,})\b', rf'\g<1>{number}', text) if number else text


def fill(folder: Path, size: int, *, as_lines: bool) -> int:
    """Write documents of `size` bytes in all, as text files or as one file of JSON lines; return their count."""
    folder.mkdir()
    written = count = 0
    with open(folder / 'all.jsonl', 'w') if as_lines else open(os.devnull, 'w') as lines:
        for count, text in enumerate(documents()):
            if written >= size:
                return count
            written += len(text.encode())
            if as_lines:
                lines.write(json.dumps({'text': text}) + '\n')
            else:
                (folder / f'{count:06}.txt').write_text(text)
    return count


def tokens_in(folder: Path) -> int:
    """The tokens of the data set of one split in a folder."""
    return SEQ_LEN * sum(shard['samples'] for shard in json.loads((folder / 'index.json').read_text())['shards'])


@app.command()
def speed(
    megabytes: Annotated[int, typer.Option(help='Of text, in files.')] = 64,
    rounds: Annotated[int, typer.Option(help='Of one conversion by each.')] = 3,
) -> None:
    """Tokens per second of this package and of `llmfoundry data_prep convert_text_to_mds`, by turns.

    Whole commands are timed, from start to finished data set, with the same text, tokenizer, length of rows and
    number of processes: that of the cores this process may use.
    """
    cores = len(os.sched_getaffinity(0))
    environment = os.environ | {'TOKENIZERS_PARALLELISM': 'false', 'HF_HUB_OFFLINE': '1'}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        count = fill(work / 'text', megabytes << 20, as_lines=False)
        made = [sys.executable, str(PREPARE), str(work / 'text'), '--seq-len', str(SEQ_LEN), '--split', 'train=1']
        run([*made, '--train-tokenizer', str(VOCAB_SIZE), '--output', str(work / 'first')], environment)
        tokenizer = str(work / 'first' / 'tokenizer')
        end_of_text = json.loads((Path(tokenizer) / 'tokenizer_config.json').read_text())['eos_token']
        # The other compresses by default, so this one is told to.
        commands = {
            'prepare_data.py': [*made, '--tokenizer', tokenizer, '--compression', 'zstd', '--output'],
            'convert_text_to_mds': [
                *(str(LLMFOUNDRY), 'data_prep', 'convert_text_to_mds'),
                *('--input-folder', str(work / 'text'), '--tokenizer', tokenizer, '--eos-text', end_of_text),
                *('--concat-tokens', str(SEQ_LEN), '--processes', str(cores), '--output-folder'),
            ],
        }
        speeds: dict[str, list[float]] = {name: [] for name in commands}
        for number in range(rounds):
            for name, command in commands.items():
                out = work / f'{name}.{number}'
                seconds = run([*command, str(out)], environment)
                speeds[name].append(tokens_in(out / 'train' if (out / 'train').exists() else out) / seconds)
        print(f'{count:,} documents, {megabytes} MiB, {tokens_in(work / "first" / "train"):,} tokens, {cores} cores')
        for name, values in speeds.items():
            print(
                f'{name:>20}: {statistics.median(values):>9,.0f} tokens/s, of {", ".join(f"{v:,.0f}" for v in values)}'
            )
        ratios = [ours / theirs for ours, theirs in zip(*speeds.values(), strict=True)]
        print(f'{"ratio":>20}: {statistics.median(ratios):.2f}, of {", ".join(f"{ratio:.2f}" for ratio in ratios)}')


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
        count = fill(work / 'text', int(gigabytes * (1 << 30)), as_lines=True)
        size = (work / 'text' / 'all.jsonl').stat().st_size
        command = [sys.executable, str(PREPARE), str(work / 'text'), '--output', str(work / 'out'), '--verify']
        start = time.monotonic()
        process = subprocess.Popen([*command, '--seq-len', str(SEQ_LEN), '--train-tokenizer', str(VOCAB_SIZE)])
        peaks = {'Pss': 0, 'Rss': 0}
        largest = 0
        while process.poll() is None:
            used = [measure(pid) for pid in tree(process.pid)]
            for key in peaks:
                peaks[key] = max(peaks[key], sum(each[key] for each in used))
            largest = max([largest, *(each['Rss'] for each in used)])
            time.sleep(SAMPLE_SECONDS)
        seconds = time.monotonic() - start
        if process.returncode:
            sys.exit(process.returncode)
        stats = json.loads((work / 'out' / 'stats.json').read_text())
        tokens = sum(split['tokens'] for split in stats['splits'].values())
        print(f'{count:,} documents in one file of {size / 1e9:.2f} GB, {tokens:,} tokens, {seconds:.0f} s')
        print(f'all processes, shared pages counted once (PSS):    {peaks["Pss"] / 1e9:.2f} GB at the peak')
        print(f'all processes, shared pages counted in each (RSS): {peaks["Rss"] / 1e9:.2f} GB at the peak')
        print(f'the largest process (RSS):                         {largest / 1e9:.2f} GB at the peak')


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

"""The texts of the evidence as JSON lines, each once.

    python -m tools.experiments.corpus OUTPUT.jsonl            the Python source of all that is installed
    python -m tools.experiments.corpus OUTPUT.jsonl FOLDER     the prose below a folder: dictionaries and packed texts

Beside it, OUTPUT.versions.txt says of what versions of which packages the source is.
"""

import gzip
import hashlib
import json
import re
import sys
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

SMALLEST = 256  # bytes; below, a file is a docstring or an import
ENTRY_BYTES = 8192  # a dictionary is cut between entries into documents of about so many


def source() -> Iterator[bytes]:
    """The Python files of every installed package and of the standard library."""
    packages, library = (Path(sysconfig.get_paths()[name]) for name in ('purelib', 'stdlib'))
    # The interpreter that the environment is made of may have packages of its own, below its library.
    own = [path for path in library.rglob('*.py') if not {'site-packages', 'dist-packages'} & set(path.parts)]
    return (path.read_bytes() for path in [*sorted(packages.rglob('*.py')), *sorted(own)])


def prose(folder: Path) -> Iterator[bytes]:
    """Dictionaries of dictd (`.dict.dz`), and packed texts (`.rst.gz`, `.txt.gz`) that are no translations."""
    for path in sorted(folder.rglob('*.dict.dz')):
        document = b''
        for entry in re.split(rb'\n(?=\S)', gzip.decompress(path.read_bytes())):
            document += entry + b'\n'
            if len(document) >= ENTRY_BYTES:
                yield document
                document = b''
        yield document
    for path in sorted([*folder.rglob('*.rst.gz'), *folder.rglob('*.txt.gz')]):
        if path.is_file() and 'translations' not in path.parts:
            yield gzip.decompress(path.read_bytes())


def main(output: Path, folder: Path | None) -> None:
    """Write the corpus and say what is in it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    seen: set[bytes] = set()
    files = kept = size = 0
    part = output.with_suffix('.part')
    with part.open('w') as lines:
        for data in prose(folder) if folder else source():
            files += 1
            digest = hashlib.blake2b(data, digest_size=16).digest()
            if len(data) < SMALLEST or digest in seen:
                continue
            seen.add(digest)
            try:
                text = data.decode()
            except UnicodeDecodeError:
                continue
            kept, size = kept + 1, size + len(data)
            lines.write(json.dumps({'text': text}) + '\n')
    part.rename(output)
    if folder is None:
        packages = sorted({f'{package.name}=={package.version}' for package in metadata.distributions()})
        versions = [f'python=={sys.version.split()[0]}', *packages]
        output.with_suffix('.versions.txt').write_text('\n'.join(versions) + '\n')
    print(f'{files:,} documents, of which {kept:,} differ, have a text and are kept: {size / 1e6:.0f} MB')


if __name__ == '__main__':
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)

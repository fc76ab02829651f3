"""The Python source of every installed package and of the standard library, each text once, as JSON lines.

python tools/experiments/corpus.py OUTPUT.jsonl

Beside it, OUTPUT.versions.txt names the packages and their versions.
"""

import hashlib
import json
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

SMALLEST = 256  # bytes; below, a file is a docstring or an import


def main(output: Path) -> None:
    """Write the corpus and say what is in it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    folders = [sysconfig.get_paths()[name] for name in ('purelib', 'stdlib')]
    paths = [path for folder in folders for path in sorted(Path(folder).rglob('*.py'))]
    seen: set[bytes] = set()
    files = size = 0
    with output.open('w') as lines:
        for path in dict.fromkeys(paths):
            data = path.read_bytes()
            digest = hashlib.blake2b(data, digest_size=16).digest()
            if len(data) < SMALLEST or digest in seen:
                continue
            seen.add(digest)
            try:
                text = data.decode()
            except UnicodeDecodeError:
                continue
            files, size = files + 1, size + len(data)
            lines.write(json.dumps({'text': text}) + '\n')
    packages = sorted(f'{package.name}=={package.version}' for package in metadata.distributions())
    versions = [f'python=={sys.version.split()[0]}', *dict.fromkeys(packages)]
    output.with_suffix('.versions.txt').write_text('\n'.join(versions) + '\n')
    print(f'{len(paths):,} files, of which {files:,} differ, have a text and are kept: {size / 1e6:.0f} MB')


if __name__ == '__main__':
    main(Path(sys.argv[1]))

"""The command ``composer-tst``: each of its commands is a module that is read when it is named."""

from __future__ import annotations

import difflib
import importlib
import json
import re
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import distributions, version
from io import TextIOWrapper
from pathlib import Path
from urllib.parse import unquote, urlparse

# Module that holds the command as `app`, and what it does.
COMMANDS = {
    'plan': ('composer_tst.cli.plan.command', 'whether a run is likely to gain, and its steps, data and time'),
    'prepare-data': ('composer_tst.cli.prepare_data.command', 'raw text, local or on S3, to tokenised MDS shards'),
    'compare': ('composer_tst.cli.compare.command', 'runs beside a baseline, as a table and a picture'),
    'recipe': ('composer_tst.cli.recipe', 'the configs of the published models'),
}


class CommandError(Exception):
    """A failure that the user can act on, in one sentence."""


def meant(key: str, known: Iterable[str]) -> str:
    """What a key that is not known may stand for, in brackets; empty if nothing is near."""
    nearest = difflib.get_close_matches(key, known, 1)
    return f' (did you mean {nearest[0]}?)' if nearest else ''


def usage() -> str:
    """What there is, in lines."""
    width = max(map(len, COMMANDS))
    lines = [f'  {name.ljust(width)}  {about}' for name, (_, about) in COMMANDS.items()]
    return '\n'.join(['composer-tst COMMAND ...; -h after a command tells more', '', *lines])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: The command and its arguments; those of the process if None.

    Returns:
        int: 2 if there is no such command or it cannot run here, 0 after help. A command ends the process itself.
    """
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ['help']
    if name == 'help' and rest:
        name, rest = rest[0], ['--help']
    if name in ('help', '--help', '-h'):
        print(usage())
        return 0
    if name == '--version':
        print(version('composer-tst'))
        return 0
    if name not in COMMANDS:
        print(f'error: {name} is no command{meant(name, COMMANDS)}: give one of {", ".join(COMMANDS)}', file=sys.stderr)
        return 2
    module, _ = COMMANDS[name]
    for stream in (sys.stdout, sys.stderr):  # names of files need not be in the terminal's encoding
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')
    try:
        app = importlib.import_module(module).app
        app(args=rest, prog_name=f'composer-tst {name}', help_option_names=['-h', '--help'])
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith('composer_tst'):
            raise
        package = error.name.partition('.')[0]
        print(f'error: composer-tst {name} needs {package}: pip install {_brings(package)}', file=sys.stderr)
        return 2
    return 0


def _brings(package: str) -> str:
    """What to install for a package that is missing: this one, from where it was installed, with the right extra."""
    # A checkout has metadata of its own, which does not say where what is installed came from.
    found = sorted(distributions(name='composer-tst'), key=lambda each: not each.read_text('direct_url.json'))
    if not found:
        return package
    installed = found[0]
    extra, wanted = '', package
    for requirement in installed.requires or ():
        needed = re.match(rf'({package}\b[^;]*).*extra == "(tools|spark)"', requirement)
        if needed:
            wanted, extra = f"'{needed[1].strip()}'", f'[{needed[2]}]'
            break
    origin = json.loads(installed.read_text('direct_url.json') or '{}').get('url', '')
    path = unquote(urlparse(origin).path)
    # The package is on no index: if neither checkout nor wheel is there any more, what is missing is.
    return f"'{path}{extra}'" if path and Path(path).exists() else wanted


if __name__ == '__main__':  # spark-submit composer_tst/cli/main.py prepare-data ...
    sys.exit(main())

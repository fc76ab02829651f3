"""The command ``composer-tst``: each of its commands is a module that is read when it is named."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.metadata import version

# Module that holds the command as `app`, and what it does.
COMMANDS = {
    'plan': ('composer_tst.cli.plan.command', 'steps, data, time and expected gain of a run before it is run'),
    'prepare-data': ('composer_tst.cli.prepare_data.command', 'raw text, local or on S3, to tokenised MDS shards'),
    'compare': ('composer_tst.cli.compare.command', 'runs beside a baseline, as a table and a picture'),
    'recipe': ('composer_tst.cli.recipe', 'the configs of the published models'),
}
# What the extra `tools` installs and a training run does without.
NEEDED = ('matplotlib', 'tqdm', 'typer')


class CommandError(Exception):
    """A failure that the user can act on, in one sentence."""


def usage() -> str:
    """What there is, in lines."""
    width = max(map(len, COMMANDS))
    lines = [f'  {name.ljust(width)}  {about}' for name, (_, about) in COMMANDS.items()]
    return '\n'.join(['composer-tst COMMAND ...; --help after a command tells more', '', *lines])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: The command and its arguments; those of the process if None.

    Returns:
        int: 2 if there is no such command or it cannot run here, 0 after help. A command ends the process itself.
    """
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ['--help']
    if name in ('--help', '-h'):
        print(usage())
        return 0
    if name == '--version':
        print(version('composer-tst'))
        return 0
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, 1)
        meant = f' (did you mean {nearest[0]}?)' if nearest else ''
        print(f'error: {name} is no command{meant}: give one of {", ".join(COMMANDS)}', file=sys.stderr)
        return 2
    missing = [package for package in NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        print(
            f"error: composer-tst {name} needs {', '.join(missing)}: pip install 'composer-tst[tools]'", file=sys.stderr
        )
        return 2
    module, _ = COMMANDS[name]
    importlib.import_module(module).app(args=rest, prog_name=f'composer-tst {name}')
    return 0


if __name__ == '__main__':  # spark-submit composer_tst/cli/main.py prepare-data ...
    sys.exit(main())

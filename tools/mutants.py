"""One-place changes of the core, each run through the tests that cover it: which of them live.

    python -m tools.mutants [--count 80] [--seed 0] [--only loader.py]

A fixed sample for a seed. A change that no test notices is printed with its line: either it is harmless, or a test is
missing.
"""

import argparse
import ast
import copy
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# All that is slow to import, so that each mutant, in a fork, imports the package alone.
import composer  # noqa: F401
import llmfoundry.models.mpt  # noqa: F401
import peft  # noqa: F401
import pytest
import streaming  # noqa: F401
import transformers  # noqa: F401

REPO = Path(__file__).parents[1]
PACKAGE = REPO / 'composer_tst'
TESTS = {
    'algorithm.py': ['used_again', 'plain_code', 'changed_settings', 'superposition', 'epoch_ends'],
    'compatibility.py': ['plain_code', 'stack', 'callbacks', 'compatibility', 'first_batch'],
    'loader.py': ['loader', 'epoch_ends', 'used_again', 'loaders_of_ones_own', 'iterations'],
    'ops/fold.py': ['fold', 'superposition', 'plain_code'],
    'schedule.py': ['schedule', 'changed_settings'],
    'settings.py': ['mistakes', 'schedule', 'settings', 'changed_settings', 'superposition'],
    'surgery.py': ['surgery', 'superposition', 'used_again', 'plain_code'],
}
COMPARISONS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
               ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}  # fmt: skip
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
             ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr}  # fmt: skip


def changes(tree: ast.Module) -> Iterator[tuple[int, Callable[[Any], None]]]:
    """The places of a module that can be changed, each as the number of its node and what changes it."""

    def set_operator(new: type) -> Callable:
        return lambda node: setattr(node, 'op', new())

    for number, node in enumerate(ast.walk(tree)):
        if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
            new = COMPARISONS[type(node.ops[0])]
            yield number, lambda node, new=new: node.ops.__setitem__(0, new())
        elif isinstance(node, ast.BoolOp):
            yield number, set_operator(ast.And if isinstance(node.op, ast.Or) else ast.Or)
        elif isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in OPERATORS:
            yield number, set_operator(OPERATORS[type(node.op)])
        elif isinstance(node, ast.If):
            yield number, lambda node: setattr(node, 'test', ast.UnaryOp(ast.Not(), node.test))
        elif isinstance(node, ast.Constant) and type(node.value) in (int, bool):
            yield (
                number,
                lambda node: setattr(node, 'value', not node.value if isinstance(node.value, bool) else node.value + 1),
            )
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield number, lambda node: setattr(node, 'value', ast.Constant(None))


def mutants(count: int, seed: int, only: str | None) -> Iterator[tuple[str, int, str, str]]:
    """A sample of ``(file, line, the line before, the whole file after)``."""
    places = []
    for name in TESTS if only is None else [only]:
        source = (PACKAGE / name).read_text()
        tree = ast.parse(source)
        places += [(name, source, tree, number, change) for number, change in changes(tree)]
    random.Random(seed).shuffle(places)
    for name, source, tree, number, change in places[:count]:
        changed = copy.deepcopy(tree)
        node = list(ast.walk(changed))[number]
        line = node.lineno  # pyright: ignore[reportAttributeAccessIssue]
        change(node)
        yield name, line, source.splitlines()[line - 1].strip(), ast.unparse(ast.fix_missing_locations(changed))


def test_files(name: str) -> list[str]:
    """The files of tests that cover a file of the package.

    Raises:
        SystemExit: If one that is named is not there, or is there twice.
    """
    found = {test: list((REPO / 'tests').glob(f'*/test_{test}.py')) for test in TESTS[name]}
    if unknown := [test for test, paths in found.items() if len(paths) != 1]:
        raise SystemExit(f'{name} is to be covered by {", ".join(unknown)}: name tests that there are, each once.')
    return [str(path) for (path,) in found.values()]


def check_tests(names: set[str]) -> None:
    """See that the package passes as it is: else every change would seem to be noticed.

    Raises:
        SystemExit: If it does not.
    """
    for name in sorted(names):
        if not lives(name, (PACKAGE / name).read_text()):
            raise SystemExit(f'The tests that cover {name} fail as it is: mend them first.')


def lives(name: str, source: str) -> bool:
    """Whether a package with that file passes the tests that cover it."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(PACKAGE, Path(folder) / 'composer_tst')
        (Path(folder) / 'composer_tst' / name).write_text(source)
        child = os.fork()
        if child == 0:
            sys.path[:0] = [folder]
            import composer_tst  # before pytest puts the repository first

            assert composer_tst.__file__.startswith(folder), composer_tst.__file__
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            files = test_files(name)
            # An endless loop is a death like others.
            import signal

            signal.alarm(600)
            os._exit(int(pytest.main(['-x', '-q', '-p', 'no:cacheprovider', *files]) != 0))
        return os.waitpid(child, 0)[1] == 0


def main() -> None:
    """Try a sample of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument('--count', type=int, default=80)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--only', choices=TESTS)
    arguments = parser.parse_args()
    for name in TESTS:
        test_files(name)
    sample = list(mutants(arguments.count, arguments.seed, arguments.only))
    check_tests({name for name, *_ in sample})
    tried = alive = 0
    for name, line, before, source in sample:
        tried += 1
        if lives(name, source):
            alive += 1
            print(f'lives: {name}:{line}: {before}', flush=True)
        elif tried % 10 == 0:
            print(f'{tried} tried, {alive} live', flush=True)
    print(f'{alive} of {tried} mutants live')


if __name__ == '__main__':
    main()

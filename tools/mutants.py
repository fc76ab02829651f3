"""One-place changes of the core, each run through the tests that cover it: which of them live.

    python -m tools.mutants [--count 80] [--seed 0] [--only loader.py]

A fixed sample for a seed. A change that no test notices is printed with its line: either it is harmless, or a test is
missing. The tests that run a line come first, the quickest before the others; only what passes these meets all tests.
"""

import argparse
import ast
import copy
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# All that is slow to import, so that each mutant, in a fork, imports the package alone.
import composer  # noqa: F401
import coverage
import llmfoundry.models.mpt  # noqa: F401
import peft  # noqa: F401
import pytest
import streaming  # noqa: F401
import transformers  # noqa: F401

REPO = Path(__file__).parents[1]
PACKAGE = REPO / 'composer_tst'
TESTS = {
    'algorithm.py': ['used_again', 'plain_code', 'changed_settings', 'superposition', 'epoch_ends', 'first_batch'],
    'compatibility.py': ['plain_code', 'stack', 'callbacks', 'compatibility', 'first_batch', 'mistakes'],
    'loader.py': ['loader', 'epoch_ends', 'used_again', 'loaders_of_ones_own', 'iterations', 'resumption'],
    'ops/fold.py': ['fold', 'superposition', 'plain_code'],
    'schedule.py': ['schedule', 'changed_settings', 'mistakes'],
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


class Watch:
    """A plugin of pytest: which tests run each line of a package, the quickest first."""

    def __init__(self, package: Path) -> None:
        self.package = package
        self.coverage = coverage.Coverage(data_file=None, source=[str(package)])
        self.seconds: dict[str, float] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Take what runs now as this test's."""
        self.coverage.switch_context(item.nodeid)
        begin = time.perf_counter()
        outcome = yield
        self.seconds[item.nodeid] = time.perf_counter() - begin
        return outcome

    def tests(self, name: str) -> dict[int, list[str]]:
        """The tests of each line of a file."""
        contexts = self.coverage.get_data().contexts_by_lineno(str(self.package / name))
        return {line: sorted(filter(None, tests), key=self.seconds.__getitem__) for line, tests in contexts.items()}


def covering(names: Collection[str]) -> dict[str, dict[int, list[str]]]:
    """Of each line of some files of the package, the tests that run it.

    Raises:
        SystemExit: If they fail as the package is: else every change would seem to be noticed.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / 'tests.json'
        if not passes(list(dict.fromkeys(itertools.chain(*map(test_files, names)))), {}, found):
            raise SystemExit('The tests fail as the package is: mend them first.')
        read = json.loads(found.read_text())
    return {name: {int(line): tests for line, tests in read[name].items()} for name in names}


def passes(tests: Sequence[str], changed: Mapping[str, str], found: Path | None = None) -> bool:
    """Whether a package, some of whose files are changed, passes the tests.

    Where ``found`` is given, write there which of them run each line.
    """
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder).resolve() / 'composer_tst'
        shutil.copytree(PACKAGE, package)
        for name, source in changed.items():
            (package / name).write_text(source)
        child = os.fork()
        if child == 0:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            sys.path[:0] = [str(package.parent)]
            watch = Watch(package)
            if found is None:
                signal.alarm(600)  # an endless loop is a death like others
            else:
                watch.coverage.start()
            import composer_tst  # before pytest puts the repository first

            assert Path(composer_tst.__file__).parent == package, composer_tst.__file__
            plugins = [] if found is None else [watch]
            failed = int(pytest.main(['-x', '-q', '-p', 'no:cacheprovider', *tests], plugins) != 0)
            if found is not None:
                watch.coverage.stop()
                found.write_text(json.dumps({name: watch.tests(name) for name in TESTS}))
            os._exit(failed)
        return os.waitpid(child, 0)[1] == 0


def lives(name: str, source: str, first: Sequence[str]) -> bool:
    """Whether a package with that file passes the tests that cover it, some of them first."""
    changed = {name: source}
    return (not first or passes(first, changed)) and passes(test_files(name), changed)


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
    tests = covering(sorted({name for name, *_ in sample}))
    tried = alive = 0
    for name, line, before, source in sample:
        tried += 1
        # All lines of a statement count as its first.
        run = max((other for other in tests[name] if other <= line), default=line)
        if lives(name, source, tests[name].get(run, [])):
            alive += 1
            print(f'lives: {name}:{line}: {before}', flush=True)
        if tried % 10 == 0:
            print(f'{tried} tried, {alive} live', flush=True)
    print(f'{alive} of {tried} mutants live')


if __name__ == '__main__':
    main()

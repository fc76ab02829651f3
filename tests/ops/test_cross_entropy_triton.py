"""The loss with its GPU kernels, on any machine: interpreted, and compiled for GPUs that need not be there."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
from packaging.version import Version

triton = pytest.importorskip('triton', reason='torch brings no Triton for this system')

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from composer_tst.ops import cross_entropy_triton  # noqa: E402

# What each argument is; None is the dtype of the logits.
LOGITS = {'logits': None, 'row_stride': 'i64', 'column_stride': 'i32'}
TARGETS = {'targets': '*i64', 'bag_stride': 'i32', 'target_stride': 'i32'}
WEIGHTS = {'weights': '*fp32', 'weight_stride': 'i32', 'ignore_index': 'i32'}
SIZES = {'vocabulary': 'i32', 'bag_size': 'i32'}
BLOCKS = {'BLOCK': 8192, 'BAG': 8}
OF_ROWS = {'lse': '*fp32', 'valid': '*fp32'}
GRADIENTS = {'grad_output': '*fp32', 'grad_output_stride': 'i32', 'divisor': '*fp32', 'grad': None}
KERNELS = {
    '_row_losses': {**LOGITS, **TARGETS, **WEIGHTS, 'losses': '*fp32', **OF_ROWS, **SIZES},
    '_logits_gradient': {**LOGITS, **TARGETS, **WEIGHTS, **OF_ROWS, **GRADIENTS, **SIZES},
}


def test_the_tests_of_the_loss_pass_with_the_kernels():
    if Version(triton.__version__) < Version('3.7') and Version(numpy.__version__) >= Version('2.4'):
        pytest.skip(f'the interpreter of Triton {triton.__version__} fails on NumPy 2.4: make test has an older NumPy')
    # A process of its own, as Triton decides on import. What the interpreter allocates says nothing of a GPU, and it
    # checks no targets.
    tests = [str(Path(__file__).with_name('test_cross_entropy.py')), '-k', 'not one_buffer and not outside_the']
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', *tests],
        env={**os.environ, 'TRITON_INTERPRET': '1'},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def compiled(name: str, signature: dict[str, str], constants: dict[str, Any], capability: int, **options: Any) -> Any:
    """A kernel for a GPU that need not be there, all pointers aligned as torch's are."""
    aligned: Any = {(i,): [['tt.divisibility', 16]] for i, kind in enumerate(signature.values()) if kind[0] == '*'}
    signature = signature | dict.fromkeys(constants, 'constexpr')
    source = ASTSource(getattr(cross_entropy_triton, name), signature, constants, aligned)
    return triton.compile(source, target=GPUTarget('cuda', capability, 32), options={'num_warps': 8, **options})


@pytest.mark.parametrize('capability', [80, 90, 100])
@pytest.mark.parametrize('strided', [False, True])
@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize('dtype', ['*fp32', '*bf16', '*fp16'])
@pytest.mark.parametrize('name', KERNELS)
def test_the_kernels_compile_for_gpus(name: str, dtype: str, weighted: bool, strided: bool, capability: int):
    constants: dict[str, Any] = {**BLOCKS} if strided else {**BLOCKS, 'column_stride': 1, 'target_stride': 1}
    if not weighted:
        constants['weights'] = None
    checks = {'debug': True, 'sanitize_overflow': False} if name == '_row_losses' else {}
    kernel = compiled(
        name, {key: kind or dtype for key, kind in KERNELS[name].items()}, constants, capability, **checks
    )
    assert kernel.asm['cubin']
    # Targets outside the vocabulary stop the run.
    assert ('__assertfail' in kernel.asm['ptx']) == bool(checks)
    # Nothing spills: each thread holds its 32 logits in registers.
    assert '.local' not in kernel.asm['ptx']
    registers, spilled = resources(kernel.asm['ptx'])
    assert spilled <= (4 if Version(triton.__version__) < Version('3.4') else 16)  # 3.9 spills more
    assert strided or registers <= 128  # so that a multiprocessor has two programs at least


def test_the_mean_compiles_for_gpus():
    for capability in (80, 90, 100):
        of_rows = {'losses': '*fp32', 'valid': '*fp32', 'mean': '*fp32', 'divisor': '*fp32', 'rows': 'i32'}
        assert compiled('_mean_of_rows', of_rows, {'BLOCK': 8192}, capability).asm['cubin']


def resources(ptx: str) -> tuple[int, int]:
    """Registers of a thread and bytes that it spills, as the assembler that Triton brings says."""
    assembler = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin' / 'ptxas-blackwell'  # the newer of two
    if not assembler.exists():
        pytest.skip(f'this Triton brings no {assembler.name}')
    target = re.search(r'^\.target (\w+)', ptx, re.M)
    assert target, ptx
    command = [str(assembler), '-v', f'--gpu-name={target[1]}', '/dev/stdin', '-o', '/dev/null']
    said = subprocess.run(command, input=ptx, capture_output=True, text=True, check=True).stderr
    registers, spilled = re.search(r'Used (\d+) registers', said), re.search(r'(\d+) bytes spill stores', said)
    assert registers, said
    assert spilled, said
    return int(registers[1]), int(spilled[1])

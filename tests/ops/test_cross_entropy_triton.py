"""The loss with its GPU kernels, on any machine: interpreted, and compiled for GPUs that need not be there."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from packaging.version import Version

triton = pytest.importorskip('triton', reason='torch brings no Triton for this system')

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from composer_tst.ops import cross_entropy_triton  # noqa: E402

STRIDED = {'logits': None, 'row_stride': 'i64', 'column_stride': 'i32'}
KERNELS = {
    '_log_sum_exp': {**STRIDED, 'result': '*fp32', 'vocabulary': 'i32'},
    '_scaled_softmax': {**STRIDED, 'lse': '*fp32', 'scale': '*fp32', 'result': None, 'vocabulary': 'i32'},
}


def test_the_tests_of_the_loss_pass_with_the_kernels():
    if Version(triton.__version__) < Version('3.7') and Version(numpy.__version__) >= Version('2.4'):
        pytest.skip(f'the interpreter of Triton {triton.__version__} fails on NumPy 2.4: make test has an older NumPy')
    # A process of its own, as Triton decides on import. What the interpreter allocates says nothing of a GPU, and
    # the kernels do not see the weights.
    tests = [str(Path(__file__).with_name('test_cross_entropy.py')), '-k', 'not one_buffer and not weights_count']
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', *tests],
        env={**os.environ, 'TRITON_INTERPRET': '1'},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize('capability', [80, 90, 100])
@pytest.mark.parametrize('dtype', ['*fp32', '*bf16', '*fp16'])
@pytest.mark.parametrize('name', KERNELS)
def test_the_kernels_compile_for_gpus(name: str, dtype: str, capability: int):
    signature = {argument: kind or dtype for argument, kind in KERNELS[name].items()} | {'BLOCK': 'constexpr'}
    source = ASTSource(getattr(cross_entropy_triton, name), signature, {'BLOCK': 8192})
    compiled = triton.compile(source, target=GPUTarget('cuda', capability, 32), options={'num_warps': 8})
    assert compiled.asm['cubin']
    # Nothing spills: each thread holds its 32 logits in registers.
    assert '.local' not in compiled.asm['ptx']

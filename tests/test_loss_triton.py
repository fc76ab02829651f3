"""The loss with its GPU kernels, on any machine: every test of the loss again, in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip('triton')


def test_the_tests_of_the_loss_pass_with_the_kernels():
    # A process of its own, as Triton decides on import.
    command = [sys.executable, '-m', 'pytest', '--noconftest', str(Path(__file__).with_name('test_loss.py'))]
    result = subprocess.run(
        command, env={**os.environ, 'TRITON_INTERPRET': '1'}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout

"""What a call launches on a device: torch's operators and Triton's kernels."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.library import CustomOpDef
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

# They allocate, or change what a tensor says of memory that is there.
_FREE = {'empty', 'empty_like', 'empty_strided', 'new_empty', 'new_empty_strided', 'detach', 'lift_fresh'}
_LAUNCHES = ('cudaLaunchKernel', 'cuLaunchKernel', 'cudaMemcpyAsync', 'cudaMemsetAsync')


def launches(call: Callable[[], object], device: torch.device, kernels: ModuleType | None = None) -> list[str]:
    """Names of what a call launches, in order, those that an operator of the package launches included.

    On a GPU they are the launches that the profiler sees. On a CPU they are the operators that would launch something
    on a GPU, and the kernels of a module, which Triton interprets.
    """
    if device.type == 'cuda':
        call()  # what compiles, does so now
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            call()
        return [event.name for event in profiler.events() or [] if event.name.startswith(_LAUNCHES)]
    with pytest.MonkeyPatch.context() as patch, _Launches() as seen:
        for name, kernel in vars(kernels).items() if kernels else ():
            if hasattr(kernel, 'rewrite'):  # as a function of Triton's interpreter has
                patch.setattr(kernels, name, _Noted(name, kernel, seen.names))
        call()
    return seen.names


class _Launches(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func._schema.name.split('::')
        if namespace == 'composer_tst':
            with self:  # into it
                return _definition(func._schema.name)._init_fn(*args, **(kwargs or {}))
        with self:  # `to`, `contiguous` and `reshape` say that they are views, and may copy
            parts = func.decompose(*args, **(kwargs or {}))
        if parts is not NotImplemented:
            return parts
        if not func.is_view and name not in _FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def _definition(name: str) -> CustomOpDef:
    from torch._library.custom_ops import OPDEFS

    return OPDEFS[name]


class _Noted:
    """A kernel whose launches are noted, and what the interpreter does for them is not."""

    def __init__(self, name: str, kernel: Any, names: list[str]):
        self._name, self._kernel, self._names = name, kernel, names

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            self._names.append(self._name)
            with _disable_current_modes():
                self._kernel[grid](*args, **options)

        return launch

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Call it from another kernel."""
        return self._kernel(*args, **options)

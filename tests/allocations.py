"""Counting what a computation allocates: every tensor with memory of its own, as operators return it."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Records (shape, dtype) of each fresh tensor within its `with` block; `given` tensors are not fresh."""

    def __init__(self, *given: torch.Tensor):
        super().__init__()
        self.tensors: list[tuple[tuple[int, ...], torch.dtype]] = []
        # The storages are kept, so that no address is used twice.
        self._seen = {tensor.untyped_storage()._cdata: tensor for tensor in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._seen:
                self._seen[tensor.untyped_storage()._cdata] = tensor
                self.tensors.append((tuple(tensor.shape), tensor.dtype))
        return result

    def above(self, elements: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Fresh tensors of more than this many elements."""
        return [(shape, dtype) for shape, dtype in self.tensors if torch.Size(shape).numel() > elements]

"""A model's first call on ids that stand for bags, watched.

The ids say nothing about tokens. A model that computes with them would train on nonsense. So :class:`FirstCall` makes
the model's first call twice.

1. The watched call has no gradient and is not compiled. :class:`_Watch` follows the ids, and refuses what reads or
   changes them. :func:`leaving_no_trace` puts back what the call has changed.
2. The second call is the real one.
"""

import collections
import contextlib
import copy
import functools
import random
import sys
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from composer_tst.ops.lookup import stands_for_bags


def version_of(ids: Tensor) -> int | None:
    """How often a tensor was changed in place. None for a tensor of inference mode, which does not count."""
    return None if ids.is_inference() else ids._version


# Models whose first call was watched: in training mode or not, and on ids that stand for bags or on plain ones.
_WATCHED: dict[tuple[bool, bool], weakref.WeakSet[nn.Module]] = collections.defaultdict(weakref.WeakSet)
_CALL = '_compiled_call_impl'


def is_watched(model: nn.Module, bags: bool) -> bool:
    """Whether a call of the model was watched in its present mode, training or evaluation."""
    return model in _WATCHED[model.training, bags]


def watch_again(model: nn.Module) -> None:
    """Watch the model's next call."""
    for watched in _WATCHED.values():
        watched.discard(model)


class CallStandIn:
    """Be called in place of a model. It stands where ``nn.Module.compile`` puts the compiled call.

    What stands there is not compiled, and copies of the model leave it out.

    Args:
        model: The model to stand in for, from now on.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.put_on()

    def put_on(self) -> None:
        """Stand in for the model's call, or for another stand-in."""
        self._had = vars(self.model).get(_CALL)
        vars(self.model)[_CALL] = self

    def take_off(self) -> None:
        """Put the model's call back as it was."""
        stands = vars(self.model).get(_CALL)
        if stands is self:
            del vars(self.model)[_CALL]
            if self._had is not None:
                vars(self.model)[_CALL] = self._had
        elif isinstance(stands, CallStandIn) and stands._had is self:  # blocks may be left in any order
            stands._had = self._had

    def call_on(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model without the stand-in."""
        return (self._had or self.model._call_impl)(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the model has no stand-in. Composer's models copy this attribute, torch's do not."""

    def __reduce__(self) -> Any:
        return type(None), ()


def take_stand_ins_off(model: nn.Module) -> None:
    """Put a model's call back as it was, wherever a pass has ended."""
    while isinstance(stand_in := vars(model).get(_CALL), CallStandIn):
        stand_in.take_off()


class FirstCall(CallStandIn):
    """Make a watched call before a model's first call on ids that stand for bags.

    Args:
        model: The model.
        given: The ids that the model gets.
        tables: The embeddings that look bags up, the input embedding first. None if ids are plain.

    Attributes:
        was_called: Whether the model was called on these ids.
        labels: Labels that the model may hand on but not read.
    """

    def __init__(self, model: nn.Module, given: Tensor, tables: list[nn.Embedding]):
        super().__init__(model)
        self._given, self._tables = given, tables
        self._version = version_of(given)
        self.was_called = False
        self.labels: list[Tensor] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model, the first time twice."""
        if torch.compiler.is_compiling():
            # The caller is being compiled, so nothing can be watched. `superposed.__exit__` raises.
            return self.model._call_impl(*args, **kwargs)
        self.take_off()
        try:
            again, copies = _copy_call(args, kwargs)
            ids = [value for value in copies.values() if isinstance(value, Tensor) and stands_for_bags(value)]
            ours = bool(ids) or id(self._given) in copies  # other calls in the block are on plain ids
            self.was_called |= ours
            unchanged = version_of(self._given) == self._version  # if they were changed, `superposed.__exit__` raises
            if ours and unchanged and not is_watched(self.model, bool(self._tables)):
                labels = [*self.labels, *(copies[id(label)] for label in self.labels if id(label) in copies)]
                watch = _Watch(self.model, self._tables, [self._given, *ids] if self._tables else [], labels)
                eager = torch.compiler.set_stance('force_eager')
                with torch.no_grad(), eager, leaving_no_trace(self.model), watch:
                    self.model(*again[0], **again[1])
                watch.check()
                _WATCHED[self.model.training, bool(self._tables)].add(self.model)
            return self.model(*args, **kwargs)
        finally:
            self.put_on()  # the next call in the block may be in the other mode


def _copy_call(args: Any, kwargs: Any) -> tuple[Any, dict[int, Any]]:
    """Copy a call's arguments, which a forward may change. The second result has each copy by its original's id."""
    copies: dict[int, Any] = {}
    try:  # a batch may be of a class of one's own
        with _DeepCopies():
            return copy.deepcopy((args, kwargs), copies), copies
    except Exception:  # a lock, say, cannot be copied: both calls are given it
        tensors = (value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor))
        copies = {id(value): value.detach().clone() for value in tensors}
        return tree_map(lambda value: copies.get(id(value), value), (args, kwargs)), copies


class _DeepCopies(TorchFunctionMode):
    """Have ``deepcopy`` copy tensors with a gradient function too, which torch refuses."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Copy a tensor, or call the function."""
        if func is Tensor.__deepcopy__:
            return args[1].setdefault(id(args[0]), args[0].detach().clone())
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def leaving_no_trace(model: nn.Module) -> Iterator[None]:
    """Run a pass on copies of what it may change, and give the modules their own values back.

    Copied are buffers, frozen weights, and the tensors, generators and containers among a module's attributes. What a
    module sets up in the pass is taken away again. Hooks and random numbers are put back. Under FSDP1 only buffers,
    numbers, hooks and random numbers are put back. No weight that autocast has cast is kept.

    Args:
        model: The model of the pass.
    """
    numpy: Any = sys.modules.get('numpy')
    states = random.getstate(), numpy and numpy.random.get_state()
    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    if torch.cuda.is_initialized():
        devices.add(torch.cuda.current_device())
    with torch.random.fork_rng(devices), warnings.catch_warnings(), contextlib.ExitStack() as after:
        warnings.simplefilter('ignore')  # the call that counts warns
        after.callback(_fill_again, parametrize._cache, dict(parametrize._cache))
        _lend_copies(model, after)
        try:
            yield
        finally:
            torch.clear_autocast_cache()  # casts without a gradient
            random.setstate(states[0])
            if numpy:
                numpy.random.set_state(states[1])


# The dicts of a module that hold its hooks.
_HOOKS = {name for name in vars(nn.Module()) if 'hooks' in name}


def _lend_copies(model: nn.Module, after: contextlib.ExitStack) -> None:
    """Give each module copies of what it has, and its own values back when ``after`` is left."""
    # The first call of a lazy module makes another module of it, for good.
    modules = [module for module in model.modules() if not isinstance(module, LazyModuleMixin)]
    fsdp = sys.modules.get('torch.distributed.fsdp')  # nothing is of FSDP if FSDP is not imported
    fsdp1, fsdp2 = (
        any(isinstance(module, getattr(fsdp, kind, ())) for module in modules)
        for kind in ('FullyShardedDataParallel', 'FSDPModule')
    )
    # Weights that are trained are not copied. Nor are the dicts in which FSDP2 exchanges sharded and whole weights.
    copies: dict[int, Any] = {id(weight): weight for weight in model.parameters() if weight.requires_grad}
    if fsdp2:
        copies |= {id(module._parameters): module._parameters for module in modules}
        for weight in model.parameters():
            if not weight.requires_grad:
                after.callback(_write_again, weight, weight.detach().clone())
    for module in modules:
        own = dict(vars(module))
        for name in _HOOKS & own.keys():  # a handle removes its hook from the dict itself, not from a copy
            copies[id(own[name])] = own[name]
            if not (fsdp2 and 'state_dict' in name):  # FSDP2 registers its own in its first call, for good
                after.callback(_fill_again, own[name], dict(own[name]))
        if fsdp1:  # it keeps views of its weights among the attributes of modules
            numbers = {name: value for name, value in own.items() if isinstance(value, (int, float))}
            after.callback(vars(module).update, numbers)
            after.callback(_fill_again, module._buffers, dict(module._buffers))
        else:
            after.callback(_fill_again, vars(module), own)
            vars(module).update({name: _copied(value, copies) for name, value in own.items()})
    for buffer in model.buffers() if fsdp1 else ():  # its first call casts them, for all calls that follow
        after.callback(_write_again, buffer, buffer.detach().clone())


def _fill_again(holder: dict[Any, Any], before: dict[Any, Any]) -> None:
    holder.clear()
    holder.update(before)


def _write_again(tensor: Tensor, before: Tensor) -> None:
    if tensor.shape == before.shape and tensor.dtype == before.dtype:
        tensor.data.copy_(before)  # views of it have the values again too
    else:
        tensor.data = before.to(tensor)


_HOLDERS = (dict, list, set, collections.deque)


def _copied(value: Any, copies: dict[int, Any]) -> Any:
    """Copy a tensor, a generator, or a container and what it holds. Any other value is given as it is.

    Args:
        value: The value.
        copies: The copies made so far, by the ids of what they are copies of.
    """
    if id(value) in copies:
        return copies[id(value)]
    copies[id(value)] = value
    try:
        if _is_generator(value) or (
            isinstance(value, Tensor) and 0 not in value.stride()  # nothing writes to an expanded one
        ):
            with _DeepCopies():
                copies[id(value)] = copy.deepcopy(value)
        elif isinstance(value, _HOLDERS):
            copied = copy.copy(value)  # of a class of one's own, it may be anything
            if type(copied) is type(value) and copied is not value and copied == value:
                copies[id(value)] = copied
                if not isinstance(value, set):
                    for key, each in value.items() if isinstance(value, dict) else enumerate(value):
                        copied[key] = _copied(each, copies)  # pyright: ignore
        elif isinstance(value, tuple):
            parts = [_copied(each, copies) for each in value]
            copies[id(value)] = getattr(value, '_make', type(value))(parts)
    except Exception:  # some kinds cannot be copied
        copies[id(value)] = value
    return copies[id(value)]


def _is_generator(value: Any) -> bool:
    numpy: Any = sys.modules.get('numpy')
    of_numpy = (numpy.random.Generator, numpy.random.RandomState) if numpy else ()
    return isinstance(value, (torch.Generator, random.Random, *of_numpy))


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Operators that move the values of their first argument, and read none.
_MOVES = _names("""
    view _unsafe_view reshape _reshape_alias alias detach clone contiguous _to_copy copy_ pin_memory lift_fresh
    lift_fresh_copy t transpose permute expand squeeze unsqueeze slice select narrow split split_with_sizes chunk unbind
    unfold as_strided roll repeat flip index index_select masked_select gather cat stack constant_pad_nd
""")
# Operators that only copy, as moving to a device does. No more may be done with labels, which are for the loss.
_COPIES = _names('alias detach clone _to_copy lift_fresh')
# Operators that ask for shapes.
_SHAPES = _names("""
    empty_like zeros_like ones_like full_like rand_like randn_like randint_like new_empty new_zeros new_ones new_full
    new_empty_strided is_same_size sym_size sym_numel sym_stride is_pinned record_stream
""")
# Methods that give a tensor's values to code that is not an operator of torch: numpy, Python, a Triton kernel.
_GIVES_VALUES_AWAY = _names('tolist numpy __array__ __dlpack__ data_ptr apply_ map_ map2_')
# Functions of transformers that may read ids. One warns of padding without a mask. The other counts positions, and
# takes no bag for padding.
_MAY_READ = ('warn_if_padding_and_no_attention_mask', 'create_position_ids_from_input_ids')


class _Watch(TorchDispatchMode):
    """Follow ids, and refuse what reads or writes them, except a lookup in a :class:`BagLookup`.

    A result that shares their storage, or is a copy of them, holds ids too. Labels are followed in the same way: a
    model may hand them on.

    Args:
        model: The model of the pass.
        tables: The embeddings that look bags up, the input embedding first. None if ids are plain.
        ids: Tensors of ids that stand for bags.
        labels: Tensors of labels.
    """

    def __init__(self, model: nn.Module, tables: list[nn.Embedding], ids: list[Tensor], labels: list[Tensor]):
        super().__init__()
        self._model, self._tables = model, tables
        self._held: dict[int, tuple[StorageWeakRef, str]] = {}
        self._looked_up = False
        self._methods = _WatchMethods(self)
        for tensor in ids:
            self._hold(tensor, 'ids')
        for tensor in labels:
            self._hold(tensor, 'labels')

    def __enter__(self) -> Any:
        for operator in torch._ops._higher_order_ops.values():
            if _Watch not in operator.python_key_table:  # flex_attention, say: a mode needs a rule for it
                operator.py_impl(_Watch)(_of_functions(operator))
        self._methods.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._methods.__exit__(*error)

    def check(self) -> None:
        """Refuse a pass in which no ids were looked up in the input embedding."""
        if self._tables and not self._looked_up:
            raise ValueError(
                f'{type(self._model).__name__} looks no ids of the batch up in its input embedding, so that it '
                'would not read bags: have its forward call that module on the ids, or on a view of them.'
            )

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run an operator, or refuse it."""
        kwargs = kwargs or {}
        name = func._schema.name.partition('::')[2]
        what = self.kind_held(args, kwargs)
        if what is None or name in _SHAPES:
            return func(*args, **kwargs)
        if func.namespace == 'composer_tst':
            self._looked_up |= any(frame.f_locals.get('self') is self._tables[0] for frame in _frames())
            return func(*args, **kwargs)
        if any(frame.f_code.co_name in _MAY_READ for frame in _frames()):
            return func(*args, **kwargs)
        writes = func._schema.is_mutable and self.kind_held(args[0]) is not None
        moved = 1 if name == 'copy_' else 0
        may = _MOVES if what == 'ids' else _COPIES
        if writes or name not in may or self.kind_held(args[moved + 1 :], kwargs) is not None:
            self.refuse(name, what, writes)
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                if leaf.dtype not in (torch.int64, torch.int32):
                    self.refuse(f'{name} to {leaf.dtype}', what)
                self._hold(leaf, what)
        return result

    def _hold(self, tensor: Tensor, what: str) -> None:
        for part in _parts(tensor):
            storage = part.untyped_storage()
            self._held[storage._cdata] = StorageWeakRef(storage), what

    def kind_held(self, *values: Any) -> str | None:
        """``ids`` or ``labels`` if there are such among the values, else None."""
        for value in tree_leaves(values):
            if isinstance(value, Tensor):
                for part in _parts(value):
                    reference, what = self._held.get(part.untyped_storage()._cdata, (None, None))
                    if reference is not None and not reference.expired():
                        return what
        return None

    def refuse(self, operator: str, what: str, writes: bool = False) -> None:
        """Raise a ValueError that names the module, the operator and the line."""
        here = __file__.rpartition('/')[0]
        frames = [frame for frame in _frames() if not frame.f_code.co_filename.startswith(here)]
        names = {id(module): name for name, module in self._model.named_modules()}
        module = next((f.f_locals['self'] for f in frames if id(f.f_locals.get('self')) in names), self._model)
        name, kind = names[id(module)], vars(module).get('superposed_class', type(module)).__name__
        owner = f'{name} ({kind})' if name else kind
        own = [frame for frame in frames if '/torch/' not in frame.f_code.co_filename]
        line = f', {own[0].f_code.co_filename.rpartition("/")[2]}:{own[0].f_lineno}' if own else ''
        if what == 'labels':
            raise ValueError(
                f'{owner} reads the labels by {operator}{line} in its forward, and a bag has several: have the forward '
                'return logits, and the loss read labels.'
            )
        done = 'changes the ids of a superposed batch' if writes else 'reads the ids of a superposed batch by value'
        raise ValueError(
            f'{owner} {done} by {operator}{line}. Each stands for a bag: check, change or derive tokens where batches '
            'are made, and have the model only look them up in an nn.Embedding as long as its input embedding.'
        )


class _WatchMethods(TorchFunctionMode):
    """Refuse methods that give the values of ids away. Ignore hooks on a tensor without a gradient."""

    def __init__(self, watch: _Watch):
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Call a method, or refuse it."""
        name = getattr(func, '__name__', '')
        if name in _GIVES_VALUES_AWAY and (what := self._watch.kind_held(args)):
            self._watch.refuse(name, what)
        if name in ('retain_grad', 'register_hook') and not args[0].requires_grad:  # a watched call has no gradient
            return RemovableHandle(collections.OrderedDict())
        return func(*args, **(kwargs or {}))


def _of_functions(operator: Any) -> Callable[..., Any]:
    """The rule for an operator that takes functions: refuse it if they have ids, else run it unwatched."""

    def rule(watch: _Watch, *args: Any, **kwargs: Any) -> Any:
        captured = [_captured(value) for value in tree_leaves((args, kwargs))]
        if what := watch.kind_held(args, kwargs, captured):
            watch.refuse(operator.name(), what)
        return operator(*args, **kwargs)

    return rule


def _captured(function: Any) -> list[Any]:
    """The values that a function holds: in its closure, as a partial, or in its object."""
    found: list[Any] = []
    waiting, seen = [function], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen or not callable(value) or isinstance(value, (type, Tensor)):
            continue
        seen.add(id(value))
        held: list[Any] = []
        for cell in getattr(value, '__closure__', None) or ():
            with contextlib.suppress(ValueError):  # the cell may be empty still
                held.append(cell.cell_contents)
        if isinstance(value, functools.partial):
            held += [value.func, *tree_leaves((value.args, value.keywords))]
        held += getattr(getattr(value, '__self__', value), '__dict__', {}).values()
        found += held
        waiting += held
    return found


def _parts(value: Any) -> list[Tensor]:
    """The tensors with a storage that a tensor consists of. For a DTensor it is the local tensor."""
    if is_traceable_wrapper_subclass(value):
        names, _ = value.__tensor_flatten__()
        return [part for name in names for part in _parts(getattr(value, name))]
    # Newer versions of torch count the mesh of a DTensor among its parts.
    return [value] if isinstance(value, Tensor) and value.layout == torch.strided else []


def _frames() -> Iterator[types.FrameType]:
    """The frames of the callers, the innermost first."""
    frame = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back

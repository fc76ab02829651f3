"""Bags in any module's input embedding, for one forward and backward pass.

A model is given one id for each bag, told by its value: ``BASE + k`` stands for the k-th bag of the batch. No table is
as long as ``BASE``, and int32 holds it. While a pass lasts, each embedding that the ids may be looked up in has
:class:`BagLookup` beneath its class, as FSDP2's ``fully_shard`` changes a module's class. It looks up an id that stands
for a bag as the mean of the bag's embeddings, and any other id as ever. So a view, a copy or a recomputation of the ids
comes out right, in eager and compiled models alike. Parameters, buffers and state-dict keys stay as they are.

The ids say nothing about tokens. A model that computes with them would train on nonsense, so the first call of a
model is made once more before it, and watched (:class:`_Watch`).
"""

import contextlib
import copy
import random
import sys
import types
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map

from composer_tst.ops.embedding import NOT_FOR_BAGS, bag_embedding

BASE = 1 << 30
# What a batch has for the loss and for counting, and a model's forward does not take.
_NOT_FOR_FORWARD = ('labels', 'bag_mask', 'total_tokens', 'loss_generating_tokens')


class superposed:
    """Give a model's input embedding bags to look up, for the forward and backward pass inside a ``with`` block.

    .. code-block:: python

        with superposed(model, folded) as inputs:
            logits = model(**inputs).logits
            loss = multi_hot_cross_entropy(logits.flatten(0, 1), folded['labels'].flatten(0, 1))
            loss.backward()  # inside: recomputed activations look bags up too

    The first time that a model is called in such a block, in training and in evaluation mode, it is called twice. The
    first call is watched: it refuses a model that reads the ids by value, or writes to them. It has no gradient and is
    not compiled. It changes no bit of the second call: random numbers (of torch, numpy and ``random``), buffers, and
    numbers that modules keep are put back. What it cannot see: a branch that is first taken later.

    Args:
        model: The model, wrapped, sharded, compiled or plain, as it is called in the block.
        folded: A batch as :func:`~composer_tst.functional.fold_batch` makes it: ``input_ids`` ``(B, P, s)``, or ``(B,
            P)`` for ``superpose: output``. With bags of one token all is plain.
        embedding: The module that the ids are looked up in. By default what ``get_input_embeddings`` gives, else the
            only ``nn.Embedding`` of the model.

    Yields:
        dict: What to call the model with, without labels: ``input_ids`` ``(B, P)``, ``attention_mask`` and the rest.

    Raises:
        ValueError: On entering, if the model has no such embedding, its embedding has an option that is not defined for
            bags, the batch is not folded, or another block is open on the model. In the block, if the model reads or
            changes the ids or does not look them up. On leaving, if the ids were changed in place or the model was not
            called.
    """

    def __init__(self, model: nn.Module, folded: Mapping[str, Any], embedding: nn.Embedding | None = None):
        _check_folded(folded)
        self._model = model
        self._ids: Tensor = folded['input_ids']
        self._mask: Tensor | None = folded.get('bag_mask')
        self._rest = {key: value for key, value in folded.items() if key not in (*_NOT_FOR_FORWARD, 'input_ids')}
        self._embedding = embedding
        self._tables: list[nn.Embedding] = []
        self._labels: list[Tensor] = []
        self._first_call: _FirstCall | None = None

    def __enter__(self) -> dict[str, Any]:
        self._given = self._ids if self._ids.ndim == 2 else self._ids[..., 0]
        if self._ids.ndim == 3 and self._ids.shape[2] > 1:
            embedding = find_embedding(self._model) if self._embedding is None else self._embedding
            self._tables = _tables(self._model, embedding)
            self._given = BASE + torch.arange(self._given.numel(), dtype=self._ids.dtype, device=self._ids.device)
            self._given = self._given.view(self._ids.shape[:2])
            mask = None if self._mask is None else self._mask.flatten(0, 1) != 0
            for table in self._tables:
                _swap(table, (self._ids.flatten(0, 1), mask))
        if (self._tables or self._ids.ndim == 2) and not _is_watched(self._model):
            self._first_call = _FirstCall(self._model, self._given, self._tables, self._labels)
        self._version = _version(self._given)
        return {'input_ids': self._given, **self._rest}

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> None:
        self.abandon()
        if kind is not None or not self._tables:
            return
        name = type(self._model).__name__
        if self._first_call is not None and not self._first_call.came:
            raise ValueError(
                f'superposed was given {name}, which was not called on the inputs of its block, or in a compiled '
                'function alone: give it the module that you call, and the first time call that outside of compiled '
                'functions.'
            )
        if self.changed:
            raise ValueError(
                f'The ids of a superposed batch were changed in place in the pass of {name}. Each stands for a bag: '
                'change tokens before the batch is folded.'
            )

    def follow_labels(self, labels: Tensor) -> None:
        """Refuse, in a watched call, a model that reads these labels, which it is given to hand on."""
        self._labels.append(labels)

    @property
    def changed(self) -> bool:
        """Whether the ids that the model was given were changed in place."""
        return _version(self._given) != self._version

    def abandon(self) -> None:
        """Leave the model as it was, wherever the pass has ended."""
        for table in self._tables:
            _give_back(table)
        if self._first_call is not None:
            self._first_call.stop_waiting()


def find_embedding(model: nn.Module) -> nn.Embedding:
    """The module that a model looks its token ids up in.

    It is what the outermost ``get_input_embeddings`` gives, else the model's only ``nn.Embedding``. Wrappers (FSDP,
    activation checkpointing, ``torch.compile``) are looked through.

    Raises:
        ValueError: If there is not exactly one.
    """
    found: nn.Module = model
    for module in model.modules():
        if hasattr(module, 'get_input_embeddings'):
            with contextlib.suppress(NotImplementedError):  # of a base class that does not know
                given = module.get_input_embeddings()  # pyright: ignore[reportCallIssue]
                found = given if isinstance(given, nn.Module) else model
                break
    embeddings = [module for module in found.modules() if isinstance(module, nn.Embedding)]
    if len(embeddings) != 1:
        raise ValueError(
            f'{type(model).__name__} has {len(embeddings)} nn.Embedding modules where its input embedding is looked '
            'for: define get_input_embeddings() on it to return the nn.Embedding that token ids go through.'
        )
    return embeddings[0]


def give_back(model: nn.Module) -> None:
    """Leave a model as it was, wherever a pass has ended, and watch its next one."""
    for module in model.modules():
        if isinstance(module, BagLookup):
            _give_back(module)
    waiting = vars(model).get(CALL)
    if isinstance(waiting, _FirstCall):
        waiting.stop_waiting()
    for watched in _WATCHED.values():
        watched.discard(model)


def _check_folded(folded: Any) -> None:
    """Refuse, with a ValueError, what fold_batch has not made."""
    ids, labels = (folded.get(key) if isinstance(folded, Mapping) else None for key in ('input_ids', 'labels'))
    if not isinstance(ids, Tensor):
        what = f'a {type(folded).__name__}' + (' without input_ids' if isinstance(folded, Mapping) else '')
    elif ids.ndim == 3 or (ids.ndim == 2 and isinstance(labels, Tensor) and labels.ndim == 3):
        if ids.dtype in (torch.int64, torch.int32):
            return
        what = f'input_ids of {ids.dtype}'
    else:
        what = f'input_ids of shape {tuple(ids.shape)}, which are not folded'
    raise ValueError(f'superposed was given {what}: give it a batch of int64 or int32 ids that fold_batch has made.')


def _tables(model: nn.Module, embedding: nn.Embedding) -> list[nn.Embedding]:
    """The embeddings that ids may be looked up in: those as long as the input embedding, which comes first."""
    if not isinstance(embedding, nn.Embedding):
        raise ValueError(
            f'embedding is a {type(embedding).__name__}: give the nn.Embedding that {type(model).__name__} looks token '
            'ids up in.'
        )
    found = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    tables = [embedding, *(e for e in found if e is not embedding and e.num_embeddings == embedding.num_embeddings)]
    for table in tables:
        if isinstance(table, BagLookup):
            raise ValueError(
                f'{type(model).__name__} is superposed already: leave one block of superposed before the next.'
            )
        for option in NOT_FOR_BAGS:
            if getattr(table, option):
                raise ValueError(
                    f'An embedding of {type(model).__name__} has {option}, which is not defined for bags: '
                    'make it without.'
                )
    return tables


def _version(ids: Tensor) -> int | None:
    """How often a tensor was changed in place; tensors of inference mode do not say."""
    return None if ids.is_inference() else ids._version


class _Table(NamedTuple):
    """What :func:`~composer_tst.functional.bag_embedding` asks of a module."""

    weight: Tensor
    padding_idx: int | None


class BagLookup(nn.Embedding):
    """The lookup of an embedding, beneath whatever else the embedding does, while ids may stand for bags.

    Attributes:
        bags: The token ids ``(T, s)``, and the attended tokens ``(T, s)`` or None if all are.
        plain_class: The embedding's class without this one.
    """

    bags: tuple[Tensor, Tensor | None]
    plain_class: type[nn.Embedding]

    def forward(self, input: Tensor) -> Tensor:
        """Mean embeddings ``input.shape + (d,)`` of the bags that ``input`` stands for, or of tokens themselves."""
        weight = self.weight  # asked for once: a parametrisation computes it anew each time
        if isinstance(weight, DTensor):  # FSDP has made the weight whole by now
            raise ValueError(
                'The input embedding is divided by tensor parallelism, and superposition needs it whole: leave it out '
                'of the layer plan.'
            )
        ids, mask = self.bags
        table: Any = _Table(weight, self.padding_idx)
        tokens = _bag_tokens(input, ids)
        if mask is None and weight.dtype in (torch.float16, torch.bfloat16):
            return bag_embedding(table, tokens)  # the float32 mean of one token, taken s times, is exactly that token
        return bag_embedding(table, tokens, _bag_mask(input, mask, ids.shape[1]))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """What is saved is the embedding itself."""
        del protocol  # those from 2 on compare the classes
        return _as_plain(self, lambda: self.__reduce_ex__(1))

    def __deepcopy__(self, memo: Any) -> Any:
        """A copy is the embedding itself."""
        return _as_plain(self, lambda: copy.deepcopy(self, memo))


@torch.library.custom_op('composer_tst::bag_tokens', mutates_args=())
def _bag_tokens(input: Tensor, ids: Tensor) -> Tensor:
    """Tokens ``input.shape + (s,)`` of the bags of ``ids`` ``(T, s)`` that are stood for; a plain id, ``s`` times."""
    bags = ids.to(input)[(input - BASE).clamp_(min=0)]
    return torch.where((input >= BASE)[..., None], bags, input[..., None])


@_bag_tokens.register_fake
def _(input: Tensor, ids: Tensor) -> Tensor:
    return input.new_empty(*input.shape, ids.shape[1])


@torch.library.custom_op('composer_tst::bag_mask', mutates_args=())
def _bag_mask(input: Tensor, mask: Tensor | None, size: int) -> Tensor:
    """Which of these tokens are attended: those of ``mask`` ``(T, s)``, or all; the first of a plain id."""
    stands = (input >= BASE)[..., None]
    first = torch.arange(size, device=input.device) == 0
    if mask is None:
        return stands | first
    return torch.where(stands, mask.to(input.device)[(input - BASE).clamp_(min=0)], first)


@_bag_mask.register_fake
def _(input: Tensor, mask: Tensor | None, size: int) -> Tensor:
    return input.new_empty(*input.shape, size, dtype=torch.bool)


# One class for each, so that a compiler compiles for it once.
_LOOKUP_CLASSES: dict[type[nn.Embedding], type[nn.Embedding]] = {nn.Embedding: BagLookup}


def _swap(table: Any, bags: tuple[Tensor, Tensor | None]) -> None:
    plain = type(table)
    if plain not in _LOOKUP_CLASSES:
        # Between the class and nn.Embedding, where its `super().forward` looks. What copies comes first.
        copies = {name: vars(BagLookup)[name] for name in ('__reduce_ex__', '__deepcopy__')}
        _LOOKUP_CLASSES[plain] = types.new_class(
            plain.__name__, (plain, BagLookup), exec_body=lambda n: n.update(copies)
        )
    table.__class__, table.plain_class, table.bags = _LOOKUP_CLASSES[plain], plain, bags


def _give_back(table: Any) -> None:
    if isinstance(table, BagLookup):
        plain = table.plain_class
        del table.plain_class, table.bags
        table.__class__ = plain  # pyright: ignore[reportAttributeAccessIssue]


def _as_plain(table: BagLookup, call: Callable[[], Any]) -> Any:
    """Do something to a table while it is itself."""
    bags = table.bags
    _give_back(table)
    try:
        return call()
    finally:
        _swap(table, bags)


# Models whose first call was watched, in training and in evaluation mode.
_WATCHED: dict[bool, weakref.WeakSet[nn.Module]] = {True: weakref.WeakSet(), False: weakref.WeakSet()}
# Where `nn.Module.compile` puts the compiled call. What stands there is never compiled itself, and copies leave it out.
CALL = '_compiled_call_impl'


def _is_watched(model: nn.Module) -> bool:
    return model in _WATCHED[model.training]


class _FirstCall:
    """What a model's next call on ids that stand for bags goes through: a watched call before it.

    Attributes:
        came: Whether there was such a call.
    """

    def __init__(self, model: nn.Module, given: Tensor, tables: list[nn.Embedding], labels: list[Tensor]):
        self._model, self._given, self._tables, self._labels = model, given, tables, labels
        self._version = _version(given)
        self.came = False
        self._wait()

    def _wait(self) -> None:
        self._had = vars(self._model).get(CALL)
        vars(self._model)[CALL] = self

    def stop_waiting(self) -> None:
        """Leave the model's call as it was."""
        if vars(self._model).get(CALL) is self:
            del vars(self._model)[CALL]
            if self._had is not None:
                vars(self._model)[CALL] = self._had

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the model is called as ever."""

    def __reduce__(self) -> Any:
        return type(None), ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # a function around the model: leaving the block refuses it
            return self._model._call_impl(*args, **kwargs)
        self.stop_waiting()
        try:
            again, copies = _copy_call(args, kwargs)
            ids = [value for value in copies.values() if isinstance(value, Tensor) and _stands_for_bags(value)]
            ours = bool(ids) or id(self._given) in copies  # else it is a call beside the pass, on plain ids
            self.came |= ours
            if ours and _version(self._given) == self._version:  # else leaving the block refuses it
                labels = [*self._labels, *(copies[id(label)] for label in self._labels if id(label) in copies)]
                watch = _Watch(self._model, self._tables, [self._given, *ids] if self._tables else [], labels)
                with torch.no_grad(), torch.compiler.set_stance('force_eager'), leaving_no_trace(self._model), watch:
                    self._model(*again[0], **again[1])
                watch.check()
                _WATCHED[self._model.training].add(self._model)
            return self._model(*args, **kwargs)
        finally:
            if not (self.came and _is_watched(self._model)):
                self._wait()


def _copy_call(args: Any, kwargs: Any) -> tuple[Any, dict[int, Any]]:
    """A call's arguments again, as a forward may change them, and the copies by the ids of what they are copies of."""
    leaves = (value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor))
    copies: dict[int, Any] = {id(value): value.detach().clone() for value in leaves}
    try:  # batches of a class of one's own, too
        again = copy.deepcopy((args, kwargs), copies)
    except Exception:  # a lock, say
        again = tree_map(lambda value: copies.get(id(value), value), (args, kwargs))
    return again, copies


def _stands_for_bags(value: Tensor) -> bool:
    """Whether a value holds ids that stand for bags."""
    return value.dtype in (torch.int32, torch.int64) and bool((value >= BASE).any())


@contextlib.contextmanager
def leaving_no_trace(model: nn.Module) -> Iterator[None]:
    """Put random numbers, buffers and modules' numbers back, and keep no weight that autocast has cast."""
    numpy: Any = sys.modules.get('numpy')
    states = random.getstate(), numpy and numpy.random.get_state()
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    # DDP notes whether a call has a gradient.
    numbers = [
        (module, {name: value for name, value in vars(module).items() if isinstance(value, (int, float))})
        for module in model.modules()
    ]
    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    if torch.cuda.is_initialized():
        devices.add(torch.cuda.current_device())
    with torch.random.fork_rng(devices), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # the call that counts warns
        try:
            yield
        finally:
            torch.clear_autocast_cache()  # casts without a gradient
            random.setstate(states[0])
            if numpy:
                numpy.random.set_state(states[1])
            for module, name, buffer, before in buffers:
                module._buffers[name] = buffer
                if buffer is not None and before is not None and not torch.equal(buffer, before.to(buffer)):
                    buffer.copy_(before)
            for module, before in numbers:
                vars(module).update(before)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Operators that move values of their first argument, and read none.
_MOVES = _names("""
    view _unsafe_view reshape _reshape_alias alias detach clone contiguous _to_copy copy_ pin_memory lift_fresh
    lift_fresh_copy t transpose permute expand squeeze unsqueeze slice select narrow split split_with_sizes chunk unbind
    unfold as_strided roll repeat flip index index_select masked_select gather cat stack constant_pad_nd
""")
# Those that make no more than a copy, as moving to a device does: labels are for the loss, whole.
_COPIES = _names('alias detach clone _to_copy lift_fresh')
# Operators that ask for shapes.
_SHAPES = _names("""
    empty_like zeros_like ones_like full_like rand_like randn_like randint_like new_empty new_zeros new_ones new_full
    new_empty_strided is_same_size sym_size sym_numel sym_stride is_pinned record_stream
""")
# Methods of a tensor that hand its values to other than torch's operators: numpy, a loop in Python, a Triton kernel.
_LEAVES = _names('tolist numpy __array__ __dlpack__ data_ptr')
# transformers: one warns of padding without a mask; one counts positions, where no bag is padding.
_HARMLESS = ('warn_if_padding_and_no_attention_mask', 'create_position_ids_from_input_ids')


class _Watch(TorchDispatchMode):
    """Follow ids, and refuse what reads them by value or writes to them, but for lookups in a :class:`BagLookup`.

    A result that shares their storage, or is a copy, holds ids too. Labels, which a model may be given to hand on, are
    followed in the same way.

    Args:
        model: Whose pass it is.
        tables: The embeddings that look bags up, the input embedding first; none if ids are plain.
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
            if _Watch not in operator.python_key_table:  # flex_attention and its kind: a mode must say what to do
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
        what = self.what(args, kwargs)
        if what is None or name in _SHAPES:
            return func(*args, **kwargs)
        if func.namespace == 'composer_tst':
            self._looked_up |= any(frame.f_locals.get('self') is self._tables[0] for frame in _frames())
            return func(*args, **kwargs)
        if any(frame.f_code.co_name in _HARMLESS for frame in _frames()):
            return func(*args, **kwargs)
        writes = func._schema.is_mutable and self.what(args[0]) is not None
        moved = 1 if name == 'copy_' else 0
        may = _MOVES if what == 'ids' else _COPIES
        if writes or name not in may or self.what(args[moved + 1 :], kwargs) is not None:
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

    def what(self, *values: Any) -> str | None:
        """Whether there are ids or labels among values."""
        for value in tree_leaves(values):
            if isinstance(value, Tensor):
                for part in _parts(value):
                    reference, what = self._held.get(part.untyped_storage()._cdata, (None, None))
                    if reference is not None and not reference.expired():
                        return what
        return None

    def refuse(self, operator: str, what: str, writes: bool = False) -> None:
        """Raise a ValueError that names the module, the operator and the line."""
        names = {id(module): name for name, module in self._model.named_modules()}
        owner, line = type(self._model).__name__, ''
        here = __file__.rpartition('/')[0]
        frames = [frame for frame in _frames() if not frame.f_code.co_filename.startswith(here)]
        for frame in frames:
            if id(frame.f_locals.get('self')) in names:
                module = frame.f_locals['self']
                name = names[id(module)]
                kind = vars(module).get('plain_class', type(module)).__name__
                owner = f'{name} ({kind})' if name else kind
                break
        for frame in frames:
            if '/torch/' not in frame.f_code.co_filename:
                line = f', {frame.f_code.co_filename.rpartition("/")[2]}:{frame.f_lineno}'
                break
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
    """Refuse what hands the values of ids to other than torch's operators."""

    def __init__(self, watch: _Watch):
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Call a method, or refuse it."""
        name = getattr(func, '__name__', '')
        if name in _LEAVES and (what := self._watch.what(args)):
            self._watch.refuse(name, what)
        return func(*args, **(kwargs or {}))


def _of_functions(operator: Any) -> Callable[..., Any]:
    """What a watch does with an operator that takes functions: it runs unwatched if they have no ids."""

    def rule(watch: _Watch, *args: Any, **kwargs: Any) -> Any:
        captured = [_captured(value) for value in tree_leaves((args, kwargs))]
        if what := watch.what(args, kwargs, captured):
            watch.refuse(operator.name(), what)
        return operator(*args, **kwargs)

    return rule


def _captured(function: Any) -> list[Any]:
    """The values that a function has of the functions around it, and those that they have."""
    cells = getattr(function, '__closure__', None) or ()
    values = [cell.cell_contents for cell in cells]
    return values + [_captured(value) for value in values]


def _parts(tensor: Tensor) -> list[Tensor]:
    """The tensors with a storage that a tensor is made of: of a DTensor, the local one."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return [part for name in names for part in _parts(getattr(tensor, name))]
    return [tensor] if tensor.layout == torch.strided else []


def _frames() -> Iterator[types.FrameType]:
    """The frames that have called, from the innermost."""
    frame = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back

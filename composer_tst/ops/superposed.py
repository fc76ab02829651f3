"""Bags in any module's input embedding, for one forward and backward pass.

A model is given one id for each bag, told by its value: ``BASE + k`` stands for the k-th bag of the batch. No
table is as long as ``BASE``, and int32 holds it. While a pass lasts, each embedding that the ids may be looked up in
has
:class:`BagLookup` beneath its class, as FSDP2's ``fully_shard`` changes a module's class. It looks up an id that stands
for a bag as the mean of the bag's embeddings, and any other id as ever. So a view, a copy or a recomputation of the ids
comes out right, in eager and compiled models alike. Parameters, buffers and state-dict keys stay as they are.

The ids say nothing about tokens. A model that computes with them would train on nonsense, so the first pass of a
model is run once more before it, and watched (:class:`_Watch`).
"""

import contextlib
import copy
import copyreg
import random
import sys
import types
import weakref
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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

    The first time that a model is called in such a block, it is called twice. The first call is watched: it refuses a
    model that reads the ids by value, or writes to them. It has no gradient, is not compiled, and leaves random
    numbers and buffers as they were, so that it changes no bit of the second. What it cannot see: ``ids.tolist()``,
    and a branch that is first taken later.

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

    def __enter__(self) -> dict[str, Any]:
        bags = self._ids.ndim == 3 and self._ids.shape[2] > 1
        self._given = self._ids if self._ids.ndim == 2 else self._ids[..., 0]
        if bags:
            embedding = self._embedding or find_embedding(self._model)
            self._tables = _tables(self._model, embedding)
            self._given = BASE + torch.arange(self._given.numel(), dtype=self._ids.dtype, device=self._ids.device)
            self._given = self._given.view(self._ids.shape[:2])
            mask = None if self._mask is None else self._mask.flatten(0, 1) != 0
            for table in self._tables:
                _swap(table, (self._ids.flatten(0, 1), mask))
        if self._tables or self._ids.ndim == 2:
            _watch_next_call(self._model, self._given, self._tables, self._labels)
        self._version = self._given._version
        return {'input_ids': self._given, **self._rest}

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> None:
        not_called = self.abandon()
        if kind is not None:
            return
        name = type(self._model).__name__
        if not_called and self._tables:
            raise ValueError(
                f'superposed was given {name}, which was not called in its block: give it the module that you call.'
            )
        if self.changed and self._tables:
            raise ValueError(
                f'The ids of a superposed batch were changed in place in the pass of {name}. Each stands for a bag: '
                'change tokens before the batch is folded.'
            )

    def follow_labels(self, labels: Tensor) -> None:
        """Refuse, in a watched pass, a model that reads these labels, which it is given to hand on."""
        self._labels.append(labels)

    @property
    def changed(self) -> bool:
        """Whether the ids that the model was given were changed in place."""
        return self._given._version != self._version

    def abandon(self) -> bool:
        """Leave the model as it was, wherever the pass has ended; whether the model was waited for and not called."""
        for table in self._tables:
            _give_back(table)
        return _stop_waiting(self._model)


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
                found = module.get_input_embeddings()  # pyright: ignore[reportCallIssue]
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
    _stop_waiting(model)
    _WATCHED.discard(model)


def _check_folded(folded: Any) -> None:
    ids = folded.get('input_ids') if isinstance(folded, Mapping) else None
    if not isinstance(ids, Tensor) or ids.ndim not in (2, 3):
        what = f'input_ids of shape {tuple(ids.shape)}' if isinstance(ids, Tensor) else type(folded).__name__
        raise ValueError(f'superposed was given {what}: give it a batch that fold_batch has made.')


def _tables(model: nn.Module, embedding: nn.Embedding) -> list[nn.Embedding]:
    """The embeddings that ids may be looked up in: those as long as the input embedding, which comes first."""
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
        if isinstance(self.weight, DTensor):  # FSDP has made the weight whole by now
            raise ValueError(
                'The input embedding is divided by tensor parallelism, and superposition needs it whole: leave it out '
                'of the layer plan.'
            )
        ids, mask = self.bags
        tokens = _bag_tokens(input, ids)
        if mask is None and self.weight.dtype in (torch.float16, torch.bfloat16):
            return bag_embedding(self, tokens)  # the float32 mean of one token, taken s times, is exactly that token
        return bag_embedding(self, tokens, _bag_mask(input, mask, ids.shape[1]))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy, and what is saved of it, is the embedding itself."""
        del protocol
        state = {key: value for key, value in vars(self).items() if key not in BagLookup.__annotations__}
        reconstruct: Any = getattr(copyreg, '_reconstructor')  # noqa: B009
        return reconstruct, (self.plain_class, object, None), state


@torch.library.custom_op('composer_tst::bag_tokens', mutates_args=())
def _bag_tokens(input: Tensor, ids: Tensor) -> Tensor:
    """Tokens ``input.shape + (s,)`` of the bags of ``ids`` ``(T, s)`` that are stood for; a plain id, ``s`` times."""
    bags = ids[(input - BASE).clamp_(min=0)]
    return torch.where((input >= BASE)[..., None], bags, input[..., None])


@_bag_tokens.register_fake
def _(input: Tensor, ids: Tensor) -> Tensor:
    return ids.new_empty(*input.shape, ids.shape[1])


@torch.library.custom_op('composer_tst::bag_mask', mutates_args=())
def _bag_mask(input: Tensor, mask: Tensor | None, size: int) -> Tensor:
    """Which of these tokens are attended: those of ``mask`` ``(T, s)``, or all; the first of a plain id."""
    stands = (input >= BASE)[..., None]
    first = torch.arange(size, device=input.device) == 0
    if mask is None:
        return stands | first
    return torch.where(stands, mask[(input - BASE).clamp_(min=0)], first)


@_bag_mask.register_fake
def _(input: Tensor, mask: Tensor | None, size: int) -> Tensor:
    return input.new_empty(*input.shape, size, dtype=torch.bool)


# One class for each, so that a compiler compiles for it once.
_LOOKUP_CLASSES: dict[type[nn.Embedding], type[nn.Embedding]] = {nn.Embedding: BagLookup}


def _swap(table: Any, bags: tuple[Tensor, Tensor | None]) -> None:
    plain = type(table)
    if plain not in _LOOKUP_CLASSES:
        # Between the class and nn.Embedding, where its `super().forward` looks.
        _LOOKUP_CLASSES[plain] = types.new_class(plain.__name__, (plain, BagLookup))
    table.__class__, table.plain_class, table.bags = _LOOKUP_CLASSES[plain], plain, bags


def _give_back(table: Any) -> None:
    if isinstance(table, BagLookup):
        plain = table.plain_class
        del table.plain_class, table.bags
        table.__class__ = plain  # pyright: ignore[reportAttributeAccessIssue]


# Models whose first pass was watched.
_WATCHED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class _FirstCall:
    """What a model's next call goes through: a watched call before it.

    It stands where ``nn.Module.compile`` puts the compiled call, so that it is never compiled itself, and copies of the
    model leave it out.
    """

    def __init__(self, model: nn.Module, given: Tensor, tables: list[nn.Embedding], labels: list[Tensor]):
        self._model, self._given, self._tables, self._labels = model, given, tables, labels
        self._version = given._version
        self.had = vars(model).get('_compiled_call_impl')

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _stop_waiting(self._model)
        if self._given._version != self._version:  # which is refused once the pass is over
            return self._model(*args, **kwargs)
        ids = [value for value in _tensors((args, kwargs)) if value is self._given or _stands_for_bags(value)]
        if not ids:
            try:  # a call beside the pass, on plain ids
                return self._model(*args, **kwargs)
            finally:
                _watch_next_call(self._model, self._given, self._tables, self._labels)
        copies: dict[int, Tensor] = {}
        again = _copied((args, kwargs), copies)
        ids = [self._given, *(copies[id(value)] for value in ids)] if self._tables else []
        labels = [*self._labels, *(copies[id(label)] for label in self._labels if id(label) in copies)]
        watch = _Watch(self._model, self._tables, ids, labels)
        with torch.no_grad(), torch.compiler.set_stance('force_eager'), _leaving_no_trace(self._model), watch:
            self._model(*again[0], **again[1])
        watch.check()
        _WATCHED.add(self._model)
        return self._model(*args, **kwargs)


def _watch_next_call(model: nn.Module, given: Tensor, tables: list[nn.Embedding], labels: list[Tensor]) -> None:
    if model not in _WATCHED:
        vars(model)['_compiled_call_impl'] = _FirstCall(model, given, tables, labels)


def _stop_waiting(model: nn.Module) -> bool:
    """Leave a model's call as it was; whether it was not called since."""
    waiting = vars(model).get('_compiled_call_impl')
    if not isinstance(waiting, _FirstCall):
        return False
    del vars(model)['_compiled_call_impl']
    if waiting.had is not None:
        vars(model)['_compiled_call_impl'] = waiting.had
    return True


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in the arguments of a call."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(each)


def _copied(value: Any, copies: dict[int, Tensor]) -> Any:
    """The arguments of a call, each tensor a copy, which is noted by the id of the tensor."""
    if isinstance(value, Tensor):
        return copies.setdefault(id(value), value.clone())
    if isinstance(value, MutableMapping):
        result = copy.copy(value)
        for key, each in value.items():
            result[key] = _copied(each, copies)
        return result
    if isinstance(value, (list, tuple)):
        values = [_copied(each, copies) for each in value]
        return type(value)(*values) if hasattr(value, '_fields') else type(value)(values)
    return value


def _stands_for_bags(value: Tensor) -> bool:
    """Whether a value holds ids that stand for bags."""
    return value.dtype in (torch.int32, torch.int64) and bool((value >= BASE).any())


@contextlib.contextmanager
def _leaving_no_trace(model: nn.Module) -> Iterator[None]:
    """Put random numbers and buffers back, and cache no weight that autocast has cast without a gradient."""
    numpy: Any = sys.modules.get('numpy')
    states = random.getstate(), numpy and numpy.random.get_state()
    buffers = [
        (module, name, b, b.clone())
        for module in model.modules()
        for name, b in module._buffers.items()
        if b is not None
    ]
    caches = torch.is_autocast_cache_enabled()
    with torch.random.fork_rng():
        try:
            torch.set_autocast_cache_enabled(False)
            yield
        finally:
            torch.set_autocast_cache_enabled(caches)
            random.setstate(states[0])
            if numpy:
                numpy.random.set_state(states[1])
            for module, name, buffer, before in buffers:
                module._buffers[name] = buffer.copy_(before)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Operators that move values of their first argument, and read none.
_MOVES = _names("""
    view _unsafe_view reshape _reshape_alias alias detach clone contiguous _to_copy copy_ pin_memory lift_fresh
    lift_fresh_copy t transpose permute expand squeeze unsqueeze slice select narrow split split_with_sizes chunk unbind
    unfold as_strided roll repeat flip index index_select gather cat stack constant_pad_nd
""")
# Those that make no more than a copy, as moving to a device does: labels are for the loss, whole.
_COPIES = _names('alias detach clone _to_copy lift_fresh')
# Operators that ask for shapes.
_SHAPES = _names("""
    empty_like zeros_like ones_like full_like rand_like randn_like new_empty new_zeros new_ones new_full
    new_empty_strided is_same_size sym_size sym_numel sym_stride is_pinned record_stream
""")
# A function of transformers reads ids to warn of padding without a mask, and does nothing else with them.
_HARMLESS = ('warn_if_padding_and_no_attention_mask',)


class _Watch(TorchDispatchMode):
    """Follow ids, and refuse what reads them by value or writes to them, but for lookups in a :class:`BagLookup`.

    A result that shares their storage, or is a copy, holds ids too. Labels are followed in the same way.

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
        for tensor in ids:
            self._hold(tensor, 'ids')
        for tensor in labels:
            self._hold(tensor, 'labels')

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
        what = next(filter(None, map(self._what, tree_leaves((args, kwargs)))), None)
        if what is None or name in _SHAPES:
            return func(*args, **kwargs)
        if func.namespace == 'composer_tst':
            self._looked_up |= any(frame.f_locals.get('self') is self._tables[0] for frame in _frames())
            return func(*args, **kwargs)
        writes = func._schema.is_mutable and (name != 'copy_' or self._what(args[0]) is not None)
        source = args[1] if name == 'copy_' else args[0]
        others = (args[2:] if name == 'copy_' else args[1:], kwargs)
        moves = (
            name in (_MOVES if what == 'ids' else _COPIES)
            and not any(map(self._what, tree_leaves(others)))
            and tree_leaves(source)
        )
        result_type = kwargs.get('dtype')
        if writes or not moves or result_type not in (None, torch.int32, torch.int64):
            if not any(frame.f_code.co_name in _HARMLESS for frame in _frames()):
                raise ValueError(self._refusal(name, what, writes))
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._hold(leaf, what)
        return result

    def _hold(self, tensor: Tensor, what: str) -> None:
        storage = tensor.untyped_storage()
        self._held[storage._cdata] = StorageWeakRef(storage), what

    def _what(self, value: Any) -> str | None:
        if type(value) not in (Tensor, nn.Parameter):
            return None
        reference, what = self._held.get(value.untyped_storage()._cdata, (None, None))
        return None if reference is None or reference.expired() else what

    def _refusal(self, operator: str, what: str, writes: bool) -> str:
        names = {id(module): name for name, module in self._model.named_modules()}
        owner, line = type(self._model).__name__, ''
        frames = [frame for frame in _frames() if frame.f_code.co_filename != __file__]
        for frame in frames:
            if id(frame.f_locals.get('self')) in names:
                module = frame.f_locals['self']
                name = names[id(module)]
                owner = f'{name} ({type(module).__name__})' if name else type(module).__name__
                break
        for frame in frames:
            if '/torch/' not in frame.f_code.co_filename:
                line = f', {frame.f_code.co_filename.rpartition("/")[2]}:{frame.f_lineno}'
                break
        if what == 'labels':
            return (
                f'{owner} reads the labels by {operator}{line} in its forward, and a bag has several: have the forward '
                'return logits, and the loss read labels.'
            )
        done = 'changes the ids of a superposed batch' if writes else 'reads the ids of a superposed batch by value'
        return (
            f'{owner} {done} by {operator}{line}. Each stands for a bag: check, change or derive tokens where batches '
            'are made, and have the model only look them up in an nn.Embedding as long as its input embedding.'
        )


def _frames() -> Iterator[types.FrameType]:
    """The frames that have called, from the innermost."""
    frame = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back

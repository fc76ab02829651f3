"""Pre-train on bags of tokens first, then on tokens, with Composer and llm-foundry.

`TokenSuperposition`, `WarmupStableDecayScheduler` and `PhaseCheckpointer` are imported on first use, because they need
Composer. `composer_tst.functional` needs torch alone.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from composer_tst.algorithm import TokenSuperposition
    from composer_tst.lr_scheduler import WarmupStableDecayScheduler
    from composer_tst.phase_checkpointer import PhaseCheckpointer

__all__ = ['PhaseCheckpointer', 'TokenSuperposition', 'WarmupStableDecayScheduler']

_MODULES = {
    'PhaseCheckpointer': 'phase_checkpointer',
    'TokenSuperposition': 'algorithm',
    'WarmupStableDecayScheduler': 'lr_scheduler',
}


def __getattr__(name: str) -> Any:
    if name == '__version__':
        return version('composer-tst')
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = globals()[name] = getattr(import_module(f'{__name__}.{_MODULES[name]}'), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

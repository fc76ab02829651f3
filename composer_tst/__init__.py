"""Token-Superposition Training for Composer and llm-foundry."""

from composer_tst.algorithm import TokenSuperposition
from composer_tst.phase_checkpointer import PhaseCheckpointer
from composer_tst.scheduler import WarmupStableDecayScheduler

__all__ = ['PhaseCheckpointer', 'TokenSuperposition', 'WarmupStableDecayScheduler']

"""The iso-loss speed-up.

How many times as many steps the baseline needs for the same validation loss: the baseline's steps at the TST run's
final validation loss, over the TST run's steps. The baseline's steps are those of the first point at which its
validation curve, linear between evaluations, is at or below that loss. A run's steps are those of its last
evaluation, and its final validation loss is the one measured there.

**Better than the baseline ever was.** If the TST run ends below everything the baseline measured, the baseline would
have had to train for longer than it did, by an amount its curve does not tell: no ratio is stated.

**What the number does not say.** A baseline with a schedule lowers its learning rate only at its own end, while the
TST run's final loss comes after its decay. Before its end the baseline's curve lies above what a shorter baseline,
with a decay of its own, would have reached by that step. So a speed-up read off there is an upper bound, in TST's
favour. Favouring neither: final losses at equal steps (the difference in the table), or the speed-up over a baseline
that ends at the crossing.
"""

from __future__ import annotations

import numpy as np

from composer_tst.cli.compare.events import Series


def first_crossing(curve: Series, level: float) -> float | None:
    """The first step at which ``curve``, linear between its points, is at or below ``level``; None if never.

    A curve that starts at or below ``level`` crosses at its first point. Points that are not finite are left out.
    """
    finite = np.isfinite(curve.values)
    curve = Series(curve.steps[finite], curve.values[finite])
    below = np.flatnonzero(curve.values <= level)
    if not len(below):
        return None
    after = int(below[0])
    if after == 0:
        return float(curve.steps[0])
    before = after - 1
    (x0, x1), (y0, y1) = curve.steps[[before, after]], curve.values[[before, after]]
    return float(x0 + (x1 - x0) * (y0 - level) / (y0 - y1))


def iso_loss_speedup(baseline: Series, run: Series) -> float | None:
    """Iso-loss speed-up of a run over a baseline, as this module's docstring defines it.

    Args:
        baseline: The baseline's validation loss; of one run, or a mean over seeds.
        run: The TST run's validation loss, likewise.

    Returns:
        float | None: Above 1 if the run needs fewer steps than the baseline; None if the baseline never came as low.
    """
    crossing = first_crossing(baseline, float(run.values[-1]))
    return None if crossing is None else float(crossing / run.steps[-1])

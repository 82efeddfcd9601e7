"""The share of wins that the student would have if its answers were as long as the other model's.

Source: length-controlled AlpacaEval (arXiv:2404.04475), section 3: a logistic regression of the verdicts on the quality
of the two models and on the difference in length, of which only the quality is kept. The paper's third term, the
difficulty of an instruction, needs the verdicts on many models and is left out. Two models alone decide here, so the
length's coefficient has a standard normal prior: without one it would be infinite if the longer answer always wins.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MOST_QUALITY = 30.0  # log-odds; bounds the estimate where every pair is won

Floats = NDArray[np.float64]


def length_controlled_win_rate(wins: Sequence[float], lengths: Sequence[tuple[int, int]]) -> float | None:
    """The win rate without the effect of length, between 0 and 1; None without pairs.

    Args:
        wins: of the student in each pair: 1, 0.5 for a tie, 0.
        lengths: of the other model's answer and the student's, tokens.
    """
    if not len(wins):
        return None
    won, sizes = np.asarray(wins, np.float64), np.asarray(lengths, np.float64)
    longer = sizes[:, 1] - sizes[:, 0]
    spread = longer.std()
    if not spread:  # nothing tells the effect of length from that of quality
        return float(won.mean())
    return float(_probability(_fit(won, np.tanh(longer / spread))[0]))


def _fit(won: Floats, longer: Floats) -> Floats:
    """The student's quality and the effect of length, in log-odds: the maximum of the posterior."""
    from scipy.optimize import minimize  # here, because it takes half a second and most processes do not need it

    def loss(weights: Floats) -> tuple[float, Floats]:
        odds = weights[0] + weights[1] * longer
        missed = _probability(odds) - won
        value = (np.logaddexp(0, odds) - won * odds).sum() + weights[1] ** 2 / 2
        return float(value), np.array([missed.sum(), missed @ longer + weights[1]])

    bounds = [(-MOST_QUALITY, MOST_QUALITY), (None, None)]
    fitted: Floats = minimize(loss, np.zeros(2), jac=True, method="L-BFGS-B", bounds=bounds).x
    return fitted


def _probability(odds: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-odds)))

"""LossSpikes: whether the loss of a run has jumped, compared with the losses before."""

import math
from collections import deque

LATEST = 7
"""Number of losses whose median is compared: up to three bad batches are no spike."""
BEFORE = 256
"""Number of losses before them that it is compared with, at most."""
WARM_UP = 64
"""Number of those, at least."""
DEVIATIONS = 3.2
"""Standard deviations above the mean that make a spike (Wortsman et al. 2023, arXiv 2304.13013,
appendix D)."""


class LossSpikes:
    """Looks for a jump in a series of losses.

    The loss has jumped if the median of the latest 7 lies more than 3.2 standard deviations above
    the mean of up to 256 before them (Wortsman et al. 2023, arXiv 2304.13013, appendix D), and
    above all of these. Of losses that differ by noise alone, however heavy its tails, 4 of 7 are
    above the 256 before them once in six million times; a loss that rises slowly is less than two
    standard deviations above its mean; one that falls is never above what it was.

    Example:
        >>> spikes = LossSpikes()
        >>> any(spikes.is_spike(1.0 + step % 3) for step in range(100))
        False
        >>> [spikes.is_spike(9.0) for _ in range(4)]
        [False, False, False, True]
    """

    def __init__(self) -> None:
        self._latest: deque[float] = deque()
        self._before: deque[float] = deque(maxlen=BEFORE)

    def is_spike(self, loss: float) -> bool:
        """Adds a loss, and returns whether the losses have jumped.

        Args:
            loss: A finite number.
        """
        self._latest.append(loss)
        if len(self._latest) > LATEST:
            self._before.append(self._latest.popleft())
        if len(self._before) < WARM_UP:
            return False
        level = sorted(self._latest)[LATEST // 2]
        # The threshold takes longer, and is rarely needed.
        return level > max(self._before) and level > self._threshold()

    def _threshold(self) -> float:
        mean = math.fsum(self._before) / len(self._before)
        squares = math.fsum((each - mean) ** 2 for each in self._before)
        return mean + DEVIATIONS * math.sqrt(squares / len(self._before))

"""Where numbers stand on an axis, and which of them are written beside it."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

TICKS = 6
"""How many an axis has at most."""
SMALLEST_SPAN = 1e-9
"""As a share of the larger end; between ends that are closer there is nothing to see."""
LARGEST = 1e300
"""What is drawn at all; the arithmetic of axes has to stay finite."""


@dataclass(frozen=True)
class Tick:
    """A number that is written beside an axis."""

    place: float
    text: str


@dataclass(frozen=True)
class Scale:
    """An axis.

    Attributes:
        low: The number at its beginning.
        high: The number at its end, above `low`.
        first: Where its beginning stands, in pixels.
        last: Where its end stands.
        is_log: Whether equal ratios are equally far apart, rather than equal differences.

    Example:
        >>> scale = Scale(1e-4, 1e-2, 0.0, 100.0, is_log=True)
        >>> scale.place(1e-3)
        50.0
        >>> [tick.text for tick in scale.ticks()]
        ['1e-4', '3e-4', '1e-3', '3e-3', '0.01']
    """

    low: float
    high: float
    first: float
    last: float
    is_log: bool

    def place(self, value: float) -> float:
        """Where a number stands; what lies outside, at the nearer end."""
        if not self.low < value:
            return self.first
        if not value < self.high:
            return self.last
        share = (self._along(value) - self._along(self.low)) / self._span
        return round(self.first + share * (self.last - self.first), 1)

    def numbers(self) -> list[float]:
        """Round numbers between the ends, few enough to be read."""
        numbers = _decades(self.low, self.high) if self.is_log else []
        return numbers if len(numbers) > 2 else _rounds(self.low, self.high)

    def ticks(self) -> list[Tick]:
        """The round numbers where they stand."""
        numbers = self.numbers()
        texts = _texts(numbers, self.is_log)
        return [Tick(self.place(value), text) for value, text in zip(numbers, texts, strict=True)]

    @property
    def _span(self) -> float:
        return self._along(self.high) - self._along(self.low)

    def _along(self, value: float) -> float:
        return math.log10(value) if self.is_log else value


def scale_of(
    values: Iterable[float], first: float, last: float, *, is_log: bool, room: float = 0.06
) -> Scale:
    """An axis on which all of some numbers stand.

    Args:
        values: The numbers, above 0 if it is logarithmic.
        first: Where its beginning stands, in pixels.
        last: Where its end stands.
        is_log: Whether it is logarithmic.
        room: What is left free at each end, as a share of what is between.

    Example:
        >>> scale = scale_of([2.0, 4.0], 0.0, 100.0, is_log=False, room=0.5)
        >>> scale.low, scale.high
        (1.0, 5.0)
    """
    smallest = 1 / LARGEST if is_log else -LARGEST
    drawn = [each for each in values if smallest < each < LARGEST] or [1.0]
    along = [math.log10(each) if is_log else each for each in drawn]
    low, high = min(along), max(along)
    largest = max(abs(low), abs(high))
    free = (high - low) * room
    if high - low <= SMALLEST_SPAN * largest or high - low < 1 / LARGEST:
        free = 0.5 if is_log else 0.1 * largest or 1.0
    low, high = low - free, high + free
    if is_log:
        most = math.log10(LARGEST)
        low, high = 10 ** max(low, -most), 10 ** min(high, most)
    return Scale(low, high, first, last, is_log)


def _decades(low: float, high: float) -> list[float]:
    """Round numbers between two that are above 0, evenly on a logarithmic axis."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits, every in (((1, 2, 5), 1), ((1, 3), 1), *(((1,), each) for each in range(1, 700))):
        numbers = [
            float(f"{digit}e{exponent}")
            for exponent in exponents
            if exponent % every == 0
            for digit in digits
        ]
        inside = [each for each in numbers if low <= each <= high]
        if len(inside) <= TICKS:
            break
    return inside


def _rounds(low: float, high: float) -> list[float]:
    """Round numbers between two, equally far apart."""
    exponent = math.floor(math.log10((high - low) / TICKS))
    for factor in (1, 2, 5, 10, 20, 50):
        step = float(f"{factor}e{exponent}")
        if step > 0 and (high - low) / step <= TICKS:
            break
    first = math.ceil(low / step)
    return [
        float(f"{(first + place) * step:.14g}")
        for place in range(TICKS + 1)
        if (first + place) * step <= high
    ]


def _texts(numbers: Sequence[float], is_log: bool) -> list[str]:
    """Numbers with as many digits as tell them apart; decades as powers of ten."""
    for digits in range(1, 16):
        texts = [f"{each:.{digits}g}" for each in numbers]
        if [float(each) for each in texts] == list(numbers):
            break
    powers = [_power(f"{each:.{digits - 1}e}") for each in numbers]
    return [
        power if "e" in text or (is_log and len(power) < len(text) and abs(each) < 1) else text
        for each, text, power in zip(numbers, texts, powers, strict=True)
    ]


def _power(text: str) -> str:
    """`1.50e-04` as `1.5e-4`."""
    number, _, exponent = text.partition("e")
    digits = number.rstrip("0").rstrip(".") if "." in number else number
    return f"{digits}e{int(exponent)}"

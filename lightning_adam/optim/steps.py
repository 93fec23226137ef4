"""Which steps of an optimizer were taken, and which were skipped."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_adam.statistics.foreign import takes_gradients
from lightning_adam.statistics.sharding import holder


def steps_taken(optimizer: Optimizer) -> int:
    """The steps that an optimizer's state has seen.

    Example:
        >>> import torch
        >>> steps_taken(torch.optim.Adam([torch.zeros(1, requires_grad=True)]))
        0
    """
    counted = [*holder(optimizer).state.values(), *optimizer.param_groups]
    # heavyball has a count in its groups while it steps, and None in between.
    counts = (each.get("step") for each in counted)
    return int(max((float(each) for each in counts if each is not None), default=0))


def next_due(steps: int, interval: int) -> int:
    """The first optimizer step after `steps` that is 1 or divisible by an interval.

    Example:
        >>> next_due(0, 50), next_due(1, 50), next_due(50, 50)
        (1, 50, 100)
    """
    return (steps // interval + 1) * interval if steps else 1


class StepCounter:
    """Counts an optimizer's steps, taken and skipped, in its own hooks.

    A step is skipped if the GradScaler met an inf, or if no parameter has a gradient, as after a
    `training_step` that returned None. A fused step that gets the scaler's flag skips on the
    device: until `settle`, which waits for the device, it counts as taken.

    Args:
        optimizer: The raw torch optimizer.
        is_sharded: Whether a rank may lack gradients because it holds no part of what has one
            (default: False). Then a step without any counts as taken, on all ranks.

    Example:
        >>> import torch
        >>> weight = torch.ones(2, requires_grad=True)
        >>> adam = torch.optim.Adam([weight])
        >>> counter = StepCounter(adam)
        >>> counter.attach()
        >>> adam.step()
        >>> weight.sum().backward()
        >>> adam.step()
        >>> counter.taken, counter.skipped
        (1, 1)
    """

    def __init__(self, optimizer: Optimizer, is_sharded: bool = False) -> None:
        self.taken = steps_taken(optimizer)
        self.skipped = 0
        self.flags: Tensor | None = None
        """How many steps the device has skipped; never changed in place. None if no step got a
        flag."""
        self.learned = 0
        """How many of them are known here, and counted as skipped."""
        self.flag: Tensor | None = None
        """Whether the device has skipped the last step; None if it could not."""
        self._optimizer = optimizer
        self._is_sharded = is_sharded
        self._depth = 0
        self._is_expected = False
        self._seen: Tensor | None = None
        self._hooks: list[RemovableHandle] = []

    @property
    def told_by_device(self) -> tuple[Tensor, ...]:
        """How many steps the device has skipped, and whether it skipped the last one too.

        Empty if no step got a flag.
        """
        if self.flags is None:
            return ()
        return self.flags, torch.zeros_like(self.flags) if self.flag is None else self.flag

    @property
    def skipped_at_all(self) -> Tensor | float:
        """The steps skipped so far, those too that are known to the device alone."""
        return self.skipped if self.flags is None else self.flags + (self.skipped - self.learned)

    def attach(
        self,
        after_step: Callable[[], None] = lambda: None,
        guard: Callable[[Callable[[], None]], None] = lambda hook: hook(),
    ) -> None:
        """Begins to count.

        Args:
            after_step: Called after each step that was not seen to be skipped (default: nothing).
            guard: What calls the hooks (default: nothing is between them and the optimizer).
        """

        def leave() -> None:
            if self._is_taken():
                after_step()

        # A compiled step would be compiled anew at every count.
        enter_eagerly = torch.compiler.disable(lambda *_: guard(self._enter))  # type: ignore[no-untyped-call]
        leave_eagerly = torch.compiler.disable(lambda *_: guard(leave))  # type: ignore[no-untyped-call]
        self._hooks = [
            self._optimizer.register_step_pre_hook(enter_eagerly),
            self._optimizer.register_step_post_hook(leave_eagerly),
        ]

    def expect(self) -> None:
        """Lightning is about to step; a GradScaler may still decide not to call the optimizer."""
        self.skipped += self._is_expected
        self._is_expected = True

    def close(self) -> None:
        """Between two batches: a step that was expected and has not come was skipped."""
        self.skipped += self._is_expected
        self._is_expected = False
        # A step that raised has left its mark.
        self._depth = 0

    def settle(self) -> None:
        """Between two batches: counts what the device has skipped, and waits for it if it must."""
        self.close()
        if self.flags is not None:
            self.learn(int(self.flags))

    def learn(self, flags: int) -> None:
        """Counts what the device has skipped, as `flags` said after some step."""
        news = max(flags - self.learned, 0)
        self.taken -= news
        self.skipped += news
        self.learned += news

    def remove(self) -> None:
        """Lets go of the optimizer."""
        for hook in self._hooks:
            hook.remove()

    def _enter(self) -> None:
        # A subclass may call `super().step()`, which fires the hooks too.
        self._depth += 1

    def _is_taken(self) -> bool:
        """Counts the step that has just ended."""
        self._depth -= 1
        if self._depth > 0:
            return False
        self._is_expected = False
        if not (self._is_sharded or self._has_gradient() or takes_gradients(self._optimizer)):
            self.skipped += 1
            return False
        self.taken += 1
        self.flag = getattr(self._optimizer, "found_inf", None)
        if self.flag is not None:
            self.flags = self.flag if self.flags is None else self.flags + self.flag
        return True

    def _has_gradient(self) -> bool:
        # The parameter that had one last time most often has one again.
        if self._seen is None or self._seen.grad is None:
            groups = self._optimizer.param_groups
            parameters = (parameter for group in groups for parameter in group["params"])
            self._seen = next((each for each in parameters if each.grad is not None), None)
        return self._seen is not None

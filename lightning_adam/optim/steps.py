"""Counts the steps that an optimizer took, and those that were skipped."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_adam.statistics.foreign import takes_gradients
from lightning_adam.statistics.sharding import unwrap_optimizer


def steps_taken(optimizer: Optimizer) -> int:
    """Returns the number of steps in an optimizer's state.

    Example:
        >>> import torch
        >>> steps_taken(torch.optim.Adam([torch.zeros(1, requires_grad=True)]))
        0
    """
    counted = [*unwrap_optimizer(optimizer).state.values(), *optimizer.param_groups]
    # heavyball counts in its groups, and sets the count to None between steps.
    counts = (each.get("step") for each in counted)
    return int(max((float(each) for each in counts if each is not None), default=0))


def next_due(steps: int, interval: int) -> int:
    """Returns the first optimizer step after `steps` that is 1 or divisible by an interval.

    Example:
        >>> next_due(0, 50), next_due(1, 50), next_due(50, 50)
        (1, 50, 100)
    """
    return (steps // interval + 1) * interval if steps else 1


class StepCounter:
    """Counts the steps of an optimizer, taken and skipped, in the optimizer's own hooks.

    A step is skipped if the GradScaler finds an inf, or if no parameter has a gradient, for example
    after a `training_step` that returned None. A fused step that receives the scaler's flag is
    skipped on the device. It counts as taken until `resolve_skipped`, which waits for the device.

    Args:
        optimizer: The torch optimizer.
        is_sharded: Whether a rank may hold no part of the parameters that have gradients (default:
            False). If so, a step without gradients counts as taken.

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
        """Number of steps that the device skipped; None without flags. Never changed in place."""
        self.applied_flags = 0
        """Number of these steps that the host already counts as skipped."""
        self.flag: Tensor | None = None
        """Whether the device skipped the last step; None without a flag."""
        self._optimizer = optimizer
        self._reported = self.taken
        self._is_sharded = is_sharded
        self._depth = 0
        self._is_expected = False
        self._last_with_grad: Tensor | None = None
        self._hooks: list[RemovableHandle] = []

    @property
    def found_inf_flags(self) -> tuple[Tensor, ...]:
        """The number of steps that the device skipped, and whether it skipped the last one.

        Empty without flags.
        """
        if self.flags is None:
            return ()
        return self.flags, torch.zeros_like(self.flags) if self.flag is None else self.flag

    @property
    def all_skipped(self) -> Tensor | float:
        """The number of skipped steps, including those that only the device has counted."""
        return (
            self.skipped if self.flags is None else self.flags + (self.skipped - self.applied_flags)
        )

    def attach(
        self,
        after_step: Callable[[], None] = lambda: None,
        guard: Callable[[Callable[[], None]], None] = lambda hook: hook(),
    ) -> None:
        """Registers the hooks.

        Args:
            after_step: Called after each step that is not known to be skipped (default: nothing).
            guard: Calls the hooks (default: they are called directly).
        """

        def leave() -> None:
            if self._is_taken():
                after_step()

        self._hooks = [
            self._optimizer.register_step_pre_hook(_eager_hook(self._enter, guard)),
            self._optimizer.register_step_post_hook(_eager_hook(leave, guard)),
        ]

    def expect(self) -> None:
        """Announces a step, which a GradScaler may still skip without calling the optimizer."""
        self.skipped += self._is_expected
        self._is_expected = True

    def close(self) -> None:
        """Counts an announced step that was not taken as skipped. Call it between two batches."""
        self.skipped += self._is_expected
        self._is_expected = False
        # A step that raised an error did not run its post hook.
        self._depth = 0

    def resolve_skipped(self) -> None:
        """Counts the steps that the device skipped; waits for it. Call it between two batches."""
        self.close()
        if self.flags is not None:
            self.apply_device_skips(int(self.flags))

    def has_advanced(self) -> bool:
        """Returns whether a step was taken since the last call. Call it between two batches."""
        self.resolve_skipped()
        has_advanced = self.taken != self._reported
        self._reported = self.taken
        return has_advanced

    def restart(self) -> None:
        """Continues the count from the optimizer's state, after it was loaded."""
        self.taken = self._reported = steps_taken(self._optimizer)

    def apply_device_skips(self, flags: int) -> None:
        """Counts the steps that the device skipped, given the value of `flags` after any step."""
        new = max(flags - self.applied_flags, 0)
        self.taken -= new
        self.skipped += new
        self.applied_flags += new

    def remove(self) -> None:
        """Removes the hooks."""
        for hook in self._hooks:
            hook.remove()

    def _enter(self) -> None:
        # A subclass may call `super().step()`, which runs the hooks again.
        self._depth += 1

    def _is_taken(self) -> bool:
        """Counts the step that just ended; returns whether it may have been taken."""
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
        # The parameter that had a gradient last time usually has one again.
        if self._last_with_grad is None or self._last_with_grad.grad is None:
            groups = self._optimizer.param_groups
            parameters = (parameter for group in groups for parameter in group["params"])
            self._last_with_grad = next(
                (each for each in parameters if each.grad is not None), None
            )
        return self._last_with_grad is not None


def _eager_hook(
    hook: Callable[[], None], guard: Callable[[Callable[[], None]], None]
) -> Callable[..., None]:
    """Returns a hook that torch.compile does not trace, as it would recompile at each count."""
    outside_graph = torch.compiler.disable(guard)  # type: ignore[no-untyped-call]

    def call(*_: object) -> None:
        # Outside of compiled code, the wrapper would take longer than the hook.
        if torch.compiler.is_compiling():
            outside_graph(hook)
        else:
            guard(hook)

    return call

"""What others look at in Adam, written anew after their sources, in one process."""

import math
from collections.abc import Iterable
from typing import Any

import torch
import wandb
from torch import Tensor, nn

from benchmarks.monitor_cost.tensors import Named


@torch.no_grad()
def composer(named: Named, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """What Composer's OptimizerMonitor tells of its DecoupledAdamW at the end of a batch.

    The L2 norms of each parameter, gradient, first moment and update, of which the update is made
    anew from the state, then the norm of all gradients; one `.item()` for each number. As there,
    the hyperparameters of the first group stand for all, and the decay, which is not scaled by lr,
    has the sign that it has there.
    (mosaicml/composer: composer/callbacks/optimizer_monitor.py, report_per_parameter_metrics in
    composer/optim/decoupled_weight_decay.py)
    """
    group = optimizer.param_groups[0]
    beta1, beta2 = group["betas"]
    norms: dict[str, Tensor] = {}
    for name, parameter in named:
        state = optimizer.state[parameter]
        step = state["step"].item()
        denominator = state["exp_avg_sq"].sqrt() / math.sqrt(1 - beta2**step)
        denominator.add_(group["eps"])
        update = group["lr"] / (1 - beta1**step) * state["exp_avg"].div(denominator)
        update.add_(parameter, alpha=-group["weight_decay"])
        assert parameter.grad is not None
        of = {
            "moment": state["exp_avg"],
            "param": parameter,
            "update": update,
            "grad": parameter.grad,
        }
        for what, tensor in of.items():
            norms[f"l2_norm/{what}/{name}"] = torch.linalg.vector_norm(tensor)
    squares = [norm**2 for key, norm in norms.items() if key.startswith("l2_norm/grad/")]
    norms["l2_norm/grad/global"] = torch.stack(squares).sum().sqrt()
    return {key: norm.item() for key, norm in norms.items()}


@torch.no_grad()
def olmo(named: Named, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """What OLMo's clip_grads_and_collect_metrics collects, and its trainer logs, in one process.

    The least and the greatest magnitude, the mean and the norm of each gradient, first moment,
    parameter and second moment. Each number goes to the host by itself; only the reductions over
    ranks, which one process has none of, are coalesced. (allenai/OLMo: olmo/optim.py, train.py)
    """
    numbers: dict[str, Tensor] = {}
    for name, parameter in named:
        state = optimizer.state[parameter]
        assert parameter.grad is not None
        of = {
            "grad": parameter.grad,
            "exp_avg": state["exp_avg"],
            "param": parameter,
            "exp_avg_sq": state["exp_avg_sq"],
        }
        for what, tensor in of.items():
            magnitudes = tensor.abs()
            own = {
                "min": magnitudes.min(),
                "max": magnitudes.max(),
                "avg": tensor.sum(),
                "norm": torch.linalg.vector_norm(tensor, 2.0, dtype=torch.float32),
            }
            on_host = {key: each.to("cpu", torch.float32) for key, each in own.items()}
            on_host["avg"] /= torch.tensor(tensor.numel(), dtype=torch.float32)
            numbers |= {f"{what}/{name}.{key}": each for key, each in on_host.items()}
    return {key: number.item() for key, number in numbers.items()}


class Weights(nn.Module):
    """Parameters in the memory of others, without their hooks."""

    def __init__(self, others: Iterable[Tensor]) -> None:
        super().__init__()
        others = [*others]
        self.parameters_ = nn.ParameterList([nn.Parameter(each.detach()) for each in others])
        self.gradients = [each.grad for each in others]

    def forward(self) -> Tensor:
        return Given.apply(self.gradients, *self.parameters_)  # type: ignore[no-any-return, no-untyped-call]

    def train_once(self) -> None:
        """A forward and a backward pass; `grad` calls the hooks, and adds up nothing."""
        torch.autograd.grad(self(), [*self.parameters_])
        wandb.log({})


class Given(torch.autograd.Function):
    """A model that takes no time: its gradients are there before its backward pass."""

    @staticmethod
    def forward(context: Any, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        context.gradients = gradients
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return None, *context.gradients

"""Optimizers in generated states of any dtype, layout and magnitude."""

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from tests.support.pairwise import pairwise

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda values: values,
    "permuted": lambda values: (
        values.movedim(0, -1).contiguous().movedim(-1, 0) if values.ndim else values
    ),
    "every_second": lambda values: torch.stack([values, values], dim=-1)[..., 1],
    "transposed": lambda values: values.T.contiguous().T if values.ndim == 2 else values,
}
SHAPES = [(0,), (1,), (), (7,), (3, 0), (5, 4), (2, 3, 4), (33, 17)]
MAGNITUDES = [(-30, 30), (-30, -20), (-12, -6), (-3, 3), (0, 0), (20, 30), (-46, -37)]
"""Powers of ten; the last are subnormal in float32 and bfloat16."""
SPECIALS = [float("nan"), float("inf"), -float("inf")]
ONE_DTYPE = st.sampled_from(
    [(each,) * 3 for each in (torch.float32, torch.bfloat16, torch.float64)]
)
"""Dtypes of parameter, gradient and state. A kernel is compiled for each triple, which is slow."""
PAIRS_OF_DTYPES = st.sampled_from(pairwise(DTYPES, DTYPES, DTYPES))


@st.composite
def parameter_groups(
    draw: st.DrawFn, dtypes: st.SearchStrategy[tuple[torch.dtype, ...]] = ONE_DTYPE
) -> list[dict[str, Any]]:
    """Draws parameter groups: hyperparameters and a description of each tensor."""
    tensor = st.fixed_dictionaries(
        {
            "shape": st.sampled_from(SHAPES),
            "dtypes": dtypes,
            "layouts": st.lists(st.sampled_from(list(LAYOUTS)), min_size=4, max_size=4),
            "weight": st.sampled_from(MAGNITUDES),
            "grad": st.sampled_from(MAGNITUDES),
            "zeros": st.sampled_from([0.0, 0.3, 1.0]),
            "idle": st.sampled_from([0.0, 0.5, 0.9]),
            "special": st.one_of(
                st.none(), st.tuples(st.sampled_from(SPECIALS), st.integers(0, 3))
            ),
            "step": st.integers(1, 100_000),
        }
    )
    group = st.fixed_dictionaries(
        {
            "tensors": st.lists(tensor, min_size=1, max_size=3),
            "lr": st.sampled_from([0.0, 1e-5, 1e-3, 0.1]),
            "betas": st.sampled_from([(0.9, 0.999), (0.0, 0.5), (0.95, 0.99), (0.9, 0.99999)]),
            "eps": st.sampled_from([1e-15, 1e-8, 1e-3]),
            "weight_decay": st.sampled_from([0.0, 0.01, 1.0]),
            "amsgrad": st.booleans(),
            "maximize": st.booleans(),
            "decoupled": st.booleans(),
        }
    )
    return draw(st.lists(group, min_size=1, max_size=3))


def build(groups: list[dict[str, Any]], seed: int) -> Optimizer:
    """Builds an optimizer in the described state."""
    generator = torch.Generator().manual_seed(seed)
    param_groups = []
    state: dict[Tensor, dict[str, Tensor]] = {}
    for index, group in enumerate(groups):
        parameters = []
        for recipe in group["tensors"]:
            parameter, own = build_tensor(recipe, group["amsgrad"], generator)
            parameters.append(parameter)
            state[parameter] = own
        hyperparameters = {
            key: value for key, value in group.items() if key not in ("tensors", "decoupled")
        }
        param_groups.append(
            {
                **hyperparameters,
                "decoupled_weight_decay": group["decoupled"],
                "params": parameters,
                "name": f"group_{index}",
            }
        )
    optimizer = Adam(param_groups)
    optimizer.state.update(state)
    return optimizer


def build_tensor(
    recipe: dict[str, Any], amsgrad: bool, generator: torch.Generator
) -> tuple[nn.Parameter, dict[str, Tensor]]:
    shape, (p_dtype, g_dtype, state_dtype) = recipe["shape"], recipe["dtypes"]

    def random(magnitudes: tuple[int, int]) -> Tensor:
        low, high = magnitudes
        exponents = low + (high - low) * torch.rand(shape, dtype=torch.float64, generator=generator)
        values = torch.randn(shape, dtype=torch.float64, generator=generator) * 10.0**exponents
        keep: Tensor = torch.rand(shape, generator=generator) >= recipe["zeros"]
        return values * keep

    p, g = random(recipe["weight"]), random(recipe["grad"])
    m, v = random(recipe["grad"]), random(recipe["grad"]) ** 2
    v_max = v * (1 + torch.rand(shape, dtype=torch.float64, generator=generator))
    idle = torch.rand(shape, generator=generator) < recipe["idle"]
    for values in (g, m, v, v_max):
        values[idle] = 0
    if recipe["special"] is not None and p.numel():
        special, place = recipe["special"]
        # A sum of squares is never negative.
        (p, g, m, v)[place].view(-1)[p.numel() // 2] = abs(special) if place == 3 else special
    laid_out = [LAYOUTS[name] for name in recipe["layouts"]]
    parameter = nn.Parameter(laid_out[0](p.to(p_dtype)))
    parameter.grad_dtype = None
    parameter.grad = laid_out[1](g.to(g_dtype))
    state = {
        "step": torch.tensor(float(recipe["step"])),
        "exp_avg": laid_out[2](m.to(state_dtype)),
        "exp_avg_sq": laid_out[3](v.to(state_dtype)),
    }
    if amsgrad:
        state["max_exp_avg_sq"] = laid_out[3](v_max.to(state_dtype))
    return parameter, state

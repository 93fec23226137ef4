"""Statistics compared with closed forms and optax, without the reference in this repository."""

from collections.abc import Iterator
from math import exp, sqrt
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
import optax  # type: ignore[import-untyped]
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from lightning_adam import AdamStatistics
from tests.statistics.cases import stepped

Array = npt.NDArray[np.float64]
Law = tuple[float, float]
"""The expected value of a statistic, and its standard deviation over samples."""


def measured(optimizer: Optimizer) -> dict[str, float]:
    """Returns the statistics of the model by name."""
    metric = AdamStatistics(statistics="all", scopes=["model"])
    metric.update(optimizer)
    return {key.split("/")[1]: value for key, value in metric.compute().items()}


def float64(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, dtype=torch.float64))


# White noise: independent gradients g ~ N(0, s²), one a step, of which m̂ = Σaᵢgᵢ and ṽ = Σdᵢgᵢ².


def moment_weights(betas: tuple[float, float], steps: int) -> tuple[Array, Array]:
    """Returns the weights of past gradients in m̂ and ṽ, latest first."""
    age = np.arange(steps, dtype=np.float64)
    first, second = ((1 - beta) * beta**age / (1 - beta**steps) for beta in betas)
    return first, second


def white_noise_laws(betas: tuple[float, float], step: int, scale: float) -> dict[str, Law]:
    beta1, beta2 = betas
    _, d = moment_weights(betas, step)
    exp_avg_rms = scale * sqrt((1 - beta1) / (1 + beta1) * (1 - beta1 ** (2 * step)))
    carryover = beta1 * sqrt((1 - beta1 ** (2 * step - 2)) / (1 - beta1 ** (2 * step)))
    exp_avg_sq = scale**2 * (1 - beta2**step)
    return {
        "grad_rms": (scale, scale / sqrt(2)),
        "exp_avg_rms": (exp_avg_rms, exp_avg_rms / sqrt(2)),
        "exp_avg_mean": (0.0, exp_avg_rms),
        "exp_avg_sq_mean": (exp_avg_sq, exp_avg_sq * sqrt(2 * float((d**2).sum()))),
        # The first moment before the step is independent of the gradient.
        **({"grad_momentum_cosine": (0.0, 1.0)} if step > 1 else {}),
        "exp_avg_carryover": (carryover, 1 - carryover**2),
    }


def test_white_noise_has_the_moments_of_white_noise() -> None:
    torch.manual_seed(1)
    size, scale, betas, checked = 400_000, 0.02, (0.9, 0.999), [1, 2, 3, 5, 10, 30, 100]
    weight = float64(size)
    optimizer = torch.optim.AdamW(
        [weight], lr=1e-4, betas=betas, eps=1e-15, weight_decay=0, fused=True
    )
    weight.grad = torch.empty_like(weight)
    for step in range(1, checked[-1] + 1):
        weight.grad.normal_(0, scale)
        optimizer.step()
        if step not in checked:
            continue
        actual = measured(optimizer)
        for name, (expected, deviation) in white_noise_laws(betas, step, scale).items():
            tolerance = 5 * deviation / sqrt(size) + 1e-12 * abs(expected)
            assert abs(actual[name] - expected) < tolerance, (step, name, actual[name], expected)
        a, d = moment_weights(betas, step)
        # The bound by Cauchy-Schwarz for any gradients.
        assert actual["normalized_update_max"] <= sqrt(float((a**2 / d).sum())) * (1 + 1e-12)
        if step == 1:
            assert "grad_momentum_cosine" not in actual
            for name in [
                "signal_fraction",
                "normalized_update_rms",
                "normalized_update_max",
                "rms_ratio",
            ]:
                assert actual[name] == pytest.approx(1, rel=1e-12), name


# Another library's Adam.


@pytest.fixture
def jax_in_float64() -> Iterator[None]:
    update: Any = jax.config.update
    update("jax_platforms", "cpu")  # looking for GPUs is what prints warnings
    update("jax_enable_x64", True)
    yield
    update("jax_enable_x64", False)


def flat(tree: Any) -> Array:
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)])


def rms(values: Array) -> float:
    return float(np.sqrt(np.mean(values**2)))


@pytest.mark.usefixtures("jax_in_float64")
@pytest.mark.parametrize("kind", ["adam", "coupled", "adamw"])
@pytest.mark.parametrize("eps", [1e-8, 0.3])
def test_moments_and_step_agree_with_optax(kind: str, eps: float) -> None:
    torch.manual_seed(2)
    lr, beta1, beta2, decay = 0.01, 0.8, 0.97, 0.0 if kind == "adam" else 0.3
    adam: Any = {"b1": beta1, "b2": beta2, "eps": eps}
    theirs: Any = {
        "adam": optax.adam(lr, **adam),
        "coupled": optax.chain(optax.add_decayed_weights(decay), optax.adam(lr, **adam)),
        "adamw": optax.adamw(lr, weight_decay=decay, **adam),
    }[kind]
    weights = [float64(7, 5), float64(11)]
    ours = (torch.optim.AdamW if kind == "adamw" else torch.optim.Adam)(
        weights, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay
    )
    params: Any = [weight.detach().numpy().copy() for weight in weights]
    state = theirs.init(params)
    previous = np.zeros(0)
    for step in range(1, 13):
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        ours.step()
        grads = [weight.grad.numpy() for weight in weights if weight.grad is not None]
        updates, state = theirs.update(grads, state, params)
        before, params = flat(params), optax.apply_updates(params, updates)
        mu, nu = (flat(optax.tree.get(state, name)) for name in ["mu", "nu"])
        update = -flat(updates)
        decayed = decay * before
        if kind == "adamw":
            decayed = lr * decayed
            update = update - decayed
        denominator = np.sqrt(nu / (1 - beta2**step))
        ratio = (mu / (1 - beta1**step) / denominator) ** 2
        effective_grad = flat(grads) + (decayed if kind == "coupled" else 0)
        expected = {
            "exp_avg_rms": rms(mu),
            "exp_avg_max": np.abs(mu).max(),
            "exp_avg_sq_mean": nu.mean(),
            "exp_avg_sq_max": nu.max(),
            "denominator_mean": denominator.mean(),
            "signal_fraction": np.minimum(ratio, 1).mean(),
            "eps_damping": np.mean(denominator / (denominator + eps)),
            "eps_dominated_fraction": np.mean(denominator < eps),
            "rms_ratio": rms(effective_grad / np.maximum(denominator, eps)),
            "update_norm": np.linalg.norm(update),
            "normalized_update_rms": rms(update) / lr,
            "normalized_update_max": np.abs(update).max() / lr,
            "weight_norm": np.linalg.norm(flat(params)),
            "update_to_weight": np.linalg.norm(update) / np.linalg.norm(flat(params)),
        }
        if kind != "adam":
            step_of_decay = decayed if kind == "adamw" else lr * decayed / (denominator + eps)
            expected["decay_norm"] = np.linalg.norm(step_of_decay)
        actual = measured(ours)
        for name, value in expected.items():
            assert actual[name] == pytest.approx(float(value), rel=1e-12), (step, name)
        eps_energy_loss = 1 - float(((update / lr) ** 2).sum() / ratio.sum())
        assert actual["eps_energy_loss"] == pytest.approx(eps_energy_loss, rel=0, abs=1e-12)
        # The error of a signed sum is relative to its largest terms.
        tolerance = 1e-12 * float(np.abs(mu).mean())
        assert actual["exp_avg_mean"] == pytest.approx(float(mu.mean()), rel=0, abs=tolerance)
        if step > 1:
            lengths = np.linalg.norm(previous) * np.linalg.norm(effective_grad)
            cosine = float(previous @ effective_grad / lengths)
            assert actual["grad_momentum_cosine"] == pytest.approx(cosine, rel=0, abs=1e-11)
        previous = mu
        assert ("decay_norm" in actual) == (kind != "adam")


# Properties of Adam.

OF_ACTIVE = ["eps_energy_loss", "eps_dominated_fraction", "eps_damping", "normalized_update_rms"]


@pytest.mark.parametrize(("eps", "dominated"), [(1e-15, 0), (5e-4, None), (1.0, 1)])
@pytest.mark.parametrize(("decoupled", "decay"), [(True, 0.0), (True, 0.1), (False, 0.0)])
def test_embedding_rows_without_gradient_do_not_count_for_eps(
    eps: float, dominated: float | None, decoupled: bool, decay: float
) -> None:
    torch.manual_seed(3)
    table = nn.Embedding(1000, 16, dtype=torch.float64)
    head = nn.Linear(16, 5, dtype=torch.float64)
    rows = torch.randperm(1000)[:100]
    tokens, targets = rows[torch.randint(100, (5, 400))], torch.randint(5, (5, 400))
    small = nn.Parameter(table.weight.detach()[rows])
    grads: list[Tensor] = []

    def backward(weight: Tensor, step: int) -> Tensor:
        logits = head(functional.embedding(tokens[step], weight))
        loss = functional.cross_entropy(logits, targets[step])
        grads.extend(torch.autograd.grad(loss, weight))
        return grads[-1]

    settings: Any = {"decoupled": decoupled, "weight_decay": decay, "eps": eps, "steps": 5}
    whole = measured(stepped([table.weight], grad=backward, **settings))
    seen = measured(stepped([small], grad=lambda _, step: grads[step][rows], **settings))
    assert whole["idle_fraction"] == 0.9
    assert seen["idle_fraction"] == 0
    for name in OF_ACTIVE:
        assert whole[name] == pytest.approx(seen[name], rel=1e-9), name
    if dominated is None:
        assert all(0.1 < whole[name] < 0.9 for name in OF_ACTIVE)
    else:
        assert whole["eps_dominated_fraction"] == dominated
        assert whole["eps_energy_loss"] == pytest.approx(dominated, abs=1e-3)
        assert whole["eps_damping"] == pytest.approx(1 - dominated, abs=1e-2)


@pytest.mark.parametrize("factor", [2.0**-30, 2.0**12])
def test_scaling_gradients_and_eps_together_leaves_the_steps_unchanged(factor: float) -> None:
    def at_scale(scale: float) -> dict[str, float]:
        torch.manual_seed(4)
        settings: Any = {"decoupled": True, "weight_decay": 0.1, "eps": 0.4 * scale, "steps": 7}
        settings["grad"] = lambda weight, _: torch.randn_like(weight) * scale
        return measured(stepped([float64(60, 50)], **settings))

    plain, scaled = at_scale(1.0), at_scale(factor)
    powers = {
        **dict.fromkeys(
            [*OF_ACTIVE, "grad_momentum_cosine", "signal_fraction", "normalized_update_max"], 0
        ),
        **dict.fromkeys(["rms_ratio", "update_norm", "weight_norm", "decay_alignment"], 0),
        **dict.fromkeys(["grad_norm", "grad_max", "exp_avg_rms", "denominator_mean", "eps"], 1),
        **dict.fromkeys(["exp_avg_sq_mean", "exp_avg_sq_max"], 2),
    }
    for name, power in powers.items():
        # A power of two does not change rounding.
        assert scaled[name] == pytest.approx(plain[name] * factor**power, rel=1e-15), name
    assert 0 < plain["eps_dominated_fraction"] < 1


@pytest.mark.slow
def test_weights_settle_at_the_rotational_equilibrium() -> None:
    """Kosson et al. 2023: white noise and decoupled decay settle at rms(p) = √(η/2λ)."""
    torch.manual_seed(5)
    lr, decay, beta1, size, steps = 0.01, 0.1, 0.9, 65_536, 5000
    weight = nn.Parameter(torch.zeros(size))
    weight.grad = torch.empty_like(weight)
    optimizer = torch.optim.AdamW(
        [weight], lr=lr, betas=(beta1, 0.999), eps=1e-15, weight_decay=decay, fused=True
    )
    for _ in range(steps):
        weight.grad.normal_()
        optimizer.step()
    actual = measured(optimizer)
    assert actual["decay_timescale"] == pytest.approx(1000, rel=1e-12)
    assert actual["equilibrium_ratio"] == pytest.approx(1, rel=0.02)
    # More accurate than the first order of the paper: p is a sum of u, which are correlated as β1ᵏ.
    # The effect of the start decays as exp(-2ηλt); v is s² up to 1-β2.
    keep = 1 - lr * decay
    law = lr * 2 * decay * (1 - beta1) / (1 + beta1) / (1 - beta1 * keep)
    law *= (1 + beta1 * keep) / (1 - keep**2)
    tolerance = 5 / sqrt(2 * size) + exp(-2 * lr * decay * steps) + 1e-3
    assert actual["equilibrium_ratio"] == pytest.approx(sqrt(law), rel=tolerance)
    rotation = sqrt(2 * lr * decay * (1 - beta1) / (1 + beta1))
    assert actual["update_to_weight"] == pytest.approx(rotation, rel=0.02)


# Rounding in the dtypes of parameters and state.


def test_bfloat16_weights_do_not_decay() -> None:
    """1 - ηλ = 1 - 1e-4, and half a unit in bfloat16's last place is at least 2⁻⁹ = 2e-3."""
    for dtype, lost in ((torch.bfloat16, 1.0), (torch.float32, 0.0)):
        torch.manual_seed(6)
        weight = nn.Parameter(torch.randn(5000).to(dtype))
        optimizer = stepped([weight], decoupled=True, lr=1e-3, weight_decay=0.1)
        assert measured(optimizer)["decay_lost_fraction"] == lost, dtype


def test_exp_avg_sq_stalls_in_bfloat16_if_beta2_is_near_one() -> None:
    table = ((torch.bfloat16, 0.999, 1.0), (torch.bfloat16, 0.9, 0.0), (torch.float32, 0.999, 0.0))
    for dtype, beta2, stalled in table:
        torch.manual_seed(7)
        weight = nn.Parameter(torch.randn(5000).to(dtype))
        optimizer = stepped([weight], decoupled=True, betas=(0.9, beta2))
        assert optimizer.state[weight]["exp_avg_sq"].dtype == dtype
        assert measured(optimizer)["exp_avg_sq_stalled_fraction"] == stalled, (dtype, beta2)


def test_bfloat16_at_one_loses_smaller_updates_upwards_than_downwards() -> None:
    """The first step is ±η: lost upwards under 2⁻⁸, downwards under 2⁻⁹."""
    torch.manual_seed(8)
    grad = torch.randn(5000).to(torch.bfloat16)
    up = (grad < 0).double().mean().item()
    for lr, below in ((1e-3, 1.0), (3e-3, 0.0)):
        weight = nn.Parameter(torch.ones_like(grad))
        settings: Any = {"lr": lr, "weight_decay": 0.0, "steps": 1}
        actual = measured(stepped([weight], grad=lambda *_: grad, decoupled=True, **settings))
        expected = up + (1 - up) * below
        assert actual["update_lost_fraction"] == pytest.approx(expected, rel=1e-15), lr

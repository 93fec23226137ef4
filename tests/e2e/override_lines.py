"""Override lines, and what each has to build.

What a line means is known from how it was made: a value is drawn together with its spelling, so
nothing here reads an override. The rules are those of `lightning-adam explain`, written again.
"""

import math
import re
import struct
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

from hypothesis import strategies as st
from torch import nn

TOTAL_STEPS = 100
"""The optimizer steps of the run."""
LOOKED_AT = (0, 1, 7, 50, 99, 100, 150)
"""The steps at which a schedule is compared."""
CONFIG = """
defaults:
  - lightning_adam/optimizer: adamw
  - lightning_adam/scheduler: cosine
  - lightning_adam/monitor: default
  - _self_
"""
FIELD = re.compile(r"(optimizer|scheduler|adam_monitor)\b[\w.$]*")


def texts(spaced: str, *others: str) -> list[str]:
    return [*spaced.split(), *others]


# The network, and what the matchers and patterns mean in it.

NETWORK = nn.ModuleDict(
    {
        "net": nn.ModuleDict(
            {
                "embedding": nn.Embedding(5, 4),
                "blocks": nn.ModuleList(
                    nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(3)
                ),
                "head": nn.Linear(4, 2),
            }
        )
    }
)
EMBEDDING = ["net.embedding.weight"]
LINEARS = [[f"net.blocks.{n}.0.weight", f"net.blocks.{n}.0.bias"] for n in range(3)]
NORMS = [[f"net.blocks.{n}.1.weight", f"net.blocks.{n}.1.bias"] for n in range(3)]
BLOCKS = [LINEARS[n] + NORMS[n] for n in range(3)]
HEAD = ["net.head.weight", "net.head.bias"]
NAMES = [*EMBEDDING, *BLOCKS[0], *BLOCKS[1], *BLOCKS[2], *HEAD]
MATRICES = {linear[0] for linear in [*LINEARS, HEAD]}
LAYERS = {
    "net.blocks.*": {name: n for n in range(3) for name in BLOCKS[n]},
    "net.blocks.*.0": {name: n for n in range(3) for name in LINEARS[n]},
}
MATCHED = {
    "match:net.head.*": HEAD,
    "match:'*.bias'": [name for name in NAMES if name.endswith("bias")],
    'match:"net.blocks.[01].*"': BLOCKS[0] + BLOCKS[1],
    "match:net.embedding.weight": EMBEDDING,
    "match: net.blocks.2.0.* ": LINEARS[2],
    "regex:head": HEAD,
    r'regex:"^net\.blocks\.[12]"': BLOCKS[1] + BLOCKS[2],
    "module_class:LayerNorm": NORMS[0] + NORMS[1] + NORMS[2],
    "module_class:torch.nn.Linear": [name for linear in [*LINEARS, HEAD] for name in linear],
    "module_class:Embedding": EMBEDDING,
}
UNMATCHED = texts(r"""
    match:net.haed.* match:head.* match:"" match:"é" match:"[" match:null
    regex:"^$" regex:"(" regex:"[[" regex:"\d{99}" match:net.head.*,regex:head
    module_class:Conv2d module_class:torch.nn.Conv2d module_class:nowhere.Class
    module_class:torch.nn module_class:Linea
""")


# How a value is spelled, and what it means.


class Meaning(Enum):
    """What is no value."""

    refused = "Hydra refuses it when it composes"
    nothing = "it composes, but it cannot be used"

    def __repr__(self) -> str:
        return self.name


REFUSED, NOTHING = Meaning.refused, Meaning.nothing


class Same(NamedTuple):
    """The value of another field, by interpolation."""

    key: str


class Spelled(NamedTuple):
    text: str
    value: Any


Spelling = st.SearchStrategy[Spelled]


class Values(NamedTuple):
    """How a field's value can be spelled, rightly and wrongly."""

    right: Spelling
    wrong: list[Spelled]

    def drawn(self, wrong_in: int = 14) -> Spelling:
        by_hydra = [each for each in self.wrong if each.value is REFUSED]
        by_us = [each for each in self.wrong if each.value is not REFUSED]
        wrongly = [st.sampled_from(by_hydra), *[st.sampled_from(by_us or by_hydra)] * 2]
        kinds = st.sampled_from([self.right] * 3 * (wrong_in - 1) + wrongly)
        return kinds.flatmap(lambda kind: kind)


def meaning(value: Any, spaced: str, *others: str) -> list[Spelled]:
    """The ways to spell a value; the first are separated by spaces."""
    return [Spelled(text, value) for text in texts(spaced, *others)]


@st.composite
def numbers(draw: st.DrawFn, values: st.SearchStrategy[float]) -> Spelled:
    value = draw(values)
    forms = ["{}", "{}", "{}", '"{}"', "'{}'", " {} ", "\t{}"]
    signed = ["+{}"] if value > 0 else []
    return Spelled(draw(st.sampled_from(forms + signed)).format(repr(value)), value)


def words(*choices: str) -> Spelling:
    forms = st.sampled_from(["{}", '"{}"', "'{}'", " {} "])
    return st.builds(
        lambda form, word: Spelled(form.format(word), word), forms, st.sampled_from(choices)
    )


@st.composite
def lists(draw: st.DrawFn, elements: Spelling, least: int, most: int) -> Spelled:
    drawn = draw(st.lists(elements, min_size=least, max_size=most))
    comma, edge = draw(st.sampled_from([(",", ""), (" , ", " "), (", ", "")]))
    text = comma.join(each.text.strip() for each in drawn)
    return Spelled(f"[{edge}{text}{edge}]", [each.value for each in drawn])


NULL = Spelled("null", None)
NOT_NULL = Spelled("null", REFUSED)
NOT_SCALAR = [
    *meaning(
        REFUSED, "[] [1] [[1],[2]] {} {a:1} {a:{b:[1]}} 1,2 (1) a=b \u22121 é float(a) nope(1)"
    ),
    *meaning(REFUSED, "[0.1 0.1] {a:1 \"0.1 0.1'"),
    *meaning(NOTHING, "??? ${nope} ${optimizer.nope}"),
]
NOT_NUMBER = [
    *NOT_SCALAR,
    *meaning(REFUSED, 'fast "" "é☃" 0x10 1e-3f true', "", '" "', "0.1 0.2"),
]
NOT_FLOAT = [
    *NOT_NUMBER,
    *meaning(math.nan, 'nan NaN "nan"'),
    *meaning(math.inf, "inf 1e999 +inf infinity"),
    Spelled("-inf", -math.inf),
]
NOT_INTEGER = [*NOT_NUMBER, *meaning(REFUSED, '1.5 1e2 1.0 nan inf "1.5"')]
NOT_WORD = [*NOT_SCALAR, *meaning(REFUSED, 'nope Linear 0 true "é"', "", '" "')]
NOT_BOOLEAN = [*NOT_SCALAR, *meaning(REFUSED, '"" maybe 1.0 nan "é" tru', "")]


def beyond(*values: Any) -> list[Spelled]:
    """Of the right type, but out of range; Hydra spells them as Python does."""
    return [Spelled(repr(value), value) for value in values]


def floats(least: float, most: float, *also: float) -> Spelling:
    return numbers(st.floats(least, most) | st.sampled_from([least, most, *also]))


def integers(least: int, most: int) -> Spelling:
    underscored = st.integers(least, most).map(lambda value: Spelled(f"{value:_}", value))
    return numbers(st.integers(least, most)) | underscored


BOOLEANS = Values(
    st.sampled_from(
        meaning(True, 'true True TRUE yes on 1 "true"', " true")
        + meaning(False, "false False no off 0 'false'", "false ")
    ),
    [*NOT_BOOLEAN, NOT_NULL],
)
CHOSEN = Values(st.just(NULL) | BOOLEANS.right, NOT_BOOLEAN)
# The smallest is subnormal in float32, but not 0.
EPSILONS = Values(floats(1e-12, 1e-2, 1e-44), [*NOT_FLOAT, *beyond(0, 0.0, -1e-8, 1e-50)])
STRENGTHS = Values(floats(0.0, 1.0, 0), [*NOT_FLOAT, *beyond(-1, -1e-3)])
BETAS = Values(
    lists(floats(0.0, 0.9999, 0), 2, 2),
    [
        *meaning(REFUSED, '0.9 fast "[0.9,0.99]" {} {a:1} {a:{b:[1]}} 1,2 (0.9,0.9)', ""),
        *meaning(REFUSED, "[a,b] [true,0.9] [null,0.9] [0.9,{}]", "[0.9 1,0.9]"),
        *meaning(REFUSED, "[0.9,0.9 0.9,0.9] [0.9,,0.9] [0.9,0.9,]"),
        *beyond([], [0.9], [0.9, 0.9, 0.9], [0.9, 1], [-0.1, 0.9], [math.nan, 0.9]),
        *beyond([0.9, math.inf], [[0.9], 0.9], [0.9, [[]]], [[0.9, 0.9]]),
    ],
)

GROUP_FIELDS = {
    "lr_scale": Values(floats(1e-3, 1e3), [*NOT_FLOAT, NOT_NULL, *beyond(0, -1.0)]),
    "weight_decay": Values(STRENGTHS.right | st.just(NULL), STRENGTHS.wrong),
    "betas": Values(BETAS.right | st.just(NULL), BETAS.wrong),
    "eps": Values(EPSILONS.right | st.just(NULL), EPSILONS.wrong),
}
GROUP_NAMES = ("tail", "g.1", "A_b")
NOT_GROUP_NAMES = ('"a b"', '"é"', '""', "decay", "no_decay", "a-b", "a/b", r'"a\"b"', "???")


class Group(NamedTuple):
    """One of `optimizer.groups`: the parameters that it matches, and its own settings."""

    name: str | None
    matched: tuple[str, ...]
    own: dict[str, Any]


@st.composite
def groups(draw: st.DrawFn) -> Spelled:
    spelled, drawn, refused = [], [], False
    for index in range(draw(st.sampled_from([0, 1, 1, 1, 1, 2, 2, 3]))):
        name: str | None = GROUP_NAMES[index]
        spelled_name = name
        matcher, matched = draw(st.sampled_from(sorted(MATCHED.items())))
        fault = draw(st.sampled_from([*[""] * 30, "name", "same name", "matcher", "key"]))
        if fault == "name":
            spelled_name, name = draw(st.sampled_from(NOT_GROUP_NAMES)), None
        if fault == "same name":
            spelled_name = name = GROUP_NAMES[0]
        if fault == "matcher":
            matcher, matched = draw(st.sampled_from(UNMATCHED)), []
        parts, own = [f"name:{spelled_name}", matcher], {}
        for key in draw(st.lists(st.sampled_from(sorted(GROUP_FIELDS)), max_size=2, unique=True)):
            # Within a dict ??? leaves a field as it is.
            values = GROUP_FIELDS[key].drawn(20).filter(lambda each: each.text != "???")
            text, own[key] = draw(values)
            parts.append(f"{key}:{text}")
            refused |= own[key] is REFUSED
        if fault == "key":
            parts, refused = [*parts, "lrscale:2"], True
        spelled.append(f"{{{','.join(parts)}}}")
        drawn.append(Group(name, tuple(matched), own))
    return Spelled(f"[{','.join(spelled)}]", REFUSED if refused else drawn)


NOT_GROUPS = [
    *meaning(REFUSED, "null head {} {name:h,match:net.head.*} [3] [[]] [null] [head]", ""),
    *meaning(REFUSED, "[[{name:h,match:net.head.*}]] [{name:h} [{a:1}] [{name:h,match:[a]}]"),
    *meaning([Group(None, (), {})], "[{match:net.head.*}] [{name:h}] [{}]"),
]
PATTERNS = Values(
    words(*LAYERS),
    [
        *meaning(NOTHING, 'net.blocks net.block.* blocks.* "" * 3 net.*.0 "é.*" ??? ${nope}'),
        *meaning(REFUSED, '[] {a:1} net.(* a,b "net net.é'),
    ],
)
RATES = Values(floats(0.1, 1.0), [*NOT_FLOAT, *beyond(0, -0.5, 1.5)])


@st.composite
def layer_decays(draw: st.DrawFn) -> Spelled:
    (pattern, path), (rate, factor) = draw(PATTERNS.right), draw(RATES.right)
    return Spelled(f"{{pattern:{pattern},rate: {rate}}}", {"pattern": path, "rate": factor})


LAYER_DECAYS = Values(
    layer_decays(),
    [
        *meaning(REFUSED, "null [] 3 net.blocks.* {patern:net.blocks.*} {rate:a} {rate:0.5}}"),
        *meaning(REFUSED, "{pattern:[a],rate:0.5} {pattern:net.blocks.*"),
        *meaning({"pattern": NOTHING}, "{pattern:net.block.*,rate:0.5} {pattern:net.blocks}"),
        *meaning({"rate": math.nan}, "{pattern:net.blocks.*,rate:nan} {rate:nan}"),
    ],
)
STEPS = Values(integers(0, 60) | st.just(NULL), [*NOT_INTEGER, *beyond(-1, 101)])
SHARES = Values(floats(0.0, 1.0, 0), [*NOT_FLOAT, NOT_NULL, *beyond(-0.1, 1.5)])

OPTIMIZER: dict[str, Values] = {
    "optimizer.lr": Values(floats(1e-12, 1e3, 1), [*NOT_FLOAT, NOT_NULL, *beyond(0, 0.0, -1e-3)]),
    "optimizer.betas": Values(BETAS.right, [*BETAS.wrong, NOT_NULL]),
    "optimizer.betas.0": Values(floats(0.0, 0.9999), [*NOT_FLOAT, NOT_NULL, *beyond(1, -0.5)]),
    "optimizer.eps": Values(EPSILONS.right, [*EPSILONS.wrong, NOT_NULL]),
    "optimizer.weight_decay": Values(
        STRENGTHS.right | st.just(Spelled("${optimizer.lr}", Same("optimizer.lr"))),
        [*STRENGTHS.wrong, NOT_NULL],
    ),
    "optimizer.amsgrad": BOOLEANS,
    "optimizer.maximize": BOOLEANS,
    "optimizer.decoupled_weight_decay": BOOLEANS,
    "optimizer.fused": CHOSEN,
    "optimizer.foreach": CHOSEN,
    "optimizer.capturable": BOOLEANS,
    "optimizer.weight_decay_on": Values(words("matrices", "all"), [*NOT_WORD, NOT_NULL]),
    "optimizer.groups": Values(groups(), NOT_GROUPS),
    "optimizer.groups.0.eps": GROUP_FIELDS["eps"],
    "optimizer.groups.0.lr_scale": GROUP_FIELDS["lr_scale"],
    "optimizer.layer_decay": LAYER_DECAYS,
    "optimizer.layer_decay.pattern": PATTERNS,
    "optimizer.layer_decay.rate": RATES,
    "optimizer.resume": Values(words("checkpoint", "config"), [*NOT_WORD, NOT_NULL]),
    "optimizer": Values(
        st.sampled_from([Spelled("{lr:0.25,eps: 1e-6}", {"lr": 0.25, "eps": 1e-6})]),
        meaning(REFUSED, "{lrr:1} {lr:fast} {betas:{}} {lr:1 []"),
    ),
}
SCHEDULER: dict[str, Values] = {
    "scheduler.name": Values(
        words("linear", "cosine", "polynomial", "wsd", "constant"),
        [*meaning(NOTHING, 'cosin "é" "" 3 ${nope}'), *meaning(REFUSED, "null [a]")],
    ),
    "scheduler.warmup_steps": STEPS,
    "scheduler.warmup_ratio": Values(
        floats(0.0, 0.6, 0) | st.just(NULL), [*NOT_FLOAT, *beyond(-0.1, 1.5)]
    ),
    "scheduler.total_steps": Values(
        integers(60, 1000) | st.just(NULL), [*NOT_INTEGER, *beyond(0, -5)]
    ),
    "scheduler.count_skipped_steps": BOOLEANS,
    "scheduler.min_lr_ratio": SHARES,
    "scheduler.power": Values(floats(0.1, 8.0, 1), [*NOT_FLOAT, NOT_NULL, *beyond(0, -1.0)]),
    "scheduler.timescale": Values(integers(1, 20_000), [*NOT_INTEGER, *beyond(0, -3)]),
    "scheduler.decay_steps": Values(integers(1, 40), [*NOT_INTEGER, *beyond(0, -3, 1001)]),
    "scheduler.decay_ratio": Values(floats(0.01, 0.4), [*NOT_FLOAT, *beyond(0, -0.1, 1.5)]),
    "scheduler.decay": Values(words("cosine", "linear", "sqrt"), [*NOT_WORD, NOT_NULL]),
    "scheduler.monitor": Values(
        words("val/loss", "train.acc") | st.just(Spelled('"val/é ☃"', "val/é ☃")),
        [*meaning(REFUSED, 'null [] {a:1} a,b "val val/é'), *meaning(NOTHING, "???")],
    ),
    "scheduler.mode": Values(words("min", "max"), [*NOT_WORD, NOT_NULL]),
    "scheduler.factor": Values(floats(0.01, 0.99), [*NOT_FLOAT, NOT_NULL, *beyond(0, 1, 1.5)]),
    "scheduler.patience": Values(integers(0, 9), [*NOT_INTEGER, NOT_NULL, *beyond(-1)]),
    "scheduler.threshold": Values(floats(0.0, 1.0), [*NOT_FLOAT, NOT_NULL, *beyond(-1.0)]),
    "scheduler.threshold_mode": Values(words("rel", "abs"), [*NOT_WORD, NOT_NULL]),
    "scheduler.cooldown": Values(integers(0, 9), [*NOT_INTEGER, NOT_NULL, *beyond(-1)]),
}
# Within `instantiate` an interpolation or ??? is refused by OmegaConf, not by Hydra.
NOT_INTERVAL = [each for each in NOT_INTEGER if each.value is not NOTHING]
INTERVALS = Values(integers(1, 1000) | st.just(NULL), [*NOT_INTERVAL, *beyond(0, -1)])
# The field takes a word or a list, so that its type is checked by us and not by Hydra.
NOT_STATISTICS = [
    *meaning(NOTHING, "null 3 grad_nrom [grad_norm,nothing] [1] {} true"),
    *meaning(REFUSED, "[headline headline]"),
]
MONITOR: dict[str, Values] = {
    "adam_monitor.every_n_steps": INTERVALS,
    "adam_monitor.histograms_every_n_steps": INTERVALS,
    "adam_monitor.layer_depth": INTERVALS,
    "adam_monitor.flight_recorder": INTERVALS,
    "adam_monitor.statistics": Values(
        words("headline", "all", "grad_norm", "eps_*")
        | lists(words("headline", "lr", "update/*", "adam_moments/grad_*"), 1, 3),
        NOT_STATISTICS,
    ),
    "adam_monitor.scopes": Values(
        lists(words("model", "group"), 1, 2),
        [
            *meaning(REFUSED, 'model null [models] [null] [1] {} [model ["é"]'),
            *meaning(NOTHING, "[[model]] [model,[[group]]]"),
        ],
    ),
}


# What a line asks for.

EVERY_SHAPE = {
    "warmup_steps": None,
    "warmup_ratio": None,
    "total_steps": None,
    "count_skipped_steps": False,
}
SHAPES: dict[str, dict[str, Any]] = {
    "constant": EVERY_SHAPE,
    "linear": {**EVERY_SHAPE, "min_lr_ratio": 0.0},
    "cosine": {**EVERY_SHAPE, "min_lr_ratio": 0.0},
    "polynomial": {**EVERY_SHAPE, "min_lr_ratio": 0.0, "power": 1.0},
    "inverse_sqrt": {**EVERY_SHAPE, "timescale": None},
    "wsd": {
        **EVERY_SHAPE,
        "min_lr_ratio": 0.0,
        "decay_steps": None,
        "decay_ratio": None,
        "decay": "cosine",
    },
    "plateau": {
        "monitor": "val/loss",
        "mode": "min",
        "factor": 0.1,
        "patience": 10,
        "threshold": 1e-4,
        "threshold_mode": "rel",
        "cooldown": 0,
        "min_lr_ratio": 0.0,
    },
}
MONITORED = {
    "every_n_steps": None,
    "scopes": ["model", "group"],
    "statistics": "headline",
    "layer_depth": None,
    "histograms_every_n_steps": None,
    "flight_recorder": None,
}
PRESET = "preset"
"""The shape that was chosen, which a schedule's name cannot change."""
Asked = dict[str, Any]
"""The fields by their full names."""


def presets(optimizer: str, shape: str) -> Asked:
    decoupled = optimizer == "adamw"
    return {
        "optimizer.lr": 1e-3,
        "optimizer.betas": [0.9, 0.999],
        "optimizer.eps": 1e-8,
        "optimizer.weight_decay": 0.01 if decoupled else 0.0,
        "optimizer.amsgrad": False,
        "optimizer.maximize": False,
        "optimizer.decoupled_weight_decay": decoupled,
        "optimizer.fused": None,
        "optimizer.foreach": None,
        "optimizer.capturable": False,
        "optimizer.weight_decay_on": "matrices",
        "optimizer.groups": [],
        "optimizer.layer_decay.pattern": None,
        "optimizer.layer_decay.rate": None,
        "optimizer.resume": "checkpoint",
        PRESET: shape,
        "scheduler.name": shape,
        **{f"scheduler.{name}": value for name, value in SHAPES[shape].items()},
        **{f"adam_monitor.{name}": value for name, value in MONITORED.items()},
    }


class Override(NamedTuple):
    text: str
    key: str
    value: Any = REFUSED
    prefix: str = ""


OPTIMIZERS = "lightning_adam/optimizer"
SCHEDULERS = "lightning_adam/scheduler"


class RefusedError(Exception):
    """The rules do not let a line build."""


def require(condition: object) -> None:
    if not condition:
        raise RefusedError


def composed(overrides: list[Override]) -> Asked:
    """The fields after all overrides, in their order."""
    choices = {override.key: override.value for override in overrides}
    optimizer, shape = choices.get(OPTIMIZERS, "adamw"), choices.get(SCHEDULERS, "cosine")
    require(REFUSED not in (optimizer, shape))
    asked = presets(optimizer, shape or "cosine")
    if shape is None:
        leave_out(asked, "scheduler")
    for override in overrides:
        if override.key not in (OPTIMIZERS, SCHEDULERS):
            require(override.value is not REFUSED)
            put(asked, override)
    return asked


def leave_out(asked: Asked, place: str) -> None:
    for key in [key for key in asked if key.startswith(f"{place}.")]:
        del asked[key]


def put(asked: Asked, override: Override) -> None:
    """Puts a value where it belongs, if Hydra lets it."""
    _, key, value, prefix = override
    element = re.fullmatch(r"(optimizer\.(?:betas|groups))\.(\d)\.?(\w*)", key)
    if key == "scheduler":
        leave_out(asked, key)
    elif isinstance(value, dict):
        asked.update({f"{key}.{name}": each for name, each in value.items()})
    elif element:
        elements, index, name = asked[element[1]], int(element[2]), element[3]
        require(index < len(elements))
        group = elements[index]
        elements[index] = group._replace(own={**group.own, name: value}) if name else value
    else:
        require(prefix or key in asked)
        require(prefix != "+" or asked.get(key) is None or isinstance(value, list))
        asked[key] = list(value) if isinstance(value, list) else value


def is_share(value: float) -> bool:
    return 0 <= value <= 1


def is_above_0(value: float) -> bool:
    return 0 < value < math.inf


def is_not_negative(value: float) -> bool:
    return 0 <= value < math.inf


def is_count(value: int) -> bool:
    return value >= 1


RANGES: dict[str, Callable[[Any], bool]] = {
    "lr": is_above_0,
    "betas": lambda betas: (
        len(betas) == 2 and all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in betas)
    ),
    "eps": is_above_0,
    "weight_decay": is_not_negative,
    "lr_scale": is_above_0,
    "pattern": lambda pattern: pattern in LAYERS,
    "rate": lambda rate: 0 < rate <= 1,
    "warmup_steps": is_not_negative,
    "warmup_ratio": is_share,
    "total_steps": is_count,
    "min_lr_ratio": is_share,
    "power": is_above_0,
    "timescale": is_count,
    "decay_steps": is_count,
    "decay_ratio": lambda ratio: 0 < ratio <= 1,
    "factor": lambda factor: 0 < factor < 1,
    "patience": is_not_negative,
    "threshold": is_not_negative,
    "cooldown": is_not_negative,
    "every_n_steps": is_count,
    "histograms_every_n_steps": is_count,
    "layer_depth": is_count,
    "flight_recorder": is_count,
}


def check_range(name: str, value: Any) -> None:
    require(value is not NOTHING)
    require(value is None or name not in RANGES or RANGES[name](value))


@dataclass(frozen=True)
class Built:
    """What is to be built: the settings of each set of parameters, the schedule, the monitor."""

    optimizer: str
    groups: dict[frozenset[str], dict[str, Any]]
    scheduler: dict[str, Any] | None
    monitor: dict[str, Any]


def built_from(asked: Asked) -> Built:
    """What the fields ask for, if they go together."""
    known = presets("adam", asked[PRESET])
    for key, value in asked.items():
        if FIELD.fullmatch(key):
            require(key in known)
            asked[key] = asked[value.key] if isinstance(value, Same) else value
            check_range(key.rpartition(".")[2], asked[key])
    optimizer, scheduler, monitor = (at(asked, place) for place in PLACES)
    require(not scheduler or scheduler.get("name") == asked[PRESET])
    return Built(
        "AdamW" if optimizer["decoupled_weight_decay"] else "Adam",
        settings_of(optimizer, parameter_groups(optimizer)),
        schedule(scheduler) if scheduler else None,
        monitor,
    )


PLACES = ("optimizer", "scheduler", "adam_monitor")


def at(asked: Asked, place: str) -> dict[str, Any]:
    prefix = f"{place}."
    return {
        key.removeprefix(prefix): value for key, value in asked.items() if key.startswith(prefix)
    }


def settings_of(
    optimizer: dict[str, Any], groups: dict[frozenset[str], dict[str, Any]]
) -> dict[frozenset[str], dict[str, Any]]:
    """The groups with what is the same in all of them; fused is taken wherever it works."""
    fused, foreach = optimizer["fused"], optimizer["foreach"]
    require(not (fused and foreach))
    takes_fused = not foreach and fused is not False
    # Without CUDA only the fused implementation is capturable.
    require(takes_fused or not optimizer["capturable"])
    everywhere = {
        "amsgrad": optimizer["amsgrad"],
        "maximize": optimizer["maximize"],
        "decoupled_weight_decay": optimizer["decoupled_weight_decay"],
        "capturable": optimizer["capturable"],
        "fused": takes_fused,
        "foreach": bool(foreach),
    }
    return {names: {**everywhere, **own} for names, own in groups.items()}


def parameter_groups(optimizer: dict[str, Any]) -> dict[frozenset[str], dict[str, Any]]:
    """Which parameters stand together, and their own settings."""
    groups, layer_of = optimizer["groups"], layers(optimizer)
    check_groups(groups)
    members = defaultdict(set)
    for name in NAMES:
        index = next((i for i, group in enumerate(groups) if name in group.matched), None)
        spared = optimizer["weight_decay_on"] == "matrices" and name not in MATRICES
        members[index, layer_of[name], spared].add(name)
    require(set(range(len(groups))) <= {index for index, _, _ in members})
    for index, group in enumerate(groups):
        decays = any(not spared for taken, _, spared in members if taken == index)
        require(decays or not group.own.get("weight_decay"))
    result = {}
    for (index, layer, spared), names in members.items():
        own = {} if index is None else groups[index].own
        setting = {
            name: optimizer[name] if own.get(name) is None else own[name]
            for name in ("betas", "eps", "weight_decay")
            if name in optimizer or name in own
        }
        scale = own.get("lr_scale", 1) * (optimizer["layer_decay.rate"] or 1) ** layer
        setting["lr"] = optimizer["lr"] * scale
        if spared:
            setting["weight_decay"] = 0
        if "eps" in setting:
            (as_float32,) = struct.unpack("f", struct.pack("f", setting["eps"]))
            require(as_float32 != 0)
        result[frozenset(names)] = setting
    return result


def layers(optimizer: dict[str, Any]) -> dict[str, int]:
    """How many times the rate is in each parameter's learning rate."""
    pattern, rate = optimizer["layer_decay.pattern"], optimizer["layer_decay.rate"]
    require((pattern is None) == (rate is None))
    if pattern is None:
        return dict.fromkeys(NAMES, 0)
    found = LAYERS[pattern]
    return {
        name: 3 - found[name] if name in found else 4 if name in EMBEDDING else 0 for name in NAMES
    }


def check_groups(groups: list[Group]) -> None:
    names = [group.name for group in groups]
    require(None not in names)
    require(len(set(names)) == len(names))
    for group in groups:
        require(group.matched)
        for name, value in group.own.items():
            check_range(name, value)


def schedule(asked: dict[str, Any]) -> dict[str, Any]:
    """A schedule with its steps resolved."""
    shape, values = asked["name"], {**SHAPES[asked["name"]], **asked}
    if shape == "plateau":
        return values
    end = values["total_steps"] or TOTAL_STEPS
    warmup = values["warmup_steps"] or 0
    if values["warmup_ratio"] is not None:
        require(values["warmup_steps"] is None)
        warmup = round(values["warmup_ratio"] * end)
    require(warmup <= min(end, TOTAL_STEPS))
    if shape == "inverse_sqrt":
        values["timescale"] = values["timescale"] or warmup or 10_000
    if shape == "wsd":
        decay = values["decay_steps"]
        require(decay is None or values["decay_ratio"] is None)
        if decay is None:
            decay = max(1, round((values["decay_ratio"] or 0.1) * end))
        require(warmup + decay <= end)
        values["decay_steps"] = decay
    return {**values, "warmup_steps": warmup, "total_steps": end}


def multiplier(values: dict[str, Any], step: int) -> float:
    """The formulas of the shapes."""
    shape, warmup, end = values["name"], values["warmup_steps"], values["total_steps"]
    if step < warmup:
        return float(step / warmup)
    if shape == "constant":
        return 1.0
    if shape == "inverse_sqrt":
        return float((1 + (step - warmup) / values["timescale"]) ** -0.5)
    length = values["decay_steps"] if shape == "wsd" else end - warmup
    left = min(1.0, max(0, end - step) / length) if length else 0.0
    forms: dict[str, Callable[[], float]] = {
        "linear": lambda: left,
        "cosine": lambda: 0.5 - 0.5 * math.cos(math.pi * left),
        "polynomial": lambda: float(left ** values["power"]),
        "sqrt": lambda: 1 - math.sqrt(1 - left),
    }
    lowest = values["min_lr_ratio"]
    return float(lowest + (1 - lowest) * forms[values["decay"] if shape == "wsd" else shape]())


# Lines, from the overrides of which they are made.


class Line(NamedTuple):
    """An override line, and what it asks for; None if it has to be refused."""

    overrides: tuple[str, ...]
    asked: Built | None


MISSPELT = texts("""
    optimizer.lrr optimizer.beta optimizer.epsilon optimizer.LR optimizer.weight_decays
    optimizer.nope optimizer.layer_decay.rates optimizer.layer_decay.patern
    scheduler.warmup scheduler.min_lr scheduler.warmup_stepss scheduler.steps
    adam_monitor.every adam_monitor.scope optimiser.lr lr adam_monitors.scopes
""")
ANYTHING = texts(
    r"""0.1 abc {a:{b:[1]}} [1,[2]] null true nan [] "" "null" "[x" "🙂" "\\" "a\"b" '"'""",
    *("", '"é ☃"', "'a b'", r"a\ b"),
)
BROKEN = texts(
    """
    {key} {key}==0.1 {key}=[0.1 {key}=0.1] {key}=0.1,1 {key}:0.1 -{key}=0.1 --{key}=0.1
    +++{key}=0.1 ~~{key} +~{key}=0.1 é{key}=0.1 {key}..x=0.1 {key}.=0.1 {key}[0]=0.1 ~{key}.x
    {key}={{0.1 {key}=0.1}} {key}=(0.1) {key}=0.1=0.1 {key}=[[0.1] {key}="0.1 {key}='0.1"
    """,
    *("{key} =0.1", " {key}=0.1"),
)


@st.composite
def fields(draw: st.DrawFn, shape: Any, seen: set[str]) -> Override:
    """An override of a field, mostly of one that is there."""
    place = draw(st.sampled_from([OPTIMIZER] * 11 + [SCHEDULER] * 7 + [MONITOR] * 2))
    keys = sorted(place)
    if place is SCHEDULER and shape in SHAPES and draw(st.integers(0, 9)):
        keys = [f"scheduler.{name}" for name in sorted(SHAPES[shape])]
    if place is SCHEDULER and shape is None:
        # With a name the fields would make a schedule of their own.
        keys.remove("scheduler.name")
    if place is OPTIMIZER and not (seen & {"optimizer.groups"}) and draw(st.integers(0, 9)):
        keys = [key for key in keys if not key.startswith("optimizer.groups.")]
    key = draw(st.sampled_from(keys))
    text, value = draw(place[key].drawn())
    prefix = draw(st.sampled_from([""] * 20 + ["++"] * 4 + ["+", "~"]))
    if prefix and (re.search(r"\.\d", key) or key == "optimizer" or key in seen):
        prefix = ""
    if prefix == "~":
        return Override(draw(st.sampled_from([f"~{key}", f"~{key}={text}"])), key)
    return Override(f"{prefix}{key}={text}", key, value, prefix)


@st.composite
def strays(draw: st.DrawFn, seen: set[str]) -> Override:
    """An override of what is no field, or that Hydra cannot read."""
    if draw(st.booleans()) or seen & set(MISSPELT):
        form = draw(st.sampled_from(BROKEN))
        return Override(form.format(key=draw(st.sampled_from(sorted(OPTIMIZER)))), "")
    key, prefix = draw(st.sampled_from(MISSPELT)), draw(st.sampled_from(["", "+", "++", "~"]))
    text = draw(st.sampled_from(ANYTHING))
    value = REFUSED if prefix == "~" else text
    return Override(f"{prefix}{key}={text}", key, value, prefix)


WITHOUT_SCHEDULER = [
    *[Override(text, "scheduler", None) for text in ("~scheduler", "scheduler=null")],
    *[Override(f"~{SCHEDULERS}{text}", SCHEDULERS, None) for text in ("", "=cosine")],
]
NO_NODES = texts("optimizer=3 optimizer=adam optimizer=null scheduler=cosine scheduler=3")


@st.composite
def lines_of_fields(draw: st.DrawFn) -> Line:
    count, overrides = draw(st.integers(1, 4)), []
    shape: Any = "cosine"
    if draw(st.integers(0, 3)) == 0:
        name = draw(st.sampled_from([*["adam"] * 8, *["adamw"] * 4, "Adam", "adan"]))
        value = name if name in ("adam", "adamw") else REFUSED
        spelling = draw(st.sampled_from(["{}", '"{}"', " {} "])).format(name)
        overrides.append(Override(f"{OPTIMIZERS}={spelling}", OPTIMIZERS, value))
    if len(overrides) < count and draw(st.integers(0, 2)):
        shape = draw(st.sampled_from([*[*SHAPES] * 5, "cosin", "none", '"é"', "WSD"]))
        shape_value = shape if shape in SHAPES else REFUSED
        overrides.append(Override(f"{SCHEDULERS}={shape}", SCHEDULERS, shape_value))
    elif len(overrides) < count and draw(st.integers(0, 15)) == 0:
        shape = None
        overrides.append(draw(st.sampled_from(WITHOUT_SCHEDULER)))
    while len(overrides) < count:
        seen = {override.key for override in overrides}
        stray = draw(st.integers(0, 24)) == 0
        overrides.append(draw(strays(seen) if stray else fields(shape, seen)))
    if draw(st.integers(0, 49)) == 0:
        overrides[-1] = Override(draw(st.sampled_from(NO_NODES)), "")
    try:
        asked = built_from(composed(overrides))
    except RefusedError:
        asked = None
    return Line(tuple(override.text for override in overrides), asked)


# Classes of torch's own by their `_target_`.

CUSTOM_FIELDS: Asked = {
    "weight_decay": 0,
    "weight_decay_on": "matrices",
    "groups": [],
    "layer_decay.pattern": None,
    "layer_decay.rate": None,
}
OPTIMIZER_ARGUMENTS: dict[str, dict[str, Any]] = {
    "optimizer.weight_decay_on=all": {"weight_decay_on": "all"},
    "+optimizer.weight_decay=0.25": {"weight_decay": 0.25},
    "+optimizer.betas=[0.5,0.75]": {"betas": [0.5, 0.75]},
    "++optimizer.eps=1e-6": {"eps": 1e-6},
    "optimizer.layer_decay={pattern:net.blocks.*,rate:0.5}": {
        "layer_decay.pattern": "net.blocks.*",
        "layer_decay.rate": 0.5,
    },
}
NOT_OPTIMIZER_ARGUMENTS = texts("""
    optimizer.eps=1e-6 +optimizer.betas=[0.5] +optimizer.betas=[[0.5],0.5] +optimizer.bogus=1
    optimizer.weight_decay_on=biases +optimizer.weight_decay=abc optimizer.groups=3
    +optimizer.layer_decay.bogus=1 ~optimizer._target_ optimizer.lr=-1 optimizer.lr=nan
    optimizer.lr=fast optimizer.lr=null optimizer.lr=[] optimizer.lr={a:1} optimizer.lr=${nope}
""")
NOT_SCHEDULER_ARGUMENTS = texts("""
    +scheduler.bogus=1 scheduler.interval=stepp scheduler.frequency=0 scheduler.T_max=3
    scheduler.frequency=1.5 scheduler.name=cosine scheduler.name=[a]
    +scheduler.optimizer=3 scheduler.monitor=null scheduler.frequency=[] scheduler.monitor=${nope}
""")
NOT_TARGETS = texts(
    """
    torch.optim.Nadam nowhere.Adam torch.optim torch.nn.Linear builtins.dict
    null 3 [] {a:1} a..b ??? ${nope} "é"
    """,
    *("", '"a b"'),
)
SCHEDULER_ARGUMENTS: dict[str, tuple[list[str], str, list[float]]] = {
    "OneCycleLR": (
        ["+scheduler.max_lr=0.4", "+scheduler.total_steps=total_steps"],
        "step",
        [0.208 - 0.192 * math.cos(math.pi * step / 29) for step in range(4)],
    ),
    "CosineAnnealingLR": (
        ["+scheduler.T_max=total_steps"],
        "step",
        [0.0005 + 0.0005 * math.cos(math.pi * step / 100) for step in range(4)],
    ),
    "LinearLR": (
        ["+scheduler.total_iters='total_steps'", "+scheduler.start_factor=0.5"],
        "step",
        [0.0005, 0.000505, 0.00051, 0.000515],
    ),
    "StepLR": (["+scheduler.step_size=2"], "epoch", [0.001, 0.001, 0.0001, 0.0001]),
    "ExponentialLR": (["++scheduler.gamma=0.5"], "epoch", [0.001, 0.0005, 0.00025, 0.000125]),
}
"""Arguments, the interval that goes with them, and the first learning rates."""


@st.composite
def lines_of_classes(draw: st.DrawFn) -> Line:
    """A line of a custom optimizer or scheduler, most of them right."""
    place = draw(st.sampled_from(["optimizer", "scheduler"]))
    fault = draw(st.sampled_from([*[""] * 4, "argument", "target", "no target"]))
    optimizer = {**CUSTOM_FIELDS, "lr": 1e-3}
    scheduler: dict[str, Any]
    if place == "optimizer":
        name, lr = draw(st.sampled_from(["NAdam", "RAdam", "Adamax"])), draw(st.floats(1e-6, 1.0))
        more = draw(st.sampled_from(sorted(OPTIMIZER_ARGUMENTS)))
        optimizer |= {**OPTIMIZER_ARGUMENTS[more], "lr": lr}
        arguments, scheduler = [f"optimizer.lr={lr}", more], schedule({"name": "cosine"})
        target, wrong = f"torch.optim.{name}", NOT_OPTIMIZER_ARGUMENTS
    else:
        called = draw(st.sampled_from(sorted(SCHEDULER_ARGUMENTS)))
        chosen, interval, rates = SCHEDULER_ARGUMENTS[called]
        name, arguments = "AdamW", [*chosen]
        scheduler = {"name": called, "interval": interval, "rates": rates}
        target, wrong = f"torch.optim.lr_scheduler.{called}", NOT_SCHEDULER_ARGUMENTS
        optimizer["weight_decay"] = 0.01
        if called == "OneCycleLR":
            # It has a first learning rate and betas of its own.
            optimizer |= {"lr": 0.4 / 25, "betas": [0.95, 0.999]}
    if fault == "argument":
        arguments[-1] = draw(st.sampled_from(wrong))
    if fault == "target":
        target = draw(st.sampled_from(NOT_TARGETS))
    overrides = [f"lightning_adam/{place}=custom", f"{place}._target_={target}", *arguments]
    if fault == "no target":
        del overrides[1]
    asked = Built(name, parameter_groups(optimizer), scheduler, MONITORED)
    return Line(tuple(overrides), None if fault else asked)


lines = st.sampled_from([lines_of_fields()] * 7 + [lines_of_classes()]).flatmap(lambda each: each)

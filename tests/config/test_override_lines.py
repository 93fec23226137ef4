"""Command lines of overrides: the optimizer and schedule that they build, or their error."""

import logging
import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.utils import instantiate
from torch import nn

from lightning_adam import build_adam
from tests.support.tables import each_row

CONFIG = """
defaults:
  - lightning_adam/optimizer: adamw
  - lightning_adam/scheduler: cosine
  - lightning_adam/monitor: default
  - _self_
"""
TOTAL_STEPS = 100
SCHEDULER = "lightning_adam/scheduler"
CLASS = "lightning_adam/optimizer=custom optimizer._target_=torch.optim"
SCHEDULER_CLASS = f"{SCHEDULER}=custom scheduler._target_=torch.optim.lr_scheduler"
HUGE = f"1{'0' * 400}"
FIELD = re.compile(r"(optimizer|scheduler|adam_monitor)\b[\w.$]*")

INVALID = {
    r"""'optimizer.groups=[{name:head,regex:"\d{99999999999}"}]'""": (
        r'optimizer.groups.0.regex="\d{99999999999}" is not a regular expression: the repetition'
    ),
    """'+optimizer.lrr="a\nb"'""": r"""optimizer.lrr="a\nb" is not a setting. Use for example""",
    """'+optimizer.lrr="é"'""": 'optimizer.lrr="é" is not a setting. Use for example',
    "~optimizer +optimizer={lr:[1]}": "optimizer.lr=[1] must be a number. Use for example",
    "scheduler.name=custom": "scheduler.name=custom does not belong to the fields of cosine. Use",
    f"{CLASS}.NAdam optimizer.lr=0.1 +optimizer.betas=[0.5]": (
        "optimizer.betas=[0.5] is not accepted by torch.optim.NAdam: list index out of range. Use"
    ),
    f"{CLASS}.Rprop optimizer.lr=0.1 +optimizer.etas=[1]": (
        "optimizer.etas=[1] is not accepted by torch.optim.Rprop: list index out of range. Use"
    ),
    f"{CLASS}.Adam optimizer.lr=0.1 +optimizer.betas=[[0.5],0.9]": (
        "optimizer.betas=[[0.5],0.9] is not accepted by torch.optim.Adam: '<=' not supported"
    ),
    f"{CLASS}.Adam optimizer.lr=0.1 +optimizer.fused=true +optimizer.foreach=true": (
        "optimizer.foreach=true is not accepted by torch.optim.Adam: `fused` and `foreach` cannot"
    ),
    f"{CLASS}.NAdam optimizer.lr=0.1 +optimizer.bogus=1": (
        "optimizer.bogus=1 is not a setting. Use one of lr, betas, "
    ),
    f"{SCHEDULER_CLASS}.StepLR +scheduler.step_size=2 +scheduler.last_epoch=5": (
        "scheduler.last_epoch=5 is not accepted by torch.optim.lr_scheduler.StepLR: param"
    ),
    f"{SCHEDULER_CLASS}.LinearLR +scheduler.bogus=1": (
        "scheduler.bogus=1 is not a setting. Use one of start_factor, "
    ),
    f"{SCHEDULER_CLASS}.CyclicLR +scheduler.base_lr=0.1 +scheduler.max_lr=1"
    " +scheduler.step_size_up=0": (
        "scheduler.step_size_up=0 is not accepted by torch.optim.lr_scheduler.CyclicLR: float"
    ),
}
"""Invalid overrides, and the prefix of the error."""

CORRECTED = {
    "optimizer.betas=[0.9]": "optimizer.betas=[0.9] must have at least 2 items, not 1",
    "optimizer.betas=[[0.9],0.9]": (
        "optimizer.betas=[[0.9],0.9] has [0.9], which must be a number"
    ),
    "~optimizer +optimizer={betas:[[0.9],0.9]}": (
        "optimizer.betas=[[0.9],0.9] has [0.9], which must be a number"
    ),
    "optimizer.groups=[{name:head,match:net.head.*,betas:[0.9,[]]}]": (
        "optimizer.groups.0.betas=[0.9,[]] has [], which must be a number"
    ),
    """'optimizer.groups=[{name:"a\nb",match:net.head.*}]'""": (
        r'optimizer.groups.0.name="a\nb" must consist of letters, digits, . and _'
    ),
    """'optimizer.groups=[{name:head,match:"a\nb"}]'""": (
        r'optimizer.groups.0.match="a\nb" matches nothing; the nearest are net.head.bias, '
    ),
    "optimizer.lr=-1 optimizer.eps=0 optimizer.weight_decay=nan": (
        "optimizer.lr=-1.0 must be above 0"
    ),
    "optimizer.fused=true optimizer.foreach=true": (
        "optimizer.foreach=true cannot be combined with optimizer.fused=true"
    ),
    "+optimizer.lrr='0.1'": "optimizer.lrr=0.1 is not a setting",
    "optimizer.groups=[{name:head}]": (
        "optimizer.groups.0 (head) needs exactly one of match, regex, module_class, not none"
    ),
    "optimizer.groups=[{name:head,match:net.head.*,regex:head,module_class:Linear}]": (
        "optimizer.groups.0 (head) needs exactly one of match, regex, module_class, not match and"
    ),
    "optimizer.groups=[{name:a,match:net.head.*},{name:a,regex:blocks}]": (
        "optimizer.groups.1.name=a is already used by one of the groups decay, no_decay, a, a_no_de"
    ),
    "optimizer.groups=[{name:a,match:net.head.*},{name:a_no_decay,regex:blocks}]": (
        "optimizer.groups.1.name=a_no_decay is already used by one of the groups decay, no_decay, a"
    ),
    """'optimizer.groups=[{name:head,match:net.head.*},{name:"a b",regex:blocks}]'""": (
        'optimizer.groups.1.name="a b" must consist of letters, digits, . and _'
    ),
    """'optimizer.groups=[{name:a,module_class:"."}]'""": (
        "optimizer.groups.0.module_class=. cannot be imported: "
    ),
    "optimizer.groups=[{name:a,module_class:LayerNorm,weight_decay:0.1}]": (
        "optimizer.groups.0.weight_decay=0.1 has no effect: with weight_decay_on=matrices no"
    ),
    "optimizer.weight_decay_on=all optimizer.no_decay=[net.head.*]": (
        "optimizer.no_decay=[net.head.*] has no effect with optimizer.weight_decay_on=all"
    ),
    "optimizer.layer_decay.rate=0.5": (
        "optimizer.layer_decay.pattern=null is required with a rate"
    ),
    "optimizer.layer_decay={pattern:net.block.*,rate:0.5}": (
        "optimizer.layer_decay.pattern=net.block.* matches nothing; the nearest are net.blocks.*"
    ),
    "optimizer.layer_decay={pattern:blocks,rate:2}": (
        "optimizer.layer_decay.rate=2.0 must be at most 1"
    ),
    """'scheduler.name="a\nb"'""": r'scheduler.name="a\nb" must be one of constant, linear, ',
    "~scheduler +scheduler={name:[cosine]}": "scheduler.name=[cosine] must be one of constant, ",
    "~scheduler +scheduler={name:{a:1}}": "scheduler.name={a:1} must be one of constant, linear",
    "~scheduler +scheduler.warmup_steps=3": "scheduler.name is required, one of constant, linear",
    f"scheduler.warmup_ratio=0.1 scheduler.total_steps={HUGE}": (
        f"scheduler.total_steps={HUGE} must be below {2**63}"
    ),
    f"{SCHEDULER}=wsd scheduler.total_steps={HUGE}": (
        f"scheduler.total_steps={HUGE} must be below {2**63}"
    ),
    "scheduler.warmup_steps=5 scheduler.warmup_ratio=0.1": (
        "scheduler.warmup_ratio=0.1 cannot be combined with warmup_steps"
    ),
    "scheduler.warmup_steps=5 scheduler.warmup_ratio=inf": (
        "scheduler.warmup_ratio=inf must be a finite number"
    ),
    "scheduler.name=constant": ("scheduler.name=constant does not belong to the fields of cosine"),
    f"{SCHEDULER}=inverse_sqrt scheduler.name=cosin": "scheduler.name=cosin must be one of ",
    f"{SCHEDULER}=multistep scheduler.milestones=[0,50]": (
        "scheduler.milestones=[0.0,50.0] has 0.0, which must be above 0"
    ),
    f"{SCHEDULER}=one_cycle scheduler.pct_start=1": "scheduler.pct_start=1.0 must be below 1",
    f"{SCHEDULER}=cosine_restarts scheduler.num_cycles=0": (
        "scheduler.num_cycles=0 must be at least 1"
    ),
    "scheduler.min_lr=0.1": "scheduler.min_lr=0.1 is above the peak learning rate, 0.001",
    "scheduler.min_lr=1e-6 scheduler.min_lr_ratio=0.1": (
        "scheduler.min_lr=1e-06 cannot be combined with min_lr_ratio"
    ),
    f"{SCHEDULER}=wsd scheduler.decay_steps=3 scheduler.decay_ratio=0.5": (
        "scheduler.decay_ratio=0.5 cannot be combined with decay_steps"
    ),
    f"{SCHEDULER_CLASS}.StepLR scheduler.name=[a] +scheduler.step_size=2": (
        "scheduler.name=[a] cannot be combined with a _target_"
    ),
    "adam_monitor.every_n_steps=0": "adam_monitor.every_n_steps=0 must be at least 1",
    "adam_monitor.scopes=[[model]]": (
        "adam_monitor.scopes=[[model]] has ['model'], which must be 'model', 'group', 'layer' or"
    ),
}
"""Overrides that build after following the suggestions, and the prefix of the first error."""

VALID = {
    f"{CLASS}.NAdam optimizer.lr=1": [1.0],
    f"{CLASS}.NAdam optimizer.lr=1 optimizer.weight_decay_on=matrices": [1.0, 1.0],
    f"{CLASS}.NAdam optimizer.lr=1 optimizer.layer_decay={{pattern:net.blocks.*,rate:0.5}}": (
        [0.0625, 0.125, 0.25, 0.5, 1.0]
    ),
    "optimizer.lr=007": [7.0, 7.0],
    "optimizer.lr=1_0": [10.0, 10.0],
    "optimizer.lr=0.5 'optimizer.lr=${optimizer.weight_decay}'": [0.01, 0.01],
}
"""Valid overrides, and the peak learning rate of each group."""

SHORTENED = {
    "scheduler.warmup_ratio=0.5 scheduler.total_steps=1000": {"warmup_steps": 500},
    "scheduler.warmup_steps=5 scheduler.total_steps=4": {"warmup_steps": 4},
    f"{SCHEDULER}=wsd scheduler.warmup_steps=95": {"warmup_steps": 95, "decay_steps": 5},
    f"{SCHEDULER}=wsd scheduler.warmup_steps=1 scheduler.decay_ratio=1": {"decay_steps": 99},
}
"""Overrides with steps beyond the end of the run, and the steps that remain."""


@pytest.fixture(scope="module", autouse=True)
def _app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Initializes Hydra for an app with the presets, and does not log the tables of groups."""
    folder = tmp_path_factory.mktemp("app")
    (folder / "config.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.getLogger("lightning_adam"), "disabled", True)
        with initialize_config_dir(str(folder), version_base="1.3"):
            # An app sets it before it calls the user's function.
            patch.setattr(HydraConfig.instance(), "cfg", None)
            HydraConfig.instance().set_config(compose("config", return_hydra_config=True))
            yield


@pytest.fixture(scope="module")
def network() -> nn.Module:
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(3))
    net = {"embedding": nn.Embedding(5, 4), "blocks": blocks, "head": nn.Linear(4, 2)}
    return nn.ModuleDict({"net": nn.ModuleDict(net)})


def build(network: nn.Module, overrides: list[str]) -> dict[str, Any]:
    cfg = compose("config", overrides)
    instantiate(cfg.adam_monitor)
    return build_adam(network, cfg.optimizer, cfg.get("scheduler"), TOTAL_STEPS)


def message_of(error: BaseException) -> str:
    """Returns the error's line, without the lines that Hydra adds."""
    text = str(error)
    if text.startswith("Error in call to target"):
        text = next(line for line in text.split("\n") if FIELD.match(line))
    assert text.splitlines() == [text]
    return text


def corrected(overrides: list[str], message: str) -> list[str]:
    """Returns the overrides with the error's suggestion applied."""
    suggestion = re.search(r"[.?] Use (for example )?", message)
    assert suggestion
    (override,) = shlex.split(message[suggestion.end() :])
    obsolete = {override.lstrip("+").partition("=")[0]}
    if "is not a setting" in message or override.startswith("lightning_adam/"):
        obsolete.add(FIELD.match(message)[0])  # type: ignore[index]
    kept = [each for each in overrides if each.lstrip("+~").partition("=")[0] not in obsolete]
    return [*kept, override]


def errors_until_built(network: nn.Module, overrides: list[str]) -> list[str]:
    """Follows the suggestions until the overrides build, and returns the errors."""
    messages: list[str] = []
    while True:
        try:
            build(network, overrides)
        except HydraException as error:
            message = message_of(error)
            assert message not in messages, messages
            messages.append(message)
            overrides = corrected(overrides, message)
        else:
            return messages


def test_invalid_overrides_are_an_error_of_one_line(network: nn.Module) -> None:
    with each_row() as row:
        for line, beginning in INVALID.items():
            with row(line):
                with pytest.raises(HydraException) as invalid:
                    build(network, shlex.split(line))
                message = message_of(invalid.value)
                assert message.startswith(beginning)
                assert re.search(r"[.?] (Use|Set) ", message)


def test_following_the_suggestions_builds(network: nn.Module) -> None:
    with each_row() as row:
        for line, beginning in CORRECTED.items():
            with row(line):
                messages = errors_until_built(network, shlex.split(line))
                assert messages[0].startswith(beginning)


def test_valid_overrides_build_with_the_lr_they_set(network: nn.Module) -> None:
    with each_row() as row:
        for line, peaks in VALID.items():
            with row(line):
                groups = build(network, shlex.split(line))["optimizer"].param_groups
                assert sorted(group["initial_lr"] for group in groups) == peaks


@pytest.mark.filterwarnings("ignore:.*is longer than the run")
def test_overrides_with_steps_beyond_the_run_are_shortened(network: nn.Module) -> None:
    with each_row() as row:
        for line, steps in SHORTENED.items():
            with row(line):
                schedule = build(network, shlex.split(line))["lr_scheduler"]["scheduler"]
                assert steps.items() <= schedule.settings.items()

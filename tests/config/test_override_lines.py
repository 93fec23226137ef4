"""Lines of overrides: what each builds, or the sentence that refuses it."""

import logging
import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
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

REFUSED = {
    "optimizer.betas=[[0.9],0.9]": "optimizer.betas=[[0.9],0.9]: expected a list without lists",
    "optimizer.groups=[{name:head,match:net.head.*,betas:[0.9,[]]}]": (
        "optimizer.groups.0.betas=[0.9,[]]: expected a list without lists in it"
    ),
    r"""'optimizer.groups=[{name:head,regex:"\d{99999999999}"}]'""": (
        r'optimizer.groups.0.regex="\d{99999999999}": expected a regular expression'
    ),
    """'optimizer.groups=[{name:"a\nb",match:net.head.*}]'""": (
        r'optimizer.groups.0.name="a\nb": expected letters, digits, _ and . alone'
    ),
    """'optimizer.groups=[{name:head,match:"a\nb"}]'""": (
        r'optimizer.groups.0.match="a\nb": expected a match, but it matches nothing'
    ),
    """'scheduler.name="a\nb"'""": r'scheduler.name="a\nb": expected one of constant, linear',
    """'+optimizer.lrr="a\nb"'""": r'optimizer.lrr="a\nb": no such field; type for example',
    """'+optimizer.lrr="é"'""": 'optimizer.lrr="é": no such field; type for example',
    "~optimizer +optimizer={betas:[[0.9],0.9]}": "optimizer.betas=[[0.9],0.9]: expected a list",
    "~optimizer +optimizer={lr:[1]}": "optimizer.lr=[1]: Value '[1]' of type 'ListConfig' could",
    "~scheduler +scheduler={name:[cosine]}": "scheduler.name=[cosine]: expected one of constant",
    "~scheduler +scheduler={name:{a:1}}": "scheduler.name={a:1}: expected one of constant",
    "~scheduler +scheduler.warmup_steps=3": "scheduler.name: expected one of constant, linear",
    "scheduler.name=custom": "scheduler.name=custom: expected cosine, the shape of the fields",
    f"scheduler.warmup_ratio=0.1 scheduler.total_steps={HUGE}": (
        f"scheduler.total_steps={HUGE}: expected an integer below 2**63"
    ),
    f"{SCHEDULER}=wsd scheduler.total_steps={HUGE}": (
        f"scheduler.total_steps={HUGE}: expected an integer below 2**63"
    ),
    "adam_monitor.scopes=[[model]]": "adam_monitor.scopes=[[model]]: expected a list without lists",
    f"{CLASS}.NAdam optimizer.lr=0.1 +optimizer.betas=[0.5]": (
        "optimizer._target_=torch.optim.NAdam: expected arguments that it takes, but IndexError"
    ),
    f"{CLASS}.Rprop optimizer.lr=0.1 +optimizer.etas=[1]": (
        "optimizer._target_=torch.optim.Rprop: expected arguments that it takes, but IndexError"
    ),
    f"{CLASS}.Adam optimizer.lr=0.1 +optimizer.betas=[[0.5],0.9]": (
        "optimizer._target_=torch.optim.Adam: expected arguments that it takes, but TypeError"
    ),
    f"{CLASS}.Adam optimizer.lr=0.1 +optimizer.fused=true +optimizer.foreach=true": (
        "optimizer._target_=torch.optim.Adam: expected arguments that it takes, but RuntimeError"
    ),
    f"{CLASS}.NAdam optimizer.lr=0.1 +optimizer.bogus=1": "optimizer.bogus=1: no such field; ",
    f"{SCHEDULER_CLASS}.StepLR scheduler.name=[a]": "scheduler.name=[a]: expected custom beside a",
    f"{SCHEDULER_CLASS}.StepLR +scheduler.step_size=2 +scheduler.last_epoch=5": (
        "scheduler._target_=torch.optim.lr_scheduler.StepLR: expected arguments that it takes, but"
    ),
    f"{SCHEDULER_CLASS}.LinearLR +scheduler.bogus=1": "scheduler.bogus=1: no such field; the ",
    f"{SCHEDULER_CLASS}.CyclicLR +scheduler.base_lr=0.1 +scheduler.max_lr=1"
    " +scheduler.step_size_up=0": (
        "scheduler._target_=torch.optim.lr_scheduler.CyclicLR: expected arguments that it takes"
    ),
}
"""Lines, and the beginning of the sentence that refuses each."""

CORRECTED = {
    "optimizer.betas=[0.9]": "optimizer.betas=[0.9]: expected two numbers in [0, 1)",
    "optimizer.lr=-1 optimizer.eps=0 optimizer.weight_decay=nan": (
        "optimizer.lr=-1.0: expected a finite number above 0"
    ),
    "optimizer.fused=true optimizer.foreach=true": "optimizer.foreach=true: expected not both",
    "+optimizer.lrr='0.1'": "optimizer.lrr=0.1: no such field",
    "optimizer.groups=[{name:head}]": "optimizer.groups.0: expected exactly one of match, regex",
    "optimizer.groups=[{name:head,match:net.head.*,regex:head,module_class:Linear}]": (
        "optimizer.groups.0: expected exactly one of match, regex, module_class, but the group head"
    ),
    "optimizer.groups=[{name:a,match:net.head.*},{name:a,regex:blocks}]": (
        "optimizer.groups.1.name=a: expected another name than decay, no_decay, a, a_no_decay"
    ),
    "optimizer.groups=[{name:a,match:net.head.*},{name:a_no_decay,regex:blocks}]": (
        "optimizer.groups.1.name=a_no_decay: expected another name than decay, no_decay, a, a_no"
    ),
    """'optimizer.groups=[{name:head,match:net.head.*},{name:"a b",regex:blocks}]'""": (
        'optimizer.groups.1.name="a b": expected letters, digits, _ and . alone'
    ),
    """'optimizer.groups=[{name:a,module_class:"."}]'""": (
        "optimizer.groups.0.module_class=.: expected a class that can be imported"
    ),
    "optimizer.groups=[{name:a,module_class:LayerNorm,weight_decay:0.1}]": (
        "optimizer.groups.0.weight_decay=0.1: expected a group in which something decays"
    ),
    "optimizer.layer_decay.rate=0.5": "optimizer.layer_decay.pattern=null: expected one beside a r",
    "optimizer.layer_decay={pattern:net.block.*,rate:0.5}": (
        "optimizer.layer_decay.pattern=net.block.*: expected a match, but it matches nothing"
    ),
    "optimizer.layer_decay={pattern:blocks,rate:2}": (
        "optimizer.layer_decay.rate=2.0: expected a number above 0 and at most 1"
    ),
    "scheduler.warmup_ratio=0.5 scheduler.total_steps=1000": (
        "scheduler.warmup_steps=500: expected a warm-up within the 100 optimizer steps of the run"
    ),
    "scheduler.warmup_steps=5 scheduler.total_steps=4": (
        "scheduler.warmup_steps=5: expected a warm-up within the 4 optimizer steps of the run"
    ),
    "scheduler.warmup_steps=5 scheduler.warmup_ratio=0.1": (
        "scheduler.warmup_ratio=0.1: expected warmup_steps or warmup_ratio, not both"
    ),
    "scheduler.warmup_steps=5 scheduler.warmup_ratio=inf": (
        "scheduler.warmup_ratio=inf: expected a number in [0, 1]"
    ),
    "scheduler.name=constant": "scheduler.name=constant: expected cosine, the shape of the fields",
    f"{SCHEDULER}=inverse_sqrt scheduler.name=cosin": "scheduler.name=cosin: expected one of ",
    f"{SCHEDULER}=wsd scheduler.warmup_steps=95": (
        "scheduler.decay_steps=10: expected a way down within the 5 steps after the warm-up"
    ),
    f"{SCHEDULER}=wsd scheduler.warmup_steps=1 scheduler.decay_ratio=1": (
        "scheduler.decay_steps=100: expected a way down within the 99 steps after the warm-up"
    ),
    f"{SCHEDULER}=wsd scheduler.decay_steps=3 scheduler.decay_ratio=0.5": (
        "scheduler.decay_ratio=0.5: expected decay_steps or decay_ratio, not both"
    ),
    "adam_monitor.every_n_steps=0": "adam_monitor.every_n_steps=0: expected an integer of at least",
}
"""Lines that build when the suggestions are followed, and the first sentence."""

BUILT = {
    f"{CLASS}.NAdam optimizer.lr=1": [1.0, 1.0],
    f"{CLASS}.NAdam optimizer.lr=1 optimizer.layer_decay={{pattern:net.blocks.*,rate:0.5}}": (
        [0.0625, 0.125, 0.125, 0.25, 0.25, 0.5, 0.5, 1.0, 1.0]
    ),
    "optimizer.lr=007": [7.0, 7.0],
    "optimizer.lr=1_0": [10.0, 10.0],
    "optimizer.lr=0.5 'optimizer.lr=${optimizer.weight_decay}'": [0.01, 0.01],
}
"""Lines, and the peak learning rate of each group that they build."""


@pytest.fixture(scope="module", autouse=True)
def _app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Hydra, initialized for an app with the presets; the tables of groups are not logged."""
    folder = tmp_path_factory.mktemp("app")
    (folder / "config.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.getLogger("lightning.pytorch.utilities.rank_zero"), "disabled", True)
        with initialize_config_dir(str(folder), version_base="1.3"):
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


def sentence_of(error: BaseException) -> str:
    """The one line that refuses, without what Hydra puts around it."""
    text = str(error)
    if text.startswith("Error in call to target"):
        text = next(line for line in text.split("\n") if FIELD.match(line))
    assert text.splitlines() == [text]
    return text


def corrected(overrides: list[str], sentence: str) -> list[str]:
    """The overrides as the sentence suggests."""
    suggestion = re.search(r"; type (for example )?", sentence)
    assert suggestion
    (override,) = shlex.split(sentence[suggestion.end() :])
    obsolete = {override.partition("=")[0]}
    if "no such field" in sentence or override.startswith("lightning_adam/"):
        obsolete.add(FIELD.match(sentence)[0])  # type: ignore[index]
    kept = [each for each in overrides if each.lstrip("+~").partition("=")[0] not in obsolete]
    return [*kept, override]


def refusals(network: nn.Module, overrides: list[str]) -> list[str]:
    """The sentences that refuse a line, until it builds because their suggestions are followed."""
    sentences: list[str] = []
    while True:
        try:
            build(network, overrides)
        except HydraException as error:
            sentence = sentence_of(error)
            assert sentence not in sentences, sentences
            sentences.append(sentence)
            overrides = corrected(overrides, sentence)
        else:
            return sentences


def test_line_is_refused_in_one_sentence(network: nn.Module) -> None:
    with each_row() as row:
        for line, beginning in REFUSED.items():
            with row(line):
                with pytest.raises(HydraException) as refused:
                    build(network, shlex.split(line))
                assert sentence_of(refused.value).startswith(beginning)


def test_following_the_suggestions_leads_to_a_build(network: nn.Module) -> None:
    with each_row() as row:
        for line, beginning in CORRECTED.items():
            with row(line):
                sentences = refusals(network, shlex.split(line))
                assert sentences[0].startswith(beginning)


def test_line_builds_with_the_lr_it_sets(network: nn.Module) -> None:
    with each_row() as row:
        for line, peaks in BUILT.items():
            with row(line):
                groups = build(network, shlex.split(line))["optimizer"].param_groups
                assert sorted(group["initial_lr"] for group in groups) == peaks

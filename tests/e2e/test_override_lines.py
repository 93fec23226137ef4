"""Override lines: each builds exactly what it says, or ends in one sentence."""

import logging
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, OverrideParseException
from hydra.utils import instantiate
from hypothesis import HealthCheck, given, note, settings
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from lightning_adam import AdamMonitor, ConfigError, build_adam
from tests.e2e.override_lines import (
    CONFIG,
    FIELD,
    LOOKED_AT,
    MONITOR,
    NETWORK,
    OPTIMIZER,
    REFUSED,
    SCHEDULER,
    SCHEDULERS,
    SHAPES,
    TOTAL_STEPS,
    Built,
    Line,
    lines,
    multiplier,
)
from tests.support.commands import run_text


class Outcome(NamedTuple):
    built: dict[str, Any]
    monitor: Any
    error: Exception | None


def outcome(overrides: tuple[str, ...]) -> Outcome:
    """What a line builds, or how it is refused; any other exception than Hydra's is a failure."""
    try:
        cfg = compose("config", overrides=list(overrides))
        built = build_adam(NETWORK, cfg.optimizer, cfg.get("scheduler"), TOTAL_STEPS)
        return Outcome(built, instantiate(cfg.adam_monitor), None)
    except HydraException as error:
        return Outcome({}, None, error)


def our_sentence(error: Exception) -> str:
    """What we say; empty if Hydra refuses the line when it composes, or Python a keyword."""
    said = str(error)
    if not isinstance(error, ConfigError) and said.startswith("Error in call to target"):
        if "got an unexpected keyword argument" in said:
            return ""
        said = next((line for line in said.split("\n") if FIELD.match(line)), "")
        assert said, f"not in our words: {error}"
    elif not isinstance(error, ConfigError):
        return ""
    assert said.splitlines() == [said]
    assert FIELD.match(said)
    assert "expected " in said or "; type " in said or "; the fields are " in said
    return said


def typed_instead(overrides: tuple[str, ...], sentence: str) -> tuple[str, ...] | None:
    """The line as the sentence wants it; None if it leaves the value to the user."""
    refused, instruction = FIELD.match(sentence), re.search(r"; type (for example )?", sentence)
    if not instruction or not (instruction[1] or "lightning_adam/" in sentence):
        return None
    assert refused
    (typed,) = shlex.split(sentence[instruction.end() :])
    obsolete = {typed.partition("=")[0]}
    if "no such field" in sentence or typed.startswith("lightning_adam/"):
        obsolete.add(refused[0])
    kept = (each for each in overrides if each.lstrip("+~").partition("=")[0] not in obsolete)
    return (*kept, typed)


def left_after_following(overrides: tuple[str, ...], error: Exception | None) -> Exception | None:
    """What is left to be refused when one types what is said: one never goes in circles."""
    sentences: list[str] = []
    while error is not None and (sentence := our_sentence(error)):
        assert sentence not in sentences, sentences
        sentences.append(sentence)
        assert len(sentences) <= 6, sentences
        instead = typed_instead(overrides, sentence)
        if instead is None:
            return error
        overrides, error = instead, outcome(instead).error
        assert not isinstance(error, OverrideParseException), sentence
        # A misspelt field's value is handed on as it is; all else that is said has to compose.
        assert error is None or our_sentence(error) or "no such field" in sentence, sentence
    return error


def check_built(asked: Built, outcome: Outcome) -> None:
    optimizer = outcome.built["optimizer"]
    assert type(optimizer).__name__ == asked.optimizer
    check_groups_built(asked.groups, optimizer)
    assert set(outcome.built) == {"optimizer", *(["lr_scheduler"] if asked.scheduler else [])}
    if asked.scheduler:
        check_schedule_built(asked.scheduler, optimizer, **outcome.built["lr_scheduler"])
    assert isinstance(outcome.monitor, AdamMonitor)
    for name, value in asked.monitor.items():
        # A word alone is a list of one.
        wanted = [value] if isinstance(value, str) else value
        assert getattr(outcome.monitor.config, name) == wanted


def check_groups_built(asked: dict[frozenset[str], dict[str, Any]], optimizer: Optimizer) -> None:
    name_of = {id(parameter): name for name, parameter in NETWORK.named_parameters()}
    built = {
        frozenset(name_of[id(parameter)] for parameter in group["params"]): group
        for group in optimizer.param_groups
    }
    assert set(built) == set(asked)
    for names, wanted in asked.items():
        group = built[names]
        assert set(group["param_names"]) == names
        seen = {**group, "lr": group.get("initial_lr", group["lr"]), "betas": [*group["betas"]]}
        for key, value in wanted.items():
            assert seen[key] == pytest.approx(value, rel=1e-12, abs=0), key


def check_schedule_built(
    asked: dict[str, Any],
    optimizer: Optimizer,
    scheduler: LRScheduler,
    interval: str,
    frequency: int,
    monitor: str | None = None,
) -> None:
    assert frequency == 1
    peaks = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    if "rates" in asked:
        assert (type(scheduler).__name__, interval) == (asked["name"], asked["interval"])
        seen = []
        for _ in asked["rates"]:
            seen.append(optimizer.param_groups[-1]["lr"])
            optimizer.step()
            scheduler.step()
        assert seen == pytest.approx(asked["rates"])
    elif asked["name"] == "plateau":
        assert isinstance(scheduler, ReduceLROnPlateau)
        assert (interval, monitor) == ("epoch", asked["monitor"])
        for name in ("mode", "factor", "patience", "threshold", "threshold_mode", "cooldown"):
            assert getattr(scheduler, name) == asked[name]
        assert scheduler.min_lrs == [asked["min_lr_ratio"] * peak for peak in peaks]
    else:
        assert isinstance(scheduler, LambdaLR)
        assert interval == "step"
        expected = [multiplier(asked, step) for step in LOOKED_AT]
        assert scheduler.base_lrs == peaks
        assert scheduler.get_last_lr() == pytest.approx([peak * expected[0] for peak in peaks])
        for of_group in scheduler.lr_lambdas:
            assert [of_group(step) for step in LOOKED_AT] == pytest.approx(expected, abs=1e-12)


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Hydra, set up for an app with our groups; what is built is not announced."""
    folder = tmp_path_factory.mktemp("app")
    (folder / "config.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.getLogger("lightning.pytorch.utilities.rank_zero"), "disabled", True)
        with initialize_config_dir(str(folder), version_base="1.3"):
            yield


@pytest.mark.parametrize("count", [30, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore:.*cycles the momentum")
def test_a_line_builds_what_it_says_or_is_refused_in_one_sentence(app: None, count: int) -> None:
    outcomes: Counter[str] = Counter()
    passed: set[tuple[str, ...]] = set()
    failed: set[tuple[str, ...]] = set()

    @settings(
        max_examples=5 * count // 2,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(lines)
    def check(line: Line) -> None:
        overrides, asked = line
        # Nearly half of what is drawn has been drawn before.
        if overrides in passed or (len(passed) == count and not failed):
            return
        failed.add(overrides)
        seen = outcome(overrides)
        note(f"{type(seen.error).__name__}: {seen.error}")
        if seen.error is None:
            assert asked is not None, "built, though it has to be refused"
            check_built(asked, seen)
        else:
            assert asked is None, "refused, though it is right"
            left_after_following(overrides, seen.error)
        failed.remove(overrides)
        passed.add(overrides)
        outcomes["refused" if seen.error else "built"] += 1

    check()
    assert outcomes.total() == count
    assert min(outcomes.values()) >= count / 4


@pytest.mark.slow
@pytest.mark.parametrize("key", sorted({**OPTIMIZER, **SCHEDULER, **MONITOR}))
def test_each_value_that_cannot_be_used_is_refused_by_its_field(app: None, key: str) -> None:
    shape = next((each for each in SHAPES if key.partition(".")[2] in SHAPES[each]), "cosine")
    group = "optimizer.groups=[{name:head,match:net.head.*}]"
    for text, value in {**OPTIMIZER, **SCHEDULER, **MONITOR}[key].wrong:
        if value is not REFUSED:
            error = outcome((f"{SCHEDULERS}={shape}", group, f"{key}={text}")).error
            assert error is not None, text
            assert our_sentence(error).startswith(
                re.sub(r"(betas)\.0|\.(pattern|rate)$", r"\1", key)
            )


CLASS = "lightning_adam/optimizer=custom optimizer._target_=torch.optim"
SCHEDULER_CLASS = f"{SCHEDULERS}=custom scheduler._target_=torch.optim.lr_scheduler"
HUGE = f"1{'0' * 400}"


def overrides_of(line: str) -> tuple[str, ...]:
    """The overrides of a line as it is typed in a shell."""
    return tuple(shlex.split(line))


@pytest.mark.parametrize(
    "line",
    [
        "optimizer.betas=[[0.9],0.9]",
        "optimizer.groups=[{name:head,match:net.head.*,betas:[0.9,[]]}]",
        r"""'optimizer.groups=[{name:head,regex:"\d{99999999999}"}]'""",
        """'optimizer.groups=[{name:"a\nb",match:net.head.*}]'""",
        """'optimizer.groups=[{name:head,match:"a\nb"}]'""",
        """'scheduler.name="a\nb"'""",
        """'+optimizer.lrr="a\nb"'""",
        """'+optimizer.lrr="é"'""",
        "~optimizer +optimizer={betas:[[0.9],0.9]}",
        "~optimizer +optimizer={lr:[1]}",
        "~scheduler +scheduler={name:[cosine]}",
        "~scheduler +scheduler={name:{a:1}}",
        "~scheduler +scheduler.warmup_steps=3",
        "scheduler.name=constant",
        "scheduler.name=custom",
        f"scheduler.warmup_ratio=0.1 scheduler.total_steps={HUGE}",
        f"{SCHEDULERS}=wsd scheduler.total_steps={HUGE}",
        "adam_monitor.scopes=[[model]]",
        f"{CLASS}.NAdam optimizer.lr=0.1 +optimizer.betas=[0.5]",
        f"{CLASS}.Rprop optimizer.lr=0.1 +optimizer.etas=[1]",
        f"{CLASS}.Adam optimizer.lr=0.1 +optimizer.betas=[[0.5],0.9]",
        f"{CLASS}.Adam optimizer.lr=0.1 +optimizer.fused=true +optimizer.foreach=true",
        f"{SCHEDULER_CLASS}.StepLR scheduler.name=[a]",
        f"{SCHEDULER_CLASS}.StepLR +scheduler.step_size=2 +scheduler.last_epoch=5",
        f"{SCHEDULER_CLASS}.LinearLR +scheduler.bogus=1",
        f"{SCHEDULER_CLASS}.CyclicLR +scheduler.base_lr=0.1 +scheduler.max_lr=1"
        " +scheduler.step_size_up=0",
    ],
    ids=lambda line: line[:60],
)
def test_what_is_rarely_typed_is_refused_in_one_sentence(app: None, line: str) -> None:
    error = outcome(overrides_of(line)).error
    assert error is not None
    assert our_sentence(error)
    left_after_following(overrides_of(line), error)


@pytest.mark.parametrize(
    "line",
    [
        "optimizer.betas=[0.9]",
        "optimizer.lr=-1 optimizer.eps=0 optimizer.weight_decay=nan",
        "optimizer.fused=true optimizer.foreach=true",
        "+optimizer.lrr='0.1'",
        "optimizer.groups=[{name:head}]",
        "optimizer.groups=[{name:head,match:net.head.*,regex:head,module_class:Linear}]",
        "optimizer.groups=[{name:a,match:net.head.*},{name:a,regex:blocks}]",
        """'optimizer.groups=[{name:head,match:net.head.*},{name:"a b",regex:blocks}]'""",
        """'optimizer.groups=[{name:a,module_class:"."}]'""",
        "optimizer.groups=[{name:a,module_class:LayerNorm,weight_decay:0.1}]",
        "optimizer.layer_decay.rate=0.5",
        "optimizer.layer_decay={pattern:net.block.*,rate:0.5}",
        "optimizer.layer_decay={pattern:blocks,rate:2}",
        "scheduler.warmup_ratio=0.5 scheduler.total_steps=1000",
        "scheduler.warmup_steps=5 scheduler.total_steps=4",
        "scheduler.warmup_steps=5 scheduler.warmup_ratio=0.1",
        "scheduler.warmup_steps=5 scheduler.warmup_ratio=inf",
        "scheduler.name=constant",
        f"{SCHEDULERS}=inverse_sqrt scheduler.name=cosin",
        f"{SCHEDULERS}=wsd scheduler.warmup_steps=95",
        f"{SCHEDULERS}=wsd scheduler.warmup_steps=1 scheduler.decay_ratio=1",
        f"{SCHEDULERS}=wsd scheduler.decay_steps=3 scheduler.decay_ratio=0.5",
        "adam_monitor.every_n_steps=0",
    ],
)
def test_typing_what_is_said_leads_to_a_build(app: None, line: str) -> None:
    error = outcome(overrides_of(line)).error
    assert error is not None
    assert left_after_following(overrides_of(line), error) is None


@pytest.mark.parametrize(
    ("line", "peaks"),
    [
        (f"{CLASS}.NAdam optimizer.lr=1", [1.0, 1.0]),
        (
            f"{CLASS}.NAdam optimizer.lr=1 optimizer.layer_decay={{pattern:net.blocks.*,rate:0.5}}",
            [0.0625, 0.125, 0.125, 0.25, 0.25, 0.5, 0.5, 1.0, 1.0],
        ),
        ("optimizer.lr=007", [7.0, 7.0]),
        ("optimizer.lr=1_0", [10.0, 10.0]),
        ("optimizer.lr=0.5 'optimizer.lr=${optimizer.weight_decay}'", [0.01, 0.01]),
    ],
)
def test_what_is_rarely_typed_trains_with_the_learning_rate_it_says(
    app: None, line: str, peaks: list[float]
) -> None:
    seen = outcome(overrides_of(line))
    assert seen.error is None
    groups_built = seen.built["optimizer"].param_groups
    assert sorted(group["initial_lr"] for group in groups_built) == peaks


APP = """
import hydra
from hydra.utils import instantiate


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    from torch import nn

    from lightning_adam import build_adam

    network = nn.ModuleDict({"net": nn.ModuleDict({"head": nn.Linear(4, 2)})})
    built = build_adam(network, cfg.optimizer, cfg.get("scheduler"), 100)
    instantiate(cfg.adam_monitor)
    print("peak:", built["optimizer"].param_groups[0].get("initial_lr"))


if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "printed"),
    [
        ("optimizer.lr=0.25 optimizer.betas=[0.9,0.95]", "peak: 0.25"),
        ("'optimizer.groups=[{name: head, match: net.head.*, lr_scale: 10}]'", "peak: 0.01"),
        ("optimizer.lrr=0.1", "Key 'lrr' not in 'AdamConfig'"),
        ("optimizer.betas=[0.9,0.99", "no viable alternative at input"),
        ("optimizer.betas=[0.9,1.5]", "optimizer.betas=[0.9,1.5]: expected two numbers"),
        ("""'optimizer.groups=[{name: "é ☃", match: net.*}]'""", "optimizer.groups.0.name="),
        ("adam_monitor.every_n_steps=0", "adam_monitor.every_n_steps=0: expected"),
    ],
)
def test_a_line_in_a_shell(tmp_path: Path, line: str, printed: str) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.yaml").write_text(CONFIG)
    (tmp_path / "app.py").write_text(APP)
    finished = run_text(f"python app.py {line}", tmp_path)
    assert (finished.returncode == 0) == printed.startswith("peak: ")
    assert printed in finished.output
    assert "Traceback" not in finished.output

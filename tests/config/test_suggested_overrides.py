"""Suggested overrides work, for every way to pass a config with an invalid value to a module."""

import copy
import functools
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import run_job
from hydra.types import HydraContext
from hydra.utils import instantiate
from lightning.pytorch import LightningModule
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from torch import nn

from lightning_adam import AdamMixin, ConfigError, build_adam
from lightning_adam.config.errors import ConfigPath, Source
from lightning_adam.config.parsing import locate, locate_argument, merged_with_preset
from tests.support.tables import each_row


def network() -> nn.Module:
    blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
    return nn.ModuleDict({"blocks": blocks, "head": nn.Linear(3, 2)})


class Direct(AdamMixin, LightningModule):
    """Passes the configs to the mixin, as in the README."""

    def __init__(self, optimizer: Any = None, scheduler: Any = None) -> None:
        super().__init__(optimizer=optimizer, scheduler=scheduler)
        self.net = network()


class FromHparams(AdamMixin, LightningModule):
    """Saves the configs as hyperparameters, as the template does. They are parsed in `fit`."""

    def __init__(self, optimizer: Any = None, scheduler: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = network()


class Renamed(AdamMixin, LightningModule):
    """Has arguments with other names."""

    def __init__(self, adam: Any, lr_schedule: Any = None) -> None:
        super().__init__(optimizer=adam, scheduler=lr_schedule)
        self.net = network()


class Nested(AdamMixin, LightningModule):
    """Has both configs in one argument."""

    def __init__(self, training: Any) -> None:
        super().__init__(optimizer=training["optimizer"], scheduler=training["scheduler"])
        self.net = network()


class InstantiatesConfigs(AdamMixin, LightningModule):
    """Instantiates its configs, which have `_recursive_: false`."""

    def __init__(self, optimizer: Any, scheduler: Any) -> None:
        super().__init__(optimizer=instantiate(optimizer), scheduler=instantiate(scheduler))
        self.net = network()


class Plain(LightningModule):
    """Has no mixin, and builds the optimizer when `fit` starts."""

    def __init__(self, optimizer: Any, scheduler: Any) -> None:
        super().__init__()
        self.given = optimizer, scheduler
        self.net = network()

    def configure_optimizers(self) -> Any:
        return build_adam(self, *self.given, 100)


class GAN(LightningModule):
    """Has two optimizers of the same class."""

    def __init__(self, generator_optimizer: Any, discriminator_optimizer: Any) -> None:
        super().__init__()
        self.net = network()
        self.given = generator_optimizer, discriminator_optimizer

    def configure_optimizers(self) -> Any:
        return [build_adam(self, each, trainer=None) for each in self.given]


def config(kind: type, presets: str = "", **values: Any) -> str:
    """Returns a config whose model has the values."""
    node = {"model": {"_target_": f"{__name__}.{kind.__name__}", **values}}
    return presets + OmegaConf.to_yaml(node)


ADAMW = {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 0.01}
STEP = {"_target_": "torch.optim.lr_scheduler.StepLR", "_partial_": True, "step_size": 5}
ANNEALING = {"_target_": "torch.optim.lr_scheduler.CosineAnnealingLR", "_partial_": True}
PARTIALS: dict[str, Any] = {"optimizer": ADAMW, "scheduler": STEP}
PRESETS = """
defaults:
  - lightning_adam/optimizer@model.{0}: adamw
  - lightning_adam/scheduler@model.{1}: constant
  - _self_
"""
TWO_PRESETS = """
defaults:
  - lightning_adam/optimizer@model.generator_optimizer: adamw
  - lightning_adam/optimizer@model.discriminator_optimizer: adamw
  - _self_
"""
ROOT_PRESETS = """
defaults:
  - lightning_adam/optimizer: adamw
  - lightning_adam/scheduler: constant
  - _self_
"""
IN_MODEL = PRESETS.format("optimizer", "scheduler")
INTERPOLATED = {"optimizer": "${optimizer}", "scheduler": "${scheduler}"}
HEAD = {"name": "head", "match": "net.*", "lr_scale": -1}


def configured(cfg: DictConfig, **given: Any) -> Any:
    """Instantiates the model like the template, and configures it like `fit`."""
    return instantiate(cfg.model, **given).configure_optimizers()


def whole_config(cfg: DictConfig) -> Any:
    return instantiate(cfg).model.configure_optimizers()


def from_another_node(cfg: DictConfig) -> Any:
    return configured(cfg, optimizer=cfg.other)


def from_an_instantiated_node(cfg: DictConfig) -> Any:
    return configured(cfg, optimizer=instantiate(cfg.other))


def by_hand(cfg: DictConfig) -> Any:
    return build_adam(network(), cfg.model.optimizer, cfg.model.scheduler, 100)


def by_hand_with_containers(cfg: DictConfig) -> Any:
    values: Any = OmegaConf.to_container(cfg.model)
    return build_adam(network(), values["optimizer"], values["scheduler"], 100)


def by_hand_with_instances(cfg: DictConfig) -> Any:
    optimizer, scheduler = instantiate(cfg.model.optimizer), instantiate(cfg.model.scheduler)
    return build_adam(network(), optimizer, scheduler, 100)


def constructed(cfg: DictConfig) -> Any:
    return FromHparams(cfg.model.optimizer, cfg.model.scheduler).configure_optimizers()


def monitored(cfg: DictConfig) -> Any:
    return instantiate(cfg.callbacks.adam_monitor)


class Route(NamedTuple):
    """A config, invalid overrides, and the override that the error suggests."""

    config: str
    overrides: str
    suggested: str
    run: Callable[[DictConfig], Any] = configured


LR = ("model.optimizer.lr=-1", "model.optimizer.lr=0.001")
WARMUP = ("model.scheduler.warmup_steps=-1", "model.scheduler.warmup_steps=100")
BETAS = ("'+model.optimizer.betas=[0.9,1.5]'", "'++model.optimizer.betas=[0.9,0.999]'")
ROUTES = {
    **{
        f"{kind.__name__}, {name}={value}, {overrides}": Route(
            config(kind, IN_MODEL, **{name: value}), overrides, suggested
        )
        for kind, name, value in (
            (Direct, "_convert_", "none"),
            (Direct, "_convert_", "all"),
            (FromHparams, "_convert_", "none"),
            (FromHparams, "_recursive_", False),
            (Plain, "_convert_", "partial"),
            (Plain, "_recursive_", False),
        )
        for overrides, suggested in (LR, WARMUP)
    },
    "another name": Route(
        config(Renamed, PRESETS.format("adam", "lr_schedule")),
        "model.adam.eps=0",
        "model.adam.eps=1e-08",
    ),
    "within an argument": Route(
        config(Nested, PRESETS.format("training.optimizer", "training.scheduler")),
        "model.training.optimizer.lr=-1",
        "model.training.optimizer.lr=0.001",
    ),
    "the whole config": Route(config(Direct, IN_MODEL), *LR, whole_config),
    "an interpolation": Route(
        config(FromHparams, ROOT_PRESETS, **INTERPOLATED), "optimizer.lr=-1", "optimizer.lr=0.001"
    ),
    "given in code": Route(
        config(Direct, IN_MODEL, scheduler=None) + "other: {lr: -1.0}",
        "",
        "other.lr=0.001",
        from_another_node,
    ),
    "a partial given in code": Route(
        config(Direct, **PARTIALS) + OmegaConf.to_yaml({"other": {**ADAMW, "lr": -1}}),
        "",
        "other.lr=0.001",
        from_an_instantiated_node,
    ),
    "the first of two": Route(
        config(GAN, TWO_PRESETS),
        "model.generator_optimizer.lr=-1",
        "model.generator_optimizer.lr=0.001",
    ),
    "the second of two": Route(
        config(GAN, TWO_PRESETS),
        "model.discriminator_optimizer.lr=-1",
        "model.discriminator_optimizer.lr=0.001",
    ),
    "two partials": Route(
        config(GAN, generator_optimizer=ADAMW, discriminator_optimizer={**ADAMW, "eps": -1.0}),
        "",
        "model.discriminator_optimizer.eps=1e-08",
    ),
    **{
        f"{kind.__name__}, partial, {overrides}": Route(
            config(kind, **PARTIALS), overrides, suggested
        )
        for kind in (Direct, FromHparams)
        for overrides, suggested in (
            BETAS,
            ("+model.optimizer.weight_decay_on=al", "++model.optimizer.weight_decay_on=all"),
            ("+model.scheduler.interval=epoh", "++model.scheduler.interval=epoch"),
            (
                "+model.optimizer.layer_decay.rate=0.5",
                "'+model.optimizer.layer_decay.pattern=net.blocks.*'",
            ),
            ("~model.scheduler.step_size", "+model.scheduler.step_size=VALUE"),
        )
    },
    "Plain, partial": Route(config(Plain, **PARTIALS), *BETAS),
    "its own partial": Route(
        config(InstantiatesConfigs, _recursive_=False, **PARTIALS),
        "~model.scheduler.step_size",
        "+model.scheduler.step_size=VALUE",
    ),
    "a missing value": Route(
        config(Direct, optimizer=ADAMW, scheduler={**STEP, "step_size": "???"}),
        "",
        "model.scheduler.step_size=VALUE",
    ),
    "a part of a list": Route(
        config(Direct, optimizer={**ADAMW, "groups": [HEAD]}, scheduler=None),
        "",
        "model.optimizer.groups.0.lr_scale=0.1",
    ),
    "a part that a list lacks": Route(
        config(Direct, optimizer={**ADAMW, "groups": [{"name": "head"}]}, scheduler=None),
        "",
        "'+model.optimizer.groups.0.match=net.head.*'",
    ),
    **{
        f"{run.__name__}, {overrides}": Route(config(Direct, IN_MODEL), overrides, suggested, run)
        for run in (by_hand, by_hand_with_containers, constructed)
        for overrides, suggested in (LR, WARMUP)
    },
    **{
        f"{run.__name__}, partial": Route(
            config(Direct, optimizer=ADAMW, scheduler=ANNEALING),
            "",
            "+model.scheduler.T_max=total_steps",
            run,
        )
        for run in (by_hand, by_hand_with_containers, by_hand_with_instances)
    },
    "a monitor": Route(
        "defaults: [{lightning_adam/monitor@callbacks.adam_monitor: default}, _self_]",
        "callbacks.adam_monitor.every_n_steps=0",
        "callbacks.adam_monitor.every_n_steps=50",
        monitored,
    ),
}


Run = Callable[[Callable[[DictConfig], Any], str, list[str]], Any]


@pytest.fixture
def job(tmp_path: Path) -> Run:
    """Runs a function as a Hydra job, and raises its error. Presets are composed once."""

    @functools.cache
    def composed(presets: str) -> DictConfig:
        (tmp_path / "config.yaml").write_text(presets)
        own = [f"hydra.run.dir={tmp_path}", "hydra.output_subdir=null"]
        return compose("config", own, return_hydra_config=True)

    def run(task: Callable[[DictConfig], Any], text: str, overrides: list[str]) -> Any:
        with initialize_config_dir(str(tmp_path), version_base="1.3"):
            presets, model, own = text.partition("model:\n")
            cfg = copy.deepcopy(composed(presets))
            with open_dict(cfg):
                cfg.merge_with(OmegaConf.create(f"{model}{own}"))
            parsed = OverridesParser.create().parse_overrides(overrides)
            ConfigLoaderImpl._apply_overrides_to_config(parsed, cfg)
            with read_write(cfg.hydra), open_dict(cfg.hydra):
                cfg.hydra.overrides.task = overrides
            loader = GlobalHydra.instance().config_loader()
            context = HydraContext(config_loader=loader, callbacks=Callbacks())
            return run_job(task, cfg, "hydra.run.dir", None, context, False).return_value

    return run


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a function as a Hydra app with a command line, and raises its error."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    quiet = [f"hydra.run.dir={tmp_path}", "hydra.output_subdir=null"]
    quiet += [f"hydra/{each}_logging=none" for each in ("job", "hydra")]

    def run(task: Callable[[DictConfig], Any], text: str, overrides: list[str]) -> None:
        (tmp_path / "config.yaml").write_text(text)
        monkeypatch.setattr("sys.argv", ["app.py", *overrides, *quiet])
        hydra.main(version_base="1.3", config_path=str(tmp_path), config_name="config")(task)()

    return run


def config_error(run: Callable[..., Any], *arguments: Any) -> ConfigError:
    """Returns the error of a run, without the lines that Hydra adds."""
    with pytest.raises(Exception) as raised:  # noqa: PT011
        run(*arguments)
    error: BaseException | None = raised.value
    while error is not None and not isinstance(error, ConfigError):
        error = error.__cause__
    assert error is not None, raised.value
    return error


def suggested_override(error: ConfigError) -> str:
    """Returns the override that an error suggests."""
    return re.sub(r"^(Use for example|Use|Set) ", "", error.suggestion)


def check(run: Run, route: Route) -> None:
    """Applies the suggestion in place of the invalid override, and after it."""
    given = shlex.split(route.overrides)
    assert suggested_override(config_error(run, route.run, route.config, given)) == route.suggested
    (override,) = shlex.split(route.suggested.replace("VALUE", "3"))
    kept = [each for each in given if key_of(each) != key_of(override)]
    # The last of two overrides without a + applies.
    for before in {tuple(kept), tuple(given if override.startswith("+") else kept)}:
        run(route.run, route.config, [*before, override])


def key_of(override: str) -> str:
    return override.partition("=")[0].lstrip("+")


IN_DEFAULT = [
    "FromHparams, _recursive_=False, model.scheduler.warmup_steps=-1",
    "within an argument",
    "the whole config",
    "an interpolation",
    "a partial given in code",
    "the second of two",
    "two partials",
    f"Direct, partial, {BETAS[0]}",
    "FromHparams, partial, +model.optimizer.layer_decay.rate=0.5",
    "its own partial",
    "a part that a list lacks",
    "constructed, model.optimizer.lr=-1",
    "by_hand_with_containers, partial",
    "a monitor",
]
"""One route of each kind. The others run in CI, where all of them also run on a command line."""


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(IN_DEFAULT, id="one of each kind"),
        pytest.param(sorted(ROUTES.keys() - IN_DEFAULT), id="the others", marks=pytest.mark.slow),
    ],
)
def test_suggested_override_works(names: list[str], job: Run) -> None:
    with each_row() as row:
        for name in names:
            with row(name):
                check(job, ROUTES[name])


@pytest.mark.slow
def test_suggested_override_works_on_a_command_line(app: Run) -> None:
    with each_row() as row:
        for name, route in ROUTES.items():
            with row(name):
                check(app, route)


def test_preset_in_another_package_is_selected_there() -> None:
    path = ConfigPath("model.optimizer")
    error = merged_with_preset(path, "torch.optim.SGD", "lightning_adam/optimizer")
    assert str(error).startswith("model.optimizer._target_=torch.optim.SGD is merged with the fie")
    assert error.suggestion.endswith(" use lightning_adam/optimizer@model.optimizer=custom")


def test_config_from_outside_the_app_is_named_as_in_code(job: Run) -> None:
    of_code = OmegaConf.create({"adam": {"lr": -1}})
    tasks: dict[str, Callable[[DictConfig], Any]] = {
        "lr=0.001": lambda _: build_adam(network(), {"lr": -1}),
        "cfg.adam.lr=0.001": lambda _: build_adam(network(), of_code.adam),
        "eps=1e-08": lambda cfg: configured(cfg, optimizer={"lr": 0.1, "eps": -1.0}),
    }
    text = config(Direct, IN_MODEL)
    with each_row() as row:
        for suggested, task in tasks.items():
            with row(suggested):
                assert suggested_override(config_error(job, task, text, [])) == suggested


def test_config_without_an_app_is_set_in_code() -> None:
    for run in (configured, whole_config, by_hand, constructed):
        cfg: Any = OmegaConf.create(config(Direct, **PARTIALS))
        cfg.model.optimizer.betas = [0.9, 1.5]
        error = config_error(run, cfg)
        assert suggested_override(error) == "cfg.model.optimizer.betas=[0.9, 0.999]"
        exec(suggested_override(error), {"cfg": cfg})
        run(cfg)
    with pytest.raises(ConfigError, match=r"^betas=\[0\.9, 1\.5\] .* Use for example betas=\["):
        build_adam(network(), {**ADAMW, "betas": [0.9, 1.5]})


def test_config_composed_in_code_is_overridden(tmp_path: Path) -> None:
    """The overrides are also in code: `compose(overrides=[...])`."""
    (tmp_path / "config.yaml").write_text(config(FromHparams, **PARTIALS))
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        cfg = compose("config", ["+model.optimizer.layer_decay.rate=0.5"])
    suggested = "+model.optimizer.layer_decay.pattern=net.blocks.*"
    for run in (configured, whole_config, constructed):
        assert suggested_override(config_error(run, cfg)) == f"'{suggested}'"
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        configured(compose("config", ["+model.optimizer.layer_decay.rate=0.5", suggested]))


def test_path_is_known_only_while_hydra_calls_the_constructor() -> None:
    assert locate_argument("optimizer") is None
    place = locate(functools.partial(int), "optimizer")
    assert (str(place), place.source) == ("optimizer", Source.PYTHON)
    module = instantiate(OmegaConf.create(config(FromHparams, optimizer={"lr": 0.5})).model)
    assert str(module.config_paths[0]) == "model.optimizer"
    assert (locate({}, "a").keys, locate(3, "a").keys) == (frozenset(), frozenset())

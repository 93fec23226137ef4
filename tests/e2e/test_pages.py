"""The fenced blocks of the README, of CONTRIBUTING and of the guides work as they are written.

By default a command runs in this process: its overrides are composed into its config and, if that
takes less than a second, trained with. CI runs one of each kind as a process, and the nightly test
all of them.
"""

import copy
import importlib
import itertools
import json
import logging
import os
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import metadata
from pathlib import Path
from typing import Any, cast

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from lightning.pytorch.loggers import CSVLogger
from omegaconf import DictConfig, OmegaConf, open_dict
from packaging.requirements import Requirement
from torch import Tensor

from lightning_adam import AdamMonitor, ConfigError, __version__, build_adam, cli
from lightning_adam.config.tune import Range, parse_tune
from lightning_adam.config.variables import MONITOR_VARIABLE as VARIABLE
from lightning_adam.findings import RULES, Suggestion
from lightning_adam.findings.describe import describe_raised
from lightning_adam.findings.finding import Finding
from lightning_adam.monitor.environment import settings
from lightning_adam.statistics.catalogue import SYMBOLS
from tests.support.commands import (
    BIN,
    DEMO_KEYS,
    PROJECT_KEYS,
    Finished,
    environment,
    follow_the_readme,
    jobs_in,
    keys,
    logged_rows,
    offline_runs,
    promised_keys,
    run,
    run_config,
    run_text,
    succeed,
    write_files,
    write_the_project,
)
from tests.support.documentation import (
    CONFIG,
    REPOSITORY,
    TRAIN,
    TRAIN_LINE,
    block,
    blocks,
    named_files,
    shell_lines,
)
from tests.support.linked_packages import link_packages
from tests.support.memory_logger import MemoryLogger
from tests.support.tables import each_row
from tests.support.template_project import FILES as TEMPLATE
from tests.support.training import ADAMW, Lit, loader, loss_of, network, trainer
from tests.support.wandb_server import ENTITY, WandbServer

TABLE = ("text", "AdamW, ")
HYDRA_PREFIX = r"(?m)^\[[-\d]+ [:,\d]+\]\[lightning_adam\]\[INFO\] - "
FINDING = ("text", "AdamMonitor: eps_dominates")
ATTACH = ("python", "# attach.py\n")
MEASURE = ("python", "# measure.py\n")
ADOPTION = ("diff", "+from lightning_adam import AdamMixin\n")
MIGRATION = ("diff", "-from transformers import ")
MODULE = ("python", "# src/models/digits_module.py\n")
EXPERIMENT = ("yaml", "# @package _global_\n# configs/experiment/adam.yaml\n")
CLI = ("python", "# cli.py\n")
CLI_FILE = ("yaml", "# fit.yaml\n")
EXTENSIONS = {
    "# statistic.py\n": "'adam_gradient/grad_peak': 1.8898",
    "# finding.py\n": "adam_monitor.findings.step_large.threshold=0.5",
    "# schedule.py\n": "[0.5, 1.0, 1.0, 0.5, 0.5]",
}
"""The programs of CONTRIBUTING, and a part of what each prints."""
IN_THIRD_PARTY = [
    ("python", "from lightning.pytorch.plugins.io import TorchCheckpointIO\n"),
    ("python", "class LitScheduleFree("),
]
"""The blocks that test_third_party.py trains with."""
IMPORTS = ("python", "from lightning_adam")
REPORT = ("python", "from pathlib import Path\n")
EPS_ERROR = ("text", "optimizer.eps=1e-08 rounds to 0 ")
TUNED = ("text", "overrides: ")
INSPECTED = ("text", "dtype ")
BLOCKS = [IMPORTS, REPORT, EPS_ERROR, INSPECTED, TABLE, FINDING, TRAIN, CONFIG, MEASURE, MODULE]
BLOCKS += [ATTACH, TUNED, EXPERIMENT, CLI, CLI_FILE, *IN_THIRD_PARTY]
BLOCKS += [ADOPTION, MIGRATION]
BLOCKS += [("python", beginning) for beginning in EXTENSIONS]

INSTALL = r"pip install "
VERSION = r"lightning-adam --version$"
MAKE = r"make "
PRE_COMMIT = r"pre-commit install$"
EXPLAIN = r"lightning-adam explain "
LOOK = r"lightning-adam (report (?!outputs)|dashboard )"
INSPECT = r"lightning-adam inspect (?!outputs)"
PROJECT = rf"(?!{re.escape(TRAIN_LINE)})python train\.py (?!-m)"
TUNE = r"python train\.py -m hydra/sweeper=adam_tune "
NO_CODE = rf"{VARIABLE}="
RECIPE = r"python -m recipes\.(?P<name>[\w.]+)|recipes/(?P<script>\w+)_torchrun\.sh"
RECIPE_OUTPUT = r"lightning-adam (inspect|report) outputs/"
IN_TEMPLATE = r"python src/train\.py "
IN_CLI = r"python cli\.py "
LINES = [MAKE, PRE_COMMIT, EXPLAIN, LOOK, INSPECT, re.escape(TRAIN_LINE), PROJECT, TUNE, NO_CODE]
LINES += [INSTALL, VERSION, RECIPE, RECIPE_OUTPUT, IN_TEMPLATE, IN_CLI]

PRINTED = {
    'match: "net.3.*", lr_scale': ["head      "],
    "lightning_adam/scheduler=wsd": ["name=wsd", "decay_steps=10"],
    "optimizer.layer_decay": ["layer_0"],
    "lightning_adam/scheduler=plateau": ["name=plateau", "patience=3", "monitor=val/loss"],
    "OneCycleLR": ["name=OneCycleLR", "total_steps=52", "interval=step"],
    "adam_monitor.findings.": [" measurements are too few to judge "],
    "optimi.AdamW": [
        "AdamMonitor does not measure everything of AdamW: its state does not provide "
    ],
    "weight_decay_on=all": ["0.01 "],
    "ckpt_path=outputs/first": ["optimizer.lr=0.001 replaces the checkpoint's 0.002"],
}
"""What is printed where a command holds these words."""
LOGGED = {
    "layer_depth=1": [
        "adam_update/layer/net/normalized_update_max",
        "adam_underflow/group/decay/idle_fraction",
    ],
    "adam_monitor.worst": [
        "adam_underflow/eps_damping",
        "adam_underflow/worst_1/eps_energy_loss",
    ],
    "scopes=[model,tensor]": ["adam_moments/tensor/net.0.weight/exp_avg_rms"],
}
"""Some of the keys that it logs."""
EXPLAINED = {
    "optimizer": "optimizer.layer_decay.rate=null",
    "scheduler": "lightning_adam/scheduler=inverse_sqrt",
    "tune": "hydra.sweeper.n_trials=20",
}
"""A part of the explanation of a topic; that of all others has the symbols."""
MONITOR_SETTINGS = [
    {},
    {"every_n_steps": 10, "statistics": "all", "scopes": ["model", "layer"]},
]
"""What each line without code asks of the monitor."""
OPTIMIZERS: dict[str, list[dict[str, Any]]] = {
    "optimizer.amsgrad=true": [{"lr": 3e-4, "betas": [0.9, 0.95], "amsgrad": True}],
    "-m optimizer.lr=1e-4,1e-3": [{"lr": 1e-4}, {"lr": 1e-3}],
    "ckpt_path=outputs/first": [{"lr": 1e-3}],
    "fault=l2": [{"decoupled_weight_decay": False}],
}
"""The optimizers of the jobs that a recipe's command starts, where it holds these words."""
ACCURACY = "validation accuracy: "
INSTALLING = "installing into .venv"
TO_CSV = "--trainer.accelerator=cpu --trainer.logger=CSVLogger --trainer.logger.save_dir=."
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


def overrides(line: str) -> list[str]:
    words = shlex.split(line)
    start = 3 if words[1] == "-m" else 2 if words[0] == "python" else 1
    return words[start:]


@pytest.fixture(autouse=True)
def _no_job_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    for variable in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(variable, "0")


def expected(table: Mapping[str, Sequence[Any]], line: str) -> list[Any]:
    """What a table expects of a command, by the words that it holds."""
    return [each for words, found in table.items() if words in line for each in found]


def composed(folder: Path, name: str, line: list[str]) -> DictConfig:
    """The config that an app gets from its command; Hydra's own part is `HydraConfig.get()`."""
    with initialize_config_dir(str(folder), version_base="1.3"):
        line = [*line, "hydra.job.name=train", "hydra.runtime.output_dir=."]
        config = compose(name, line, return_hydra_config=True)
    HydraConfig.instance().set_config(copy.deepcopy(config))
    with open_dict(config):
        del config["hydra"]
    return config


def test_every_block_and_every_command_is_of_one_tested_kind() -> None:
    for page, language, text in blocks():
        if language == "bash":
            for line in filter(None, text.split("\n")):
                kinds = [pattern for pattern in LINES if re.match(pattern, line)]
                assert len(kinds) == 1, f"{page}: {line}: {kinds}"
        else:
            fitting = [each for each in BLOCKS if (language, text[: len(each[1])]) == each]
            assert len(fitting) == 1, f"{page}: ```{language}\n{text}"
    lines = shell_lines("")
    for words in (*PRINTED, *LOGGED, *OPTIMIZERS):
        assert any(words in line for line in lines), f"no command holds {words}"


def test_project_of_the_quick_start_learns_and_prints_what_the_page_shows(tmp_path: Path) -> None:
    training, offline_run = follow_the_readme(tmp_path / "my project")
    assert float(training.after("validation accuracy: ")) > 0.9
    config = run_config(offline_run)
    (log,) = (tmp_path / "my project").glob("outputs/*/*/train.log")
    for printed in (training.output, log.read_text(encoding="utf-8")):
        assert re.search(f"{HYDRA_PREFIX}AdamW, ", printed)
        assert block(*TABLE) in re.sub(HYDRA_PREFIX, "", printed)
    assert keys(logged_rows(offline_run)) == promised_keys(*PROJECT_KEYS)
    assert (config["optimizer"]["lr"], config["optimizer"]["betas"]) == (3e-3, [0.9, 0.95])
    assert config["scheduler"]["warmup_steps"] == 100


def test_diff_of_the_readme_leads_to_the_quick_start() -> None:
    """The script has the added and unchanged lines in this order, and no removed line."""
    lines = block(*ADOPTION).splitlines()
    removed = [line[1:] for line in lines if line[:1] == "-" and line[1:].strip()]
    kept = [line[1:] for line in lines if line[:1] != "-" and line[1:].strip()]
    assert sum(line[:1] == "+" for line in lines) == 6
    script = block(*TRAIN).splitlines()
    assert not {*removed} & {*script}
    places = [script.index(line) for line in kept]
    assert places == sorted(places)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The project of the quick start, limited to one epoch of 52 steps."""
    folder = tmp_path / "my project"
    write_the_project(folder)
    program = (folder / "train.py").read_text(encoding="utf-8")
    shorter = {"max_epochs=10": "max_epochs=1", "4096": "1920", "[3072, 1024]": "[1664, 256]"}
    for text, replacement in shorter.items():
        assert program.count(text) == 1
        program = program.replace(text, replacement)
    (folder / "train.py").write_text(program, encoding="utf-8")
    return folder


@pytest.fixture
def console(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """The lines that Lightning and lightning_adam log to the console."""
    lightning = logging.getLogger("lightning.pytorch")
    lightning.addHandler(caplog.handler)
    yield caplog
    lightning.removeHandler(caplog.handler)


def test_each_command_for_the_project_trains_as_its_guide_says(
    project: Path, console: pytest.LogCaptureFixture
) -> None:
    main = runpy.run_path(str(project / "train.py"))["main"].__wrapped__
    with each_row() as row:
        for line in shell_lines(PROJECT):
            with row(line):
                console.clear()
                logger = MemoryLogger()
                main.__globals__["WandbLogger"] = lambda offline, logger=logger: logger
                main(composed(project / "conf", "config", overrides(line)))
                logged = {key for _, values in logger.rows for key in values}
                assert all(printed in console.text for printed in expected(PRINTED, line))
                assert logged >= set(expected(LOGGED, line))


def test_install_page_names_each_extra_and_the_version_command_prints_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    extras = set(metadata("lightning-adam").get_all("Provides-Extra") or ())
    page = (REPOSITORY / "docs/install.md").read_text(encoding="utf-8")
    assert set(re.findall(r"(?m)^\| `(\w+)` \|", page)) == extras
    for line in shell_lines(INSTALL):
        *options, package = shlex.split(line)[2:]
        assert package == "." or Requirement(package).extras <= extras, line
        assert options in ([], ["-c", "constraints.txt"]), line
    (line,) = shell_lines(VERSION)
    with pytest.raises(SystemExit, match="0"):
        cli.main(shlex.split(line)[1:])
    assert capsys.readouterr().out == f"{__version__}\n"


def test_each_topic_of_the_pages_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with each_row() as row:
        for line in shell_lines(EXPLAIN):
            with row(line):
                cli.main(shlex.split(line)[1:])
                assert EXPLAINED.get(line.split()[-1], SYMBOLS) in capsys.readouterr().out


def test_finding_is_printed_as_in_the_readme() -> None:
    """The numbers are those of a run of `recipes.diagnostics.half_precision`."""
    rule = RULES["eps_dominates"]
    evidence = {
        "eps_energy_loss": 0.581,
        "denominator_mean": 0.00127,
        "eps": 1e-3,
        "eps_dominated_fraction": 0.517,
        "eps_damping": 0.447,
    }
    assert tuple(evidence) == (*rule.statistics, *rule.evidence)
    shown = Finding(
        code=rule.code,
        severity=rule.severity,
        scope="model",
        step=33,
        sentence=rule.sentence.format_map(evidence),
        evidence=evidence,
        worst={"net.2.weight": 0.62, "net.4.weight": 0.454, "net.2.bias": 0.317},
        suggestions=(Suggestion(("optimizer.eps=1e-08",)),),
        source=rule.source,
    )
    assert f"{describe_raised([shown])}\n" == block(*FINDING)


def test_checkpoint_in_bfloat16_is_inspected_as_in_the_guides(
    capsys: pytest.CaptureFixture[str],
) -> None:
    fit = trainer(max_epochs=1, precision="bf16-true")
    fit.fit(Lit(ADAMW), loader(5))
    fit.save_checkpoint("last.ckpt")
    (line,) = shell_lines(INSPECT)
    cli.main(shlex.split(line)[1:])
    inspected = capsys.readouterr().out
    assert "AdamW" in inspected
    assert block(*INSPECTED).partition("\n")[0] in inspected


def test_tuning_commands_and_the_overrides_that_they_print_fit_the_project(project: Path) -> None:
    searches = []
    for line in shell_lines(TUNE):
        composed(project / "conf", "config", shlex.split(line)[3:])
        sweeper = OmegaConf.to_container(HydraConfig.get().sweeper, resolve=True)
        searches.append(parse_tune(cast(dict[str, Any], sweeper)).config)
    assert [each.n_trials for each in searches] == [20, 40, 20]
    assert [each.study_name for each in searches] == ["train", "train", "narrow"]
    assert (searches[2].space.lr, searches[2].space.beta2) == (Range(1e-5, 0.1), None)
    printed = block(*TUNED).removeprefix("overrides: ")
    optimizer = composed(project / "conf", "config", shlex.split(printed)).optimizer
    assert (optimizer.lr, optimizer.weight_decay) == (0.00826, 0.0404)


def test_block_with_lightning_attaches_the_monitor() -> None:
    names: dict[str, Any] = {}
    exec(block(*ATTACH), names)
    (monitor,) = (each for each in names["trainer"].callbacks if isinstance(each, AdamMonitor))
    assert monitor.config.every_n_steps == 10


def test_block_without_lightning_measures(capsys: pytest.CaptureFixture[str]) -> None:
    exec(block(*MEASURE), {})
    assert "{'layer': '0', 'grad_norm': " in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("beginning", EXTENSIONS)
def test_extension_of_contributing_works(beginning: str, tmp_path: Path) -> None:
    written = named_files(("python", beginning))
    write_files(tmp_path, written)
    assert EXTENSIONS[beginning] in succeed([BIN / "python", *written], tmp_path)


def test_each_variable_without_code_is_read_as_settings() -> None:
    """test_no_code.py and test_installed.py train scripts so."""
    values = [shlex.split(line)[0].partition("=")[2] for line in shell_lines(NO_CODE)]
    assert [settings(value) for value in values] == MONITOR_SETTINGS


def test_guide_to_plain_lightning_keeps_the_learning_rates_after_the_warmup() -> None:
    lines = block(*MIGRATION).splitlines()
    batches = loader(10)

    def rates(left_out: str, *configs: Any) -> list[float]:
        names: dict[str, Any] = {"L": L, "torch": torch}
        exec("\n".join(line[1:] for line in lines if line[:1] != left_out), names)
        found: list[float] = []

        def training_step(module: Any, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            found.append(module.trainer.optimizers[0].param_groups[0]["lr"])
            return loss_of(module.net, batch)

        names["LitClassifier"].training_step = training_step
        trainer(max_epochs=1).fit(names["LitClassifier"](network(), *configs), batches)
        return found

    before = rates("+", 0.1, 4)
    after = rates("-", {"lr": 0.1}, {"name": "cosine", "warmup_steps": 4})
    assert after[4:] == pytest.approx(before[4:])
    assert len(before) == 10
    assert (before[0], after[0]) == pytest.approx((0, 0.1 / 5))


@pytest.fixture
def template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    write_files(tmp_path, TEMPLATE | named_files(MODULE, EXPERIMENT))
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "src"]:
        del sys.modules[name]


def test_guide_to_the_template_works_in_its_layout(template: Path) -> None:
    """How the mixin reads the template's own nodes is compared in test_template.py."""
    train = importlib.import_module("src.train").train
    partials, grouped, presets = (
        train(composed(template / "configs", "train", overrides(line)))
        for line in shell_lines(IN_TEMPLATE)
    )
    assert partials["scheduler"]["class"] == "ReduceLROnPlateau"
    assert set(grouped["groups"]) == {"decay", "head"}
    assert "adam_gradient/grad_norm" in presets["metrics"]


def test_guide_to_lightning_cli_works(
    monkeypatch: pytest.MonkeyPatch, console: pytest.LogCaptureFixture
) -> None:
    write_files(Path.cwd(), named_files(CLI, CLI_FILE))
    lines = shell_lines(IN_CLI)
    assert len(lines) == 2
    for line in lines:
        console.clear()
        monkeypatch.setattr(sys, "argv", shlex.split(f"{line} {TO_CSV}")[1:])
        runpy.run_path("cli.py", run_name="__main__")
        assert "name=cosine" in console.text
    assert len(list(Path.cwd().rglob("metrics.csv"))) == len(lines)


def jobs(line: str) -> list[list[str]]:
    """The overrides of each job that a command starts: several in a sweep."""
    words = [word for word in overrides(line) if word != "-m"]
    parsed = OverridesParser.create().parse_overrides(words)
    choices = [
        [f"{each.get_key_element()}={value}" for value in each.sweep_string_iterator()]
        if each.is_sweep_override()
        else [word]
        for each, word in zip(parsed, words, strict=True)
    ]
    return [list(job) for job in itertools.product(*choices)]


def test_each_command_of_a_recipe_configures_its_jobs() -> None:
    """Each recipe is run by its own test."""
    with each_row() as row:
        for line in shell_lines(RECIPE):
            with row(line):
                match = re.match(RECIPE, line)
                assert match
                name = match["name"] or match["script"]
                file = REPOSITORY / f"recipes/{name.replace('.', '/')}.py"
                name = name.rpartition(".")[2]
                program = file.read_text(encoding="utf-8")
                assert f'config_name="{name}"' in program
                conf = file.parent / "conf"
                configs = [composed(conf, name, job) for job in jobs(line)]
                if "cases=" in line:
                    cases = configs[0].cases
                    configs += [composed(conf, name, shlex.split(case)) for case in cases]
                for config in configs:
                    build_adam(network(), config.optimizer, config.scheduler, total_steps=100)
                    instantiate(config.adam_monitor)
                optimizers = [OmegaConf.to_object(config.optimizer) for config in configs]
                for optimizer, values in zip(optimizers, expected(OPTIMIZERS, line), strict=False):
                    assert vars(optimizer) | values == vars(optimizer)


def test_eps_that_rounds_to_0_in_float16_raises_as_in_the_guide() -> None:
    fit = trainer(max_epochs=1, precision="16-true")
    app = OmegaConf.create({"optimizer": ADAMW | {"eps": 1e-8}}, flags={"struct": True})
    with pytest.raises(ConfigError) as error:
        fit.fit(Lit(app.optimizer), loader(1))
    assert block(*EPS_ERROR) == f"{error.value}\n"


def write_run(name: str) -> None:
    """Trains, and leaves a run of Lightning's CSV logger in a folder of that name."""
    logger = CSVLogger(".", name=name, version="")
    fit = trainer(max_epochs=1, logger=logger, callbacks=[AdamMonitor(every_n_steps=1)])
    fit.fit(Lit(ADAMW), loader(3))


def test_program_and_commands_that_look_at_runs_write_pages(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The workspace in W&B is saved in tests/reports, and the pages are opened in a browser."""
    for name in ("RUN", "ANOTHER_RUN", "wandb"):
        write_run(name)
    exec(block(*REPORT), {})
    Path("report.html").rename("by_program.html")
    for line in shell_lines(LOOK):
        if " report " in line or "--json" in line:
            cli.main(shlex.split(line)[1:])
            printed = capsys.readouterr().out
            assert json.loads(printed)["section"] if "--json" in line else "report: " in printed
    names = ("by_program.html", "report.html", "comparison.html")
    pages = [Path(name).read_text(encoding="utf-8") for name in names]
    assert ['id="comparison"' in page for page in pages] == [False, False, True]


@pytest.mark.slow
def test_recipe_is_resumed_with_other_settings_as_in_the_guide(tmp_path: Path) -> None:
    lines = [line for line in shell_lines(RECIPE) if "outputs/first" in line]
    first, again = (line.replace("outputs/first", f"{tmp_path}/first") for line in lines)
    briefly = "width=2 trainer.limit_train_batches=25 logger.id=continued logger.resume=allow"
    started = run_text(f"{first} {briefly}", REPOSITORY)
    assert started.returncode == 0, started.output
    line = f"{again} {briefly} {shlex.join(jobs_in(tmp_path / 'again'))}"
    resumed = run_text(line, REPOSITORY)
    assert resumed.returncode == 0, resumed.output
    assert PRINTED["ckpt_path=outputs/first"][0] in resumed.output
    (before,), (after,) = (offline_runs(tmp_path / folder) for folder in ("first", "again"))
    assert max(logged_rows(before)) < min(logged_rows(after)), "the x-axis goes on"
    assert all(each.name.endswith("-continued") for each in (before, after))


SHORTER = {
    r"python train\.py -m ": ("", " hydra.sweeper.n_trials=2"),
    r"python -m recipes\.mnist": ("", " width=2 trainer.limit_train_batches=25"),
    r"python -m recipes\.diag": ("", " trainer.max_epochs=1 trainer.limit_train_batches=30"),
    r".*ddp_fsdp": ("", " layers=1 trainer.limit_train_batches=25 trainer.limit_val_batches=1"),
    IN_CLI: ("", f" {TO_CSV}"),
    # The template finds its own root; here the folder is that.
    IN_TEMPLATE: ("src/train.py", "-m src.train"),
}
"""Changes to a command so that it ends soon or runs here: one text for another, or words at the
end."""


def shortened(line: str) -> str:
    line = line.replace("ENTITY/PROJECT", f"{ENTITY}/project")
    for pattern, (old, new) in SHORTER.items():
        if re.match(pattern, line):
            line = line.replace(old, new) if old else line + new
    return line


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_all_commands_of_the_pages_succeed(project: Path, template: Path) -> None:
    """In the order of the pages: some commands read the files of earlier ones."""
    for name in ("recipes", "conf"):
        shutil.copytree(REPOSITORY / name, project / name, dirs_exist_ok=True)
    write_files(project, named_files(CLI, CLI_FILE))
    script = REPOSITORY / "tests/e2e/plain_classifier.py"
    shutil.copy(script, project / "any_lightning_script.py")
    fit = trainer(max_epochs=1)
    fit.fit(Lit(ADAMW), loader(5))
    fit.save_checkpoint(project / "last.ckpt")
    for name in ("RUN", "ANOTHER_RUN"):
        write_run(name)
        shutil.move(name, project)

    not_here = rf"(?!{INSTALL}|{MAKE}|{PRE_COMMIT}|{re.escape(TRAIN_LINE)})"
    with WandbServer("project") as server, each_row() as row:
        variables = environment(**NO_GPU) | server.variables
        for line in shell_lines(not_here):
            with row(line):
                folder = template if re.match(IN_TEMPLATE, line) else project
                finished = run_text(shortened(line), folder, variables)
                assert finished.returncode == 0, finished.output
                missing = [each for each in expected(PRINTED, line) if each not in finished.output]
                assert not missing, finished.output
    assert {path.parent.name for path in (project / "multirun").rglob("tune.md")} == {
        "adam_tune_train",
        "adam_tune_narrow",
    }
    assert (project / "outputs/bfloat16/underflow.html").is_file()


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_make_demo_works_in_a_fresh_clone_and_installs_once(tmp_path: Path) -> None:
    clone = tmp_path / "a clone"
    succeed(["git", "clone", "--quiet", REPOSITORY, clone])
    succeed(["make", f"PYTHON={sys.executable}", ".venv/bin/python"], clone)
    link_packages(clone / ".venv", "recipes")
    first, second = demo(clone), demo(clone)
    assert INSTALLING in first.output
    assert INSTALLING not in second.output
    assert first.after("run: ") != second.after("run: ")


def demo(clone: Path) -> Finished:
    """Runs `make demo`, which has to end with the name of a run that its own advice can open."""
    all_cores = environment(OMP_NUM_THREADS=str(os.cpu_count() or 1))
    demonstrated = run(["make", "demo"], clone, all_cores)
    assert demonstrated.returncode == 0, demonstrated.output
    assert float(demonstrated.after(ACCURACY)) >= 0.95
    (folder,) = shlex.split(demonstrated.after("run: "))
    (page,) = shlex.split(demonstrated.after("report: "))
    assert (clone / page).read_text(encoding="utf-8").startswith("<!doctype html>")
    assert keys(logged_rows(clone / folder)) == promised_keys(*DEMO_KEYS)
    look = demonstrated.after("look: ").replace(" leet ", " leet inspect --summary --json ")
    looked = run_text(look, clone)
    assert json.loads(looked.output)["state"] == "finished", looked.output
    return demonstrated


def test_make_targets_of_the_pages_exist() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    script = REPOSITORY / ".ci" / "run"
    for line in shell_lines(MAKE):
        assert re.search(rf"^{line.removeprefix('make ')}:", makefile, re.MULTILINE), line
    for each in ("test-ci", "lint"):
        assert f"make {each}" in script.read_text(encoding="utf-8").splitlines()
    assert os.access(script, os.X_OK)
    assert block("bash", "make demo\n").splitlines() == ["make demo", "make test"]


@pytest.mark.slow
def test_pre_commit_reads_its_file_and_installs_its_hook(tmp_path: Path) -> None:
    succeed(["git", "init", "--quiet", tmp_path])
    shutil.copy(REPOSITORY / ".pre-commit-config.yaml", tmp_path)
    (line,) = shell_lines(PRE_COMMIT)
    for command in ("pre-commit validate-config", line):
        finished = run_text(command, tmp_path)
        assert finished.returncode == 0, finished.output
    assert (tmp_path / ".git" / "hooks" / "pre-commit").is_file()

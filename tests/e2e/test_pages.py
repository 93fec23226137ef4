"""Every fenced block of the README, of CONTRIBUTING and of the guides does what is said of it."""

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger

from lightning_adam import AdamMonitor, ConfigError, cli
from lightning_adam.findings import RULES, Cure
from lightning_adam.findings.finding import Finding
from lightning_adam.findings.showing import raised
from lightning_adam.schema import Severity
from lightning_adam.statistics.catalogue import SYMBOLS
from tests.e2e.test_template import FILES as TEMPLATE
from tests.support.commands import (
    BIN,
    BRIEFLY,
    DEMO_KEYS,
    PROJECT_KEYS,
    Finished,
    environment,
    follow_the_readme,
    history,
    jobs_in,
    keys,
    logged_rows,
    offline_runs,
    promised_keys,
    recipe,
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
    files,
    typed,
)
from tests.support.linked_packages import lend
from tests.support.training import ADAMW, Lit, loader, trainer
from tests.support.wandb_server import ENTITY, WandbServer

TABLE = ("text", "AdamW, ")
FOUND = ("text", "AdamMonitor: eps_dominates")
MEASURE = ("python", "# measure.py\n")
MODULE = ("python", "# src/models/digits_module.py\n")
EXPERIMENT = ("yaml", "# @package _global_\n# configs/experiment/adam.yaml\n")
CLI = ("python", "# cli.py\n")
CLI_FILE = ("yaml", "# fit.yaml\n")
ADDED = {
    "# statistic.py\n": "'adam_moments/grad_peak': 1.8898",
    "# finding.py\n": "adam_monitor.findings.step_large.threshold=0.5",
    "# schedule.py\n": "[0.0, 0.5, 1.0, 1.0, 0.5, 0.5]",
}
"""What the programs of CONTRIBUTING print."""
ELSEWHERE = [
    ("python", "from lightning.pytorch.plugins.io import TorchCheckpointIO\n"),
    ("python", "class LitScheduleFree("),
]
"""What test_third_party.py trains with."""
IMPORTS = ("python", "from lightning_adam")
REPORTED = ("python", "from pathlib import Path\n")
REFUSED = ("text", "optimizer.eps=1e-08: expected ")
INSPECTED = ("text", "dtype ")
BLOCKS = [
    IMPORTS,
    REPORTED,
    REFUSED,
    INSPECTED,
    TABLE,
    FOUND,
    TRAIN,
    CONFIG,
    MEASURE,
    MODULE,
    EXPERIMENT,
    CLI,
    CLI_FILE,
    *ELSEWHERE,
]
BLOCKS += [("python", beginning) for beginning in ADDED]

MAKE = r"make |pre-commit install$"
EXPLAIN = r"lightning-adam explain "
LOOKING = r"lightning-adam (report (?!outputs)|dashboard )"
INSPECT = r"lightning-adam inspect (?!outputs)"
PROJECT = rf"(?!{re.escape(TRAIN_LINE)})python train\.py (?!-m)"
TUNING = r"python train\.py -m hydra/sweeper=adam_tune "
NO_CODE = r"LIGHTNING_ADAM_MONITOR="
MNIST = r"python -m recipes\.mnist (-m )?optimizer\."
RESUME = r"python -m recipes\.mnist (hydra\.run\.dir|ckpt_path)="
PROCESSES = r"(python -m |)recipes[./]ddp_fsdp"
IN_BFLOAT16 = r"python -m recipes\.mnist trainer\.|lightning-adam (inspect|report) outputs/"
RECIPES = r"python -m recipes\.(?!mnist|ddp_fsdp)"
IN_TEMPLATE = r"python src/train\.py "
IN_CLI = r"python cli\.py "
LINES = [MAKE, EXPLAIN, LOOKING, INSPECT, re.escape(TRAIN_LINE), PROJECT, TUNING, NO_CODE]
LINES += [MNIST, RESUME, PROCESSES, IN_BFLOAT16, RECIPES, IN_TEMPLATE, IN_CLI]

SAID = {
    "lightning_adam/scheduler=wsd": ["head      ", "name=wsd", "decay_steps=38"],
    "optimizer.layer_decay": [
        "layer_0",
        "name=ReduceLROnPlateau",
        "patience=3",
        "monitor=val/loss",
        "interval=epoch",
    ],
    "OneCycleLR": ["name=OneCycleLR", "total_steps=192", "interval=step"],
    "adam_monitor.findings.": ["AdamMonitor has found nothing wrong in "],
    "optimi.AdamW": ["AdamMonitor measures of AdamW what its state tells, not "],
    "weight_decay_on=all": ["0.01 "],
}
"""What is printed where a line of the project holds these words."""
LOGGED = {
    "layer_depth=1": [
        "adam_update/direction_max/layer/net",
        "adam_underflow/idle_fraction/group/decay",
    ],
    "adam_monitor.worst": [
        "adam_underflow/eps_damping",
        "adam_underflow/eps_energy_loss/tensor/net.0.weight",
    ],
    "layer_table": [
        "adam_histogram/denominator/group/decay",
        "adam_underflow/eps_curve_table",
        "adam_layers",
    ],
    "scopes=[model,tensor]": ["adam_moments/exp_avg_norm/tensor/net.0.weight"],
}
"""Some of the keys that it logs."""
EXPLAINED = {
    "optimizer": "optimizer.layer_decay.rate=null",
    "scheduler": "lightning_adam/scheduler=inverse_sqrt",
    "tune": "hydra.sweeper.n_trials=40",
}
"""What is told of a topic; of all others, the symbols are."""
UNTOUCHED = ["adam_update/update_norm", "adam_underflow/idle_fraction/layer/net.1"]
"""One of the keys that each line without code logs."""
RECIPE_JOBS = [[{"lr": 3e-4, "betas": [0.9, 0.95], "amsgrad": True}], [{"lr": 1e-4}, {"lr": 1e-3}]]
"""What the jobs of each line of the recipe train with."""
ACCURACY = "validation accuracy: "
INSTALLING = "installing into .venv"
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


def test_no_block_and_no_line_goes_untested() -> None:
    for page, language, text in blocks():
        if language == "bash":
            for line in filter(None, text.split("\n")):
                claimed = [pattern for pattern in LINES if re.match(pattern, line)]
                assert len(claimed) == 1, f"{page}: {line}: {claimed}"
        else:
            kinds = [each for each in BLOCKS if (language, text[: len(each[1])]) == each]
            assert len(kinds) == 1, f"{page}: ```{language}\n{text}"


def test_a_project_as_in_the_readme_logs_what_the_readme_says(tmp_path: Path) -> None:
    training, offline_run = follow_the_readme(tmp_path / "my project")
    config = run_config(offline_run)
    assert block(*TABLE) in training.output
    assert keys(logged_rows(offline_run)) == promised_keys(*PROJECT_KEYS)
    assert (config["optimizer"]["lr"], config["optimizer"]["betas"]) == (3e-4, [0.9, 0.95])
    assert config["scheduler"]["warmup_steps"] == 500


def shorten(project: Path, epochs: int) -> None:
    """Lets the project of the README train for fewer epochs."""
    program = (project / "train.py").read_text(encoding="utf-8")
    (project / "train.py").write_text(program.replace("max_epochs=10", f"max_epochs={epochs}"))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("my project")
    write_the_project(folder)
    shorten(folder, 2)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("line", typed(PROJECT))
def test_what_is_typed_for_the_project_does_what_is_said(line: str, project: Path) -> None:
    before = set(offline_runs(project))
    trained = run_text(line, project, environment(**NO_GPU))
    assert trained.returncode == 0, trained.output
    expected = [each for words, each in SAID.items() if words in line]
    assert all(part in trained.output for parts in expected for part in parts), trained.output
    (left,) = set(offline_runs(project)) - before
    # A histogram's and a table's parts stand behind a dot.
    logged = {f"{key}." for row in history(left) for key in row}
    wanted = [key for words, keys in LOGGED.items() if words in line for key in keys]
    missing = [key for key in wanted if not any(each.startswith(f"{key}.") for each in logged)]
    assert not missing


@pytest.mark.parametrize("line", typed(EXPLAIN))
def test_what_is_explained_is_there(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(shlex.split(line)[1:])
    assert EXPLAINED.get(line.split()[-1], SYMBOLS) in capsys.readouterr().out


def test_a_finding_is_shown_as_in_the_readme() -> None:
    """Its numbers are of some training; its form is that of every finding."""
    shown = Finding(
        code="eps_dominates",
        severity=Severity.error,
        scope="model",
        step=150,
        sentence=RULES["eps_dominates"].sentence.format(eps_energy_loss=0.994),
        evidence={"eps_energy_loss": 0.994, "denominator_mean": 4.1e-10, "eps": 1e-8},
        worst={"net.0.weight": 0.997, "net.2.weight": 0.981},
        cures=(Cure(("optimizer.eps=1e-13",)),),
        source=RULES["eps_dominates"].source,
    )
    assert raised([shown]) in block(*FOUND)


@pytest.mark.parametrize("line", typed(INSPECT))
def test_a_checkpoint_is_inspected_as_it_is_typed(line: str, tmp_path: Path) -> None:
    fit = trainer(max_epochs=1)
    fit.fit(Lit(ADAMW), loader(5))
    fit.save_checkpoint(tmp_path / "last.ckpt")
    inspected = run_text(line, tmp_path, environment(**NO_GPU))
    assert inspected.returncode == 0, inspected.output
    assert "AdamW" in inspected.output


@pytest.mark.slow
@pytest.mark.parametrize("line", typed(TUNING))
def test_what_is_typed_for_tuning_works(line: str, tmp_path: Path) -> None:
    """With trainings that are shorter, and with fewer of them than forty."""
    write_the_project(tmp_path)
    shorten(tmp_path, 1)
    searched = run_text(line.replace("n_trials=40", "n_trials=12"), tmp_path, environment(**NO_GPU))
    assert searched.returncode == 0, searched.output
    name = "quick" if "quick" in line else "train"
    (told,) = tmp_path.glob("multirun/*/tune.md")
    assert told.parent.name == f"adam_tune_{name}"
    assert told.read_text(encoding="utf-8").splitlines()[-1] == searched.after("type: ")
    assert (told.parent / "tune.html").is_file()


def test_the_block_without_lightning_measures_and_draws(tmp_path: Path) -> None:
    write_files(tmp_path, files(MEASURE))
    said = succeed([sys.executable, "measure.py"], tmp_path)
    assert "{'layer': '0', 'grad_norm': " in said
    assert (tmp_path / "adam.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("beginning", ADDED)
def test_what_contributing_adds_works(beginning: str, tmp_path: Path) -> None:
    written = files(("python", beginning))
    write_files(tmp_path, written)
    assert ADDED[beginning] in succeed([BIN / "python", *written], tmp_path)


@pytest.mark.parametrize(("line", "key"), list(zip(typed(NO_CODE), UNTOUCHED, strict=True)))
def test_a_script_that_is_not_touched_is_measured(line: str, key: str, tmp_path: Path) -> None:
    """Its parameters are compared in test_no_code.py."""
    script = REPOSITORY / "tests" / "e2e" / "plain_classifier.py"
    shutil.copy(script, tmp_path / "any_lightning_script.py")
    trained = run_text(line, tmp_path)
    assert trained.returncode == 0, trained.output
    (metrics,) = tmp_path.rglob("metrics.csv")
    assert key in metrics.read_text(encoding="utf-8").partition("\n")[0].split(",")


@pytest.mark.slow
def test_the_guide_to_the_template_works_in_its_layout(tmp_path: Path) -> None:
    """What the mixin makes of the template's own nodes is compared in test_template.py."""
    write_files(tmp_path, TEMPLATE | files(MODULE, EXPERIMENT))
    as_it_stands, grouped, presets = typed(IN_TEMPLATE)
    # The template finds its own root; here the folder is that.
    jobs = [
        run_text(line.replace("src/train.py", "-m src.train"), tmp_path)
        for line in (as_it_stands, grouped, presets)
    ]
    for job in jobs:
        assert job.returncode == 0, job.output
    trained = [json.loads(job.after("trained with: ")) for job in jobs]
    assert trained[0]["scheduler"]["class"] == "ReduceLROnPlateau"
    assert set(trained[1]["groups"]) == {"decay", "head"}
    assert "adam_moments/grad_norm/group/decay" in trained[2]["metrics"]


@pytest.mark.slow
def test_the_guide_to_lightning_cli_works(tmp_path: Path) -> None:
    write_files(tmp_path, files(CLI, CLI_FILE))
    lines = typed(IN_CLI)
    assert len(lines) == 2
    for line in lines:
        quietly = "--trainer.accelerator=cpu --trainer.logger=CSVLogger --trainer.logger.save_dir=."
        trained = run_text(f"{line} {quietly}", tmp_path)
        assert trained.returncode == 0, trained.output
        assert "name=cosine" in trained.output
    assert len(list(tmp_path.rglob("metrics.csv"))) == len(lines)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "jobs"), list(zip(typed(MNIST), RECIPE_JOBS, strict=True)), ids=["job", "sweep"]
)
def test_a_line_for_the_recipe_trains_with_what_it_says(
    line: str, jobs: list[dict[str, object]], tmp_path: Path
) -> None:
    training = run_text(f"{line} {shlex.join([*BRIEFLY, *jobs_in(tmp_path)])}", REPOSITORY)
    assert training.returncode == 0, training.output
    assert training.output.count(ACCURACY) == len(jobs)
    for optimizer, job in zip(recorded_optimizers(tmp_path), jobs, strict=True):
        assert optimizer | job == optimizer


@pytest.mark.slow
@pytest.mark.parametrize("line", typed(PROCESSES))
def test_a_line_for_many_processes_trains_and_reports(line: str, tmp_path: Path) -> None:
    """What is logged is compared in test_ddp_fsdp.py."""
    briefly = "layers=1 trainer.limit_train_batches=25 trainer.limit_val_batches=1"
    training = run_text(f"{line} {briefly} {shlex.join(jobs_in(tmp_path))}", REPOSITORY)
    assert training.returncode == 0, training.output
    assert training.output.count("bits a byte") == 1
    assert (tmp_path / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("line", typed(RECIPES))
def test_a_line_for_another_recipe_works(line: str, tmp_path: Path) -> None:
    """What each prints is looked at in the test of the recipe."""
    briefly = "trainer.max_epochs=1 trainer.limit_train_batches=30"
    trained = run_text(f"{line} {briefly} {shlex.join(jobs_in(tmp_path))}", REPOSITORY)
    assert trained.returncode == 0, trained.output


@pytest.mark.slow
def test_a_training_in_bfloat16_is_looked_at_as_it_is_typed(tmp_path: Path) -> None:
    said = ""
    for line in typed(IN_BFLOAT16):
        line = line.replace("outputs/bfloat16", f"{tmp_path}/bfloat16")
        briefly = f" {shlex.join(BRIEFLY)}" if line.startswith("python") else ""
        looked = run_text(line + briefly, REPOSITORY)
        assert looked.returncode == 0, looked.output
        said += looked.output
    assert block(*INSPECTED).partition("\n")[0] in said
    assert (tmp_path / "bfloat16" / "underflow.html").is_file()


def test_an_eps_that_float16_does_not_hold_is_refused_as_it_is_shown() -> None:
    fit = trainer(max_epochs=1, precision="16-true")
    with pytest.raises(ConfigError) as refused:
        fit.fit(Lit(ADAMW | {"eps": 1e-8}), loader(1))
    assert block(*REFUSED).partition(", the dtype")[0] in str(refused.value)


def test_a_report_is_written_from_a_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = CSVLogger(tmp_path, name="RUN", version="")
    fit = trainer(max_epochs=1, logger=logger, callbacks=[AdamMonitor(every_n_steps=1)])
    fit.fit(Lit(ADAMW), loader(3))
    monkeypatch.chdir(tmp_path)
    exec(block(*REPORTED), {})
    assert (tmp_path / "report.html").is_file()


@pytest.mark.slow
def test_a_training_is_resumed_as_it_is_typed(tmp_path: Path) -> None:
    first, again = (line.replace("outputs/first", f"{tmp_path}/first") for line in typed(RESUME))
    briefly = [each for each in BRIEFLY if "max_epochs" not in each]
    briefly += ["logger.id=continued", "logger.resume=allow"]
    assert run_text(f"{first} {shlex.join(briefly)}", REPOSITORY).returncode == 0
    line = f"{again} {shlex.join([*briefly, *jobs_in(tmp_path / 'again')])}"
    resumed = run_text(line, REPOSITORY)
    assert resumed.returncode == 0, resumed.output
    assert "optimizer.lr=0.001: from here on, after the checkpoint's 0.002" in resumed.output
    (before,), (after,) = (offline_runs(tmp_path / folder) for folder in ("first", "again"))
    assert max(logged_rows(before)) < min(logged_rows(after)), "the x-axis goes on"
    assert all(each.name.endswith("-continued") for each in (before, after))
    ended = run_text(f"{line} trainer.max_epochs=2", REPOSITORY)
    assert "type trainer.max_epochs=10" in ended.output


@pytest.mark.slow
def test_what_is_typed_to_look_at_runs_shows_them(tmp_path: Path) -> None:
    """The page itself is looked at by a browser, in test_report_page.py."""
    for name in ("first", "second"):
        assert recipe(tmp_path / name, *BRIEFLY).returncode == 0
    first, second = offline_runs(tmp_path)
    names = {"ANOTHER_RUN": second, "RUN": first, "ENTITY/PROJECT": f"{ENTITY}/project"}
    with WandbServer("project") as server:
        for line in typed(LOOKING):
            words = shlex.split(line)
            command = [str(names.get(word, word)) for word in words]
            variables = environment() | server.variables
            looked = run([BIN / command[0], *command[1:]], tmp_path, variables)
            assert looked.returncode == 0, looked.output
            shown = {"dashboard": f"workspace: {server.url}/", "report": f"report: {words[-1]}"}
            if "--json" in words:
                assert json.loads(looked.output)["section"]
            else:
                assert shown[words[1]] in looked.output
    pages = [tmp_path / name for name in ("report.html", "comparison.html")]
    compared = ['id="comparison"' in page.read_text(encoding="utf-8") for page in pages]
    assert compared == [False, True]


def recorded_optimizers(folder: Path) -> list[dict[str, Any]]:
    """What the jobs under a folder recorded, in W&B or, without, in Lightning's CSV logger."""
    hparams = sorted(folder.rglob("hparams.yaml"))
    configs = [
        yaml.safe_load(path.read_text(encoding="utf-8"))["lightning_adam"] for path in hparams
    ]
    return [config["optimizer"] for config in configs or map(run_config, offline_runs(folder))]


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_make_demo_works_in_a_fresh_clone_and_installs_once(tmp_path: Path) -> None:
    clone = tmp_path / "a clone"
    succeed(["git", "clone", "--quiet", REPOSITORY, clone])
    succeed(["make", f"PYTHON={sys.executable}", ".venv/bin/python"], clone)
    lend(clone / ".venv", "recipes")
    first, second = demo(clone), demo(clone)
    assert INSTALLING in first.output
    assert INSTALLING not in second.output
    assert first.after("run: ") != second.after("run: ")


def demo(clone: Path) -> Finished:
    """One `make demo`, which has to end by naming a run that its own advice can open."""
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


def test_what_make_is_asked_for_is_a_target() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    script = REPOSITORY / ".ci" / "run"
    for line in typed("make "):
        assert re.search(rf"^{line.removeprefix('make ')}:", makefile, re.MULTILINE)
    for each in ("test-ci", "lint"):
        assert f"make {each}" in script.read_text(encoding="utf-8").splitlines()
    assert os.access(script, os.X_OK)
    assert block("bash", "make demo\n").splitlines() == ["make demo", "make test"]


def test_pre_commit_takes_its_file_and_installs_its_hook(tmp_path: Path) -> None:
    succeed(["git", "init", "--quiet", tmp_path])
    shutil.copy(REPOSITORY / ".pre-commit-config.yaml", tmp_path)
    (line,) = typed("pre-commit ")
    for command in ("pre-commit validate-config", line):
        asked = run_text(command, tmp_path)
        assert asked.returncode == 0, asked.output
    assert (tmp_path / ".git" / "hooks" / "pre-commit").is_file()

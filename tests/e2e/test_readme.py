"""Every fenced block of the README does what the README says."""

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

from lightning_adam.findings import RULES, Cure
from lightning_adam.findings.finding import Finding
from lightning_adam.findings.showing import raised
from lightning_adam.schema import Severity
from lightning_adam.statistics.catalogue import STATISTICS, SYMBOLS, Statistic
from tests.e2e.support import (
    BIN,
    BRIEFLY,
    CONFIG,
    DEMO_KEYS,
    PROJECT_KEYS,
    REPOSITORY,
    TRAIN,
    TRAIN_COMMAND,
    Finished,
    environment,
    follow_the_readme,
    history,
    jobs_in,
    keys,
    logged_rows,
    offline_runs,
    promised_keys,
    readme_blocks,
    readme_text,
    recipe,
    run,
    run_config,
    run_text,
    succeed,
    write_the_project,
)
from tests.training import ADAMW, Lit, loader, trainer
from tests.wandb_server import ENTITY, WandbServer

TABLE = ("text", "AdamW, ")
RECIPE = ("bash", "python -m recipes.mnist optimizer.")
MAKE = ("bash", "make demo\n")
VARIANTS = ("bash", "python train.py 'optimizer.groups=")
MONITORING = ("bash", "python train.py adam_monitor.statistics=")
RESUME = ("bash", "python -m recipes.mnist hydra.run.dir=")
PROCESSES = ("bash", "python -m recipes.ddp_fsdp strategy=")
MEASURE = ("python", "# measure.py\n")
NO_CODE = ("bash", "LIGHTNING_ADAM_MONITOR=1 ")
FINDING = ("bash", "python train.py adam_monitor.findings.")
FOUND = ("text", "AdamMonitor: eps_dominates")
INSPECT = ("bash", "lightning-adam inspect ")
LOOKING = ("bash", "lightning-adam report ")
TUNING = ("bash", "python train.py -m hydra/sweeper=adam_tune ")
HANDLED = [TRAIN, CONFIG, TRAIN_COMMAND, VARIANTS, TABLE, RECIPE, MAKE, MONITORING, RESUME, MEASURE]
HANDLED += [LOOKING, NO_CODE, PROCESSES, FINDING, FOUND, INSPECT, TUNING]

RECIPE_JOBS = [[{"lr": 3e-4, "betas": [0.9, 0.95], "amsgrad": True}], [{"lr": 1e-4}, {"lr": 1e-3}]]
"""What the jobs of each line of that block train with."""
ACCURACY = "validation accuracy: "
INSTALLING = "installing into .venv"


def test_a_project_as_in_the_readme_logs_what_the_readme_says(tmp_path: Path) -> None:
    training, offline_run = follow_the_readme(tmp_path / "my project")
    config = run_config(offline_run)
    assert readme_text(*TABLE) in training.output
    assert keys(logged_rows(offline_run)) == promised_keys(*PROJECT_KEYS)
    assert (config["optimizer"]["lr"], config["optimizer"]["betas"]) == (3e-4, [0.9, 0.95])
    assert config["scheduler"]["warmup_steps"] == 500


SAID = [
    ["head      ", "name=wsd", "decay_steps=192"],
    ["layer_0", "name=ReduceLROnPlateau", "patience=3", "monitor=val/loss", "interval=epoch"],
    ["name=OneCycleLR", "total_steps=960", "interval=step"],
    ["optimizer.layer_decay.rate=null"],
    ["lightning_adam/scheduler=inverse_sqrt"],
]
"""What each line of that block prints."""
LOGGED = [
    ["adam_update/direction_max/layer/net", "adam_underflow/idle_fraction/group/decay"],
    ["adam_underflow/eps_damping", "adam_underflow/eps_energy_loss/tensor/net.0.weight"],
    ["adam_histogram/denominator/group/decay", "adam_underflow/eps_curve_table", "adam_layers"],
]
"""Some of the keys that each training of the monitor's block logs; the other lines explain."""
UNTOUCHED = ["adam_update/update_norm", "adam_underflow/idle_fraction/layer/net.1"]
"""One of the keys that each line without code logs."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("my project")
    write_the_project(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "said"), list(zip(readme_text(*VARIANTS).splitlines(), SAID, strict=True))
)
def test_what_else_the_readme_types_does_what_it_says(
    line: str, said: list[str], project: Path
) -> None:
    typed = run_text(line, project, environment(CUDA_VISIBLE_DEVICES=""))
    assert typed.returncode == 0, typed.output
    for words in said:
        assert words in typed.output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "logged"),
    list(zip(readme_text(*MONITORING).splitlines(), [*LOGGED, [], []], strict=True)),
)
def test_what_the_readme_types_for_the_monitor_is_logged(
    line: str, logged: list[str], project: Path
) -> None:
    before = set(offline_runs(project))
    typed = run_text(line, project, environment(CUDA_VISIBLE_DEVICES=""))
    assert typed.returncode == 0, typed.output
    rows = [row for left in set(offline_runs(project)) - before for row in history(left)]
    # A histogram's and a table's parts stand behind a dot.
    keys_and_parts = {key for row in rows for key in row}
    assert all(any(f"{each}.".startswith(f"{key}.") for each in keys_and_parts) for key in logged)
    assert logged or SYMBOLS in typed.output


@pytest.mark.slow
@pytest.mark.parametrize("line", readme_text(*FINDING).splitlines())
def test_what_the_readme_types_for_findings_works(line: str, project: Path) -> None:
    typed = run_text(line, project, environment(CUDA_VISIBLE_DEVICES=""))
    assert typed.returncode == 0, typed.output
    is_training = line.startswith("python")
    assert ("AdamMonitor has found nothing wrong in " if is_training else SYMBOLS) in typed.output


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
    assert raised([shown]) in readme_text(*FOUND)


def test_a_checkpoint_is_inspected_as_in_the_readme(tmp_path: Path) -> None:
    fit = trainer(max_epochs=1)
    fit.fit(Lit(ADAMW), loader(5))
    fit.save_checkpoint(tmp_path / "last.ckpt")
    inspected = run_text(readme_text(*INSPECT), tmp_path, environment(CUDA_VISIBLE_DEVICES=""))
    assert inspected.returncode == 0, inspected.output
    assert "AdamW" in inspected.output


@pytest.mark.slow
@pytest.mark.parametrize("line", readme_text(*TUNING).splitlines())
def test_what_the_readme_types_for_tuning_works(line: str, tmp_path: Path) -> None:
    """With trainings that are shorter, and with fewer of them than forty."""
    write_the_project(tmp_path)
    program = (tmp_path / "train.py").read_text(encoding="utf-8")
    (tmp_path / "train.py").write_text(program.replace("max_epochs=10", "max_epochs=1"))
    line = line.replace("n_trials=40", "n_trials=12")
    typed = run_text(line, tmp_path, environment(CUDA_VISIBLE_DEVICES=""))
    assert typed.returncode == 0, typed.output
    if not line.startswith("python"):
        assert "hydra.sweeper.n_trials=40" in typed.output
        return
    name = "quick" if "quick" in line else "train"
    (told,) = tmp_path.glob("multirun/*/tune.md")
    assert told.parent.name == f"adam_tune_{name}"
    assert told.read_text(encoding="utf-8").splitlines()[-1] == typed.after("type: ")
    assert (told.parent / "tune.html").is_file()


def test_the_table_of_statistics_is_the_catalogues() -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if re.match(r"\| (\*\*)?`adam_", line)]
    assert rows == [as_row(statistic) for statistic in STATISTICS.values()]
    assert SYMBOLS in text


def as_row(statistic: Statistic) -> str:
    key = f"**`{statistic.key}`**" if statistic.is_headline else f"`{statistic.key}`"
    source = f" ({statistic.source})" if statistic.source else ""
    formula = statistic.formula.replace("|", r"\|")
    return f"| {key} | {statistic.meaning} | {formula}{source} |"


def test_the_block_without_lightning_measures_and_draws(tmp_path: Path) -> None:
    (tmp_path / "measure.py").write_text(readme_text(*MEASURE), encoding="utf-8")
    said = succeed([sys.executable, "measure.py"], tmp_path)
    assert "{'layer': '0', 'grad_norm': " in said
    assert (tmp_path / "adam.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("line", "key"),
    list(zip(readme_text(*NO_CODE).splitlines(), UNTOUCHED, strict=True)),
)
def test_a_script_that_is_not_touched_is_measured(line: str, key: str, tmp_path: Path) -> None:
    """Its parameters are compared in test_no_code.py."""
    script = REPOSITORY / "tests" / "e2e" / "plain_classifier.py"
    shutil.copy(script, tmp_path / "any_lightning_script.py")
    typed = run_text(line, tmp_path)
    assert typed.returncode == 0, typed.output
    (metrics,) = tmp_path.rglob("metrics.csv")
    assert key in metrics.read_text(encoding="utf-8").partition("\n")[0].split(",")


@pytest.mark.parametrize(
    ("line", "jobs"),
    list(zip(readme_text(*RECIPE).splitlines(), RECIPE_JOBS, strict=True)),
    ids=["job", "sweep"],
)
def test_a_recipe_line_of_the_readme_trains_with_what_it_says(
    line: str, jobs: list[dict[str, object]], tmp_path: Path
) -> None:
    training = run_text(f"{line} {shlex.join([*BRIEFLY, *jobs_in(tmp_path)])}", REPOSITORY)
    assert training.returncode == 0, training.output
    assert training.output.count(ACCURACY) == len(jobs)
    for optimizer, job in zip(recorded_optimizers(tmp_path), jobs, strict=True):
        assert optimizer | job == optimizer


@pytest.mark.slow
@pytest.mark.parametrize("line", readme_text(*PROCESSES).splitlines())
def test_a_line_for_many_processes_trains_and_reports(line: str, tmp_path: Path) -> None:
    """What is logged is compared in test_ddp_fsdp.py."""
    briefly = "layers=1 trainer.limit_train_batches=25 trainer.limit_val_batches=1"
    training = run_text(f"{line} {briefly} {shlex.join(jobs_in(tmp_path))}", REPOSITORY)
    assert training.returncode == 0, training.output
    assert training.output.count("bits a byte") == 1
    assert (tmp_path / "report.html").is_file()


@pytest.mark.slow
def test_a_training_is_resumed_as_the_readme_types_it(tmp_path: Path) -> None:
    first, again = readme_text(*RESUME).replace("outputs/first", f"{tmp_path}/first").splitlines()
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
def test_what_the_readme_types_to_look_at_runs_shows_them(tmp_path: Path) -> None:
    """The page itself is looked at by a browser, in test_report_page.py."""
    for name in ("first", "second"):
        assert recipe(tmp_path / name, *BRIEFLY).returncode == 0
    first, second = offline_runs(tmp_path)
    names = {"ANOTHER_RUN": second, "RUN": first, "ENTITY/PROJECT": f"{ENTITY}/project"}
    with WandbServer("project") as server:
        for line in readme_text(*LOOKING).splitlines():
            typed = shlex.split(line)
            command = [str(names.get(word, word)) for word in typed]
            variables = environment() | server.variables
            looked = run([BIN / command[0], *command[1:]], tmp_path, variables)
            assert looked.returncode == 0, looked.output
            shown = {"dashboard": f"workspace: {server.url}/", "report": f"report: {typed[-1]}"}
            if "--json" in typed:
                assert json.loads(looked.output)["section"]
            else:
                assert shown[typed[1]] in looked.output
    pages = [tmp_path / name for name in ("report.html", "comparison.html")]
    compared = ['id="comparison"' in page.read_text(encoding="utf-8") for page in pages]
    assert compared == [False, True]


def recorded_optimizers(folder: Path) -> list[dict[str, Any]]:
    """What the jobs under a folder recorded, in W&B or, without, in Lightning's CSV logger."""
    files = sorted(folder.rglob("hparams.yaml"))
    configs = [yaml.safe_load(path.read_text(encoding="utf-8"))["lightning_adam"] for path in files]
    return [config["optimizer"] for config in configs or map(run_config, offline_runs(folder))]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_make_demo_works_in_a_fresh_clone_and_installs_once(tmp_path: Path) -> None:
    clone = tmp_path / "a clone"
    succeed(["git", "clone", "--quiet", REPOSITORY, clone])
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


def test_make_test_is_part_of_what_is_checked_before_a_change_lands() -> None:
    script = REPOSITORY / ".ci" / "run"
    assert readme_text(*MAKE).splitlines() == ["make demo", "make test"]
    assert "make test" in script.read_text(encoding="utf-8").splitlines()
    assert os.access(script, os.X_OK)


def test_no_block_of_the_readme_goes_untested() -> None:
    for language, text in readme_blocks():
        handlers = [kind for kind in HANDLED if (kind[0], text[: len(kind[1])]) == kind]
        assert len(handlers) == 1, f"```{language}\n{text}"

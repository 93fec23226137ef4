"""The recipe of a GPT: its text, its perplexity, the sample that it writes, and its errors."""

import math
from pathlib import Path

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from lightning_adam import ConfigError
from recipes import char_gpt
from recipes._common import Loader, read_text, text_loaders
from recipes.char_gpt import GPT, LitGPT, sample_text
from tests.support.commands import (
    BIN,
    REPOSITORY,
    Command,
    history,
    jobs_in,
    logged_rows,
    offline_runs,
    run,
    run_config,
)
from tests.support.tables import each_row

BRIEFLY = (
    "layers=1",
    "width=16",
    "heads=2",
    "context=32",
    "batch_size=8",
    "sample.length=40",
    "trainer.precision=bf16-true",
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=12",
    "trainer.limit_val_batches=8",
)
CONTEXT = 32
PROMPT = "the step of "
SENTENCE = "Adam divides the step of each parameter by the root of its second moment.\n"

INVALID = {
    "text=none.txt": "text=none.txt is not a file: ",
    "text=short.txt": "text=short.txt has 74 bytes, fewer than the 1,040 that the recipe needs."
    " Use a longer text, for example text=README.md, or a smaller context",
    "width=3": "width=3 is not a multiple of heads=4. Use for example width=4",
    "sample.prompt=''": "sample.prompt='' must have at least one byte. Use for example"
    " sample.prompt=import",
    "sample.temperature=0": "sample.temperature=0 must be above 0. Use for example"
    " sample.temperature=0.1",
}
"""Overrides, and how the error about each begins."""


@pytest.mark.slow
def test_recipe_trains_prints_its_loss_and_writes_a_sample(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text(100 * SENTENCE, encoding="utf-8")
    overrides = [*BRIEFLY, f'sample.prompt="{PROMPT}"', f"text={tmp_path}/own.txt"]
    command: Command = [BIN / "python", "-m", "recipes.char_gpt", *overrides]
    training = run([*command, *jobs_in(tmp_path / "job")])
    assert training.returncode == 0, training.output
    assert sum(line.startswith(PROMPT.strip()) for line in training.lines) == 1, training.output
    (offline_run,) = offline_runs(tmp_path)
    assert list(logged_rows(offline_run)) == [0, 9]
    assert run_config(offline_run)["optimizer"]["betas"] == [0.9, 0.95]
    (row,) = (row for row in history(offline_run) if "val/perplexity" in row)
    assert row["val/perplexity"] == pytest.approx(math.exp(row["val/loss"]), rel=1e-3)
    bits = f"{row['val/loss'] / math.log(2):.4f}"
    assert training.after("validation bits per byte: ") == bits
    assert list(tmp_path.rglob("best.ckpt"))
    assert list(tmp_path.rglob("report.html"))


def small_module(net: GPT) -> LitGPT:
    return LitGPT(net, OmegaConf.create({"lr": 1e-3}), OmegaConf.create({"name": "constant"}))


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_perplexity_is_the_exponential_of_the_loss(precision: str) -> None:
    """Its sums keep single precision where the parameters have bfloat16."""
    module = small_module(GPT(1, 16, 2, CONTEXT))
    _, validation = text_loaders(read_text(None, 0)[: 16 * 33 * 20], CONTEXT, batch_size=4)
    trainer = L.Trainer(
        accelerator="cpu",
        precision=precision,  # type: ignore[arg-type]
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    (found,) = trainer.validate(module, validation, verbose=False)
    assert found["val/perplexity"] == pytest.approx(math.exp(found["val/loss"]), rel=1e-5)
    assert 5 < found["val/loss"] < 7


def test_predictions_are_compared_with_the_next_bytes() -> None:
    class RepeatsEachByte(GPT):
        def forward(self, text: torch.Tensor) -> torch.Tensor:
            return 100 * torch.nn.functional.one_hot(text, 256).float()

    module = small_module(RepeatsEachByte(1, 16, 2, CONTEXT))
    logits, targets = module.predict((torch.tensor([list(b"aab")], dtype=torch.uint8),))
    assert logits.argmax(dim=2).tolist() == [list(b"aa")]
    assert targets.tolist() == [list(b"ab")]


def test_end_of_the_text_validates_and_is_not_trained_on() -> None:
    text = bytearray(15 * 64 * b"a" + 64 * b"b")
    train, validation = text_loaders(text, 15, batch_size=8)
    assert bytes_of(train) == (15 * 64 - 15, set(b"a"))
    assert bytes_of(validation) == (4, set(b"b"))


def bytes_of(loader: Loader) -> tuple[int, set[int]]:
    """The number of the pieces, and the bytes in them."""
    pieces = torch.cat([batch[0] for batch in loader])
    assert pieces.shape[1] == 16
    return len(pieces), set(pieces.flatten().tolist())


def test_same_seed_gives_the_same_sample() -> None:
    net = GPT(1, 16, 2, context=8)

    def sample(seed: int, temperature: float) -> str:
        return sample_text(net, "x = ", 20, temperature, seed)

    assert sample(0, 1.0) == sample(0, 1.0) != sample(1, 1.0)
    assert sample(0, 1e-4) == sample(1, 1e-4)
    assert sample(0, 1.0).startswith("x = ")


def test_sample_has_the_length_that_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    net = GPT(1, 16, 2, context=8)
    torch.nn.init.zeros_(net.norm.weight)
    monkeypatch.setattr(net, "head", OnlyDots())
    assert sample_text(net, "prompt", 20, 1.0, 0) == "prompt" + 20 * "."


class OnlyDots(torch.nn.Module):
    weight = torch.zeros(1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.full((*hidden.shape[:2], 256), -100.0)
        logits[..., ord(".")] = 100
        return logits


def test_diverged_network_writes_only_the_prompt() -> None:
    net = GPT(1, 16, 2, CONTEXT)
    torch.nn.init.constant_(net.norm.weight, math.nan)
    assert sample_text(net, "def ", 20, 1.0, 0) == "def "


def test_invalid_settings_raise_before_training(tmp_path: Path) -> None:
    Path("short.txt").write_text(SENTENCE, encoding="utf-8")
    job = f"hydra.runtime.output_dir={tmp_path}/job"
    with each_row() as row:
        for override, beginning in INVALID.items():
            with row(override):
                with initialize_config_dir(str(REPOSITORY / "recipes/conf"), version_base="1.3"):
                    config = compose("char_gpt", [override, job], return_hydra_config=True)
                with pytest.raises(ConfigError) as raised:
                    char_gpt.main(config)
                (sentence,) = str(raised.value).splitlines()
                assert sentence.startswith(beginning)
                assert ". Use " in sentence
                assert not Path(tmp_path, "job").exists()

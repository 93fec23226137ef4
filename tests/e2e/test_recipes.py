"""The recipes of vision transformers, diffusion, fine-tuning and tuning, run briefly."""

import copy
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib.pyplot as plt
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset
from transformers import ModernBertConfig, ModernBertModel

from lightning_adam import ConfigError, build_optimizer
from recipes import finetune_transformers, vit
from recipes._common import Loader
from recipes.diffusion import LitDiffusion, UNet, generate, signal_and_noise
from recipes.finetune_transformers import (
    MARKS,
    MASK,
    PAD,
    VOCABULARY,
    LoRA,
    Restorer,
    add_lora,
    make_examples,
)
from tests.support.commands import BIN, REPOSITORY, Command, jobs_in, run

NO_BARS = ("trainer.enable_progress_bar=false", "logger=csv")
CHANCE = {"vit": 1 / 10, "finetune_transformers": 1 / 8}

BRIEFLY = {
    "vit": ("width=32", "layers=2", "trainer.max_epochs=2", *NO_BARS),
    "diffusion": ("width=8", "trainer.max_epochs=2", "sample.steps=3", *NO_BARS),
    "finetune_transformers": (
        "layers=2",
        "width=32",
        "context=16",
        "examples=16",
        "pretraining.trainer.limit_train_batches=100",
        "pretraining.trainer.enable_progress_bar=false",
        *NO_BARS,
    ),
}
CHECKS = {
    "vit": vit.check,
    "finetune_transformers": finetune_transformers.check,
}
REFUSED = {
    "vit": {"width=1": "width=4", "patch_size=5": "1, 2, 4, 7, 14, 28"},
    "finetune_transformers": {"width=1": "width=8", "lora.rank=0": "lora.rank=16"},
}


def recipe(name: str, folder: Path, *overrides: str) -> str:
    command: Command = [BIN / "python", "-m", f"recipes.{name}", *overrides, *jobs_in(folder)]
    finished = run(command, REPOSITORY)
    assert finished.returncode == 0, finished.output
    return finished.output


def printed_numbers(output: str) -> Mapping[str, float]:
    """Returns the numbers that a recipe prints at its end, by their names."""
    found = re.findall(r"^(validation [\w ,]+): ([\d.]+)$", output, re.MULTILINE)
    return {name: float(number) for name, number in found}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANCE)
def test_brief_run_is_better_than_chance_and_raises_no_warnings(name: str, tmp_path: Path) -> None:
    output = recipe(name, tmp_path, *BRIEFLY[name])
    numbers = printed_numbers(output)
    assert numbers
    assert all(2 * CHANCE[name] < number <= 1 for number in numbers.values())
    assert "AdamMonitor: No issues found" in output


@pytest.mark.slow
def test_diffusion_prints_losses_of_averaged_and_raw_weights_and_draws_digits(
    tmp_path: Path,
) -> None:
    numbers = printed_numbers(recipe("diffusion", tmp_path, *BRIEFLY["diffusion"]))
    averaged = numbers["validation loss, averaged weights"]
    raw = numbers["validation loss, raw weights"]
    # The velocity has a variance of 1 where the images are constant.
    assert averaged != raw
    assert 0 < averaged < 1
    assert 0 < raw < 1
    assert plt.imread(tmp_path / "generated.png").shape[:2] == (8 * 28, 10 * 28)


@pytest.mark.slow
@pytest.mark.parametrize("name", BRIEFLY)
def test_run_without_logger_and_validation_measures_nothing(name: str, tmp_path: Path) -> None:
    brief = [each for each in BRIEFLY[name] if not each.startswith("logger=")]
    output = recipe(
        name, tmp_path, *brief, "~logger", "trainer.limit_val_batches=0", "trainer.max_steps=3"
    )
    assert re.search(r"^validation .*: not measured$", output, re.MULTILINE)
    assert not printed_numbers(output)


@pytest.mark.slow
def test_tune_recipe_searches_without_any_argument(tmp_path: Path) -> None:
    output = recipe("tune", tmp_path, "hydra.sweeper.n_trials=4", "trainer.max_epochs=2")
    assert re.search(r"^overrides: .*optimizer\.lr=", output, re.MULTILINE)
    assert (tmp_path / "tune.md").is_file()


@pytest.mark.slow
def test_single_run_of_the_tune_recipe_prints_its_loss(tmp_path: Path) -> None:
    output = recipe("tune", tmp_path, "hydra.mode=RUN", "optimizer.lr=1e-2", "trainer.max_epochs=2")
    # A guess among ten digits has a loss of log(10).
    assert 0 < printed_numbers(output)["validation loss"] < math.log(10)


@pytest.mark.parametrize(
    ("name", "override", "suggestion"),
    [(name, *pair) for name, pairs in REFUSED.items() for pair in pairs.items()],
)
def test_sizes_that_do_not_fit_are_refused_in_one_sentence(
    name: str, override: str, suggestion: str
) -> None:
    with initialize_config_dir(str(REPOSITORY / "recipes/conf"), version_base="1.3"):
        cfg = compose(name, [override])
    with pytest.raises(ConfigError) as error:
        CHECKS[name](cfg)
    assert override in str(error.value)
    assert suggestion in str(error.value)


def test_tokens_and_positions_of_the_vision_transformer_do_not_decay() -> None:
    net = vit.ViT(patch_size=14, layers=1, width=8, heads=2)
    groups = build_optimizer(net, {"lr": 1e-3, "weight_decay": 0.1}).param_groups
    decays = {group["name"]: group["param_names"] for group in groups if group["weight_decay"]}
    assert list(decays) == ["decay"]
    assert {"patches.weight", "head.weight"} <= set(decays["decay"])
    assert not {"class_token", "position_embedding", "head.bias"} & set(decays["decay"])


@pytest.fixture
def restorer() -> Restorer:
    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=PAD,
    )
    return Restorer(ModernBertModel(config)).eval()


def test_lora_trains_its_matrices_and_the_head_alone(restorer: Restorer) -> None:
    add_lora(restorer.encoder, rank=2, alpha=4)
    groups = build_optimizer(restorer, {"lr": 1e-3}).param_groups
    trained = {name for group in groups for name in group["param_names"]}
    head = {"head.weight", "head.bias"}
    assert head < trained
    assert all(name.endswith(("weight.0.down", "weight.0.up")) for name in trained - head)
    # The attention and the feed-forward network of each of two layers have two linear layers.
    assert len(trained - head) == 2 * 4 * 2


def test_merged_lora_weights_give_the_same_output(restorer: Restorer) -> None:
    text = torch.randint(1, VOCABULARY, (2, 9))
    merged = copy.deepcopy(restorer)
    add_lora(restorer.encoder, rank=2, alpha=4)
    before = restorer(text)
    assert torch.equal(before, merged(text))
    for name, module in restorer.named_modules():
        if isinstance(module, LoRA):
            nn.init.normal_(module.up)
            layer = merged.get_submodule(name.removesuffix(".parametrizations.weight.0"))
            assert isinstance(layer, nn.Linear)
            layer.weight.data += 4 / 2 * module.up.data @ module.down.data
    after = restorer(text)
    torch.testing.assert_close(after, merged(text))
    assert not torch.allclose(after, before)


def test_examples_hide_a_mark_in_the_middle_and_are_labelled_with_it() -> None:
    text = bytearray(b"f(x[1]).y = {a: b, c: d}\n" * 20)
    texts, marks = make_examples(text, context=5, count=3).tensors
    assert texts[:, 2].eq(MASK).all()
    assert marks.tolist() == [label for label in range(len(MARKS)) for _ in range(3)]
    for example, mark in zip(texts.tolist(), marks, strict=True):
        assert bytes([*example[:2], MARKS[mark], *example[3:]]) in text


def test_averaged_weights_follow_each_step_and_are_those_validated() -> None:
    class Recorded(LitDiffusion):
        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)
            steps.append(copy.deepcopy(self.net.state_dict()))

    steps: list[dict[str, Tensor]] = []
    torch.manual_seed(0)
    images, digits = torch.rand(8, 1, 28, 28), torch.arange(8)
    loader: Loader = DataLoader(TensorDataset(images, digits), batch_size=8)
    optimizer, scheduler = OmegaConf.create({"lr": 1e-2}), OmegaConf.create({"name": "constant"})
    module = Recorded(UNet(2), optimizer, scheduler, ema_decay=0.75)
    trainer = L.Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, loader, loader)
    averaged, *later = steps
    for step in later:
        averaged = {name: 0.75 * averaged[name] + 0.25 * step[name] for name in averaged}
    for name, weight in module.ema.module.state_dict().items():
        torch.testing.assert_close(weight, averaged[name])
    noisy, times, velocity = module.add_noise(images, torch.Generator().manual_seed(0))
    for metric, net in {"val/loss": module.ema, "val/loss_raw": module.net}.items():
        loss = mse_loss(net(noisy, times, digits), velocity)
        torch.testing.assert_close(trainer.callback_metrics[metric], loss.detach())
    assert trainer.callback_metrics["val/loss"] != trainer.callback_metrics["val/loss_raw"]


def test_noise_schedule_is_the_cosine_and_keeps_the_variance() -> None:
    times = torch.linspace(0, 1, 11)
    signal_rate, noise_rate = (each.flatten() for each in signal_and_noise(times))
    torch.testing.assert_close(signal_rate**2, (1 + torch.cos(math.pi * times)) / 2)
    torch.testing.assert_close(signal_rate**2 + noise_rate**2, torch.ones(11))


def test_generation_with_the_true_velocity_gives_the_image() -> None:
    class Oracle(nn.Module):
        def forward(self, noisy: Tensor, times: Tensor, digits: Tensor) -> Tensor:
            signal_rate, noise_rate = signal_and_noise(times)
            return (signal_rate * noisy - image) / noise_rate

    torch.manual_seed(0)
    image = torch.rand(1, 1, 28, 28) * 2 - 1
    generated = generate(Oracle(), torch.tensor([3, 7]), steps=5, seed=0)
    torch.testing.assert_close(generated, image.expand(2, -1, -1, -1), atol=1e-5, rtol=0)

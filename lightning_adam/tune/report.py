from pathlib import Path

from lightning_adam.tune.story import Story


def write_story(story: Story, folder: Path) -> None:
    (folder / "tune.md").write_text(repr(story))

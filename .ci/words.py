"""Finds terms that the project does not use.

python .ci/words.py        prints each with its file, its line and what to write instead
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

WORDS = {
    r"trainings|a training(?! (?!that|which|is|was|of|in|on|with|to|and|has)\w)": "run",
    r"(?:is|are|was|were) told": "active voice: `X logs …`, `X warns …`",
    r"what there is|for want of|lets? go of|in health": "a plain verb",
    r"of (?:one's|its|his|their|your|our) own(?=[.,:;)\"`']|$)": "`its own X`, `your own X`",
    r"so (?:many|much) (?!as|faster|slower|that|more|less)": "the number, or `N`",
    r"rhythm": "interval, or `lr_scheduler_options`",
    r"hopeless": "underperforming",
    r"cures?|healed|heals": "suggestion; fixes",
    r"mostly blind|hour of death|last words": "a plain phrase",
    r"type_instead|as_typed": "suggest_override, format_override",
    r"obstacle_to|settle_unscaling": "unsupported_reason, configure_amp_unscaling",
    r"schedule_share|LR_RATIO|StepwiseConfig": "lr_factor, LR_SCALE, WarmupScheduleConfig",
    r"exp_avg_sq_lag|momentum_alignment": "rms_ratio, grad_momentum_cosine",
    r"direction_(?:rms|max|large_fraction)": "normalized_update_…",
    r"lie_alike|told_by_device|over_ranks": "same_layout, found_inf_flags, all_reduce_stats",
    r"explained_by|AFTERMATH|went_first": "suppressed_by, COOLDOWN_STEPS, first_diverging_layer",
    r"_is_hopeless|HOPELESS": "should_prune, max_failures",
    r"_bury|try_first": "reap_stale, initial_points",
}
"""Regular expressions of whole words, by what to write instead."""

PATTERN = re.compile("|".join(rf"\b(?:{words})\b" for words in WORDS))
SUFFIXES = {".cff", ".md", ".py", ".sh", ".toml", ".yaml", ".yml"}


def found() -> Iterator[str]:
    """Yields a line for each term in a file that git tracks."""
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True)
    for path in map(Path, listed.stdout.splitlines()):
        if path.suffix in SUFFIXES and path.exists() and path.name != Path(__file__).name:
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                for term in PATTERN.findall(line):
                    advice = next(WORDS[words] for words in WORDS if re.match(words, term))
                    yield f"{path}:{number}: {term!r}: write {advice}"


if __name__ == "__main__":
    sys.exit("\n".join(found()) or 0)

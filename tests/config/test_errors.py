"""The shell and Hydra read a suggested override as the value that was meant."""

import math
import shlex

from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightning_adam.config.errors import format_value, type_instead, unknown_field

TEXT = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1).filter(
    lambda text: "${" not in text
)
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
)
VALUES = st.recursive(
    SCALARS | TEXT,
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.from_regex(r"[a-z][a-z_]*", fullmatch=True), inner)
    ),
    max_leaves=5,
)


def read_back(typed: str) -> object:
    (word,) = shlex.split(typed)
    return OverridesParser.create().parse_override(word).value()


def same(ours: object, theirs: object) -> bool:
    """Equal, but for texts that Hydra reads as a number or as a word such as `true`."""
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, str) and theirs is None:
        return ours.lower() == "null"
    if isinstance(ours, str) and not isinstance(theirs, str):
        return str(theirs).lower() == ours.lower() or math.isclose(float(str(theirs)), float(ours))
    return ours == theirs


@settings(deadline=None, derandomize=True)
@given(VALUES)
@example("NULL")
def test_suggested_value_survives_the_shell_and_hydra(value: object) -> None:
    assert same(value, read_back(type_instead("key", value).removeprefix("type for example ")))


def test_unknown_field_is_suggested_under_the_nearest_name_with_its_value() -> None:
    error = unknown_field("optimizer", "beta", [0.9, 0.95], ["lr", "betas"])
    assert str(error).endswith("type for example 'optimizer.betas=[0.9,0.95]'")
    error = unknown_field("optimizer", "momentum", 0.9, ["lr", "betas"])
    assert str(error).endswith("the fields are lr, betas")


def test_words_are_typed_as_hydra_reads_them() -> None:
    assert [format_value(value) for value in (None, True, 1e-8, "net.*")] == [
        "null",
        "true",
        "1e-08",
        "net.*",
    ]

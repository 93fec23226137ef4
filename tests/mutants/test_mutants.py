from collections import Counter
from pathlib import Path

import lightning_adam
from tests.mutants.__main__ import MIRRORS, planted
from tests.mutants.mutants import MUTANTS, REDUNDANT

PACKAGE = Path(lightning_adam.__file__).parent


def test_each_mutant_changes_one_place_of_its_module_and_leaves_valid_python() -> None:
    wrong = []
    for number, mutant in enumerate(MUTANTS):
        source = (PACKAGE / f"{mutant.module}.py").read_text(encoding="utf-8")
        try:
            compile(planted(mutant, source), mutant.module, "exec", dont_inherit=True)
        except (ValueError, SyntaxError) as error:
            wrong.append(f"{number}: {error}")
    assert not wrong, "\n".join(wrong)


def test_mutants_are_distinct() -> None:
    changes = Counter((each.module, each.text, each.replacement) for each in MUTANTS)
    meanings = Counter(each.meaning for each in MUTANTS)
    assert max(*changes.values(), *meanings.values()) == 1, (changes + meanings).most_common(3)
    assert all(each.text != each.replacement for each in MUTANTS)
    assert {*range(len(MUTANTS))} >= REDUNDANT


def test_each_module_with_mutants_has_tests_that_mirror_it() -> None:
    modules = {mutant.module for mutant in MUTANTS}
    files = {path.stem for path in PACKAGE.with_name("tests").glob("**/test_*.py")}
    wrong = [
        module
        for module in sorted(modules)
        if not files.intersection(MIRRORS.get(module) or MIRRORS.get(str(Path(module).parent), ()))
    ]
    assert not wrong

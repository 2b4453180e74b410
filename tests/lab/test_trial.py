"""What a trial may declare, and how it is found."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from danlu.lab.errors import TrialError
from danlu.lab.trial import Arm, Budget, Comparison, canonical_json, digest, find_trial, full_name, trial_names

TINY = str(Path(__file__).with_name("tiny_trial.py"))


@pytest.fixture
def trial():
    return find_trial(TINY)[1]


def test_every_trial_is_found_by_file_name():
    names = trial_names()
    assert {"optim/tiger", "losses/tailr", "attention/rerope"} <= set(names)
    for name in names:
        full, trial = find_trial(name)
        assert full == name
        assert {"ci", "demo", "report"} <= set(trial.sizes)
        assert trial.claim.endswith(".")
        assert trial.source
        for arm in trial.arms.values():
            assert not arm.method or arm.method.startswith("danlu.")
    assert full_name("tiger") == "optim/tiger"


@pytest.mark.parametrize(
    ("typo", "nearest"), [("tigr", "tiger"), ("rerop", "rerope"), ("losses/tailor", "losses/tailr")]
)
def test_misspelt_trial_suggests_the_nearest(typo, nearest):
    with pytest.raises(TrialError, match=re.escape(f"did you mean '{nearest}'")):
        find_trial(typo)


def test_unknown_trial_lists_all():
    with pytest.raises(TrialError, match="optim/tiger"):
        find_trial("zzzzzzzz")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("x = 1\n", "does not define a Trial named TRIAL"),
        ("import nothing_of_this_name\n", "fails: ModuleNotFoundError"),
        ("def (\n", "fails: SyntaxError"),
    ],
)
def test_bad_trial_file(tmp_path, content, match):
    file = tmp_path / "mine.py"
    file.write_text(content)
    with pytest.raises(TrialError, match=match):
        find_trial(str(file))


def test_missing_trial_file(tmp_path):
    with pytest.raises(TrialError, match="cannot read the trial file"):
        find_trial(str(tmp_path / "none.py"))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"decides": ()}, "at least one comparison"),
        (
            {"decides": (Comparison(candidate="fats", baseline="slow", metric="error", better="lower"),)},
            "unknown arm 'fats'.*did you mean 'fast'",
        ),
        ({"arms": {"slow": Arm(options={"lrr": 1.0}), "fast": Arm()}}, "sets 'lrr', which.*did you mean 'lr'"),
        ({"arms": {"slow": Arm(grid=({"lr": 1.0}, {"lr": 2.0})), "fast": Arm()}}, "unequal numbers of tuning fits"),
        ({"sizes": {"ci": Budget(steps=1, seeds=2)}}, "needs at least 3"),
        ({"sizes": {"dmeo": Budget(steps=1)}}, "unknown size 'dmeo'; did you mean 'demo'"),
        ({"sizes": {"ci": Budget(steps=1, options={"widht": 1})}}, "sets 'widht'"),
    ],
)
def test_contradictory_declarations(trial, change, match):
    with pytest.raises(TrialError, match=match):
        replace(trial, **change)


def test_evaluation_only_grid_costs_no_fits(trial):
    arms = {"slow": Arm(), "fast": Arm(grid=({"bias": 0.0}, {"bias": 1.0}))}
    changed = replace(trial, arms=arms)
    assert len(changed.points("fast", "ci")) == 2
    assert len(changed.tuning_fits("fast", "ci")) == len(changed.tuning_fits("slow", "ci")) == 1


def test_points_lay_grid_over_arm_over_size_over_defaults(trial):
    changed = replace(trial, sizes={"ci": Budget(steps=1, options={"lr": 9.0, "bias": 0.25}, grid=1)})
    assert changed.points("slow", "ci") == ({"lr": 0.0005, "replica": 0, "broken": False, "bias": 0.25},)
    assert changed.split({"lr": 1.0, "bias": 2.0}) == ({"lr": 1.0}, {"bias": 2.0})


def test_digest_is_of_the_value():
    assert canonical_json({"b": 1, "a": (1, 2)}) == '{"a":[1,2],"b":1}'
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})

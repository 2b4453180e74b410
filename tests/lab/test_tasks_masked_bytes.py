"""Masked bytes: what is hidden, metrics of known answers, the same targets at every length, and exact resume."""

import math

import pytest
import torch
from torch.nn import functional as F

from danlu.lab.errors import TrialError
from danlu.lab.tasks.masked_bytes import MaskedBytes, hide
from danlu.lab.tasks.position_encoder import PositionEncoder
from danlu.lab.trial import find_trial

SMALL = {"width": 16, "layers": 1, "heads": 2, "batch_size": 4, "windows": 20, "context": 16, "reach": 4}


def options(**changes):
    task = MaskedBytes()
    return {**task.fit_options, **task.evaluate_options, **SMALL, **changes}


class Guess(PositionEncoder):
    """Guesses one byte everywhere; notes what it is given."""

    def __init__(self, byte: int):
        super().__init__(98, 97, width=8, layers=1, heads=2, encoding="rope", logn=None)
        self.byte = byte
        self.seen = []

    def forward(self, tokens, positions, window=None):
        self.seen.append((tokens, positions, window))
        return F.one_hot(torch.full_like(tokens, self.byte), 97).float()


class Fit:
    def __init__(self, model):
        self.model = model


def evaluated(model, **changes):
    return MaskedBytes().evaluate(Fit(model), seed=0, split="test", options=options(**changes))


def test_what_is_hidden():
    text = torch.arange(97).repeat(40, 10)
    tokens, hidden = hide(text, torch.Generator().manual_seed(0))
    assert torch.equal(tokens == 97, hidden)
    assert torch.equal(tokens[~hidden], text[~hidden])
    assert hidden.float().mean().item() == pytest.approx(0.15, abs=0.006)
    assert hide(torch.zeros(50, 1, dtype=torch.int64), torch.Generator())[1].all()


def test_metrics_of_one_guess_and_equal_targets_at_all_lengths():
    found = evaluated(Guess(0), windows=300)
    assert set(found) == {f"{metric}@{r}x" for metric in ("accuracy", "bits") for r in (1, 2, 4)}
    # Symbol 0 is the space, about every fourth byte of Python source.
    assert 0.1 < found["accuracy@1x"] < 0.5
    right = math.log(math.e + 96) - 1
    wrong = math.log(math.e + 96)
    expected = (found["accuracy@1x"] * right + (1 - found["accuracy@1x"]) * wrong) / math.log(2)
    assert found["bits@1x"] == pytest.approx(expected, rel=1e-5)
    # The same hidden bytes count, whatever stands around them.
    for r in (2, 4):
        assert found[f"accuracy@{r}x"] == found["accuracy@1x"]
        assert found[f"bits@{r}x"] == pytest.approx(found["bits@1x"], rel=1e-6)
    assert found == evaluated(Guess(0), windows=300)


def test_texts_of_all_lengths_have_one_middle():
    model = Guess(0)
    evaluated(model, windows=5)
    short, middle, long = (tokens for tokens, _, _ in model.seen)
    assert [t.shape[1] for t in (short, middle, long)] == [16, 32, 64]
    assert torch.equal(middle[:, 8:24], short)
    assert torch.equal(long[:, 24:40], short)


def test_log_n_is_of_the_evaluation():
    model = Guess(0)
    evaluated(model, logn=True)
    assert model.logn == 16
    evaluated(model)
    assert model.logn is None


def test_positions_and_windows_of_the_test():
    def given(**changes):
        model = Guess(0)
        evaluated(model, max_position=128, **changes)
        return model.seen[-2]

    assert given()[1].tolist() == list(range(64))
    _, even, window = given(read_with="even", local=True)
    assert even[0].tolist() == list(range(0, 128, 2))
    assert window == 16
    drawn = given(read_with="random")[1]
    assert (drawn.diff() > 0).all()
    assert len(drawn.unique(dim=0)) == len(drawn)


@pytest.mark.parametrize(
    "changes",
    [{}, {"trained_on": "sorted"}, {"trained_on": "equal_mean"}, {"encoding": "alibi"}],
    ids=str,
)
def test_resumes_bit_for_bit(changes):
    task, chosen = MaskedBytes(), options(**changes)
    whole = task.start(seed=0, steps=4, options=chosen)
    points = [whole.step(i) for i in range(4)]
    half = task.start(seed=0, steps=4, options=chosen)
    assert [half.step(i) for i in range(2)] == points[:2]
    rest = task.start(seed=0, steps=4, options=chosen)
    for parameter in rest.model.parameters():
        parameter.data.fill_(7.0)
    rest.load(half.state())
    assert [rest.step(i) for i in range(2, 4)] == points[2:]
    assert task.start(seed=1, steps=4, options=chosen).step(0) != points[0]


def test_unknown_options():
    with pytest.raises(TrialError, match="unknown positions 'odd'; known: plain, sorted, equal_mean"):
        MaskedBytes().start(seed=0, steps=1, options=options(trained_on="odd"))
    with pytest.raises(TrialError, match="unknown encoding 'odd'; known: rope, alibi"):
        MaskedBytes().start(seed=0, steps=1, options=options(encoding="odd"))
    with pytest.raises(TrialError, match="unknown positions 'odd'; known: plain, even, random"):
        evaluated(Guess(0), read_with="odd")
    with pytest.raises(TypeError, match="MaskedBytes evaluates a PositionEncoder, not Linear"):
        evaluated(torch.nn.Linear(1, 1))


def test_arms_share_the_fits_that_they_should():
    _, trial = find_trial("positions/randomized_bytes")
    fits = {arm: trial.tuning_fits(arm, "report") for arm in trial.arms}
    assert fits["plain"] == fits["window"]
    assert fits["randomized"] == fits["randomized_at_test"] == fits["randomized_log_n"]
    assert fits["equal_mean"] == fits["equal_mean_log_n"]
    assert len({frozenset(one) for one in fits.values()}) == 4

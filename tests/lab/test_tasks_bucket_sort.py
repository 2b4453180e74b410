"""Bucket sort: metrics of known answers, exact resume, and what each option changes."""

import pytest
import torch
from torch.nn import functional as F

from danlu.lab.errors import TrialError
from danlu.lab.tasks.bucket_sort import BucketSort, SortEncoder, draw_strings
from danlu.lab.trial import find_trial

SMALL = {"width": 16, "layers": 1, "heads": 2, "batch_size": 4, "strings": 20, "longest": 6}


def options(**changes):
    task = BucketSort()
    return {**task.fit_options, **task.evaluate_options, **SMALL, **changes}


class Answers(SortEncoder):
    """Sorts, or repeats what it reads; notes the positions that it is given."""

    def __init__(self, sort: bool):
        super().__init__(5, width=8, layers=1, heads=2, encoding="rope", logn=None)
        self.sort = sort
        self.seen = []

    def forward(self, strings, positions, window=None):
        self.seen.append((positions, window))
        return F.one_hot(strings.sort(1).values if self.sort else strings, 5).float()


class Fit:
    def __init__(self, model):
        self.model = model


def test_accuracy_of_known_answers():
    task = BucketSort(lengths=(1, 7, 100))
    found = task.evaluate(Fit(Answers(True)), seed=0, split="test", options=options())
    assert found == {"accuracy@1": 1.0, "accuracy@7": 1.0, "accuracy@100": 1.0}
    found = task.evaluate(Fit(Answers(False)), seed=0, split="test", options=options(strings=400))
    assert found["accuracy@1"] == 1.0
    # A fifth of the symbols is right by chance.
    assert found["accuracy@100"] == pytest.approx(0.2, abs=0.01)
    assert found == task.evaluate(Fit(Answers(False)), seed=9, split="test", options=options(strings=400))
    assert found != task.evaluate(Fit(Answers(False)), seed=0, split="validation", options=options(strings=400))


def test_positions_and_windows_of_the_test():
    task = BucketSort(lengths=(4,))

    def given(**changes):
        model = Answers(True)
        task.evaluate(Fit(model), seed=0, split="test", options=options(max_position=80, **changes))
        return model.seen[0]

    assert given()[0].tolist() == list(range(8))
    even, window = given(read_with="even", local=True)
    assert even[0].tolist() == list(range(0, 80, 10))
    assert window == 12
    drawn = given(read_with="random")[0]
    assert (drawn.diff() > 0).all()
    assert drawn.max() < 80
    assert len(drawn.unique(dim=0)) == len(drawn)


@pytest.mark.parametrize(
    "changes",
    [{}, {"trained_on": "sorted"}, {"trained_on": "equal_mean", "logn": True}, {"encoding": "alibi"}],
    ids=str,
)
def test_resumes_bit_for_bit(changes):
    task, chosen = BucketSort(), options(**changes)
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


def encoder(**changes):
    torch.manual_seed(0)
    given = {"width": 16, "layers": 2, "heads": 2, "encoding": "rope", "logn": None, **changes}
    return SortEncoder(5, **given).double().eval()


def test_the_encoder_reads_positions_as_it_should():
    strings = draw_strings(3, 6, 5, torch.Generator().manual_seed(0))
    positions = torch.arange(12)
    for encoding in ("rope", "alibi"):
        model = encoder(encoding=encoding)
        if encoding == "alibi":
            model.slopes = model.slopes.double()
        out = model(strings, positions)
        assert out.shape == (3, 6, 5)
        # Relative: a shift changes nothing, a stretch does.
        torch.testing.assert_close(model(strings, positions + 50), out, rtol=1e-9, atol=1e-9)
        assert (model(strings, 3 * positions) - out).abs().max() > 1e-4
        torch.testing.assert_close(model(strings, positions.expand(3, -1)), out, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(model(strings, positions, 12), out, rtol=1e-12, atol=1e-12)
        assert (model(strings, positions, 3) - out).abs().max() > 1e-4


def test_log_n_is_1_at_its_length():
    strings = draw_strings(3, 6, 5, torch.Generator().manual_seed(0))
    plain = encoder()(strings, torch.arange(12))
    torch.testing.assert_close(encoder(logn=12)(strings, torch.arange(12)), plain)
    assert (encoder(logn=144)(strings, torch.arange(12)) - plain).abs().max() > 1e-5


def test_unknown_options():
    with pytest.raises(TrialError, match="unknown positions 'odd'; known: plain, sorted, equal_mean"):
        BucketSort().start(seed=0, steps=1, options=options(trained_on="odd"))
    with pytest.raises(TrialError, match="unknown encoding 'odd'; known: rope, alibi"):
        BucketSort().start(seed=0, steps=1, options=options(encoding="odd"))
    with pytest.raises(TrialError, match="unknown positions 'odd'; known: plain, even, random"):
        BucketSort().evaluate(Fit(Answers(True)), seed=0, split="test", options=options(read_with="odd"))
    with pytest.raises(TypeError, match="BucketSort evaluates a SortEncoder, not Linear"):
        BucketSort().evaluate(Fit(torch.nn.Linear(1, 1)), seed=0, split="test", options=options())


def test_arms_share_the_fits_that_they_should():
    _, trial = find_trial("positions/randomized")
    fits = {arm: trial.tuning_fits(arm, "report") for arm in trial.arms}
    assert fits["plain"] == fits["window"]
    assert fits["randomized"] == fits["randomized_at_test"]
    assert len({frozenset(one) for one in fits.values()}) == 5

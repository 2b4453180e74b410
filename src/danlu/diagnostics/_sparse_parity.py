r"""Multitask sparse parity: a data set made of discrete skills with Zipf frequencies.

Source: "基于量子化假设推导模型的尺度定律" (2023-05-18); arXiv 2303.13506, section 3.

Shape letters: `K` tasks, `B` bits of a sample, `S` samples, `T` records of a learning curve.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from danlu._common.checks import check_integer, check_real

__all__ = ["MultitaskSparseParity", "TaskScores", "learning_times"]

# Samples that a model sees at once in an evaluation.
_CHUNK = 8192


@dataclass(frozen=True, eq=False)
class TaskScores:
    r"""Scores of a model on every task of a [`MultitaskSparseParity`][danlu.diagnostics.MultitaskSparseParity].

    Definition:
        `mean_loss` $= \sum_k p_k \ell_k$ with $\ell$ = `loss` and the frequencies $p$ of the tasks.

    Args:
        loss: binary cross entropy (nats) of each task, `(K,)`, float64; $\log 2$ for a guess.
        accuracy: share of right signs of each task, `(K,)`, float64.
        mean_loss: loss of the distribution (nats).

    Numerics:
        Sums in float64.

    Source:
        arXiv 2303.13506, section 3.

    Example:
        >>> import torch
        >>> from danlu.diagnostics import MultitaskSparseParity
        >>> data = MultitaskSparseParity(n_tasks=5, n_bits=8, k=2, gamma=0.5)
        >>> round(data.evaluate(lambda task, bits: torch.zeros(len(task))).mean_loss, 4)
        0.6931
    """

    loss: Tensor
    accuracy: Tensor
    mean_loss: float


class MultitaskSparseParity:
    r"""Samples (task, bits, label) in which each task is the parity of its own few bits.

    Definition:
        Task $t = 1, \dots, K$ has a set $S_t$ of $k$ of the $B$ bits, all sets different and drawn at random. A sample
        draws $t$ with $p_t = t^{-\gamma-1}/Z$ and bits $x \in \{0, 1\}^B$ uniformly; its label is
        $\bigoplus_{i \in S_t} x_i$. With $K$ = `n_tasks`, $B$ = `n_bits`; task ids count from 0.

    Args:
        n_tasks: $K \ge 1$.
        n_bits: $B \ge 1$.
        k: bits of a task, $1 \le k \le B$.
        gamma: $\gamma > 0$, the exponent in the number of learned tasks.
        seed: of the sets and of the samples.

    Raises:
        TypeError: an argument is not of its type.
        ValueError: an argument is out of its range, or there are fewer than `n_tasks` sets of `k` bits.

    Numerics:
        Frequencies in float64; the rarest task of $10^6$ is still drawn with its own frequency.

    Cost:
        A sample takes $B/8$ table look-ups, some ten million samples a second on one core for 32 bits.

    Differences:
        The paper codes the task as one-hot bits in front of the others. The task id says the same with less memory: an
        embedding added to the first layer is that layer on the one-hot code.

    Source:
        "基于量子化假设推导模型的尺度定律" (2023-05-18); arXiv 2303.13506, section 3.

    Example:
        >>> from danlu.diagnostics import MultitaskSparseParity
        >>> data = MultitaskSparseParity(n_tasks=5, n_bits=8, k=2, gamma=0.5)
        >>> task, bits, label = data.sample(4)
        >>> task.shape, bits.shape, label.shape
        (torch.Size([4]), torch.Size([4, 8]), torch.Size([4]))
        >>> bool((bits.gather(1, data.subsets[task]).sum(1) % 2 == label).all())
        True
    """

    def __init__(self, n_tasks: int, n_bits: int, k: int, gamma: float, seed: int = 0) -> None:
        for name, count in {"n_tasks": n_tasks, "n_bits": n_bits, "k": k}.items():
            check_integer(name, count, low=1)
        check_real("gamma", gamma, low=0.0, low_open=True)
        check_integer("seed", seed, low=0)
        if k > n_bits:
            raise ValueError(f"k must be at most n_bits={n_bits}, got {k}")
        if n_tasks > math.comb(n_bits, k):
            raise ValueError(
                f"n_tasks must be at most {math.comb(n_bits, k)}, the number of sets of {k} of {n_bits} bits, "
                f"got {n_tasks}"
            )
        self.n_tasks, self.n_bits, self.k, self.gamma, self.seed = n_tasks, n_bits, k, gamma, seed
        self.subsets = _distinct_subsets(n_tasks, n_bits, k, seed)
        weight = torch.arange(1, n_tasks + 1, dtype=torch.float64).pow(-gamma - 1)
        self.probabilities = weight / weight.sum()
        # The last entry is infinite so that rounding of the sum can never name a task beyond the last.
        self._cumulative = self.probabilities.cumsum(0)
        self._cumulative[-1] = math.inf

    def __repr__(self) -> str:
        return (
            f"MultitaskSparseParity(n_tasks={self.n_tasks}, n_bits={self.n_bits}, k={self.k}, gamma={self.gamma}, "
            f"seed={self.seed})"
        )

    def sample(self, count: int, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Draw `count` samples: task ids (int64), bits (uint8, 0 or 1, `(count, n_bits)`), labels (int64, 0 or 1).

        Without a `generator` the draw is that of the seed, the same at every call.
        """
        check_integer("count", count, low=0)
        generator = generator or self._generator(0)
        task = torch.empty(count, dtype=torch.int64)
        bits, label = torch.empty(count, self.n_bits, dtype=torch.uint8), torch.empty(count, dtype=torch.int64)
        # In blocks that stay in the cache.
        for t, x, y in zip(task.split(_CHUNK), bits.split(_CHUNK), label.split(_CHUNK), strict=True):
            place = torch.rand(len(t), dtype=torch.float64, generator=generator)
            torch.searchsorted(self._cumulative, place, right=True, out=t)
            drawn, parity = self.label_bits(t, generator=generator)
            x.copy_(drawn)
            y.copy_(parity)
        return task, bits, label

    def label_bits(self, task: Tensor, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw bits for given task ids `(S,)` and return them with their labels."""
        bits = _random_bits(len(task), self.n_bits, generator or self._generator(0))
        return bits, bits.gather(1, self.subsets[task]).sum(1) & 1

    def batches(self, batch_size: int, *, start: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Fresh batches without end, from number `start` on: batch $i$ is the same whatever was drawn before it."""
        check_integer("batch_size", batch_size, low=1)
        check_integer("start", start, low=0)
        return self._batches(batch_size, start)

    def _batches(self, batch_size: int, start: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        index = start
        while True:
            yield self.sample(batch_size, generator=self._generator(index + 2))
            index += 1

    @torch.no_grad()
    def evaluate(
        self,
        predict: Callable[[Tensor, Tensor], Tensor],
        *,
        samples_per_task: int = 256,
        generator: torch.Generator | None = None,
    ) -> TaskScores:
        """Score every task on samples of its own.

        Args:
            predict: task ids `(S,)` and bits `(S, n_bits)` to the logit of label 1, `(S,)`; called in chunks.
            samples_per_task: samples of each task.
            generator: of the samples; None takes the same ones at every call, none of which `batches` draws.
        """
        check_integer("samples_per_task", samples_per_task, low=1)
        generator = generator or self._generator(1)
        loss, right = torch.zeros(2, self.n_tasks, dtype=torch.float64)
        for task in torch.arange(self.n_tasks).repeat_interleave(samples_per_task).split(_CHUNK):
            bits, label = self.label_bits(task, generator=generator)
            logit = predict(task, bits)
            if logit.shape != task.shape:
                raise ValueError(f"predict must return one logit a sample, {tuple(task.shape)}, got {logit.shape}")
            logit = logit.cpu().double()
            loss.index_add_(0, task, F.binary_cross_entropy_with_logits(logit, label.double(), reduction="none"))
            right.index_add_(0, task, ((logit > 0) == (label > 0)).double())
        loss, right = loss / samples_per_task, right / samples_per_task
        return TaskScores(loss, right, float(self.probabilities @ loss))

    def _generator(self, stream: int) -> torch.Generator:
        """Stream 0 draws samples, 1 evaluates, 2 and more are the batches."""
        # Seeds of neighboring streams are far apart, and no two of (seed, stream) below 2^31 coincide.
        mixed = ((self.seed << 31) + stream) * 0x9E3779B97F4A7C15 % 2**63
        return torch.Generator().manual_seed(mixed)


def learning_times(steps: Sequence[float] | Tensor, losses: Tensor, *, threshold: float = 0.5 * math.log(2)) -> Tensor:
    r"""When each task is learned: the first time that its loss is below a threshold.

    Definition:
        $t_k = \min\{t : \ell_k(t) < \theta\}$ with $\theta$ = `threshold`, by linear interpolation of $\ell_k$ in
        $\log t$ between the last record above and the first below; the first record's step if $\ell_k$ starts below,
        and infinity if it never gets there.

    Args:
        steps: of the records, `(T,)`, positive and strictly increasing.
        losses: of the tasks at the records, `(T, K)`.
        threshold: $\theta > 0$, in the unit of the losses; half-way between a guess and perfection.

    Returns:
        $t_k$, `(K,)`, float64.

    Raises:
        TypeError: `losses` is not a floating tensor.
        ValueError: shapes that do not match, no records, or steps not positive and strictly increasing.

    Numerics:
        float64. Losses that are not finite count as above the threshold.

    Source:
        arXiv 2303.13506, section 3, where the drop of a task's loss marks its emergence; the interpolation is ours.

    Example:
        >>> import torch
        >>> from danlu.diagnostics import learning_times
        >>> losses = torch.tensor([[0.7, 0.7], [0.3, 0.7], [0.1, 0.7]])
        >>> learning_times([10.0, 1000.0, 2000.0], losses, threshold=0.5)
        tensor([100.0000,      inf], dtype=torch.float64)
    """
    if not isinstance(losses, Tensor) or not losses.is_floating_point():
        raise TypeError("losses must be a floating-point tensor")
    check_real("threshold", threshold, low=0.0, low_open=True)
    times = torch.as_tensor(steps, dtype=torch.float64).detach().cpu()
    if losses.ndim != 2 or times.shape != losses.shape[:1] or not len(times):
        raise ValueError(f"losses must be ({len(times)}, tasks), one row a step, got shape {tuple(losses.shape)}")
    if not bool((times > 0).all()) or not bool((times.diff() > 0).all()):
        raise ValueError("steps must be positive and strictly increasing")
    curve = losses.detach().cpu().double()
    below = curve < threshold
    first = below.to(torch.uint8).argmax(0)
    before = (first - 1).clamp(min=0)
    high, low = (curve.gather(0, row[None])[0] for row in (before, first))
    share = ((high - threshold) / (high - low)).nan_to_num(1.0, 1.0, 1.0).clamp(0, 1)
    logs = times.log()
    crossed = torch.where(first > 0, torch.lerp(logs[before], logs[first], share), logs[0]).exp()
    return torch.where(below.any(0), crossed, torch.inf)


def _distinct_subsets(count: int, n_bits: int, k: int, seed: int) -> Tensor:
    """`count` different sorted sets of `k` of `n_bits`, `(count, k)`; uniform over such families."""
    generator = torch.Generator().manual_seed(seed)
    total = math.comb(n_bits, k)
    if total <= 4 * count:
        # Few sets to choose from: list them all and shuffle.
        every = torch.combinations(torch.arange(n_bits), k)
        return every[torch.randperm(total, generator=generator)[:count]]
    found: dict[tuple[int, ...], None] = {}
    while len(found) < count:
        drawn = torch.rand(count, n_bits, generator=generator).argsort(1)[:, :k].sort(1).values
        found.update(dict.fromkeys(map(tuple, drawn.tolist())))
    return torch.tensor(list(found)[:count])


def _random_bits(count: int, n_bits: int, generator: torch.Generator) -> Tensor:
    """Uniform bits, uint8 `(count, n_bits)`: a random byte at a time becomes eight bytes of 0 or 1."""
    width = -(-n_bits // 8)
    words = torch.empty(-(-count * width // 7), dtype=torch.int64).random_(0, 2**56, generator=generator)
    # The top byte of each word is always 0 and not used.
    octets = words.view(torch.uint8).view(-1, 8)
    octets = octets[:, :7] if _LITTLE_ENDIAN else octets[:, 1:]
    places = octets.reshape(-1)[: count * width].int()
    return _OCTETS.index_select(0, places).view(torch.uint8).view(count, 8 * width)[:, :n_bits]


_LITTLE_ENDIAN = bool(torch.tensor([1], dtype=torch.int64).view(torch.uint8)[0])
# Row b holds the eight bits of b as bytes, packed into one word.
_OCTETS = ((torch.arange(256)[:, None] >> torch.arange(8)) & 1).to(torch.uint8).view(torch.int64)[:, 0].contiguous()

r"""A data collator around another one, which adds random position ids for training.

Source: as in `danlu.positions._randomized`.
"""

import copy
import hashlib
import inspect
import os
import re
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn
from torch.utils.data import get_worker_info

from danlu._common.checks import check_integer
from danlu.positions._randomized import even_positions, random_positions

__all__ = ["RandomPositionCollator"]


class RandomPositionCollator:
    r"""Wraps any data collator of transformers and adds `position_ids`, drawn anew for every batch.

    Definition:
        `batch = collator(features)`, then `batch["position_ids"] = random_positions(batch["attention_mask"], ...)` by
        [`random_positions`][danlu.positions.random_positions], where a batch without a mask gets one of ones.

        The mask is always there and is two-dimensional. Without one, and without a cache, transformers takes a step
        other than 1 between two position ids for the border between two packed texts: every token would see itself
        alone, silently.

    Args:
        collator: features -> batch of PyTorch tensors with `input_ids` or `inputs_embeds`.
        max_position: as in the function.
        mode: as in the function; "equal_mean" needs a functional encoding.
        distribution: as in the function.
        concentration: as in the function.
        endpoint: as in the function.
        seed: of the draws. Every rank (that of `torch.distributed`, or the environment variable RANK) and every worker
            of a DataLoader draws differently from one seed, and anew in every epoch.
        model: checked, if given: whether it takes position ids, and whether its table of positions, if it has one,
            takes these.

    Returns:
        From a call: the batch of `collator`, with `position_ids` and `attention_mask` of shape `(B, L)`.

    Raises:
        TypeError: `collator` is not callable, or a batch is not of PyTorch tensors.
        ValueError: an option is wrong, as in the function; `model` cannot take the positions; a batch has position ids
            already (packed texts), or a mask that is not two-dimensional.

    Numerics:
        One draw per sample and batch: all layers and heads share it, and gradient checkpointing does not draw again,
        since positions are inputs. Trainer wraps the batches of an evaluation, too: give it
        `collator.for_evaluation()` there, which has the deterministic positions of inference (evenly spaced, or plain
        ones in mode "equal_mean").

    Differences:
        Random positions are for encoders and for functional encodings. For generation token by token the author of the
        articles found them of no help: inference there has plain positions.

    Source:
        Article 8 of the series (2023-01-31); the limit to encoders: article 9 (2023-05-12).

    Example:
        >>> import torch
        >>> from danlu.positions import RandomPositionCollator
        >>> def stack(features):
        ...     return {"input_ids": torch.tensor([feature["input_ids"] for feature in features])}
        >>> collator = RandomPositionCollator(stack, max_position=64)
        >>> sorted(collator([{"input_ids": [5, 6, 7]}]))
        ['attention_mask', 'input_ids', 'position_ids']
        >>> collator.for_evaluation()([{"input_ids": [5, 6, 7, 8]}])["position_ids"]
        tensor([[ 0, 16, 32, 48]])
    """

    def __init__(
        self,
        collator: Callable[[Any], Any],
        *,
        max_position: int | None = None,
        mode: Literal["sorted", "equal_mean"] = "sorted",
        distribution: Literal["exponential", "beta"] = "exponential",
        concentration: float = 2.0,
        endpoint: bool = False,
        seed: int = 0,
        model: nn.Module | None = None,
    ) -> None:
        if not callable(collator):
            raise TypeError(f"collator must be callable, got {type(collator).__name__}")
        check_integer("seed", seed, low=0)
        self.collator = collator
        self.max_position = max_position
        self.mode = mode
        self.distribution = distribution
        self.concentration = concentration
        self.endpoint = endpoint
        self.seed = seed
        self.training = True
        self._source: torch.Generator | None = None
        self._owner: tuple[int, int, int] | None = None
        # Wrong options fail here and not in a worker.
        self._draw(torch.ones(1, 1, dtype=torch.int64), torch.Generator())
        if model is not None:
            _check_model(model, mode, max_position)

    def for_evaluation(self) -> "RandomPositionCollator":
        """The same collator with the deterministic positions of inference."""
        other = copy.copy(self)
        other.training = False
        return other

    def __call__(self, features: Any) -> Any:
        """Collate `features` and add positions."""
        return self.added(self.collator(features), lambda device: self.source())

    def added(self, batch: Any, source: Callable[[torch.device], torch.Generator]) -> Any:
        """Add positions to a batch, drawn from what `source` returns for its device."""
        if batch.get("position_ids") is not None:
            raise ValueError("the batch has position_ids already (packed texts?), which random ones would replace")
        mask = batch.get("attention_mask")
        if mask is None:
            mask = _ones(batch)
        if not isinstance(mask, Tensor):
            raise TypeError(f"attention_mask must be a torch.Tensor, got {type(mask).__name__}; return_tensors='pt'")
        if mask.ndim != 2:
            raise ValueError(f"attention_mask must have shape (B, L), got {tuple(mask.shape)}")
        batch["attention_mask"] = mask
        batch["position_ids"] = self._draw(mask, source(mask.device)) if self.training else self._inference(mask)
        return batch

    def _draw(self, mask: Tensor, generator: torch.Generator) -> Tensor:
        return random_positions(
            mask,
            self.max_position,
            mode=self.mode,
            distribution=self.distribution,
            concentration=self.concentration,
            endpoint=self.endpoint,
            generator=generator,
        )

    def _inference(self, mask: Tensor) -> Tensor:
        if self.mode == "sorted":
            # Integers, which tables of positions need and which the training had.
            return even_positions(mask, self.max_position or 0).to(torch.int64)
        visible = mask != 0
        return (visible.cumsum(1) - 1).masked_fill(~visible, 0)

    def source(self) -> torch.Generator:
        """That of this process: workers are copies of one another and of the main process."""
        worker = get_worker_info()
        # The seed of a worker differs from epoch to epoch, while the object is copied anew for each.
        owner = (_rank(), -1, 0) if worker is None else (_rank(), worker.id, worker.seed)
        if self._source is None or self._owner != owner:
            digest = hashlib.sha256("/".join(map(str, (self.seed, *owner))).encode()).digest()
            self._source = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            self._owner = owner
        return self._source

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_source": None, "_owner": None}


def _rank() -> int:
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank()
    return int(os.environ.get("RANK", "0"))


def _ones(batch: Any) -> Tensor:
    for name in ("input_ids", "inputs_embeds"):
        tokens = batch.get(name)
        if isinstance(tokens, Tensor):
            return torch.ones(tokens.shape[:2], dtype=torch.int64, device=tokens.device)
    raise TypeError("a batch must have input_ids or inputs_embeds as torch tensors; return_tensors='pt'")


def _check_model(model: nn.Module, mode: str, max_position: int | None) -> None:
    # A model with adapters hands its arguments on.
    model = getattr(model, "get_base_model", lambda: model)()
    name = type(model).__name__
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"{name} does not take position_ids")
    for path, module in model.named_modules():
        own = path.rpartition(".")[2]
        if not isinstance(module, nn.Embedding) or not re.search(r"(^|_)(pos|positions?|wpe)(_|$)", own):
            continue
        if mode == "equal_mean":
            raise ValueError(f"mode='equal_mean' has real positions, but {name} looks them up in the table {path!r}")
        if max_position is not None and module.num_embeddings < max_position:
            raise ValueError(f"max_position={max_position} is beyond the {module.num_embeddings} rows of {path!r}")

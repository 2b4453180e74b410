r"""Random position ids inside a model: a hook that draws them for every forward pass of the training.

Source: as in `danlu.positions._randomized`.
"""

import inspect
from types import TracebackType
from typing import Any, Literal

import torch
from torch import nn

from danlu.positions._position_collator import RandomPositionCollator

__all__ = ["RandomizedPositions", "randomize_positions"]


class RandomizedPositions:
    r"""A model with random positions; `remove()`, or the end of a `with` block, takes them out.

    Definition:
        As in [`randomize_positions`][danlu.positions.randomize_positions], which makes it.

    Args:
        model: the model.
        positions: the options, as those of a collator.

    Numerics:
        As in the function.

    Source:
        As in the function.

    Example:
        >>> from torch import nn
        >>> from danlu.positions import RandomizedPositions, randomize_positions
        >>> class Model(nn.Module):
        ...     def forward(self, input_ids, attention_mask=None, position_ids=None):
        ...         return position_ids
        >>> isinstance(randomize_positions(Model(), max_position=64), RandomizedPositions)
        True
    """

    def __init__(self, model: nn.Module, positions: RandomPositionCollator) -> None:
        self.model = model
        self._positions = positions
        self._sources: dict[torch.device, torch.Generator] = {}
        self._names = list(inspect.signature(model.forward).parameters)
        self._hook = model.register_forward_pre_hook(self._add, with_kwargs=True)

    def remove(self) -> None:
        """Take the hook out; a second call does nothing."""
        self._hook.remove()

    def __enter__(self) -> "RandomizedPositions":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _add(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        if not model.training and self._positions.mode == "equal_mean":
            # Plain positions, which are the model's own affair.
            return args, kwargs
        for name in ("cache", "past_key_values"):
            if given.get(name) is not None:
                raise ValueError(
                    f"{name} is for text that grows, whose positions would have to move: random positions are for "
                    "texts that are read at once"
                )
        collate = self._positions if model.training else self._positions.for_evaluation()
        return (), collate.added(given, self._source)

    def _source(self, device: torch.device) -> torch.Generator:
        """A generator of the device, since the ids of a device are drawn there."""
        if device not in self._sources:
            seed = int(self._positions.source().initial_seed())
            self._sources[device] = torch.Generator(device=device).manual_seed(seed)
        return self._sources[device]


def randomize_positions(
    model: nn.Module,
    *,
    max_position: int | None = None,
    mode: Literal["sorted", "equal_mean"] = "sorted",
    distribution: Literal["exponential", "beta"] = "exponential",
    concentration: float = 2.0,
    endpoint: bool = False,
    seed: int = 0,
) -> RandomizedPositions:
    r"""Give a model random position ids in training, and those of inference in evaluation, whatever calls it.

    Definition:
        Before every forward pass of `model` in training mode, `position_ids` become
        [`random_positions`][danlu.positions.random_positions] of `attention_mask`, which is all ones if it is not
        given, and is passed on. In evaluation mode they become [`even_positions`][danlu.positions.even_positions], as
        integers, or are left to the model in mode "equal_mean".

    Args:
        model: takes `position_ids`, `attention_mask`, and `input_ids` or `inputs_embeds`, as the models of transformers
            do. It gets a forward pre-hook.
        max_position: as in the function.
        mode: as in the function.
        distribution: as in the function.
        concentration: as in the function.
        endpoint: as in the function.
        seed: of the draws; every rank draws differently from one seed.

    Returns:
        A handle: `handle.remove()`, or leaving a `with` block, takes the hook out.

    Raises:
        ValueError: an option is wrong, as in the function; `model` takes no position ids, or has a table of them that
            these do not fit. From the model: position ids that are given, a mask that is not two-dimensional, or a
            cache.

    Numerics:
        One draw per sample and pass, on the device of the tokens, shared by all layers and heads; gradient
        checkpointing within the model does not draw again, since positions are inputs.

    Differences:
        [`RandomPositionCollator`][danlu.positions.RandomPositionCollator] does the same where the batches are made,
        which leaves the model as it is and draws on the loader's processes.

    Source:
        As in the module.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from danlu.positions import randomize_positions
        >>> class Model(nn.Module):
        ...     def forward(self, input_ids, attention_mask=None, position_ids=None):
        ...         return position_ids
        >>> model = Model().eval()
        >>> with randomize_positions(model, max_position=64):
        ...     print(model(torch.tensor([[5, 6, 7, 8]])))
        tensor([[ 0, 16, 32, 48]])
    """
    positions = RandomPositionCollator(
        dict,
        max_position=max_position,
        mode=mode,
        distribution=distribution,
        concentration=concentration,
        endpoint=endpoint,
        seed=seed,
        model=model,
    )
    return RandomizedPositions(model, positions)

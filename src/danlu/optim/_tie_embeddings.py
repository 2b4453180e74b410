r"""One matrix for the input embedding and the output layer of a model.

Source: kexue.fm article 9736 (2023-08-28).

Shape letters: V tokens, D channels.
"""

from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["tie_embeddings"]

Model = TypeVar("Model", bound=nn.Module)


def tie_embeddings(
    model: Model, *, embedding: str | None = None, head: str | None = None, permute_halves: bool = False
) -> Model:
    r"""Make a model's output layer use the matrix of its input embedding, so that every row gets a gradient.

    Definition:
        With the embedding $E \in \mathbb R^{V\times D}$, the logits of a hidden state $h$ are $E h$ (plus the layer's
        bias, if any); with `permute_halves` they are $[E_{:,D/2:}\;E_{:,:D/2}]\,h$, which keeps the two roles of a row
        apart. The softmax then gives every row a gradient at every step, and no row is left to a momentum alone.

    Args:
        model: changed in place. Models with `get_input_embeddings` and `get_output_embeddings` (transformers) are asked
            for their layers; elsewhere there must be one `nn.Embedding` and one `nn.Linear` with its shape of weight.
        embedding: qualified name of the embedding, for models with several; None looks for it.
        head: qualified name of the output layer; None looks for it.
        permute_halves: swap the two halves of the channels at the output.

    Returns:
        `model`. Tie before an optimizer is made, since the output layer's own matrix is gone.

    Raises:
        TypeError: `model` is not a module, or a named layer is of another class.
        ValueError: a layer is not found or not unique, the shapes, dtypes or devices differ, `permute_halves` with an
            odd D, or the output layer is parametrized already.

    Numerics:
        The values of the embedding are kept, those of the output layer are dropped.

    Cost:
        Saves V D parameters. `permute_halves` copies the V D elements in every forward.

    Differences:
        The permutation is a parametrization of the layer's weight rather than of its input, so code that reads
        `head.weight` (fused or chunked losses) sees the matrix that is meant. Such a model is saved by its
        `state_dict`, and tied again before that is loaded.

    Source:
        Article "Lion/Tiger optimizers and their embedding anomaly", kexue.fm 9736 (2023-08-28).

    Example:
        >>> import torch
        >>> from danlu.optim import tie_embeddings
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Tanh(), torch.nn.Linear(4, 10))
        >>> model = tie_embeddings(model)
        >>> model[2].weight is model[0].weight
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    source = _layer(model, "embedding", embedding, nn.Embedding, "get_input_embeddings")
    target = _layer(model, "head", head, nn.Linear, "get_output_embeddings", shape=source.weight.shape)
    if parametrize.is_parametrized(target, "weight"):
        raise ValueError("the weight of head is parametrized already")
    for what in ("shape", "dtype", "device"):
        ours, theirs = getattr(source.weight, what), getattr(target.weight, what)
        if ours != theirs:
            raise ValueError(f"embedding and head must have weights of one {what}, got {ours} and {theirs}")
    if permute_halves and source.weight.shape[1] % 2:
        raise ValueError(f"permute_halves needs an even number of channels, got {source.weight.shape[1]}")
    target.weight = source.weight
    if permute_halves:
        parametrize.register_parametrization(target, "weight", _SwapHalves())
    # transformers ties by this entry when it loads a model, and would undo the permutation.
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "tie_word_embeddings"):
        config.tie_word_embeddings = not permute_halves
    return model


class _SwapHalves(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return torch.roll(weight, weight.shape[1] // 2, dims=1)


Layer = TypeVar("Layer", nn.Embedding, nn.Linear)


def _layer(
    model: nn.Module,
    argument: str,
    name: str | None,
    kind: type[Layer],
    accessor: str,
    *,
    shape: torch.Size | None = None,
) -> Layer:
    if name is not None:
        found = dict(model.named_modules()).get(name)
        if found is None:
            raise ValueError(f"{argument}={name!r} is not a module of {type(model).__name__}")
        if not isinstance(found, kind):
            raise TypeError(f"{argument}={name!r} must be a {kind.__name__}, got {type(found).__name__}")
        return found
    asked = getattr(model, accessor, None)
    if callable(asked):
        layer = cast("Callable[[], object]", asked)()
        if isinstance(layer, kind):
            return layer
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, kind) and (shape is None or module.weight.shape == shape)
    }
    if len(layers) != 1:
        of = "" if shape is None else f" with a weight of shape {tuple(shape)}"
        listed = f": {', '.join(layers)}" if layers else ""
        raise ValueError(f"found {len(layers)} {kind.__name__} layers{of}{listed}; name one as {argument}=")
    return next(iter(layers.values()))

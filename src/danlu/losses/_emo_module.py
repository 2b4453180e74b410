r"""EMO as a module that keeps its cost embedding.

Source: as in [`emo_loss`][danlu.losses.emo_loss].
"""

import weakref

import torch
from torch import Tensor, nn

from danlu._common.checks import check_integer, is_low_precision
from danlu._common.reduction import Reduction, check_reduction
from danlu.losses._emo import EMOMode, check_emo_options, emo_loss
from danlu.losses._ground_cost import GroundCost, inverse_norms

__all__ = ["EMOLoss"]


class EMOLoss(nn.Module):
    r"""Module form of [`emo_loss`][danlu.losses.emo_loss] that keeps the frozen cost embedding.

    Definition:
        `forward(input, target) = emo_loss(input, target, cost_embedding=self.cost_embedding, ...)`, with the rows of
        the embedding normalized once.

    Args:
        cost_embedding: shape `(V, E)`; copied, normalized, and kept as a buffer that is not part of the state dict.
        cost_matrix: shape `(V, V)`, in place of it; a buffer, too.
        mode: as in the function.
        ce_weight: as there.
        emo_weight: as there.
        max_ratio: as there.
        shift_target: as there.
        min_nll: as there.
        eps: as there.
        label_smoothing: as there.
        ignore_index: target of rows that count for nothing.
        reduction: "mean", "sum" or "none".

    Returns:
        From `forward`: the loss; `normalizer` replaces the denominator of "mean", and `token_weight` weighs rows.

    Raises:
        TypeError: a tensor is not floating.
        ValueError: an option is out of its range, at construction.

    Numerics:
        As in the function. The copy has the dtype of the embedding and is normalized in float32.

    Cost:
        The copy of the embedding, $VE$ numbers. [`linear_emo_loss`][danlu.losses.linear_emo_loss] with
        `cost_embedding="head"` needs none.

    Source:
        As in the function.

    Example:
        >>> import torch
        >>> from danlu.losses import EMOLoss
        >>> loss = EMOLoss.from_model(torch.nn.Linear(4, 10, bias=False))
        >>> loss(torch.zeros(2, 10), torch.tensor([0, 3]))
        tensor(2.3026)
    """

    cost_embedding: Tensor | None
    cost_matrix: Tensor | None

    def __init__(
        self,
        cost_embedding: Tensor | None = None,
        *,
        cost_matrix: Tensor | None = None,
        mode: EMOMode = "ce_anchored",
        ce_weight: float = 1.0,
        emo_weight: float = 1.0,
        max_ratio: float | None = None,
        shift_target: bool = False,
        min_nll: float = 1e-3,
        eps: float = 1e-10,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_emo_options(mode, ce_weight, emo_weight, max_ratio, min_nll, eps, label_smoothing)
        check_reduction(reduction, None)
        # For its checks.
        GroundCost(embedding=cost_embedding, matrix=cost_matrix)
        unit = None if cost_embedding is None else _normalized(cost_embedding)
        self.register_buffer("cost_embedding", unit, persistent=False)
        matrix = None if cost_matrix is None else cost_matrix.detach().clone()
        self.register_buffer("cost_matrix", matrix, persistent=False)
        self.mode: EMOMode = mode
        self.ce_weight = ce_weight
        self.emo_weight = emo_weight
        self.max_ratio = max_ratio
        self.shift_target = shift_target
        self.min_nll = min_nll
        self.eps = eps
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction
        self.refresh_every: int | None = None
        self._calls = 0
        # Weak, so that the model does not become a part of its loss.
        self._head: weakref.ref[nn.Module] | None = None

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        *,
        refresh_every: int | None = None,
        mode: EMOMode = "ce_anchored",
        ce_weight: float = 1.0,
        emo_weight: float = 1.0,
        max_ratio: float | None = None,
        shift_target: bool = False,
        min_nll: float = 1e-3,
        eps: float = 1e-10,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> "EMOLoss":
        """Take the output embedding of `model` as it is now.

        Args:
            model: has `get_output_embeddings()`, as models of transformers do, or is the head itself. If FSDP2 shards
                the head, every process gathers it here and in every refresh, so all must call together.
            refresh_every: copy the head again before every so many-th call in training mode; None keeps the first copy.
            mode: as in the class.
            ce_weight: as there.
            emo_weight: as there.
            max_ratio: as there.
            shift_target: as there.
            min_nll: as there.
            eps: as there.
            label_smoothing: as there.
            ignore_index: as there.
            reduction: as there.

        Raises:
            ValueError: the model has no output embedding, or an option is out of its range.
        """
        getter = getattr(model, "get_output_embeddings", None)
        head = getter() if callable(getter) else model
        weight = getattr(head, "weight", None)
        if not isinstance(head, nn.Module) or not isinstance(weight, Tensor) or weight.ndim != 2:
            raise ValueError(
                f"{type(model).__name__} has no output embedding; pass cost_embedding, or the module of the head"
            )
        if refresh_every is not None:
            check_integer("refresh_every", refresh_every, low=1)
        loss = cls(
            weight,
            mode=mode,
            ce_weight=ce_weight,
            emo_weight=emo_weight,
            max_ratio=max_ratio,
            shift_target=shift_target,
            min_nll=min_nll,
            eps=eps,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            reduction=reduction,
        )
        if refresh_every is not None:
            loss.refresh_every, loss._head = refresh_every, weakref.ref(head)
        return loss

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the head again; raise `RuntimeError` if the model is gone or `refresh_every` was not given."""
        head = None if self._head is None else self._head()
        if head is None or self.cost_embedding is None:
            raise RuntimeError("there is no head to copy: give refresh_every, and keep the model alive")
        weight = head.weight
        assert isinstance(weight, Tensor)
        self.cost_embedding.copy_(_normalized(weight))

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        normalizer: float | Tensor | None = None,
        token_weight: Tensor | None = None,
    ) -> Tensor:
        """Return the loss."""
        if self.refresh_every is not None and self.training:
            if self._calls and self._calls % self.refresh_every == 0:
                self.refresh()
            self._calls += 1
        return emo_loss(
            input,
            target,
            cost_embedding=self.cost_embedding,
            cost_matrix=self.cost_matrix,
            mode=self.mode,
            ce_weight=self.ce_weight,
            emo_weight=self.emo_weight,
            max_ratio=self.max_ratio,
            shift_target=self.shift_target,
            min_nll=self.min_nll,
            eps=self.eps,
            label_smoothing=self.label_smoothing,
            token_weight=token_weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            normalizer=normalizer,
        )

    def extra_repr(self) -> str:
        """Options as they stand in `repr`."""
        return (
            f"mode={self.mode!r}, ce_weight={self.ce_weight}, emo_weight={self.emo_weight}, "
            f"max_ratio={self.max_ratio}, shift_target={self.shift_target}, min_nll={self.min_nll}, eps={self.eps}, "
            f"label_smoothing={self.label_smoothing}, refresh_every={self.refresh_every}, "
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}"
        )


@torch.no_grad()
def _normalized(embedding: Tensor) -> Tensor:
    """Rows of length 1, in the dtype of the embedding; rows of zeros stay. Of a sharded head every process gets all."""
    # By its name: importing distributed tensors takes longer than the check is worth.
    if type(embedding).__name__ == "DTensor":
        embedding = embedding.full_tensor()  # pyrefly: ignore[missing-attribute]
    dtype = torch.float32 if is_low_precision(embedding.dtype) else embedding.dtype
    return (embedding.to(dtype) * inverse_norms(embedding, dtype)[:, None]).to(embedding.dtype)

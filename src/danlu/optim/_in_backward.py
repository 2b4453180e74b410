"""Steps inside the backward pass: hooks that hand every gradient over as soon as it is there, and then free it.

A hook runs after all uses of a parameter have added to its gradient, so a tied weight is handed over once. Under
`DistributedDataParallel` the gradient is not averaged yet at that point; there the hand-over is a communication hook,
after the average.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["BackwardHooks", "data_parallel_model", "refuse_local_gradients"]


def data_parallel_model(model: object) -> Any:
    """The model if it is a `DistributedDataParallel`, else None."""
    return model if type(model).__name__ == "DistributedDataParallel" and isinstance(model, nn.Module) else None


class BackwardHooks:
    """Calls `receive(param, grad)` for every gradient during the backward pass.

    Args:
        params: whose gradients are handed over.
        receive: a method; its object is held weakly, so hooks do not keep an optimizer alive.
        model: the `DistributedDataParallel` that owns the parameters, or None.
    """

    def __init__(self, params: Iterable[Tensor], receive: Callable[[Tensor, Tensor], None], model: Any) -> None:
        self._receive = weakref.WeakMethod(receive)
        self._model = None if model is None else weakref.ref(model)
        self._handles: list[Any] = []
        if model is not None:
            model.register_comm_hook(None, _communication_hook(model, self._receive))
        for param in params:
            self.add(param)

    def add(self, param: Tensor) -> None:
        """Hand over the gradients of one more parameter."""
        hook = self._hand_over if self._model is None else self._check
        frozen = not param.requires_grad
        if frozen and not (param.is_floating_point() or param.is_complex()):
            return
        # A frozen parameter may be thawed later; autograd takes hooks only of those that are not frozen.
        if frozen:
            param.requires_grad_(True)
        self._handles.append(param.register_post_accumulate_grad_hook(hook))
        if frozen:
            param.requires_grad_(False)

    def remove(self) -> None:
        """Leave gradients where autograd puts them."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hand_over(self, param: Tensor) -> None:
        receive = self._receive()
        if receive is not None and param.grad is not None:
            grad, param.grad = param.grad, None
            receive(param, grad)

    def _check(self, param: Tensor) -> None:
        model = None if self._model is None else self._model()
        if model is not None and not model.require_backward_grad_sync:
            param.grad = None
            refuse_local_gradients()


def _communication_hook(model: Any, receive: weakref.WeakMethod[Callable[[Tensor, Tensor], None]]) -> Any:
    """Averages a bucket of gradients over the processes, then hands them over."""
    # Only where a DistributedDataParallel exists; the annotations below are checked by it.
    import torch.distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    group = model.process_group

    def hook(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        def hand_over(future: torch.futures.Future[Tensor]) -> Tensor:
            averaged, call = future.value(), receive()
            if call is not None:
                for param, grad in zip(bucket.parameters(), bucket.gradients(), strict=True):
                    call(param, grad)
            return averaged

        return allreduce_hook(group, bucket).then(hand_over)

    return hook


def refuse_local_gradients() -> None:
    """Raise `RuntimeError`: gradients that are not averaged would make the replicas differ without a sign."""
    raise RuntimeError(
        "the gradients of this backward pass are not averaged over the processes (no_sync), and folding them into the "
        "momentum would make the replicas differ; leave out no_sync: nothing is saved by it here"
    )

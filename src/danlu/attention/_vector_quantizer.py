r"""Keys replaced by their nearest codewords; the codebook follows the keys by an exponential moving average.

Source: Lingle (2023), "Transformer-VQ: Linear-Time Transformers via Vector Quantization", arXiv 2309.16354;
"VQ一下Key，Transformer的复杂度就变成线性了" (2023-11-09).

Shape letters: `B` batch; `H` heads of the keys; `N` keys; `D` head size; `S` codewords of a head.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from danlu._common.checks import check_floating, check_integer, check_real, check_same_device, is_low_precision
from danlu.attention._masks import check_key_padding_mask

__all__ = ["Quantized", "VectorQuantizer", "look_up", "nearest_codes", "straight_through"]

# Keys whose distances are held at a time; more of them leave the cache of a core.
_CHUNK = 1024
# A codeword is m / max(n, this), as in the original code: a code that nothing comes to fades, but does not blow up.
_FLOOR = 0.01


def nearest_codes(key: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest codeword, the lowest one of several, shape (B, H, N), with O(S) scores held per key."""
    wide = torch.promote_types(torch.promote_types(key.dtype, codebook.dtype), torch.float32)
    with torch.no_grad(), torch.autocast(device_type=key.device.type, enabled=False):
        key, codebook = key.to(wide), codebook.to(wide)
        # |k|^2 is the same for all codewords.
        offset = -0.5 * codebook.square().sum(-1)[:, None]
        found = [(part @ codebook.mT + offset).max(-1).indices for part in key.split(_CHUNK, dim=2)]
    return torch.cat(found, dim=2) if found else key.new_zeros(key.shape[:3], dtype=torch.int64)


def look_up(codebook: Tensor, codes: Tensor) -> Tensor:
    """Codewords (B, H, N, D) of codes (B, H, N)."""
    heads, count, size = codebook.shape
    rows = codes + count * torch.arange(heads, device=codes.device)[:, None]
    return codebook.reshape(-1, size).index_select(0, rows.flatten()).view(*codes.shape, size)


def straight_through(key: Tensor, codebook: Tensor, codes: Tensor) -> Tensor:
    """Codewords whose gradient goes to the keys; a key that is not finite stays NaN."""
    return look_up(codebook.detach(), codes) + (key - key.detach())


class Quantized(NamedTuple):
    r"""What a [`VectorQuantizer`][danlu.attention.VectorQuantizer] returns.

    Definition:
        $\hat k_j = C_{z_j}$, $z_j = \operatorname{argmin}_s \lVert k_j - C_s \rVert^2$.

    Args:
        key: quantized keys, shape `(B, H, N, D)`, whose gradient goes straight through to the keys; 0 in hidden slots.
        codes: $z$, int64, shape `(B, H, N)`.
        loss: commitment loss times its weight, a scalar to add to the training loss.
        usage: share of the codewords that are nearest to some visible key of this batch, shape `(H,)`, without
            gradient.
        relative_error: $\sum \lVert k - \hat k \rVert^2 / \sum \lVert k \rVert^2$ over visible keys and heads, a scalar
            without gradient.

    Numerics:
        `loss`, `usage` and `relative_error` are at least float32.

    Source:
        As in `VectorQuantizer`.

    Example:
        >>> import torch
        >>> from danlu.attention import VectorQuantizer
        >>> VectorQuantizer(4, 2, 1)(torch.zeros(1, 1, 3, 2)).usage
        tensor([0.2500])
    """

    key: Tensor
    codes: Tensor
    loss: Tensor
    usage: Tensor
    relative_error: Tensor


class VectorQuantizer(nn.Module):
    r"""A codebook per head that replaces keys by their nearest codewords and learns by a moving average.

    Definition:
        $$z_j = \operatorname{argmin}_s \lVert k_j - C_s \rVert^2, \qquad \hat k_j = \operatorname{sg}(C_{z_j}) +
        (k_j - \operatorname{sg}(k_j))$$
        $$n_s \leftarrow \gamma n_s + (1 - \gamma) \sum_j \Delta_{js}, \quad
        m_s \leftarrow \gamma m_s + (1 - \gamma) \sum_j \Delta_{js} k_j, \quad C_s = \frac{m_s}{\max(n_s, 0.01)}$$
        with $\Delta_{js} = 1$ where $z_j = s$, $\gamma$ = `decay`, and sg the stop of the gradient. The loss is
        `commitment` times the mean over visible tokens of $\sum_h \lVert k - \operatorname{sg}(C_z) \rVert^2$.

    Args:
        num_codes: $S$.
        dim: $D$.
        num_heads: $H$.
        decay: $\gamma$ in [0, 1).
        commitment: weight of the loss, 0 or more.
        init_std: standard deviation of the first codewords; None means $D^{-1/4}$, the size of the channels of
            [`VQAttention`][danlu.attention.VQAttention]. See also
            [`init_codebook_from_keys`][danlu.attention.init_codebook_from_keys].
        reseed_below: a codeword whose $n_s$ (keys per update) falls below this is replaced by a key of the last batch
            and gets $n_s = 1$; None never reseeds.
        auto_update: every forward in training first makes the update that is due. With False, call `update()` once per
            optimizer step, which also makes one update out of several micro-batches.

    Returns:
        From `forward(key, key_padding_mask=None)`: [`Quantized`][danlu.attention.Quantized]. In training it also adds
        up what the next update needs, over all processes of the default group if there are several; in evaluation
        nothing changes.

    Raises:
        TypeError: options of a wrong type, keys that are not floating, or a mask that is not bool.
        ValueError: options out of range, or keys that are not `(B, num_heads, N, dim)`.

    Numerics:
        Distances and averages are in float32 for half keys, also under autocast; the averages stay float32 when the
        module is cast to half. The lowest index wins a tie. Padding changes nothing.

        The forward pass never changes the codebook that it uses: the update is made at the start of the next forward in
        training (or by `update()`). Gradient checkpointing therefore recomputes with the codebook of its forward, and
        its recomputation, which runs inside the backward pass, adds nothing to the sums. The sums are buffers like the
        averages, so a checkpoint of the training resumes exactly, and all processes hold the same.

    Cost:
        $2NSD$ flops per head for the nearest codes, $O(S)$ memory per key of a chunk, one all-reduce of $HS(D + 1)$
        numbers per forward with several processes.

    Differences:
        The original updates within the step; here the update of a step is made before the next one uses the codebook,
        which is the same codebook for every forward in training.

    Source:
        Lingle (2023), arXiv 2309.16354, section 3.

    Example:
        >>> import torch
        >>> from danlu.attention import VectorQuantizer
        >>> quantizer = VectorQuantizer(num_codes=16, dim=8, num_heads=2)
        >>> found = quantizer(torch.randn(1, 2, 100, 8))
        >>> found.key.shape, found.codes.shape
        (torch.Size([1, 2, 100, 8]), torch.Size([1, 2, 100]))
    """

    ema_counts: Tensor
    ema_sums: Tensor
    batch_counts: Tensor
    batch_sums: Tensor
    candidates: Tensor
    updates: Tensor

    def __init__(
        self,
        num_codes: int,
        dim: int,
        num_heads: int,
        *,
        decay: float = 0.99,
        commitment: float = 1e-4,
        init_std: float | None = None,
        reseed_below: float | None = None,
        auto_update: bool = True,
    ) -> None:
        super().__init__()
        self.num_codes = check_integer("num_codes", num_codes, low=1)
        self.dim = check_integer("dim", dim, low=1)
        self.num_heads = check_integer("num_heads", num_heads, low=1)
        self.decay = check_real("decay", decay, low=0.0, high=1.0, high_open=True)
        self.commitment = check_real("commitment", commitment, low=0.0)
        self.init_std = dim**-0.25 if init_std is None else check_real("init_std", init_std, low=0.0)
        self.reseed_below = None if reseed_below is None else check_real("reseed_below", reseed_below, low=0.0)
        self.auto_update = auto_update
        words = (num_heads, num_codes, dim)
        for name, shape in (
            ("ema_counts", words[:2]),
            ("ema_sums", words),
            ("batch_counts", words[:2]),
            ("batch_sums", words),
        ):
            self.register_buffer(name, torch.zeros(shape))
        if self.reseed_below is not None:
            self.register_buffer("candidates", torch.zeros(words))
            self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new codewords with $n_s = 1$ and forget what was added up."""
        with torch.no_grad():
            self.ema_counts.fill_(1.0)
            self.ema_sums.normal_(0.0, self.init_std)
            self.batch_counts.zero_()
            self.batch_sums.zero_()

    @property
    def codebook(self) -> Tensor:
        """Codewords $C$, shape `(H, S, D)`."""
        return self.ema_sums / self.ema_counts.clamp_min(_FLOOR)[..., None]

    @torch.no_grad()
    def set_codebook(self, codebook: Tensor, counts: Tensor | None = None) -> None:
        """Make `codebook` `(H, S, D)` the codewords, with $n_s$ = `counts` `(H, S)`, at least 1; None means 1."""
        check_floating("codebook", codebook)
        if codebook.shape != self.ema_sums.shape:
            raise ValueError(f"codebook must have shape {tuple(self.ema_sums.shape)}, got {tuple(codebook.shape)}")
        ones = torch.ones_like(self.ema_counts)
        self.ema_counts.copy_(ones if counts is None else counts.to(ones).clamp_min(1.0))
        self.ema_sums.copy_(codebook.to(self.ema_sums) * self.ema_counts[..., None])
        self.batch_counts.zero_()
        self.batch_sums.zero_()

    def forward(self, key: Tensor, key_padding_mask: Tensor | None = None) -> Quantized:
        """Quantize keys; in training, also add them up for the next update."""
        self.check_keys(key, key_padding_mask)
        # A recomputation of gradient checkpointing runs within the backward pass and must find and leave all as it was.
        learns = self.training and not _in_backward()
        if learns and self.auto_update:
            self.update()
        codebook = self.codebook
        wide = torch.promote_types(key.dtype, torch.float32)
        with torch.autocast(device_type=key.device.type, enabled=False):
            exact = key.to(wide)
            if key_padding_mask is not None:
                exact = exact.masked_fill(~key_padding_mask[:, None, :, None], 0.0)
            codes = nearest_codes(exact, codebook)
            quantized = straight_through(exact, codebook.to(wide), codes)
            counts, sums, picked = self._statistics(exact.detach(), codes, key_padding_mask, learns)
            if learns:
                self._accumulate(counts, sums, picked)
            visible = torch.ones_like(exact[:, 0, :, 0]) if key_padding_mask is None else key_padding_mask.to(wide)
            distances = (exact - quantized.detach()).square().sum((1, 3)) * visible
            loss = self.commitment * distances.sum() / visible.sum().clamp_min(1.0)
            size = exact.detach().square().sum()
            # 0 of 0 is no error: there were no keys.
            error = distances.detach().sum() / torch.where(size > 0, size, 1.0)
            if key_padding_mask is not None:
                quantized = quantized.masked_fill(~key_padding_mask[:, None, :, None], 0.0)
        return Quantized(quantized.to(key.dtype), codes, loss, (counts > 0).to(wide).mean(-1), error)

    def check_keys(self, key: Tensor, key_padding_mask: Tensor | None) -> None:
        """Raise unless `key` and its mask fit this quantizer."""
        check_floating("key", key)
        if key.ndim != 4 or key.shape[1] != self.num_heads or key.shape[3] != self.dim:
            raise ValueError(
                f"key must have shape (B, {self.num_heads}, N, {self.dim}) for this quantizer, got {tuple(key.shape)}"
            )
        check_same_device(key=key, codebook=self.ema_sums)
        check_key_padding_mask(key_padding_mask, key)

    @torch.no_grad()
    def _statistics(
        self, key: Tensor, codes: Tensor, key_padding_mask: Tensor | None, learns: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Visible keys per codeword; in training also their sums, and keys that may replace dead codewords."""
        heads, count = self.num_heads, self.num_codes
        ones = torch.ones_like(key[..., 0]) if key_padding_mask is None else key_padding_mask[:, None].to(key.dtype)
        rows = (codes + count * torch.arange(heads, device=codes.device)[:, None]).flatten()
        counts = key.new_zeros(heads * count).index_add_(0, rows, ones.expand(codes.shape).flatten()).view(heads, count)
        if not learns:
            return counts, None, None
        # Hidden keys are 0 here.
        sums = key.new_zeros(heads * count, self.dim).index_add_(0, rows, key.reshape(-1, self.dim))
        picked = self._candidates(key, ones[:, 0]) if self.reseed_below is not None else None
        return counts, sums.view(heads, count, self.dim), picked

    def _candidates(self, key: Tensor, visible: Tensor) -> Tensor:
        """Keys at `S` places spread evenly over the visible tokens, others at every update.

        Places are from an additive recurrence with the golden ratio and not drawn: a draw that the recomputation of a
        checkpoint leaves out would change what other layers draw.
        """
        order = (visible.flatten() == 0).to(torch.int8).argsort(stable=True)
        golden = (math.sqrt(5.0) - 1.0) / 2.0
        start = self.updates.to(torch.float64) * math.sqrt(2.0)
        step = torch.arange(1, self.num_codes + 1, device=key.device, dtype=torch.float64) * golden
        total = visible.sum().clamp_min(1.0)
        places = order[((start + step).frac() * total).long().clamp_max(len(order) - 1)]
        return key.transpose(0, 1).flatten(1, 2).index_select(1, places)

    @torch.no_grad()
    def _accumulate(self, counts: Tensor, sums: Tensor | None, picked: Tensor | None) -> None:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # Summed at once and not with the update: DistributedDataParallel copies the buffers of the first process.
            together = torch.cat((counts.flatten(), cast("Tensor", sums).flatten()))
            dist.all_reduce(together)
            counts, sums = together[: counts.numel()].view_as(counts), together[counts.numel() :].view_as(self.ema_sums)
            if picked is not None:
                dist.broadcast(picked, src=0)
        self.batch_counts += counts
        self.batch_sums += cast("Tensor", sums)
        if picked is not None:
            self.candidates.copy_(picked)

    @torch.no_grad()
    def update(self) -> None:
        """Make one update from what forwards in training have added up; without any, nothing changes."""
        # As a tensor: to ask for the number would wait for the device.
        due = (self.batch_counts.sum() > 0).to(self.ema_counts.dtype)
        fade = 1.0 - (1.0 - self.decay) * due
        self.ema_counts.mul_(fade).add_(self.batch_counts, alpha=1.0 - self.decay)
        self.ema_sums.mul_(fade).add_(self.batch_sums, alpha=1.0 - self.decay)
        if self.reseed_below is not None:
            dead = (self.ema_counts < self.reseed_below) & (due > 0)
            self.ema_sums.copy_(torch.where(dead[..., None], self.candidates, self.ema_sums))
            self.ema_counts.masked_fill_(dead, 1.0)
            self.updates += due.long()
        self.batch_counts.zero_()
        self.batch_sums.zero_()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "VectorQuantizer":
        """Move or cast; averages with a decay near 1 would stand still in half precision, so they stay float32."""
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            if buffer is not None and is_low_precision(buffer.dtype):
                self._buffers[name] = buffer.float()
        return self

    def extra_repr(self) -> str:
        """Options as they stand in `repr`."""
        return (
            f"{self.num_codes}, {self.dim}, {self.num_heads}, decay={self.decay}, commitment={self.commitment}, "
            f"reseed_below={self.reseed_below}, auto_update={self.auto_update}"
        )


def _in_backward() -> bool:
    # A compiler traces the forward pass alone.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1

"""Models with one known hazard each, and clean ones: what the audit must find, and where it must be silent."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from danlu.positions import RotaryEmbedding
from danlu.precision import mask_value

WIDTH = 8


class Net(nn.Module):
    """Two linear layers with the part under test between them, so that the hazard has a path."""

    def __init__(self, part: nn.Module, first_scale: float = 1.0) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.body = nn.ModuleDict({"part": part})
        self.last = nn.Linear(WIDTH, WIDTH)
        with torch.no_grad():
            self.first.weight.mul_(first_scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body["part"](self.first(x)).flatten(-1))


def part(function):
    """A module that is one function of its input."""

    class Part(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    return Part


HIDDEN = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1], dtype=torch.bool)
ROW = torch.tensor([[True], [False], [False], [False]])


def subtract_mask(x):
    return (x - HIDDEN.to(x.dtype) * 1e12).float().softmax(-1)


def fill_mask(x):
    return x.masked_fill(HIDDEN, -1e9).float().softmax(-1)


def where_mask(x):
    return torch.where(HIDDEN, -1e9, x).float().softmax(-1)


def where_tensor_mask(x):
    return torch.where(HIDDEN, torch.tensor(-1e9), x).float().softmax(-1)


def assigned_mask(x):
    x = x.clone()
    x[:, HIDDEN] = -1e9
    return x.float().softmax(-1)


def cast_mask(x):
    return (x + (HIDDEN.float() * -1e9).to(x.dtype)).float().softmax(-1)


def two_masks(x):
    mask = torch.zeros(WIDTH, dtype=x.dtype).masked_fill(HIDDEN, mask_value(x.dtype))
    return (x + mask + mask).float().softmax(-1)


def norm_with_eps(x):
    wide = x.float()
    return wide / (wide.square().mean(-1, keepdim=True).to(x.dtype) + 1e-12).float().sqrt()


def clamp_with_eps(x):
    return x.float() / x.abs().amax(-1, keepdim=True).clamp(min=1e-12).float()


def ceiling_with_eps(x):
    return x.sigmoid().clamp(1e-7, 1 - 1e-7).float()


def cast_eps(x):
    return x.float() / (x.abs().amax(-1, keepdim=True) + torch.tensor([1e-12]).to(x.dtype)).float()


def tensor_eps(x):
    return x.float() / torch.maximum(x.abs().amax(-1, keepdim=True), torch.tensor(1e-12, dtype=x.dtype)).float()


def full_eps(x):
    return torch.maximum(x, x.new_full((1,), 1e-12)).float()


def half_softmax(x):
    return x.softmax(-1)


def log_of_probability(x):
    return (x.softmax(-1) + 1e-4).log()


def log_of_cast_probability(x):
    return x.softmax(-1).float().clamp(min=1e-6).log()


def log_of_complement(x):
    return torch.log(1 - x.sigmoid() + 1e-4)


def entropy_of_half(x):
    return F.binary_cross_entropy(x.sigmoid(), (x > 0).to(x.dtype), reduction="none")


def half_root(x):
    return x * (x.float().square().mean(-1, keepdim=True).to(x.dtype) + 1e-3) ** -0.5


def large_exponential(x):
    return (x.sign() * 10.8).exp().float().log()


def half_norm(x):
    return x / x.norm(dim=-1, keepdim=True)


def half_variance(x):
    return (x - x.float().mean(-1, keepdim=True)) / x.var(-1, keepdim=True).float().add(1e-5).sqrt()


def half_cumsum(x):
    return x.cumsum(-1)


def exponential_sum(x):
    return x.float() - (x * 30).exp().float().sum(-1, keepdim=True).log()


def empty_row(x):
    return x.float().masked_fill(ROW, float("-inf")).softmax(-1).nan_to_num()


def finite_empty_row(x):
    return x.float().masked_fill(ROW, mask_value(torch.float32)).softmax(-1)


def half_angles(x):
    angles = torch.arange(len(x)).to(x.dtype)[:, None] * 100
    return x * angles.cos()


def half_positions(x):
    return (
        x + torch.arange(3000).to(torch.float16 if x.dtype == torch.float16 else torch.bfloat16)[-len(x) :, None] / 3000
    )


class HalfBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.ones(WIDTH, dtype=torch.float16))

    def forward(self, x: Tensor) -> Tensor:
        return x.float() * self.table.float()


class EpsAttribute(nn.Module):
    """A norm of one's own, right in float32, whose eps would be 0 in half."""

    def __init__(self) -> None:
        super().__init__()
        self.eps = 1e-12

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)


def mse(model, x):
    return (model(x) - x).square().mean()


def half_mse(model, x):
    with torch.autocast("cpu", enabled=False):
        return F.mse_loss(model(x).half(), x.half())


BODY, LOSS = "body.part", "(loss)"
# name: (part, loss function or None, first layer's scale, {(module, kind): severity} that must be found)
PLANTED = {
    "subtract_mask": (part(subtract_mask), None, 1.0, {(BODY, "constant"): "error"}),
    "fill_mask": (part(fill_mask), None, 1.0, {(BODY, "constant"): "error"}),
    "where_mask": (part(where_mask), None, 1.0, {(BODY, "constant"): "error"}),
    "where_tensor_mask": (part(where_tensor_mask), None, 1.0, {(BODY, "constant"): "error"}),
    "assigned_mask": (part(assigned_mask), None, 1.0, {(BODY, "constant"): "error"}),
    "cast_mask": (part(cast_mask), None, 1.0, {(BODY, "nonfinite"): "error"}),
    "two_masks": (part(two_masks), None, 1.0, {(BODY, "constant"): "warning"}),
    "norm_with_eps": (part(norm_with_eps), None, 1.0, {(BODY, "eps"): "error"}),
    "clamp_with_eps": (part(clamp_with_eps), None, 1.0, {(BODY, "eps"): "error"}),
    "ceiling_with_eps": (part(ceiling_with_eps), None, 1.0, {(BODY, "eps"): "error"}),
    "cast_eps": (part(cast_eps), None, 1.0, {(BODY, "eps"): "error"}),
    "tensor_eps": (part(tensor_eps), None, 1.0, {(BODY, "eps"): "error"}),
    "full_eps": (part(full_eps), None, 1.0, {(BODY, "eps"): "error"}),
    "eps_attribute": (EpsAttribute, None, 1.0, {(BODY, "eps"): "info"}),
    "half_softmax": (part(half_softmax), None, 1.0, {(BODY, "softmax"): "warning"}),
    "log_of_probability": (
        part(log_of_probability),
        None,
        1.0,
        {(BODY, "softmax"): "warning", (BODY, "log"): "error"},
    ),
    "log_of_cast_probability": (
        part(log_of_cast_probability),
        None,
        1.0,
        {(BODY, "softmax"): "warning", (BODY, "log"): "error"},
    ),
    "log_of_complement": (part(log_of_complement), None, 1.0, {(BODY, "log"): "error"}),
    "entropy_of_half": (part(entropy_of_half), None, 1.0, {(BODY, "log"): "error"}),
    "half_root": (part(half_root), None, 1.0, {(BODY, "norm"): "warning"}),
    "large_exponential": (part(large_exponential), None, 1.0, {(BODY, "activation"): "warning"}),
    "half_norm": (part(half_norm), None, 1.0, {(BODY, "norm"): "warning"}),
    "half_variance": (part(half_variance), None, 1.0, {(BODY, "norm"): "warning"}),
    "half_cumsum": (part(half_cumsum), None, 1.0, {(BODY, "reduction"): "warning"}),
    "exponential_sum": (part(exponential_sum), None, 3.0, {(BODY, "nonfinite"): "error"}),
    "empty_row": (part(empty_row), None, 1.0, {(BODY, "masked_row"): "error"}),
    "finite_empty_row": (part(finite_empty_row), None, 1.0, {(BODY, "masked_row"): "warning"}),
    "half_angles": (part(half_angles), None, 1.0, {(BODY, "angle"): "error"}),
    "half_positions": (part(half_positions), None, 1.0, {(BODY, "positions"): "error"}),
    "half_buffer": (HalfBuffer, None, 1.0, {(BODY, "buffer"): "warning"}),
    "large_activations": (part(torch.Tensor.float), None, 3e4, {("first", "activation"): "warning"}),
    "overflow": (part(torch.Tensor.float), None, 1e6, {("first", "nonfinite"): "error"}),
    "mean_square_in_half": (part(torch.Tensor.float), half_mse, 1.0, {(LOSS, "loss"): "error"}),
}


class Attention(nn.Module):
    """A block with torch's fused attention, padding and a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.rotary = RotaryEmbedding(WIDTH // 2)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm(x)).view(1, -1, 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(self.rotary(query), self.rotary(key), value, is_causal=True)
        return x + self.out(attended.transpose(1, 2).reshape(x.shape))


class Mixture(nn.Module):
    """Two of three experts for each row, with the weights of a softmax in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 16), nn.SiLU(), nn.Linear(16, WIDTH)) for _ in "abc"
        )

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.router(x).float().softmax(-1).topk(2, -1)
        weight = weight / weight.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            taken = chosen == index
            rows = taken.any(-1)
            out[rows] += (weight * taken).sum(-1)[rows].unsqueeze(-1) * expert(x[rows]).float()
        return x + out


class SafeSoftmax(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        scores = x.float().masked_fill(HIDDEN, mask_value(torch.float32))
        return scores.log_softmax(-1)


def cross_entropy(model, x):
    return F.cross_entropy(model(x).float(), torch.arange(len(x)))


CLEAN = {
    "mlp": (lambda: nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4)), cross_entropy),
    "attention": (lambda: nn.Sequential(Attention(), Attention(), nn.Linear(WIDTH, 4)), cross_entropy),
    "convolution": (
        lambda: nn.Sequential(
            nn.Unflatten(-1, (1, WIDTH)),
            nn.Conv1d(1, 4, 3, padding=1),
            nn.BatchNorm1d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(4 * WIDTH, 4),
        ),
        cross_entropy,
    ),
    "masked_log_softmax": (lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), SafeSoftmax()), cross_entropy),
    "encoder": (
        lambda: nn.Sequential(
            nn.Unflatten(-1, (2, WIDTH // 2)),
            nn.TransformerEncoderLayer(WIDTH // 2, 2, 16, dropout=0.1, batch_first=True),
            nn.Flatten(),
            nn.Linear(WIDTH, 4),
        ),
        cross_entropy,
    ),
    "mixture": (lambda: nn.Sequential(nn.LayerNorm(WIDTH), Mixture(), nn.Linear(WIDTH, 4)), cross_entropy),
    "residual_dropout": (lambda: nn.Sequential(Net(part(F.silu)()), nn.Dropout(0.1), nn.RMSNorm(WIDTH)), cross_entropy),
}

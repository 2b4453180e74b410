"""What random position ids cost beside the training step that they are for: 64 samples of 2048 tokens.

One thread, interleaved in one process. The usual way, a permutation of all positions per sample, is the peer. The step
is forward, backward and AdamW of a decoder of 4 layers of width 256, which is small for texts of this length, on *one*
sample; a step of 64 takes 64 times as long. The floor is one draw, one comparison and one write per id. The target is
1 % of a step.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from _measure import interleave, run_tests, save, show, summary
from danlu.positions import apply_rope, even_positions, random_positions, rope_frequencies

BATCH, LENGTH, ROUNDS = 64, 2048, 7
WIDTH, LAYERS, HEADS, VOCABULARY = 256, 4, 4, 1000
LIMITS = {"a key per position (L_max 8192)": 8192, "mended repetitions (L_max 65536)": 65536}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
        q, k = (apply_rope(part, positions, rope_frequencies(WIDTH // HEADS)) for part in (q, k))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, positions)
        return x @ self.embedding.weight.T


def training_step() -> Callable[[], object]:
    torch.manual_seed(0)
    model = Decoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens, positions = torch.randint(VOCABULARY, (1, LENGTH)), torch.arange(LENGTH)

    def run() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(tokens, positions).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()

    return run


def permutations(limit: int) -> Tensor:
    return torch.stack([torch.randperm(limit)[:LENGTH].sort().values for _ in range(BATCH)])


def main() -> None:
    run_tests("tests/positions")
    torch.set_num_threads(1)
    mask = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    runs: dict[str, Callable[[], object]] = {"step of one sample": training_step()}
    for title, limit in LIMITS.items():
        runs[f"danlu, {title}"] = lambda limit=limit: random_positions(mask, max_position=limit)
        runs[f"randperm per sample, L_max {limit}"] = lambda limit=limit: permutations(limit)
    runs["danlu, equal mean"] = lambda: random_positions(mask, mode="equal_mean")
    runs["danlu, even"] = lambda: even_positions(mask, 8192)
    rows = summary(interleave(runs, rounds=ROUNDS, warmup=1), "step of one sample")
    step = BATCH * rows["step of one sample"]["median_ms"]
    for row in rows.values():
        row["percent_of_step"] = 100.0 * row["median_ms"] / step
    show(f"{BATCH} samples of {LENGTH} tokens (a step of them takes {step / 1e3:.0f} s)", rows)
    for name, row in rows.items():
        if name.startswith("danlu"):
            assert row["percent_of_step"] < 1.0, name
    print(f"written to {save('random_positions', {'times': rows})}".replace(f"{Path.cwd()}/", ""))


if __name__ == "__main__":
    main()

"""What it costs to look at the attention of a model while it runs, beside one more product of its queries and keys.

A Llama of SmolLM2-135M's shape (9 heads of 64 channels on 3 key heads, width 576) with random weights and 6 of its 30
layers, no cache, one thread, interleaved in one process. Memory is the peak above that of the model alone, in fresh
processes.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from _measure import PeakMemory, in_fresh_process, interleave, run_tests, save, show, summary
from danlu.integrations.transformers import AttentionProbe

LAYERS, ROUNDS = 6, 7
LENGTHS = [512, 2048]
LONGEST = 8192
PLAIN = "no probe"


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=LAYERS,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=LONGEST,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval()


@contextmanager
def one_product() -> Iterator[None]:
    """The floor: the scores below the diagonal once more, in tiles of 64 rows, and nothing made of them."""
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(module: torch.nn.Module, query: Tensor, key: Tensor, *args: object, **kwargs: object) -> object:
        grown = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        for low in range(0, query.shape[2], 64):
            high = low + 64
            query[:, :, low:high] @ grown[:, :, :high].transpose(-2, -1)
        return plain(module, query, key, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def forward(subject: LlamaForCausalLM, length: int, context: Callable[[], object]) -> Callable[[], object]:
    tokens = torch.randint(1000, (1, length), generator=torch.Generator().manual_seed(0))

    def run() -> object:
        with torch.no_grad(), context():
            # Logits of all positions would hide what attention costs.
            return subject(tokens, logits_to_keep=1)

    return run


def candidates(subject: LlamaForCausalLM) -> dict[str, Callable[[], object]]:
    return {
        PLAIN: nullcontext,
        "one more product": one_product,
        "danlu AttentionProbe": lambda: AttentionProbe(subject),
        "danlu AttentionProbe, share 1/4": lambda: AttentionProbe(subject, share=0.25),
    }


def measure_memory(name: str) -> None:
    torch.set_num_threads(1)
    subject = model()
    context = candidates(subject)[name]
    forward(subject, 64, context)()
    with PeakMemory() as memory:
        forward(subject, LONGEST, context)()
    print(json.dumps({"MiB": memory.extra / 2**20}))


def main() -> None:
    run_tests("tests/integrations/test_transformers_probe.py")
    torch.set_num_threads(1)
    subject, content = model(), {}
    for length in LENGTHS:
        runs = {name: forward(subject, length, context) for name, context in candidates(subject).items()}
        rows = summary(interleave(runs, rounds=ROUNDS, warmup=1), PLAIN)
        show(f"forward, {length} tokens, ratio to {PLAIN}", rows)
        content[f"forward, {length} tokens"] = rows
    peaks = {name: in_fresh_process(__file__, name) for name in candidates(subject)}
    for row in peaks.values():
        row["MiB above no probe"] = row["MiB"] - peaks[PLAIN]["MiB"]
    show(f"peak memory of a forward, {LONGEST} tokens", peaks)
    content[f"peak memory, {LONGEST} tokens"] = peaks
    print(f"written to {save('attention_probe', content)}".replace(f"{Path.cwd()}/", ""))


if __name__ == "__main__":
    measure_memory(sys.argv[1]) if len(sys.argv) > 1 else main()

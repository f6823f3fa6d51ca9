"""Trainers and loops of other libraries on two processes, one after the other: clients.py OUT.

Each trains, saves halfway, and a second one goes on from there. Rank 0 writes for each what was
measured before and after, how many tensors Muon trained, and how far apart are the weights of the
ranks, those of the two runs, and what the saved model computes and what it computed.
"""

import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from peft import PeftModel

from hf_muon.integrations.report import find_muon
from tests.distributed.layouts import leave_together
from tests.integration import recipes
from tests.integration import test_sentence_transformers as sentence_transformers
from tests.integration.tiny import largest_difference, tiny_data, trainer_of

sys.path += [str(recipes.RECIPES), str(recipes.RECIPES / "ecosystem")]
import accelerate_loop
import bytes_llama
import layerwise
import lightning_module
from shared import compared
from shared.processes import forget_evaluation

STEPS = 6
SMALL = {
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": STEPS // 2,
    "train_rows": 48,
    "validation_rows": 16,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 16,
    "disable_tqdm": True,
}
METHODS = ("sft", "dpo", "reward", "grpo")
# CrossEncoder's trainer fails under DDP, with AdamW as well (sentence-transformers 6.2).
ENCODERS = ("SentenceTransformer", "SparseEncoder")


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


class Ran(NamedTuple):
    """What a run measured, the weights, how many tensors Muon trained, and what reading changed."""

    before: dict
    after: dict
    weights: dict
    tensors: int
    reread: float | None = None


def by_muon(optimizer):
    groups = find_muon(optimizer).param_groups
    return sum(len(group["params"]) for group in groups if group["algorithm"] == "muon")


@torch.no_grad()
def differs(model, folder):
    """How far the numbers are apart that a model computes and that what is in a folder does."""
    ids = torch.arange(12).view(2, 6)
    given = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids
    own = model(**given).logits.clone()
    if hasattr(model, "peft_config"):
        again = PeftModel.from_pretrained(model.unload(), folder)
    else:
        again = type(model).from_pretrained(folder)
    return float((again.eval()(**given).logits - own).abs().max())


def words(**options):
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


class Recipes:
    """Recipes that compare a model with itself, in this process; they leave the group as it is."""

    def __init__(self):
        self.found = {name: recipes.import_recipe(name) for name in ("post_training", "seq2seq")}
        train = compared.train

        def seen(trainer, measured, samples, **facts):
            self.trainer = trainer
            if trainer.args.resume_from_checkpoint:  # measured once is enough
                measured = dict
            return train(trainer, measured, list, **facts)

        compared.train, compared.leave_together = seen, lambda trainer: None

    def __call__(self, main, config, folder, **options):
        told = {"output_dir": folder, **SMALL, **options}
        results = main([str(recipes.RECIPES / config), *words(**told)])
        dist.barrier()  # the first rank has saved
        model = self.trainer.accelerator.unwrap_model(self.trainer.model).eval()
        return Ran(
            results["before"],
            results["after"],
            values(model),
            by_muon(self.trainer.optimizer),
            differs(model, folder),
        )


def twice(run, folder):
    """A run, and one that goes on in its middle."""
    whole = run(folder / "whole")
    resumed = run(folder / "resumed", halfway=str(folder / "whole" / f"checkpoint-{STEPS // 2}"))
    found = whole._asdict()
    # A run that began anew would be the same as well; it would have saved halfway.
    found["began_anew"] = bool(list((folder / "resumed").rglob(f"checkpoint-{STEPS // 2}")))
    found |= {"apart": apart(whole.weights), "resumed": apart_from(resumed.weights, whole.weights)}
    return found


def apart_from(weights, others):
    """How far weights are apart on the rank where they are most."""
    worst = torch.tensor(largest_difference(weights, others))
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return float(worst)


def apart(weights):
    """How far the weights of the ranks are apart."""
    first = {name: value.clone() for name, value in weights.items()}
    for value in first.values():
        dist.broadcast(value, 0)
    return apart_from(first, weights)


def post_training(by_recipe, method, r):
    main = by_recipe.found["post_training"][method].METHOD.main
    more = {"max_length": 64} if method != "grpo" else {"max_completion_length": 4}
    more |= {} if r is None else {"r": r, "learning_rate": 1e-2}

    def run(folder, halfway=None):
        went_on = {"resume_from_checkpoint": halfway} if halfway else {}
        config = f"post_training/configs/{method}.yaml"
        return by_recipe(main, config, folder, **more, **went_on)

    return run


def seq2seq(by_recipe):
    main = by_recipe.found["seq2seq"]["run"].main

    def run(folder, halfway=None):
        went_on = {"resume_from_checkpoint": halfway} if halfway else {}
        return by_recipe(main, "seq2seq/configs/t5.yaml", folder, **went_on)

    return run


def of_sentences(client):
    def run(folder, halfway=None):
        saving = {name: SMALL[name] for name in ("max_steps", "save_strategy", "save_steps")}
        with PartialState().main_process_first():  # who saves the model that both read
            trainer = sentence_transformers.built(client, folder, **saving)
        before = {"loss": trainer.evaluate()["eval_loss"]}
        forget_evaluation(trainer)
        saved = halfway and Path(halfway).parent / "out" / Path(halfway).name
        trainer.train(resume_from_checkpoint=saved and str(saved))
        after = {"loss": trainer.evaluate()["eval_loss"]}
        return Ran(before, after, values(trainer.model), by_muon(trainer.optimizer))

    return run


def few_shot(folder):
    """SetFit, which cannot resume."""
    with PartialState().main_process_first():
        trainer = sentence_transformers.few_shot(folder)
    trainer.train()
    body = trainer.model.model_body
    return {"tensors": by_muon(trainer.st_trainer.optimizer), "apart": apart(values(body))}


def loop(module, **options):
    """A script of recipes/ecosystem that returns the held-out loss before and after."""
    built, made, goes_on = [], [], []
    of_bytes, of_muon = module.build_model, module.create_muon_optimizer

    def build_model():
        built.append(of_bytes())
        if goes_on:  # from other weights, so that one that began anew would end elsewhere
            built[-1].lm_head.weight.data *= 0.5
        return built[-1]

    def create_muon_optimizer(*args, **settings):
        made.append(of_muon(*args, **settings))
        return made[-1]

    module.build_model, module.create_muon_optimizer = build_model, create_muon_optimizer

    def run(folder, halfway=None):
        if halfway is None:
            told = words(steps=STEPS, folder=folder, **options)
            before, after = module.main(told)
        else:
            module.main(words(steps=STEPS, stop_at=STEPS // 2, folder=folder, **options))
            goes_on.append(True)
            before, after = module.main([*words(steps=STEPS, folder=folder, **options), "--resume"])
        return Ran({"loss": before}, {"loss": after}, values(built[-1]), by_muon(made[-1]))

    return run


def by_layer():
    made = []

    class Seen(layerwise.LayerwiseTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    layerwise.LayerwiseTrainer = Seen
    saving = {name: SMALL[name] for name in ("max_steps", "save_strategy", "save_steps")}

    def run(folder, halfway=None):
        went_on = {"resume_from_checkpoint": halfway} if halfway else {}
        told = {"output_dir": folder, "use_cpu": True, "disable_tqdm": True, **saving, **went_on}
        before, after = layerwise.main(words(**told))
        trainer = made[-1]
        weights = values(trainer.model)
        return Ran({"loss": before}, {"loss": after}, weights, by_muon(trainer.optimizer))

    return run


def evaluated_first(folder):
    """What a stock Trainer ends with that evaluates before it trains, on each rank."""
    data = {"eval_dataset": tiny_data(4)}
    trainer = trainer_of(folder, trainer_settings=data, ddp_backend="gloo")
    trainer.evaluate()
    messages = [None] * dist.get_world_size()
    try:
        trainer.train()
        said = "nothing"
    except ValueError as error:
        said = str(error)
    dist.all_gather_object(messages, said)
    return messages


def main(out):
    results, folder = {}, Path(out).parent
    results["evaluated first"] = evaluated_first(folder / "evaluated first")
    by_recipe = Recipes()
    bytes_llama.LENGTH, bytes_llama.BATCH = 32, 8
    runs = {
        **{
            (method, kind): post_training(by_recipe, method, r)
            for method in METHODS
            for kind, r in (("full", None), ("LoRA", 4))
        },
        "seq2seq": seq2seq(by_recipe),
        "layerwise": by_layer(),
        "accelerate": loop(accelerate_loop),
        "Lightning": loop(lightning_module, devices=dist.get_world_size()),
        **{client: of_sentences(client) for client in ENCODERS},
    }
    for name, run in runs.items():
        results[name] = twice(run, folder / str(name))
    results["SetFit"] = few_shot(folder / "SetFit")
    if dist.get_rank() == 0:
        torch.save(results, out)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    PartialState(cpu=True)
    Accelerator.end_training = lambda accelerator: None  # which closes the group
    main(sys.argv[1])
    leave_together()

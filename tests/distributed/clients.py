"""Trainers and loops of other libraries on two processes, one after the other: clients.py OUT.

Each trains, saves halfway, and a second one goes on from there. Rank 0 writes for each what was
measured before and after, and how far apart the weights are of the ranks, and of the two runs.
"""

import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState

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

STEPS = 8
SMALL = {
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": STEPS // 2,
    "train_rows": 64,
    "validation_rows": 24,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 24,
    "disable_tqdm": True,
}
METHODS = ("sft", "dpo", "reward", "grpo")
ENCODERS = ("SentenceTransformer", "SparseEncoder", "CrossEncoder")


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def words(**options):
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


class Recipes:
    """Recipes that compare a model with itself, in this process; they leave the group as it is."""

    def __init__(self):
        self.found = {name: recipes.import_recipe(name) for name in ("post_training", "seq2seq")}
        train = compared.train

        def seen(trainer, *args, **kwargs):
            self.trainer = trainer
            return train(trainer, *args, **kwargs)

        compared.train, compared.leave_together = seen, lambda trainer: None

    def __call__(self, main, config, folder, **options):
        told = {"output_dir": folder, **SMALL, **options}
        results = main([str(recipes.RECIPES / config), *words(**told)])
        return results["before"], results["after"], values(self.unwrapped())

    def unwrapped(self):
        return self.trainer.accelerator.unwrap_model(self.trainer.model)


def twice(run, folder):
    """What a run measured, and the weights of it and of one that goes on in its middle."""
    before, after, weights = run(folder / "whole")
    *_, resumed = run(folder / "resumed", halfway=str(folder / "whole" / f"checkpoint-{STEPS // 2}"))
    return {
        "before": before,
        "after": after,
        "apart": apart(weights),
        "resumed": largest_difference(weights, resumed),
    }


def apart(weights):
    """How far the weights of the ranks are apart."""
    first = {name: value.clone() for name, value in weights.items()}
    for value in first.values():
        dist.broadcast(value, 0)
    worst = torch.tensor(largest_difference(first, weights))
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return float(worst)


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
        trainer = sentence_transformers.built(client, folder, ddp_backend="gloo", **saving)
        before = {"loss": trainer.evaluate()["eval_loss"]}
        forget_evaluation(trainer)
        trainer.train(resume_from_checkpoint=halfway)
        after = {"loss": trainer.evaluate()["eval_loss"]}
        return before, after, values(trainer.model)

    return run


def loop(module, **options):
    """A script of recipes/ecosystem that returns the held-out loss before and after."""
    built = []
    of_bytes = module.build_model

    def build_model():
        built.append(of_bytes())
        return built[-1]

    module.build_model = build_model

    def run(folder, halfway=None):
        if halfway is None:
            told = words(steps=STEPS, folder=folder, **options)
            before, after = module.main(told)
        else:
            module.main(words(steps=STEPS, stop_at=STEPS // 2, folder=folder, **options))
            before, after = module.main([*words(steps=STEPS, folder=folder, **options), "--resume"])
        return {"loss": before}, {"loss": after}, values(built[-1])

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
        return {"loss": before}, {"loss": after}, values(made[-1].model)

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
        begun = time.time()
        results[name] = twice(run, folder / str(name))
        if dist.get_rank() == 0:
            print(name, results[name], round(time.time() - begun, 1), flush=True)
    if dist.get_rank() == 0:
        torch.save(results, out)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    PartialState(cpu=True)
    Accelerator.end_training = lambda accelerator: None  # which closes the group
    main(sys.argv[1])
    leave_together()

"""Load adapters as a user without this package would, and write down what the models compute.

``python stock_peft.py IN OUT``. IN holds ``inputs`` and ``adapters``: name -> folder of the base
model and of the adapter. OUT holds, for each adapter, its logits as loaded, merged, unmerged again,
merged for good, and without the adapter.
"""

import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def main(source, target):
    request = torch.load(source, weights_only=True)

    def logits(model):
        with torch.no_grad():
            return model.eval()(request["inputs"]).logits

    found = {}
    for name, (base, adapter) in request["adapters"].items():
        plain = AutoModelForCausalLM.from_pretrained(base)
        without = logits(plain)
        model = PeftModel.from_pretrained(plain, adapter)
        loaded = logits(model)
        model.merge_adapter()
        merged = logits(model)
        model.unmerge_adapter()
        unmerged = logits(model)
        found[name] = {
            "without": without,
            "loaded": loaded,
            "merged": merged,
            "unmerged": unmerged,
            "unloaded": logits(model.merge_and_unload()),
        }
    torch.save({"logits": found, "modules": sorted(sys.modules)}, target)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Run the LLaMA recipe and get a signal in the middle of a step.

In: ``PREEMPT=rank:step:signal:whom`` in the environment (whom: ``self``, ``launcher``, or
``batch``, the shell of a job), and the arguments of run.py, after ``fsdp2`` where accelerate has to
shard on CPUs.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

import transformers.trainer

from tests.integration.preempted import Preempt

RECIPE = Path(__file__).parents[2] / "recipes" / "llama_pretrain"
WHOM = {
    "self": os.getpid,
    "launcher": os.getppid,
    "batch": lambda: int(os.environ["BATCH_SHELL"]),
}


def main():
    if sys.argv[1] == "fsdp2":
        import tests.distributed.fsdp_on_cpu  # noqa: F401

        del sys.argv[1]
    if "PREEMPT" in os.environ:
        rank, step, number, whom = os.environ["PREEMPT"].split(":")
        if os.environ["RANK"] == rank:
            preempt = Preempt(int(step), signal.Signals[number], WHOM[whom])
            transformers.trainer.DEFAULT_CALLBACKS.append(preempt)
    sys.path.insert(0, str(RECIPE))
    import stream

    stream.AT_ONCE = 4  # documents: several places in a short run
    runpy.run_path(str(RECIPE / "run.py"), run_name="__main__")


if __name__ == "__main__":
    main()

"""Stand-ins for SLURM's commands: jobs run here, each node a session of processes.

In: an empty folder. Out: executables in it, to be put first on PATH, and a file ``requeued`` once a
job has gone back into the queue. They are those of recipes/slurm/dry_run.py.
"""

from tests.distributed.launch import ROOT
from tests.integration.recipes import import_recipe

JOBS = ROOT / "recipes" / "slurm"
dry_run = import_recipe("slurm")["dry_run"]
install, variables, directives = dry_run.install, dry_run.variables, dry_run.directives

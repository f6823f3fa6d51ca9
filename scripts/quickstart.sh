#!/usr/bin/env bash
# Train a small LLaMA on Shakespeare with Muon and with AdamW, on the same tokens, and compare them.
#
# In: nothing but python3 (>= 3.11); arguments go to every training, e.g. --max_steps 20.
# Out: .venv with the package, a table, and runs/llama_pretrain/tiny_compare/comparison.png.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh recipes
.venv/bin/python scripts/prepare_assets.py --only shakespeare
exec .venv/bin/python recipes/llama_pretrain/compare.py configs/tiny.yaml -- "$@"

#!/usr/bin/env bash
# Open the notebook "Momentum as a spectral filter" in a browser.
#
# In: nothing but python3 (>= 3.11); arguments go to `jupyter notebook`, e.g. --no-browser. Out:
# a server that runs until Ctrl-C.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh notebook recipes
exec .venv/bin/jupyter notebook recipes/ordering/momentum_as_a_spectral_filter.ipynb "$@"

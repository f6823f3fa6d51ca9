#!/usr/bin/env bash
# Make .venv-peers: the packages of the main environment, and the contenders of peers.py beside
# them. None may bring dependencies: another torch would be another comparison.
#
#   scripts/bench/peers.sh && .venv-peers/bin/python scripts/bench/peers.py --model 130m --layers 2
set -euo pipefail
cd "$(dirname "$0")/../.."
site() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
main=${PYTHON:-.venv/bin/python}
"$main" -m venv .venv-peers
peers=.venv-peers/bin/python
# As a site directory, so that what is installed in place (this package) is found too.
echo "import site; site.addsitedir('$(site "$main")')" > "$(site "$peers")/main.pth"
"$peers" -m pip install --quiet --no-deps -r scripts/bench/peers.txt
"$peers" -c 'import torch; print("torch", torch.__version__, "from", torch.__file__)'

#!/usr/bin/env bash
# Build the documentation site; a warning is an error.
#
# In: nothing but python3 (>= 3.11); arguments go to `mkdocs build`. Out: site/, and where to look.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh docs
.venv/bin/mkdocs build --quiet --strict "$@"
echo "Built. To read it with working links: .venv/bin/mkdocs serve, then http://127.0.0.1:8000 in a browser."

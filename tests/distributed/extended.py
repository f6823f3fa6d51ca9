"""Train with the rules of docs/extending.md under one sharding: extended.py KIND OUT."""

import sys

from tests.distributed import layouts
from tests.integration.markdown import ROOT, blocks

ELEMENTWISE = {
    "two terms": {"filter": "two_terms"},
    "two terms behind": {"filter": "two_terms", "order": "post_polar"},
    "clipped": {"filter": "clipped"},
    "nuclear": {"matrix_map": "nuclear"},
    "norms": {"rescale": "frobenius"},
    "skipped": {"skip_zero_gradients": True},
}
WHOLE = {"rows": {"rescale": "even_rows"}}


def register():
    """Run the blocks of the page that register something."""
    for block in blocks(ROOT / "docs" / "extending.md"):
        if "register_" in block.code:
            exec(block.code, {})


def without_interleaved():
    """Matrices of which a rank holds one piece each, as a stage for whole ones needs them."""
    return {name: of for name, of in layouts.MATRICES.items() if name != "interleaved"}


def main(kind, out):
    register()
    layouts.MATRICES = without_interleaved()
    layouts.CASES = ELEMENTWISE | (WHOLE if kind == "ddp" else {})
    layouts.IN_FLOAT16 = {}
    if kind == "fsdp":
        refused = None
        try:
            layouts.train(kind, **WHOLE["rows"])
        except ValueError as error:
            refused = str(error)
        assert "a stage of the update rule needs whole matrices" in refused
    sys.argv = ["", kind, out]
    layouts.main()


if __name__ == "__main__":
    with layouts.process_group():
        main(*sys.argv[1:])

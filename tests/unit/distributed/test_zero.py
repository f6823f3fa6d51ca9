"""DeepSpeed's map is trusted only where its parts make up every parameter."""

import pytest
import torch

from hf_muon.distributed.layout import Ranks
from hf_muon.distributed.zero import FlatTensor, Span, _check_complete

PARAMETERS = [torch.zeros(4, 6), torch.zeros(5)]
WHOLE = ((Span(0, 0, 20, 0),), (Span(0, 20, 24, 0), Span(1, 0, 5, 4)))


def check(spans):
    _check_complete(FlatTensor((0, 1), spans, Ranks((0, 1))), PARAMETERS)


def test_parts_that_make_up_the_parameters_pass():
    check(WHOLE)


@pytest.mark.parametrize(
    "spans",
    [
        ((Span(0, 0, 20, 0),), (Span(0, 21, 24, 0), Span(1, 0, 5, 4))),  # a gap
        ((Span(0, 0, 20, 0),), (Span(0, 19, 24, 0), Span(1, 0, 5, 4))),  # twice
        ((Span(0, 0, 20, 0),), (Span(0, 20, 24, 0), Span(1, 0, 4, 4))),  # an end is missing
        ((Span(0, 0, 20, 0),), (Span(0, 20, 24, 0),)),  # a parameter is missing
    ],
)
def test_other_parts_are_refused(spans):
    with pytest.raises(ValueError, match="do not make it up"):
        check(spans)

"""Pieces name exactly the elements that a rank holds."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_muon.distributed.layout import Matrix, pieces_in_range

# name -> (shape of the parameter, its matrices)
PARAMETERS = {
    "whole": ((7, 5), [Matrix.whole((7, 5))]),
    "experts": ((3, 4, 5), [Matrix(20 * e, (4, 5), (5, 1), 0) for e in range(3)]),
    "rows": ((9, 4), [Matrix(0, (5, 4), (4, 1), 0), Matrix(20, (4, 4), (4, 1), 0)]),
    "columns": ((6, 9), [Matrix(3 * i, (6, 3), (9, 1), 1) for i in range(3)]),
    "strided columns": ((5, 6), [Matrix(e, (5, 3), (6, 2), 0) for e in range(2)]),
    "heads": ((12, 5), [Matrix(10 * i, (2, 2, 5), (30, 5, 1), 0) for i in range(3)]),
    "one column": ((6, 1), [Matrix.whole((6, 1))]),
}


def whole_matrix(parameter, matrix):
    view = parameter.flatten().as_strided(matrix.shape, matrix.strides, matrix.offset)
    return view.reshape(matrix.rows, matrix.cols)


@given(st.sampled_from(sorted(PARAMETERS)), st.data())
def test_pieces_of_flat_ranges_cover_each_matrix_once(name, data):
    shape, matrices = PARAMETERS[name]
    parameter = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    size = parameter.numel()
    cuts = sorted(data.draw(st.lists(st.integers(0, size), max_size=3)))
    offset = data.draw(st.integers(0, 4))
    assembled = [torch.full((m.rows, m.cols), -1.0) for m in matrices]
    held = 0
    for start, stop in zip([0, *cuts], [*cuts, size], strict=True):
        local = torch.full((offset + stop - start + 2,), -2.0)
        local[offset : offset + stop - start] = parameter.flatten()[start:stop]
        for matrix, whole in zip(matrices, assembled, strict=True):
            for piece in pieces_in_range(matrix, start, stop, offset):
                held += piece.numel
                piece.of_matrix(whole).copy_(piece.of_local(local))
    assert held == size
    for matrix, whole in zip(matrices, assembled, strict=True):
        assert torch.equal(whole, whole_matrix(parameter, matrix))


def test_a_range_of_whole_rows_is_one_piece_and_a_ragged_one_at_most_three():
    matrix = Matrix.whole((100, 10))
    assert len(pieces_in_range(matrix, 20, 500, 0)) == 1
    assert len(pieces_in_range(matrix, 25, 513, 0)) == 3
    assert pieces_in_range(matrix, 20, 20, 0) == ()

"""Which documents a row is made of: the pieces of a row are its tokens, in every order."""

import numpy as np
import pytest

import tiny
from regpt.data.documents import row_pieces
from regpt.runs.build import build_loader, open_corpus


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"shuffle_rows": "none"},
        {"shuffle_rows": 8},
        {"order": "sequential"},
        {"order": "bos"},
    ],
    ids=str,
)
def test_the_pieces_of_a_row_are_its_tokens(shards, data):
    config = tiny.change(tiny.run_config(shards), "data", **data)
    rows = build_loader(config, open_corpus(config), tiny.ALONE).rows
    for row in (0, 1, 7, 200, 500):  # of several epochs
        pieces = row_pieces(rows, row)
        assert np.concatenate([piece.tokens for piece in pieces]).tolist() == rows.read(row, 1)[0].tolist()

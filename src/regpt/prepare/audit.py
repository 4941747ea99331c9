"""Is what a fast encoder made what the tokenizer makes? One document in a thousand is compared, whoever encoded it."""

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

import numpy as np

from regpt.prepare.corpus import Unusable
from regpt.text.fast import PACKAGE
from regpt.text.tokenizer import Tokenizer

EVERY = 1024  # documents: a hundredth of one core's time at the speed of sixteen
MOST_TOKENS = 1 << 16  # of a document: a book would take seconds


class Audit:
    """Takes the documents of the partitions in `work` in their order, the first one first."""

    def __init__(self, work: Path, tokenizer: Tokenizer, dtype: np.dtype) -> None:
        self._work, self._tokenizer, self._dtype = work, tokenizer, dtype
        self._seen = 0

    def check(self, name: str, tables: Mapping[str, np.ndarray]) -> None:
        """Compare some documents of the partition `name`, of which `tables` are those of the splits.

        Raises:
            Unusable: other tokens, or not those of the text that was read.
        """
        for split, table in tables.items():
            first = -self._seen % EVERY
            self._seen += len(table)
            path = self._work / f"{name}.{split}.bin"
            if first < len(table) and path.exists():  # finished shards took the others
                starts = np.cumsum(table["tokens"]) - table["tokens"]
                for i in range(first, len(table), EVERY):
                    if table["tokens"][i] <= MOST_TOKENS:
                        self._compare(path, int(starts[i]), table[i])

    def _compare(self, path: Path, start: int, row: np.void) -> None:
        offset = (start + 1) * self._dtype.itemsize  # without the <|endoftext|>
        ids = np.fromfile(path, dtype=self._dtype, count=int(row["tokens"]) - 1, offset=offset)
        text = self._tokenizer.decode(ids.tolist())
        same_text = sha256(text.encode()).digest()[:16].rstrip(b"\0") == row["key"]  # NumPy drops zeros at the end
        if not same_text or not np.array_equal(self._tokenizer.encode_batch([text])[0], ids):
            raise Unusable(
                f"the package {PACKAGE} encodes {text[:40]!r}… differently from the tokenizer {self._tokenizer.name}; "
                "do without it: --encoder exact"
            )

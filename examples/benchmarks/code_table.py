"""A code table of ten million ids.

Ids look like Amazon's (ten characters), each has three codes of 256. Takes about 4 GB of memory.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from measure import Row, once, peak

from tokenrec_hf.models.codes import CodeTable, IdIndex, load_tables, save_tables

IDS, CODEBOOKS, CODEBOOK_SIZE, ASKED = 10_000_000, 3, 256, 100_000


def rows() -> list[Row]:
    """Makes, saves and loads a table, looks up ids, and gives a thousand new ids codes."""
    found: list[Row] = []
    codes = np.random.default_rng(0).integers(CODEBOOK_SIZE, size=(IDS, CODEBOOKS))
    with once(found, "make the ids"):
        table = CodeTable("item", IdIndex(map(name, range(IDS))), codes, CODEBOOK_SIZE)
    asked = np.random.default_rng(1).integers(IDS, size=ASKED)
    ids, unknown = [name(row) for row in asked], [f"x{row}" for row in asked]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "codes.safetensors"
        with once(found, "save"):
            save_tables({"item": table}, path)
        found.append(Row("size on disk", path.stat().st_size / IDS, "bytes an id"))
        del table
        with once(found, "load, check, and build the dictionary of look-ups"):
            table = load_tables(path, {"item": [CODEBOOKS, CODEBOOK_SIZE]})["item"]
            table.rows(ids[:1])
    with once(found, f"codes of {ASKED:,} random ids"):
        assert (table.codes[table.rows(ids)] == codes[asked]).all()
    with once(found, f"look-up of {ASKED:,} unknown ids"):
        assert (table.index.rows(unknown) < 0).all()
    with once(found, "codes for 1,000 new ids"):
        table.updated([f"new-{row}" for row in range(1_000)], np.zeros((1_000, CODEBOOKS), dtype=np.int64))
    return [*found, Row("most memory, with both tables", peak() * 2**30 / IDS, "bytes an id")]


def name(row: int) -> str:
    """The id of a row."""
    return f"B{row:09d}"

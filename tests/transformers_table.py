"""docs/support_matrix_transformers.md, generated from the architectures that the tests run.

python tests/transformers_table.py
"""

import pathlib

import zoo

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "support_matrix_transformers.md"

HEADER = """# `transformers` models that the tests split

Written by `python tests/transformers_table.py` from what `tests/integrations/transformers/test_families.py` runs: tiny
random models of sizes that divide by nothing, on real ranks, against one process: outputs within 1e-5 of their largest
value, greedy tokens equal, batches padded in front. "Refused" is an error that names the model, before anything is
split.

| model | class | tp = 2, 3, 4 | ring = 2, ulysses = 3, ring = 2 × tp = 2 |
|---|---|---|---|
"""


def table() -> str:
    rows = []
    for name in (*zoo.DECODERS, *zoo.ENCODERS):
        split = "exact, attention whole on every rank" if name in zoo.WHOLE_ATTENTION else "exact"
        sequence = "refused" if name in zoo.NO_SEQUENCE else "exact"
        rows.append(f"| {name} | {type(zoo.build(name)).__name__} | {split} | {sequence} |\n")
    return HEADER + "".join(rows)


if __name__ == "__main__":
    PAGE.write_text(table())

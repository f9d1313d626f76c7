"""The support matrix: features, their pairs, and the table of them, which running this file writes."""

import dataclasses
import itertools
import pathlib

import torch
from cells import Cell

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "support_matrix_attention.md"

BASE = {"batch": 2, "seq_len": 16, "heads": 4, "kv_heads": 4, "head_dim": 8, "value_dim": 8}

FEATURES = {
    "length that doesn't divide": {"seq_len": 13},
    "fewer positions than ranks": {"seq_len": 3},
    "heads that don't divide": {"heads": 5, "kv_heads": 5},
    "fewer heads than ranks": {"heads": 2, "kv_heads": 2},
    "grouped queries, groups cut": {"heads": 6, "kv_heads": 2},
    "multi-query": {"heads": 4, "kv_heads": 1},
    "causal": {"causal": True},
    "zigzag order": {"order": "zigzag"},
    "own positions": {"causal": True, "positions": "shuffled"},
    "more keys than queries": {"kv_seq_len": 29},
    "fewer keys than queries": {"kv_seq_len": 5},
    "replicated keys": {"replicated_kv": True, "kv_seq_len": 11},
    "key mask": {"key_mask": "random"},
    "padding to nothing": {"key_mask": "none left"},
    "bool mask": {"mask": "bool bh"},
    "additive mask": {"mask": "float 11"},
    "joint tokens": {"joint": 5},
    "joint tokens, masked": {"joint": 5, "joint_masked": True, "joint_position": "rear"},
    "own scale": {"scale": 0.3},
    "other value head_dim": {"value_dim": 12},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "BNSD layout": {"layout": "BNSD"},
    "non-contiguous": {"strided": True},
}
MESHES = {
    "ring": {"ring": 4},
    "ulysses": {"ulysses": 4},
    "hybrid": {"ring": 2, "ulysses": 2},
}
REFUSED = "refused: joint tokens have no place in a causal order"


def cell(*features: str) -> Cell | None:
    """The cell that has these features, or None where they say different things about one argument."""
    values = dict(BASE)
    for mine, other in itertools.permutations(features, 2):
        shared = FEATURES[mine].keys() & FEATURES[other].keys()
        if any(FEATURES[mine][key] != FEATURES[other][key] for key in shared):
            return None
    for feature in features:
        values |= FEATURES[feature]
    return Cell(**values)


def is_refused(cell: Cell) -> bool:
    return cell.causal and cell.joint is not None


def pairs() -> list[tuple[str, str, Cell]]:
    """Every feature with itself and with every other that doesn't contradict it."""
    found = [(a, b, cell(a, b)) for a, b in itertools.combinations_with_replacement(FEATURES, 2)]
    return [(a, b, cell) for a, b, cell in found if cell is not None]


def cells_for(schedule: str, refused: bool) -> list[Cell]:
    cells = [cell for _, _, cell in pairs() if is_refused(cell) == refused]
    return [dataclasses.replace(cell, schedule=schedule, seed=i) for i, cell in enumerate(cells)]


def table() -> str:
    """The page, from the same parameters that the tests run."""
    kinds = {(a, b): "R" if is_refused(cell) else "E" for a, b, cell in pairs()}
    kinds |= {(b, a): kind for (a, b), kind in kinds.items()}
    numbers = range(1, len(FEATURES) + 1)
    lines = [
        "# What `attend` supports",
        "",
        "Written by `python tests/attention/features.py` from what `tests/attention/test_support.py` runs: all on",
        "four real ranks, as a ring, as Ulysses and as 2 × 2 of both, against float64 attention on one card (float32",
        "within 1e-5 of the largest value, bfloat16 within 1e-2, float16 within 5e-3).",
        "",
        f"- **E**: exact, on all three schedules. {sum(kind == 'E' for kind in kinds.values())} cells.",
        f"- **R**: {REFUSED}.",
        "- a dot: the two say different things about one argument.",
        "",
        "| | feature | " + " | ".join(map(str, numbers)) + " |",
        "|---|---|" + ":-:|" * len(FEATURES),
    ]
    for i, a in zip(numbers, FEATURES, strict=True):
        lines.append(f"| {i} | {a} | " + " | ".join(kinds.get((a, b), "·") for b in FEATURES) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(table())

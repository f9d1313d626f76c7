"""The types of GGUF tensors by the numbers that stand for them in a file."""

from __future__ import annotations

from multicard.quantized.types import BLOCK_TYPES, BlockType

READABLE = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BLOCK_TYPES["Q4_0"],
    3: BLOCK_TYPES["Q4_1"],
    6: BLOCK_TYPES["Q5_0"],
    7: BLOCK_TYPES["Q5_1"],
    8: BLOCK_TYPES["Q8_0"],
    10: BLOCK_TYPES["Q2_K"],
    11: BLOCK_TYPES["Q3_K"],
    12: BLOCK_TYPES["Q4_K"],
    13: BLOCK_TYPES["Q5_K"],
    14: BLOCK_TYPES["Q6_K"],
    30: BlockType("BF16", 1, 2),
}

REFUSED = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
}
"""Types that exist and that can't be read here."""

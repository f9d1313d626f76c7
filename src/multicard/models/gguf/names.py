"""The tensors of a GGUF file from which our decoder's parameters are read."""

from __future__ import annotations

import dataclasses
import re

from torch import Tensor

from multicard.weights import Plain

NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_up_proj": "ffn_gate_up",
    "mlp.down_proj": "ffn_down",
}
"""A module of the decoder, in a layer or outside, and its name in the file."""

PARTS = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "gate_proj": "ffn_gate", "up_proj": "ffn_up"}
INTERLEAVED = ("q_proj", "k_proj")
IN_LAYER = re.compile(r"layers\.(\d+)\.(.+)\.(weight|bias)")

ROPE_FACTORS = "rope_freqs.weight"
"""By how much each pair of a head turns slower; part of the config."""


def key_of(name: str) -> str:
    """The tensor of one of our parameters; a fused one has a name that no file has, for its parts' to be made from."""
    if (found := IN_LAYER.fullmatch(name)) is not None:
        return f"blk.{found[1]}.{NAMES[found[2]]}.{found[3]}"
    module, _, leaf = name.rpartition(".")
    return f"{NAMES[module]}.{leaf}"


@dataclasses.dataclass(frozen=True)
class Named(Plain):
    """A parameter's tensor, or those of its parts.

    Attributes:
        pairs_of: head size of a file that has the rows of queries and keys in pairs to rotate, (0, 1), (2, 3), ...;
            None: pairs are (0, head_dim/2), (1, head_dim/2 + 1), ..., as our decoder has them.
    """

    pairs_of: int | None = None

    @property
    def together(self) -> int:
        return self.pairs_of or 1

    def in_order(self, key: str, rows: Tensor) -> Tensor:
        turned = self.pairs_of is not None and key in map(self._part, INTERLEAVED)
        return in_halves(rows, self.pairs_of) if turned and self.pairs_of else rows

    def _part(self, part: str) -> str:
        module, _, leaf = self.key.rpartition(".")
        return f"{module.rpartition('.')[0]}.{PARTS[part]}.{leaf}"


def in_halves(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of whole heads with pairs (0, 1), (2, 3), ... in the order in which pairs are (0, head_dim/2), ..."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)

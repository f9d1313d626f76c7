"""One exact attention call for every mesh: ring, Ulysses, hybrid; and decoding over a sharded cache."""

from multicard.attention.attend import attend
from multicard.attention.decode import attend_decode
from multicard.attention.forward import attention_forward
from multicard.attention.schedule import Schedule, choose_schedule
from multicard.attention.sequence import gather_sequence, shard_sequence

__all__ = [
    "Schedule",
    "attend",
    "attend_decode",
    "attention_forward",
    "choose_schedule",
    "gather_sequence",
    "shard_sequence",
]

"""What is refused, by its own words: the value, the limit and the fix; before anything runs."""

import pytest
import torch

import multicard as mc
from multicard import attention
from multicard.errors import ConfigError, UnsupportedError

MESH = mc.single()
Q = torch.zeros(2, 6, 4, 8)
KV = torch.zeros(2, 6, 2, 8)
KEEP = torch.ones(2, 6, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"layout": "BSH"}, r"layout='BSH': must be one of BSND, BNSD"),
        ({"order": "striped"}, r"order='striped': must be one of contiguous, zigzag"),
        ({"schedule": "pipe"}, r"schedule='pipe': must be one of auto, ulysses, ring, hybrid"),
        ({"joint": (Q, KV, KV), "joint_position": "middle"}, r"joint_position='middle': must be one of front, rear"),
        ({"seq_len": 7}, r"seq_len=7 .* 7 positions, and it holds 6"),
        ({"kv_seq_len": 5}, r"kv_seq_len=5 .* 5 positions, and it holds 6"),
        ({"replicated_kv": True, "kv_seq_len": 9}, r"kv_seq_len=9, but k has 6"),
        ({"key_mask": KEEP.float()}, r"key_mask .* must be bool \(2, 6\)"),
        ({"key_mask": KEEP[:1]}, r"key_mask has shape \(1, 6\)"),
        ({"mask": KEEP}, r"mask has shape \(2, 6\): must be \(batch\|1, heads\|1, local rows, all keys\)"),
        ({"mask": torch.ones(1, 3, 6, 6)}, r"mask has shape \(1, 3, 6, 6\)"),
        ({"mask": torch.ones(1, 1, 6, 6, dtype=torch.long)}, r"mask is torch.int64"),
        ({"causal": True, "q_positions": torch.zeros(6)}, r"q_positions .* must be integers \(6,\)"),
        ({"causal": True, "kv_positions": torch.arange(5)}, r"kv_positions has shape \(5,\)"),
        ({"joint_key_mask": KEEP}, r"joint_key_mask without joint"),
        ({"joint": (Q, KV, Q)}, r"don't fit"),
        ({"joint": (KV, KV, KV)}, r"joint q of shape \(2, 6, 2, 8\)"),
        ({"joint": (Q.half(), KV.half(), KV.half())}, r"joint q .* torch.float16"),
        ({"joint": (Q, KV, KV), "joint_key_mask": KEEP[:, :5]}, r"joint_key_mask has shape \(2, 5\)"),
    ],
)
def test_arguments_that_can_not_be_meant(arguments, words):
    with pytest.raises(ConfigError, match=words):
        attention.attend(Q, KV, KV, mesh=MESH, **arguments)


@pytest.mark.parametrize(
    ("q", "k", "v", "words"),
    [
        (Q[0], KV, KV, r"q has shape \(6, 4, 8\)"),
        (Q, KV.double(), KV, r"k is torch.float64"),
        (Q.long(), KV.long(), KV.long(), r"torch.int64: must be a floating dtype"),
        (Q, KV[:1], KV[:1], r"don't fit"),
        (Q, KV, KV[:, :3], r"don't fit"),
        (Q, KV[..., :4], KV, r"don't fit"),
        (Q[:, :, :3], KV, KV, r"3 query heads over 2 key/value heads"),
        (Q, KV[:, :, :0], KV[:, :, :0], r"4 query heads over 0"),
    ],
)
def test_tensors_that_do_not_fit(q, k, v, words):
    for call in (
        lambda: attention.attend(q, k, v, mesh=MESH),
        lambda: attention.attend_decode(q, k, v, axis=MESH.sequence),
        lambda: attention.attention_forward(q, k, v),
    ):
        with pytest.raises(ConfigError, match=words):
            call()


def test_causal_with_joint_is_refused_with_the_fix():
    with pytest.raises(UnsupportedError, match="put them into the sequence, or drop causal"):
        attention.attend(Q, KV, KV, mesh=MESH, causal=True, joint=(Q, KV, KV))


def test_a_backward_is_refused_and_a_forward_is_not():
    q = Q.clone().requires_grad_()
    for out in (
        attention.attend(q, KV, KV, mesh=MESH),
        attention.attend_decode(q, KV, KV, axis=MESH.sequence),
        attention.attention_forward(q, KV, KV),
    ):
        with pytest.raises(UnsupportedError, match="no backward"):
            out.sum().backward()
    with torch.no_grad():
        assert not attention.attend(q, KV, KV, mesh=MESH).requires_grad


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kv_lengths": torch.tensor([3])}, r"kv_lengths .* integers \(2,\)"),
        ({"kv_lengths": torch.tensor([3.0, 2.0])}, r"kv_lengths"),
        ({"key_mask": KEEP[:, :3]}, r"key_mask has shape \(2, 3\)"),
        ({"mask": KEEP[:, None, None, :4]}, r"mask has shape \(2, 1, 1, 4\)"),
    ],
)
def test_decode(arguments, words):
    with pytest.raises(ConfigError, match=words):
        attention.attend_decode(Q[:, :1], KV, KV, axis=MESH.sequence, **arguments)


def test_a_rank_that_holds_another_length_says_so(run_on):
    def message(mesh):
        try:
            attention.attend(Q, Q, Q, mesh=mesh, seq_len=11)
        except ConfigError as error:
            return str(error)

    fine, wrong = 6, 5
    words = f"gives sequence rank 1 of 2 {wrong} positions, and it holds {fine}: shard with mc.shard_sequence"

    def refused_on_rank_1(mesh):
        return message(mesh) if mesh.rank == 1 else None

    assert words in run_on(refused_on_rank_1, ring=2)[1]

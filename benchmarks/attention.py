"""Attention on two ranks of one thread against one rank of one thread, one process of two, the bound, and peers.

    python benchmarks/attention.py --seq-len 8192 --rounds 5

Every round runs every contestant once, so that a noisy minute hits all of them; the table has medians. "bound" is the
row above it with every exchange taken out: the same ranks do the same local work at the same time. Peers run in the
same ranks over the same backend, after their answer has been compared with one card's at a small size; one that can't
run, or answers something else, is in the table with the reason. yunchang is used where it can be imported.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

import multicard as mc
from common import alternate, report, without_exchanges
from multicard import attention, collectives

HEADS, HEAD_DIM = 8, 64
EXACT = 1e-2

Call = Callable[[mc.ParallelMesh, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def ours(mesh: mc.ParallelMesh, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    return attention.attend(q, k, v, mesh=mesh, **options)


def sdpa(mesh: mc.ParallelMesh, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


# --- the bound: attend with every exchange taken out ------------------------------------------------------------------


def bound(mesh: mc.ParallelMesh, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    with without_exchanges():
        return ours(mesh, q, k, v, **options)


# --- peers: each takes this rank's contiguous slice -------------------------------------------------------------------


def diffusers_ulysses(mesh: mc.ParallelMesh, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """diffusers' templated Ulysses over its native backend, below the model's device check."""
    from diffusers.models import attention_dispatch
    from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig

    config = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=mesh.sequence.size))
    config.setup(mesh.rank, mesh.world_size, q.device, mesh=mesh.device_mesh["ring", "ulysses"])
    return attention_dispatch.dispatch_attention_fn(q, k, v, backend="native", parallel_config=config)


def torch_context_parallel(mesh: mc.ParallelMesh, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """torch's context_parallel as it is meant to be called: on whole tensors, which it cuts and puts together again."""
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import _cp_options

    _cp_options.enable_load_balance = False
    with context_parallel(mesh.device_mesh["ulysses"], buffers=[q, k, v], buffer_seq_dims=[1, 1, 1]):
        return sdpa(mesh, q, k, v, causal=False)


def torch_ring(mesh: mc.ParallelMesh, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The ring inside torch's context_parallel, by its private function, given the CPU kernel."""
    from torch.distributed.tensor.experimental._context_parallel import _attention

    def kernel(query, key, value, is_causal, **rest):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, is_causal=is_causal)

    _attention._cp_options.enable_load_balance = False
    group = mesh.sequence.group
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return _attention._templated_ring_attention(group, 2, kernel, query=q, key=k, value=v)[0].transpose(1, 2)


def yunchang_ulysses(mesh: mc.ParallelMesh, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """yunchang's Ulysses, given torch's SDPA in place of its CUDA kernels."""
    from yunchang.kernels import AttnType
    from yunchang.ulysses import UlyssesAttention

    layer = UlyssesAttention(mesh.sequence.group, attn_type=AttnType.TORCH_EFFICIENT)
    layer.attn_fn = lambda q, k, v, **rest: sdpa(mesh, q, k, v, causal=False)
    return layer(q, k, v)


def yunchang_ring(mesh: mc.ParallelMesh, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from yunchang.ring import ring_pytorch_attn_func

    return ring_pytorch_attn_func(q, k, v, causal=False, group=mesh.sequence.group)


PEERS: dict[str, Call] = {
    "diffusers Ulysses": diffusers_ulysses,
    "torch context_parallel": torch_context_parallel,
    "torch's ring, private": torch_ring,
    "yunchang Ulysses": yunchang_ulysses,
    "yunchang ring": yunchang_ring,
}


TAKES_WHOLE = {"torch context_parallel"}


# --- on a rank --------------------------------------------------------------------------------------------------------


def make_inputs(mesh: mc.ParallelMesh, seq_len: int, dtype: str, order: str, whole: bool) -> list[torch.Tensor]:
    mesh = mc.single() if whole else mesh
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(1, seq_len, HEADS, HEAD_DIM, generator=generator) for _ in range(3)]
    return [attention.shard_sequence(x, mesh, order=order).to(getattr(torch, dtype)).contiguous() for x in made]


def once(mesh: mc.ParallelMesh, call: Call, tensors: list[torch.Tensor], options: dict[str, Any]) -> None:
    with torch.no_grad():
        call(mesh, *tensors, **options)
    collectives.barrier(mesh.world)


def why_not(mesh: mc.ParallelMesh, call: Call, takes_whole: bool) -> str | None:
    """Why a peer can't take part: it raises, or its answer isn't attention's. None: it can."""
    mine = make_inputs(mesh, 256, "float32", "contiguous", takes_whole)
    whole = make_inputs(mesh, 256, "float32", "contiguous", True)
    try:
        with torch.no_grad():
            out = call(mesh, *mine)
    except Exception as error:  # whatever a peer raises is the reason
        return f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
    wanted = attention.shard_sequence(sdpa(mesh, *whole, causal=False), mesh)
    if out.shape != wanted.shape or (out - wanted).abs().max() > EXACT:
        return "runs, but its answer is wrong here"
    return None


# --- the contest ------------------------------------------------------------------------------------------------------


def contest(
    seq_len: int, dtype: str, rounds: int, backend: str, peers: bool, kinds: Sequence[str], statistic: Callable
) -> list[dict[str, Any]]:
    with contextlib.ExitStack() as stack:
        start = functools.partial(mc.Ranks, timeout=120.0)
        one = stack.enter_context(start(mc.ParallelConfig(), threads_per_rank=1))
        wide = stack.enter_context(start(mc.ParallelConfig(), threads_per_rank=2))
        two = stack.enter_context(start(mc.ParallelConfig(ulysses=2), threads_per_rank=1, backend=backend))
        contestants: dict[str, Callable[[], object]] = {}

        def enter(name: str, ranks: mc.Ranks, call: Call, whole: bool = False, **options: Any) -> None:
            tensors = ranks.keep(make_inputs, seq_len, dtype, options.get("order", "contiguous"), whole)
            contestants[name] = functools.partial(ranks.run, once, call, tensors, options)

        for causal, suffix in ((kind == "causal", " causal" if kind == "causal" else "") for kind in kinds):
            enter(f"1 rank of 1 thread{suffix}", one, sdpa, causal=causal)
            enter(f"1 process of 2 threads{suffix}", wide, sdpa, causal=causal)
            rings = {"ring": "contiguous"} if not causal else {"ring zigzag": "zigzag", "ring contiguous": "contiguous"}
            for name, order in {"ulysses": "contiguous", **rings}.items():
                options = {"causal": causal, "schedule": name.split()[0], "order": order}
                enter(f"{name}{suffix}", two, ours, **options)
                enter(f"{name}{suffix} bound", two, bound, **options)
        refused = {}
        for name, call in PEERS.items() if peers and "full" in kinds else ():
            reasons = two.run(why_not, call, name in TAKES_WHOLE)
            if reasons[0] is None:
                enter(name, two, call, whole=name in TAKES_WHOLE)
            else:
                refused[name] = reasons[0]
        times = alternate(contestants, rounds, statistic=statistic)
    rows = [row(name, times, seq_len, dtype) for name in times if not name.endswith("bound")]
    blank = dict.fromkeys(rows[0], "")
    return rows + [{**blank, "contestant": name, "note": reason} for name, reason in refused.items()]


def row(name: str, times: dict[str, float], seq_len: int, dtype: str) -> dict[str, Any]:
    suffix = " causal" if name.endswith("causal") else ""
    limit = times.get(f"{name} bound")
    return {
        "S": seq_len,
        "dtype": dtype,
        "contestant": name,
        "seconds": times[name],
        "over 1x1": times[f"1 rank of 1 thread{suffix}"] / times[name],
        "over 1x2": times[f"1 process of 2 threads{suffix}"] / times[name],
        "of bound": limit / times[name] if limit else "",
        "note": "",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, nargs="+", default=[8192])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    parser.add_argument("--kind", nargs="+", choices=["full", "causal"], default=["full", "causal"])
    parser.add_argument(
        "--fastest", action="store_true", help="the fastest round instead of the median: noisy machines"
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    statistic = min if args.fastest else statistics.median
    rows = [
        row
        for seq_len in args.seq_len
        for dtype in args.dtype
        for row in contest(seq_len, dtype, args.rounds, args.backend, args.peers, args.kind, statistic)
    ]
    report(rows, args.json, heads=HEADS, head_dim=HEAD_DIM, rounds=args.rounds, figure=statistic.__name__)


if __name__ == "__main__":
    main()

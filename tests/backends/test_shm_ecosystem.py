"""Other people's code on the shm backend, unchanged: torch's own layers above it, transformers, torchrun, mp.spawn."""

import subprocess
import sys
import textwrap

import pytest
import torch
import torch.distributed as dist


def functional(mesh):
    """Functional collectives, which reach the group from C++."""
    import torch.distributed._functional_collectives as fc

    rank, size, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    x = torch.arange(4.0) + rank
    every = [torch.arange(4.0) + r for r in range(size)]
    pairs = {
        "all_reduce": (fc.all_reduce(x, "sum", group), sum(every)),
        "all_reduce avg": (fc.all_reduce(x, "avg", group), sum(every) / size),
        "all_gather": (fc.all_gather_tensor(x, 0, group), torch.cat(every)),
        "reduce_scatter": (fc.reduce_scatter_tensor(x.repeat(size), "sum", 0, group), sum(every)),
        "broadcast": (fc.broadcast(x, 1, group), every[1]),
        "all_to_all": (
            fc.all_to_all_single(x.repeat(size), [4] * size, [4] * size, group),
            torch.cat(every),
        ),
        "coalesced": (fc.all_reduce_coalesced([x, x + 1], "sum", group)[1], sum(every) + size),
        "gather coalesced": (fc.all_gather_into_tensor_coalesced([x, x + 1], group)[1], torch.cat(every) + 1),
        "scatter coalesced": (
            fc.reduce_scatter_tensor_coalesced([x.repeat(size)], "sum", [0], group)[0],
            sum(every),
        ),
    }
    for name, (got, want) in pairs.items():
        assert torch.equal(got + 0, want), name


@pytest.mark.parametrize("ranks", [2, 3])
def test_functional_collectives(run_on, ranks):
    run_on(functional, dp=ranks)


def meshes(mesh):
    """A device mesh with axes of size 1, flattened ones and their groups; DTensor laid out over them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    device_mesh = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("a", "b", "c"))
    flat = device_mesh["b", "c"]._flatten("bc")
    grid = device_mesh["b", "c"]
    for rows, where, placements in ((10, flat, [Shard(0)]), (10, flat, [Shard(1)]), (12, grid, [Shard(0), Shard(1)])):
        whole = torch.arange(8.0 * rows).view(rows, 8)
        one = distribute_tensor(whole, where, placements)
        for others in ([Replicate()] * where.ndim, [Shard(1)] * where.ndim, placements):
            assert torch.equal(one.redistribute(where, others).full_tensor(), whole), (placements, others)
        product = one @ distribute_tensor(whole.t().contiguous(), where, [Replicate()] * where.ndim)
        assert isinstance(product, DTensor)
        assert torch.equal(product.full_tensor(), whole @ whole.t()), placements
    lonely = torch.ones(3)
    dist.all_reduce(lonely, group=device_mesh.get_group("a"))
    assert lonely.tolist() == [1.0] * 3


def test_device_mesh_and_dtensor(run_on):
    run_on(meshes, dp=4)


def compiled(mesh):
    size, rank = dist.get_world_size(), dist.get_rank()

    @torch.compile(fullgraph=True, options={"cpp.vec_isa_ok": False})  # else it compiles programs to find out
    def step(x):
        y = x * 2
        dist.all_reduce(y)
        out = y.new_empty(size * 3)
        dist.all_gather_single(out, y + rank)
        return torch.relu(out)

    got = step(torch.ones(3))
    return torch.equal(got, torch.cat([torch.full((3,), 2.0 * size + r) for r in range(size)]))


def test_torch_compile_with_inductor(run_on):
    assert all(run_on(compiled, dp=2))


def test_transformers_tensor_parallel(run_on, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[1, 5, 9, 33, 2]])

    def run(mesh, path, ids):
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM.from_pretrained(path, tp_plan="auto").eval()
        with torch.inference_mode():
            logits = model(ids).logits
        local = model.model.layers[0].mlp.gate_proj.weight
        return logits, tuple(local.to_local().shape if hasattr(local, "to_local") else local.shape)

    with torch.inference_mode():
        want = model(ids).logits
    for logits, shape in run_on(run, str(tmp_path), ids, dp=2):
        torch.testing.assert_close(logits, want, rtol=1e-5, atol=1e-5)
        assert shape == (24, 32)  # it is split


SCRIPT = """
    import os, torch, torch.distributed as dist
    import multicard.backends.shm

    def main(rank=None, size=None, path=None):
        where = {} if rank is None else {"init_method": f"file://{path}", "rank": rank, "world_size": size}
        dist.init_process_group("cpu:shm", **where)
        x = torch.full((1000,), dist.get_rank() + 1.0)
        dist.all_reduce(x)
        assert x.tolist() == [3.0] * 1000
        print("right")
        dist.destroy_process_group()

    if __name__ == "__main__":
        if "RANK" in os.environ:
            main()
        else:
            import tempfile, torch.multiprocessing as mp
            with tempfile.TemporaryDirectory() as folder:
                mp.spawn(main, (2, folder + "/store"), nprocs=2)
"""


@pytest.mark.parametrize("launcher", [[], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]])
def test_other_launchers(tmp_path, launcher):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    done = subprocess.run([sys.executable, *launcher, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("right") == 2

"""``multicard info``: this machine's devices, backends and versions."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
from typing import Any

from multicard import versions
from multicard.cli import options

PACKAGES = ("multicard", "torch_npu", *versions.BY_NAME)


def info(as_json: options.Json = False) -> None:
    """Print devices, backends and versions."""
    found = {"devices": _devices(), "backends": _backends(), "compiling": _compiling(), "versions": _versions()}
    untested = {name: remark for name in PACKAGES if (remark := versions.untested(name))}
    if as_json:
        print(json.dumps(found | {"untested": untested}))
        return
    for name, remark in untested.items():
        found["versions"][name] += f", {remark}"
    for title, rows in found.items():
        print(title)
        for name, value in rows.items():
            print(f"  {name:<14}{value}")


def _devices() -> dict[str, Any]:
    import psutil
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = psutil.virtual_memory()
    gib = float(1 << 30)
    kernel = torch.backends.cpu.get_cpu_capability()
    devices = {
        "cpu": f"{cores} cores, {kernel}, {memory.available / gib:.1f} of {memory.total / gib:.1f} GiB memory free"
    }
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        assert kind is not None
        module = getattr(torch, kind.type)
        for index in range(torch.accelerator.device_count()):
            free, total = module.mem_get_info(index)
            name = module.get_device_name(index)
            devices[f"{kind.type}:{index}"] = f"{name}, {free / gib:.1f} of {total / gib:.1f} GiB free"
    return devices


def _backends() -> dict[str, Any]:
    import torch.distributed as dist

    shm = importlib.util.find_spec("multicard.backends.shm") is not None
    return {
        "shm": "multicard's own, for CPU ranks on one host" if shm else "not here",
        "gloo": _yes(dist.is_gloo_available()),
        "nccl": _yes(dist.is_nccl_available()),
        "xccl": _yes(getattr(dist, "is_xccl_available", bool)()),
        "hccl": _yes(importlib.util.find_spec("torch_npu") is not None),
    }


def _compiling() -> dict[str, Any]:
    import torch

    from multicard.models import artifacts, compiled

    obstacle = compiled.why_not(torch.device("cpu"))
    return {"decode step": obstacle or f"with {compiled.cxx()}, kept in {artifacts.cache_folder()}"}


def _yes(here: bool) -> str:
    return "in this torch" if here else "not here"


def _versions() -> dict[str, Any]:
    machine = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    return machine | {name: versions.installed(name) or "not installed" for name in PACKAGES}

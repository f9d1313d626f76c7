"""What is private to other libraries and used here all the same: which names, where, what for; and are they there?

A release that renames one fails here by its name. A use that is new, or gone, fails here too: TABLE is the one place
that tells what an upgrade can break.
"""

import ast
import importlib
import inspect
import json
import pathlib
import sys
import threading
import typing

import diffusers
import pytest
import torch
import torch.distributed as dist
import transformers
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.first_block_cache import FBCHeadBlockHook
from diffusers.hooks.hooks import StateManager
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from diffusers.pipelines.pag.pag_utils import PAGMixin

RENDEZVOUS = importlib.import_module("torch.distributed.rendezvous")  # torch.distributed has a function of that name
SOURCE = pathlib.Path(__file__).parents[1] / "src" / "multicard"


class Use(typing.NamedTuple):
    """Why a name is used, in which of our files, and ``there(name)``: whether the installed library has it."""

    why: str
    files: tuple[str, ...]
    there: typing.Callable[[str], bool]


def has(*owners):
    return lambda name: all(hasattr(owner, name) for owner in owners)


def says(*functions):
    """For what is only ever set inside a function."""
    return lambda name: all(name in inspect.getsource(function) for function in functions)


def is_backend(name):
    return name in {backend.value for backend in AttentionBackendName}


def is_saved(name):
    return name in json.loads(diffusers.DDIMScheduler().to_json_string())


def is_compiled(name):
    return hasattr(torch.compile(torch.nn.Identity()), name)


def hooked():
    module = torch.nn.Linear(1, 1)
    HookRegistry.check_if_exists_or_initialize(module)
    return module


def keeps_context(name):
    return {"_context", "_current_context"} & set(vars(StateManager(dict)))


def runs_compiled_code(name):
    return hasattr(getattr(torch._C, name).AOTIModelContainerRunnerCpu, "run")


def compiles_ahead(name):
    import torch._inductor

    return hasattr(torch._inductor, "aot_compile")


LLM, DIFFUSERS = "integrations/transformers", "integrations/diffusers"
OPERATIONS = {
    "interpolation": (
        "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d",
    ),
    "norms": ("_fused_rms_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"),
    "pointwise": ("_to_copy",),
    "reductions": ("_log_softmax", "_safe_softmax", "_softmax"),
    "views": ("_reshape_alias", "_unsafe_view"),
}  # fmt: skip
"""Of torch.ops.aten, by the file in spatial/ that has their rules."""

TABLE = {
    "python": {
        "_current_exceptions": Use("Ctrl-C in another thread", ("ranks/interrupt.py",), has(sys)),
        "_current_frames": Use("what a rank is doing", ("ranks/activity.py", "ranks/interrupt.py"), has(sys)),
        "_getframe": Use("call sites", ("backends/calls.py",), has(sys)),
        "_shutdown": Use("the interpreter's exit on the stack", ("ranks/interrupt.py",), has(threading)),
    },
    "torch.distributed": {
        "_allgather_base": Use("gloo by its own calls", ("backends/gloo.py",), has(dist.ProcessGroupGloo)),
        "_flatten": Use("several axes as one", ("mesh.py",), has(dist.device_mesh.DeviceMesh)),
        "_get_default_group": Use("the memo of meshes", ("mesh.py",), has(dist.distributed_c10d)),
        "_get_sequence_number_for_group": Use("who didn't arrive", ("ranks/activity.py",), has(dist.ProcessGroup)),
        "_resolve_process_group": Use("groups by name", ("backends/traced.py",), has(dist.distributed_c10d)),
        "_rendezvous_handlers": Use("init_process_group in scripts", ("join.py",), has(RENDEZVOUS)),
        "_set_default_timeout": Use("gloo by its own calls", ("backends/gloo.py",), has(dist.ProcessGroupGloo)),
        "_set_pg_timeout": Use("sub-groups' timeouts", ("join.py",), has(dist.distributed_c10d)),
        "_world": Use("all groups, and their ranks", ("ranks/activity.py",), has(dist.distributed_c10d)),
    },
    "torch": {
        **{
            name: Use("operations on split rows", (f"spatial/{file}.py",), has(torch.ops.aten))
            for file, names in OPERATIONS.items()
            for name in names
        },
        "_assert_async": Use("a check in a compiled graph", ("layers/embedding.py",), has(torch)),
        "_C": Use(
            "DisableTorchFunctionSubclass, compiled code",
            ("guidance/lazy.py", "models/compiled.py", "spatial/products.py", "spatial/rows.py"),
            has(torch),
        ),
        "_aoti": Use("AOTIModelContainerRunnerCpu: compiled code", ("models/compiled.py",), runs_compiled_code),
        "_compiled_call_impl": Use("whether a model is compiled", (f"{DIFFUSERS}/checks.py",), has(torch.nn.Module)),
        "_inductor": Use("aot_compile", ("models/compiler.py",), compiles_ahead),
        "_is_mkldnn_bf16_supported": Use(
            "whether this processor multiplies packed bfloat16", ("layers/packed.py",), has(torch.ops.mkldnn)
        ),
        "_linear_pointwise": Use("oneDNN's product", ("layers/packed.py", "spatial/weights.py"), has(torch.ops.mkldnn)),
        "_make_wrapper_subclass": Use("tensors of ours", ("guidance/lazy.py", "spatial/rows.py"), has(torch.Tensor)),
        "_modules": Use("modules in place", ("integrations/styles.py",), has(torch.nn.Module())),
        "_nbytes": Use("the size of a packed weight", ("layers/packed.py",), has(torch.ops.mkldnn)),
        "_orig_mod": Use("what torch.compile wraps", (f"{DIFFUSERS}/denoisers.py",), is_compiled),
        "_parameters": Use("weights in place", ("integrations/styles.py", f"{LLM}/experts.py"), has(torch.nn.Module())),
        "_pytree": Use(
            "tensors within arguments",
            (
                "guidance/batch.py",
                "guidance/branches.py",
                "guidance/lazy.py",
                "guidance/trees.py",
                f"{DIFFUSERS}/stores.py",
                "replica.py",
            ),
            has(torch.utils),
        ),
        "_reorder_linear_weight": Use("packed weights", ("layers/packed.py",), has(torch.ops.mkldnn)),
        "_reversed_padding_repeated_twice": Use(
            "padding other than zeros", ("layers/conv.py",), has(torch.nn.Conv2d(1, 1, 1))
        ),
        "_scaled_dot_product_cudnn_attention": Use(
            "attention with its log-sum-exp", ("attention/kernels/torch_cuda.py",), has(torch.ops.aten)
        ),
        "_scaled_dot_product_efficient_attention": Use(
            "attention with its log-sum-exp", ("attention/kernels/torch_cuda.py",), has(torch.ops.aten)
        ),
        "_scaled_dot_product_flash_attention": Use(
            "attention with its log-sum-exp", ("attention/kernels/torch_cuda.py",), has(torch.ops.aten)
        ),
        "_scaled_dot_product_flash_attention_for_cpu": Use(
            "attention with its log-sum-exp", ("attention/kernels/torch_cpu.py",), has(torch.ops.aten)
        ),
        "_schema": Use(
            "whether an operation writes, and its arguments' names",
            ("guidance/lazy.py", "spatial/pointwise.py", "spatial/reductions.py", "spatial/rows.py"),
            has(torch.ops.aten.add.Tensor),
        ),
        "_version": Use("whether a tensor was written to", (f"{DIFFUSERS}/state.py",), has(torch.Tensor)),
    },
    "transformers": {
        "_attn_implementation": Use(
            "attention over a split sequence or by segments of heads",
            (f"{LLM}/doors.py", f"{LLM}/sequence.py"),
            has(transformers.LlamaConfig()),
        ),
        "_attn_implementation_internal": Use(
            "attention by segments of heads", (f"{LLM}/heads.py",), has(transformers.LlamaConfig())
        ),
        "_from_config": Use("models on meta", (f"{LLM}/load.py",), has(transformers.PreTrainedModel)),
        "_keep_in_fp32_modules_strict": Use(
            "dtypes as transformers loads", (f"{LLM}/part.py",), has(transformers.PreTrainedModel)
        ),
        "_get_static_cache_init_shape": Use(
            "static caches of a rank's own heads", (f"{LLM}/generate.py",), has(transformers.GenerationMixin)
        ),
        "_is_hf_initialized": Use(
            "what was read isn't made again",
            (f"{LLM}/load.py",),
            says(transformers.PreTrainedModel._initialize_weights),
        ),
        "_move_missing_keys_from_meta_to_device": Use(
            "buffers that no file has", (f"{LLM}/load.py",), has(transformers.PreTrainedModel)
        ),
    },
    "diffusers": {
        "_attention_backend": Use("backends that can't be split", (f"{DIFFUSERS}/checks.py",), has(FluxAttnProcessor)),
        "_calculate_module_shape": Use(
            "whole shapes of split layers", (f"{DIFFUSERS}/lora.py",), has(diffusers.loaders.FluxLoraLoaderMixin)
        ),
        "_class_name": Use(
            "the class of a folder's pipeline or model", (f"{DIFFUSERS}/folder.py", "integrations/load.py"), is_saved
        ),
        "_cp_plan": Use("a model's own sequence plan", (f"{DIFFUSERS}/plans.py",), has(diffusers.ModelMixin)),
        "_cache_config": Use("caches between steps", (f"{DIFFUSERS}/caches.py",), has(diffusers.CacheMixin)),
        "_context": Use("the state of a branch", (f"{DIFFUSERS}/stores.py",), keeps_context),
        "_current_context": Use("the same in older releases", (f"{DIFFUSERS}/stores.py",), keeps_context),
        "_diffusers_hook": Use("hooks of diffusers", (f"{DIFFUSERS}/hooks.py",), has(hooked())),
        "_is_stateful": Use(
            "caches between steps",
            (f"{DIFFUSERS}/caches.py", f"{DIFFUSERS}/hooks.py", f"{DIFFUSERS}/sequence.py"),
            has(ModelHook),
        ),
        "_should_compute_remaining_blocks": Use(
            "FirstBlockCache's decision", (f"{DIFFUSERS}/caches.py",), has(FBCHeadBlockHook)
        ),
        "_state_cache": Use("states by branch", (f"{DIFFUSERS}/stores.py",), has(StateManager(dict))),
        "_keep_in_fp32_modules": Use(
            "dtypes as libraries load", (f"{DIFFUSERS}/load.py", f"{LLM}/part.py"), has(diffusers.ModelMixin)
        ),
        "_native_cudnn": Use("a backend that can be split", (f"{DIFFUSERS}/checks.py",), is_backend),
        "_native_efficient": Use("a backend that can be split", (f"{DIFFUSERS}/checks.py",), is_backend),
        "_native_flash": Use("a backend that can be split", (f"{DIFFUSERS}/checks.py",), is_backend),
        "_native_math": Use("a backend that can be split", (f"{DIFFUSERS}/checks.py",), is_backend),
        "_pag_attn_processors": Use(
            "perturbed attention guidance", (f"{DIFFUSERS}/checks.py",), says(PAGMixin.pag_attn_processors.fget)
        ),
        "_tp_plan": Use("a model's own tensor plan", (f"{DIFFUSERS}/plans.py",), has(diffusers.ModelMixin)),
    },
}
USES = {name: use for names in TABLE.values() for name, use in names.items()}
NOT_PRIVATE = {"_exit"}  # os._exit is documented


def is_private(name):
    return name.startswith("_") and not name.startswith(("__", "_multicard")) and name.strip("_") != ""


def own_names(tree):
    """What a file defines itself: functions, classes, arguments, variables, attributes of its own ``self``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            yield node.attr


def is_self(node):
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def mentioned(tree):
    """Attributes of anything but ``self``, what is imported, and text that is nothing but a name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not is_self(node.value):
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("multicard"):
            yield from [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            yield from [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            yield node.value


def foreign_names(path):
    """Private names in a file that aren't its own; one that is both its own and in TABLE counts as the other's."""
    tree = ast.parse(path.read_text())
    ours = set(own_names(tree)) - set(USES) | NOT_PRIVATE
    return {name for name in mentioned(tree) if is_private(name)} - ours


def test_the_table_has_every_use_and_no_other():
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        for name in foreign_names(path):
            found.setdefault(name, []).append(path.relative_to(SOURCE).as_posix())
    wrong = [
        f"{name} is used in {', '.join(found.get(name, ['no file']))}, TABLE says {', '.join(USES[name].files)}"
        if name in USES
        else f"{name} of another library is used in {', '.join(found[name])}: add it to TABLE, with what it is for"
        for name in sorted({*found, *USES})
        if name not in USES or sorted(USES[name].files) != found.get(name)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("library", "name"), [(library, name) for library in TABLE for name in TABLE[library]])
def test_the_installed_library_still_has_it(library, name):
    use = USES[name]
    assert use.there(name), f"this {library} has no {name} any more: {', '.join(use.files)} need it for {use.why}"

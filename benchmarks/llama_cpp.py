"""llama.cpp as a peer: the wheel ``xllamacpp`` in an environment of its own, with the same weights as ours.

Run as a script inside that environment it serves requests: one JSON line each on standard input and output.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

REQUIREMENT = "xllamacpp==2026.10.11549"
ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / ".cache" / "llama_cpp"
CONTEXT = 1024  # tokens of a prompt and its answer


class LlamaCpp:
    """A process with SmolLM2 as GGUF in ``kind``, and so many threads and requests at once."""

    def __init__(self, kind: str, threads: int, slots: int = 1) -> None:
        command = [str(_environment()), __file__, str(weights(kind)), str(threads), str(slots)]
        self._process = subprocess.Popen(command, stdin=-1, stdout=-1, stderr=subprocess.DEVNULL, text=True)
        self._ask({"prompts": [[1, 2, 3]], "new": 2})

    def run(self, ids: list[int], new: int) -> tuple[float, float]:
        """Seconds to the first token, and for each of the others."""
        first = self._ask({"prompts": [ids], "new": 1})
        return first, (self._ask({"prompts": [ids], "new": new}) - first) / (new - 1)

    def batch(self, prompts: list[list[int]], new: int) -> float:
        """Tokens a second after the first ones, of all prompts together."""
        first = self._ask({"prompts": prompts, "new": 1})
        return len(prompts) * (new - 1) / (self._ask({"prompts": prompts, "new": new}) - first)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _ask(self, request: dict[str, Any]) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"llama.cpp ended with code {self._process.wait()}")
        return float(line)


def _environment() -> pathlib.Path:
    """The Python of an environment that has xllamacpp; made when first asked for."""
    python = FOLDER / "venv" / "bin" / "python"
    if not (FOLDER / "venv" / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(FOLDER / "venv")], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", REQUIREMENT, "numpy"], check=True)
        (FOLDER / "venv" / "ready").touch()
    return python


def weights(kind: str) -> pathlib.Path:
    """SmolLM2's GGUF with its matrices in ``kind``: the numbers that its own Q4_1 stands for, rounded to that."""
    target = FOLDER / f"smollm2-{kind}.gguf"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        sys.path.insert(0, str(ROOT / "examples"))
        import smollm2

        with tempfile.TemporaryDirectory(dir=target.parent) as work:
            source = smollm2.download(pathlib.Path(work)) / smollm2.GGUF
            if kind == "Q4_1":
                source.rename(target)
            else:
                _convert(source, target, kind)
    return target


def _convert(source: pathlib.Path, target: pathlib.Path, kind: str) -> None:
    import gguf

    name = {"float32": "F32", "bfloat16": "BF16"}.get(kind, kind)
    stored = gguf.GGMLQuantizationType[name]

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    left_out = ("general.architecture", "general.file_type", "general.quantization_version")
    for key, field in reader.fields.items():
        if key not in left_out and not key.startswith("GGUF."):
            kind, element = field.types[0], field.types[-1]
            arrays = {"sub_type": element} if kind == gguf.GGUFValueType.ARRAY else {}
            writer.add_key_value(key, field.contents(), kind, **arrays)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if name == "F32" else f"MOSTLY_{name}"])
    for tensor in reader.tensors:
        numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if numbers.ndim > 1:
            writer.add_tensor(tensor.name, gguf.quants.quantize(numbers, stored), raw_dtype=stored)
        else:
            writer.add_tensor(tensor.name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def serve(path: str, threads: int, slots: int) -> None:
    import xllamacpp

    asked = xllamacpp.CommonParams()
    asked.model.path = path
    asked.n_ctx, asked.n_parallel, asked.verbosity = CONTEXT * slots, slots, 0
    asked.cpuparams.n_threads = asked.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(asked)
    for line in sys.stdin:
        request = json.loads(line)
        common = {"n_predict": request["new"], "temperature": 0, "cache_prompt": False, "ignore_eos": True}
        calls = [
            threading.Thread(target=server.handle_completions, args=({"prompt": prompt, **common},))
            for prompt in request["prompts"]
        ]
        begin = time.perf_counter()
        for call in calls:
            call.start()
        for call in calls:
            call.join()
        print(time.perf_counter() - begin, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

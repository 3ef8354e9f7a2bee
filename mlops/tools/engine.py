"""Starts an engine that samples PPO's rollouts: a vLLM server that gets its weights from the trainer.

    python -m mlops.tools.engine models/sft --port 8000                  needs `make engines`
    python -m mlops.tools.engine models/sft --port 8001 -- --tensor-parallel-size 2      more of `vllm serve`'s options

It reads the model's configuration and tokenizer only: its weights are random until the trainer sends the policy's. Room
for a prompt and a response is that of the profile's section ppo. It listens on 127.0.0.1 unless told otherwise: whoever
reaches it may change its weights.
"""

import argparse
import json
import os
import shlex
import shutil
import socket
import sys
from pathlib import Path

from mlops.config.loader import load_params
from rlhf.errors import UserError, one_line

ENVIRONMENT = Path(".venv-engines")  # made by `make engines`
WAITING_TOKENS = 32_768  # of prompts in one pass: on a CPU vLLM 0.32 cannot sample a prompt of which it has read a part


def command_of(model: Path, port: int, host: str, dtype: str, length: int, on_gpu: bool) -> list[str]:
    """`vllm serve` with the options that the connection needs."""
    return ["vllm", "serve", str(model.resolve()), "--host", host, "--port", str(port), "--dtype", dtype,
            "--max-model-len", str(length), "--load-format", "dummy", "--logprobs-mode", "processed_logprobs",
            "--weight-transfer-config", json.dumps({"backend": "instructflow"}),
            "--hf-overrides", json.dumps({"tie_word_embeddings": False}),
            *([] if on_gpu else ["--max-num-batched-tokens", str(max(WAITING_TOKENS, length)), "--enforce-eager"])]


def check(model: Path, host: str, port: int) -> None:
    """Raises UserError where the folder is no language model's, or the port is taken."""
    if not (model / "config.json").is_file():
        raise UserError(f"{model}: no model folder (no config.json)")
    kinds = json.loads((model / "config.json").read_text(encoding="utf-8")).get("architectures") or []
    if any("Classification" in kind for kind in kinds):
        raise UserError(f"{model}: a reward model ({kinds[0]}); an engine samples from a policy, e.g. models/sft")
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {os.strerror(error.errno) if error.errno else error}") from None


def program(root: Path) -> Path:
    """vLLM's own, of its environment. Raises UserError where there is none."""
    own = root / ENVIRONMENT / "bin" / "vllm"
    found = own if own.exists() else Path(shutil.which("vllm") or "")
    if not found.name:
        raise UserError("no vllm here: make engines")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mlops.tools.engine", allow_abbrev=False,
                                     description="Starts a vLLM server that samples PPO's rollouts.")
    parser.add_argument("model", type=Path, help="a policy's folder, e.g. models/sft")
    parser.add_argument("--port", type=int, default=8000, help="8000 unless told otherwise")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on: 127.0.0.1 unless told otherwise")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="as ppo.precision computes on the trainer's "
                        "machine; bfloat16 where there is a GPU here, else float32")
    parser.add_argument("options", nargs="?", metavar="-- OPTIONS", help="more options of `vllm serve`")
    own, more = sys.argv[1:], []
    if "--" in own:
        own, more = own[:own.index("--")], own[own.index("--") + 1:]
    options = parser.parse_args(own)
    with one_line("engine"):
        check(options.model, options.host, options.port)
        ppo = load_params(Path.cwd()).stages.ppo
        on_gpu = shutil.which("nvidia-smi") is not None
        command = command_of(options.model, options.port, options.host,
                             options.dtype or ("bfloat16" if on_gpu else "float32"),
                             ppo.max_prompt_tokens + ppo.max_new_tokens, on_gpu) + more
        path = program(Path.cwd())
        settings = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        if not on_gpu:  # GiB; the machine's other work has cores too
            settings |= {name: os.environ.get(name, value) for name, value in
                         (("VLLM_CPU_KVCACHE_SPACE", "1"), ("VLLM_CPU_OMP_THREADS_BIND", "nobind"))}
        os.environ.update(settings)
        print("engine:", *(f"{name}={shlex.quote(value)}" for name, value in settings.items()), shlex.join(command),
              flush=True)
        os.execv(path, [str(path), *command[1:]])


if __name__ == "__main__":
    main()

"""Which tensors an engine's model consists of, as its Hugging Face folder names them: read by transformers from the
configuration alone, in a process of its own, since vLLM changes transformers' classes in its processes.

    python -m rlhf.engines.expected < config.json      prints {name: shape} as JSON
"""

import json
import subprocess
import sys


def tensors_of(config: str) -> dict[str, list[int]]:
    """Name -> shape of a model with this configuration, its JSON. Raises RuntimeError where transformers has none."""
    done = subprocess.run([sys.executable, "-m", "rlhf.engines.expected"], input=config, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"transformers makes no model of this configuration: {done.stderr.strip()[-500:]}")
    found: dict[str, list[int]] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = json.load(sys.stdin)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    print(json.dumps({name: list(value.shape) for name, value in model.named_parameters()}))


if __name__ == "__main__":
    main()

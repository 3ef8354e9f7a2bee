"""What would stop a run later, or make its numbers worthless, found before anything runs: `instructflow check`.

    python -m flows.check [--profile NAME] [--set SECTION.NAME=VALUE]

Exit code 2 where something would stop the run; a warning stops nothing. Each finding says what to change.
"""

import argparse
import dataclasses
import os
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import flows.environment  # noqa: F401

# isort: split
from flows.execution import check_params
from flows.parameters import assigned
from flows.workspaces import Changes, changed_by, changed_profile, load_changed
from mlops import imports_done, program
from mlops.config.inputs import STAGES as WITH_INPUTS
from mlops.config.inputs import linked_files
from mlops.config.loader import (
    PARAMS_FILE,
    PROFILES_DIR,
    SOURCES_DIR,
    Params,
    is_resolved,
    load_params,
    load_profile,
    read_yaml,
)
from mlops.config.paths import MODELS
from mlops.config.sources import load_source
from mlops.printing import show_findings, terminal
from mlops.tools.row_lengths import accepted, millions, tokens_of
from rlhf.curation.preview import Look, look_at
from rlhf.curation.sources.spec import Source
from rlhf.errors import UserError, first_line, one_line
from rlhf.params import PpoParams, Profile, RmParams, SftParams
from tasks import launch

State = Literal["ok", "warn", "stop"]
MARKS = {"ok": "[green]ok[/]", "warn": "[yellow]warn[/]", "stop": "[red]STOP[/]"}
FOR_GPU = 10_000  # episodes that take days on a CPU
FEW_PROMPTS, FEW_PAIRS = 200, 500  # held-out prompts, comparisons to train on
OF_THE_MACHINE = ("machine", "memory", "disk")
LONG_SHARE = 0.05  # of rows that are longer than a stage takes
GB = 1e9
WEIGHT_BYTES = 4  # float32
PPO_BYTES = 2 * (4 + 4 + 8) + 2 * 4  # a parameter: policy and value model with gradient and Adam, two fixed models
SAVED_MODELS = 8  # base, SFT, reward model, policy, each in models/ and DVC's cache
CHECKPOINTS = 2 * 2 * (4 + 8)  # bytes a parameter: two checkpoints of policy and value model with Adam


@dataclasses.dataclass(frozen=True)
class Finding:
    """`what` was looked at, what was found, and unless that is ok what to change."""

    what: str
    state: State
    detail: str
    change: str = ""


@dataclasses.dataclass(frozen=True)
class Base:
    """The base model as it is before any stage: its codec, positions and number of parameters."""

    codec: Any
    context: int
    parameters: int


def findings(params: Params, root: Path) -> Iterator[Finding]:
    """All of them, the quick ones first. Raises nothing: what cannot be looked at is a finding."""
    profile = params.stages
    yield Finding("parameters", "ok", f"profile {params.profile}, seed {params.seed}, arms {', '.join(profile.arms)}")
    yield from _guarded("files", lambda: _files(params, root))
    yield from _guarded("machine", lambda: _machine(params))
    yield from _guarded("PPO", lambda: _warmup(profile))
    base: list[Base] = []
    yield from _guarded("base model", lambda: _base_model(profile, root, base))
    looks: dict[str, Look] = {}
    yield from _guarded("data", lambda: _data(params, root, looks))
    if base and looks:
        yield from _guarded("lengths", lambda: _lengths(profile, base[0], looks))
    if base or not profile.pretrain.base_model:  # else its size is not known
        size = base[0].parameters if base else own_parameters(profile)
        yield from _guarded("memory", lambda: _memory(profile, size))
        yield from _guarded("disk", lambda: _disk(root, size))
    yield from _guarded("servers", _servers)


def _guarded(what: str, look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from look()
    except UserError as error:
        yield Finding(what, "stop", str(error))
    except ImportError as error:
        yield Finding(what, "stop", f"{error}", "rm .venv/.installed; make setup")


# --- parameters, files, machine ---------------------------------------------------------------------------------------


def _warmup(profile: Profile) -> Iterator[Finding]:
    """Whether PPO has iterations left once the value model is warm."""
    for name, arm in profile.arms.items():
        iterations = arm.episodes // arm.batch_size
        if arm.value_warmup_iterations * 2 > iterations:
            yield Finding("PPO", "warn", f"arm {name}: up to {arm.value_warmup_iterations} of its {iterations} "
                          "iterations train the value model alone, so the policy may hardly change",
                          "more ppo.episodes, or fewer ppo.value_warmup_iterations")


def _files(params: Params, root: Path) -> Iterator[Finding]:
    count = sum(len(linked_files(stage, params, root)) for stage in WITH_INPUTS)
    yield Finding("files", "ok", f"{count} outside the checkout, all there" if count else "none outside the checkout")


def _machine(params: Params) -> Iterator[Finding]:
    import torch

    profile = params.stages
    gpus, cores = torch.cuda.device_count(), os.cpu_count() or 1
    asked = {name: launch.count(getattr(profile, name).processes) for name in ("pretrain", "sft", "rm", "evaluate")
             if hasattr(getattr(profile, name), "processes")} | {
        f"arm {name}": launch.count(arm.processes) for name, arm in profile.arms.items()}
    most = gpus or cores
    over = {name: count for name, count in asked.items() if count > most}
    kind = f"{gpus} GPUs" if gpus else f"no GPU, {cores} cores"
    for_gpu = bool(profile.pretrain.base_model) and max(arm.episodes for arm in profile.arms.values()) >= FOR_GPU
    if not gpus and params.profile.startswith("gpu"):
        yield Finding("machine", "stop", f"{kind}, and profile {params.profile} is for GPUs",
                      "a GPU, or another profile")
    elif not gpus and for_gpu:
        yield Finding("machine", "warn", f"{kind}, and {max(arm.episodes for arm in profile.arms.values()):,} episodes "
                      "are meant for a GPU", "ppo.episodes, or instructflow init ... --device cpu")
    elif over:
        name, count = next(iter(over.items()))
        yield Finding("machine", "stop" if gpus else "warn", f"{kind}; {name} asks for {count} processes",
                      f"processes: {most} or fewer")
    else:
        yield Finding("machine", "ok", kind)


# --- base model -------------------------------------------------------------------------------------------------------


def _big_model(profile: Profile, config: Any) -> Iterator[Finding]:
    """What a stage would refuse of how the base model is held and split."""
    from rlhf.model.nf4 import installed
    from rlhf.training.tensor_parallel import problem

    sections: dict[str, SftParams | RmParams | PpoParams] = {
        "sft": profile.sft, "rm": profile.rm, **{f"arms.{name}": arm for name, arm in profile.arms.items()}}
    for name, section in sections.items():
        if found := problem(config, section.tensor_parallel):
            yield Finding("base model", "stop", f"{name}.tensor_parallel = {section.tensor_parallel}: {found}")
        if section.lora_base == "nf4" and not installed():
            yield Finding("base model", "stop", f"{name}.lora_base = nf4: needs bitsandbytes",
                          "pip install 'instructflow[nf4]'")


def _base_model(profile: Profile, root: Path, found: list[Base]) -> Iterator[Finding]:
    """Tokenizer, template and configuration; the weights are read by stage pretrain."""
    name = profile.pretrain.base_model
    if not name:
        yield Finding("base model", "ok", f"a small GPT of {millions(own_parameters(profile))} parameters, trained "
                                          "from scratch")
        return
    import datetime

    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    from rlhf.model.chat_format import ChatFormatError, codec_with_pad
    from rlhf.model.folders import check_folder

    folder = str(root / name) if (root / name).is_dir() else name
    try:
        check_folder(folder)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        codec = codec_with_pad(folder, datetime.date.fromisoformat(profile.pretrain.template_date))
        import torch

        with torch.device("meta"):
            size = AutoModelForCausalLM.from_config(config, trust_remote_code=False).num_parameters()
    except UserError as error:
        said = "" if isinstance(error, ChatFormatError) else "cannot be used: "
        yield Finding("base model", "stop", f"{name}: {said}{error}", "another pretrain.base_model")
        return
    except Exception as error:  # whatever a foreign configuration makes transformers raise
        yield Finding("base model", "stop", f"{name}: cannot be loaded: {first_line(error)}",
                      "pretrain.base_model: a folder with config.json, tokenizer and safetensors, or a hub name")
        return
    if stops := list(_big_model(profile, config)):
        yield from stops
        return
    folder_path = Path(folder)
    if folder_path.is_dir() and not list(folder_path.glob("*.safetensors")):
        yield Finding("base model", "stop", f"{name}: has no *.safetensors", "save it with safe_serialization=True")
        return
    for file in sorted(folder_path.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as weights:  # reads the header, and compares it with the length
                weights.keys()
        except Exception as error:
            yield Finding("base model", "stop", f"{file}: is damaged: {first_line(error)}", "get the file again")
            return
    own = "its own chat template" if codec.tokenizer.chat_template and _has_template(folder) else \
        "no chat template: the project's own is used"
    context = int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2048)
    longest = _longest(profile)
    found.append(Base(codec, context, size))
    if longest[1] > context:
        yield Finding("base model", "stop", f"{name} has {context:,} positions, and {longest[0]} makes {longest[1]:,} "
                      "tokens", f"{longest[0]} smaller")
        return
    yield Finding("base model", "ok", f"{name}: {millions(size)} parameters, {context:,} positions, {own}")


def _has_template(folder: str) -> bool:
    from rlhf.model.tokenizer import load_tokenizer

    return bool(load_tokenizer(folder).chat_template)


def _longest(profile: Profile) -> tuple[str, int]:
    """The parameter that makes the longest sequence, and its tokens."""
    lengths = {"sft.max_tokens": profile.sft.max_tokens, "rm.max_tokens": profile.rm.max_tokens,
               "ppo.max_prompt_tokens + max_new_tokens": max(arm.max_prompt_tokens + arm.max_new_tokens
                                                             for arm in profile.arms.values())}
    name = max(lengths, key=lambda key: lengths[key])
    return name, lengths[name]


def own_parameters(profile: Profile) -> int:
    """The parameters of the small GPT that is trained from scratch, about."""
    pretrain = profile.pretrain
    return 12 * pretrain.n_layer * pretrain.n_embd**2 + (pretrain.vocab_size + pretrain.context) * pretrain.n_embd


# --- data -------------------------------------------------------------------------------------------------------------


def _data(params: Params, root: Path, looks: dict[str, Look]) -> Iterator[Finding]:
    profile = params.stages
    if profile.ingest.source == "embedded":
        yield Finding("data", "ok", "the embedded world: no files")
        return
    spec = root / PROFILES_DIR / SOURCES_DIR / f"{profile.ingest.spec}.yaml"
    source = load_source(spec)
    if not isinstance(source, Source):
        yield Finding("data", "stop", f"{spec}: describes the embedded source", "ingest.source: embedded")
        return
    if missing := [role for role in ("sft", "rm", "ppo") if not getattr(source, role)]:
        yield Finding("data", "stop", f"{spec}: nothing for {', '.join(missing)}", "the pipeline needs demonstrations "
                      "(sft), comparisons (rm) and prompts (ppo); entries may read the same file")
        return
    looks |= look_at(source, spec.parent, params.seed)
    if any(look.refused and not look.whole for look in looks.values()):  # a few rows more tell whether it is so
        looks |= look_at(source, spec.parent, params.seed, further=True)
    for role, look in looks.items():
        if look.refused:
            yield Finding(f"data, {role}", "stop" if look.whole else "warn", look.refused,
                          f"python -m tasks.ingest --source {spec} --preview 3")
    if any(look.refused for look in looks.values()):
        looks.clear()
        return
    sizes = Counter(len(row["completions"]) for row in looks["rm"].kept)
    smallest = min(sizes)
    if smallest < profile.validate.min_k:
        yield Finding("data, rm", "stop", f"{sizes[smallest]:,} comparisons have {smallest} completions, and "
                      f"validate.min_k = {profile.validate.min_k}", f"validate.min_k: {smallest}")
    for role, parameter in (("sft", "max_prompt_chars"), ("rm", "max_prompt_chars"), ("ppo", "max_prompt_chars")):
        limit = getattr(profile.validate, parameter)
        if over := sum(len(_text(row["prompt"])) > limit for row in looks[role].kept):
            yield Finding(f"data, {role}", "stop", f"{over:,} prompts are longer than validate.{parameter} = {limit:,}",
                          f"validate.{parameter}, or rules.{parameter} of the description")
    valid = min(profile.evaluate.prompts, sum(row["split"] == "valid" for row in looks["ppo"].kept))
    whole = looks["ppo"].whole
    if whole and not valid:
        yield Finding("data, ppo", "stop", "no prompt is held out (split valid), so nothing could be measured",
                      "rules.valid_share, or more users: a split goes by user")
    elif whole and valid < FEW_PROMPTS:
        yield Finding("data, ppo", "warn", f"{valid} held-out prompts: win rates will have wide intervals",
                      f"evaluate.prompts, more prompts, or a larger rules.valid_share; {FEW_PROMPTS} decide something")
    pairs = round((1 - profile.judge.share) * sum(row["split"] == "train" for row in looks["rm"].kept))
    if looks["rm"].whole and pairs < FEW_PAIRS:
        yield Finding("data, rm", "warn", f"{pairs} comparisons to train on: the reward model will be weak",
                      f"more of them; {FEW_PAIRS} or more teach something")
    kept = ", ".join(f"{role} {len(look.kept):,} of {look.read:,}" for role, look in looks.items())
    yield Finding("data", "ok", f"kept of the first rows: {kept}; completions per comparison "
                  f"{'–'.join(str(size) for size in dict.fromkeys((smallest, max(sizes))))}")


def _text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(str(turn.get("content", "")) for turn in prompt)


def _lengths(profile: Profile, base: Base, looks: Mapping[str, Look]) -> Iterator[Finding]:
    """Rows that the chat template refuses, and how many are longer than a stage takes: it drops them."""
    arm = profile.arms[profile.promoted]
    for name, limit, answers in (("sft.max_tokens", profile.sft.max_tokens, "completion"),
                                 ("rm.max_tokens", profile.rm.max_tokens, "completions"),
                                 ("ppo.max_prompt_tokens", arm.max_prompt_tokens, "")):
        role = name.partition(".")[0]
        rows, refused = accepted(base.codec, looks[role].kept)
        if refused:
            yield Finding("template", "stop", f"{role}: {len(refused):,} of {len(looks[role].kept):,} rows: "
                          f"{refused[0]}", f"rules.tokenizer: {profile.pretrain.base_model} in the description takes "
                          "such rows out and counts them; or another base model")
        if not rows:
            continue
        counts = [sum(pair) for pair in tokens_of(base.codec, rows, answers)]
        beyond = sum(count > base.context for count in counts)
        if beyond:
            yield Finding("lengths", "stop", f"{role}: {beyond:,} of {len(counts):,} rows have more "
                          f"than the model's {base.context:,} positions, and stage validate stops at them",
                          "rules.tokenizer with rules.max_prompt_tokens and rules.max_completion_tokens in the "
                          "description drop them")
            continue
        over = sum(count > limit for count in counts)
        most = base.context - (0 if answers else arm.max_new_tokens)
        fits = sorted(counts)[min(len(counts) - 1, int(0.95 * len(counts)))]
        share = over / len(counts)
        whole = looks[role].whole
        state: State = "stop" if share == 1 and whole else "warn" if share > LONG_SHARE else "ok"
        yield Finding("lengths", state, f"{name} = {limit}: {share:.0%} of the rows are longer and would be dropped; "
                      f"95 % have at most {fits:,} tokens", "" if state == "ok" else f"{name} = {min(fits, most)}"
                      + (f", the most that the model's {base.context:,} positions leave" if fits > most else ""))


# --- resources --------------------------------------------------------------------------------------------------------


def _memory(profile: Profile, parameters: int) -> Iterator[Finding]:
    """Weights, gradients and optimizer of PPO, the largest stage, without activations (docs/capacity.md)."""
    import torch

    arm = profile.arms[profile.promoted]
    bases = 1 if profile.rm.lora_rank and not arm.shard else 4  # rlhf/model/adapter_folder.py: one base for all models
    needed = parameters * (bases * WEIGHT_BYTES if arm.lora_rank else PPO_BYTES)
    processes = launch.count(arm.processes)
    if arm.shard:
        needed //= processes
    if torch.cuda.is_available():
        there, where = torch.cuda.get_device_properties(0).total_memory, "GPU 0"
    else:
        there, where = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine"
        needed *= 1 if arm.shard else processes
    detail = f"PPO's weights and optimizer take {needed / GB:.1f} GB, {where} has {there / GB:.0f} GB"
    if needed > there:
        yield Finding("memory", "stop", detail, "ppo.lora_rank: 16, ppo.shard over more processes, or a smaller model")
    elif needed > 0.7 * there:
        yield Finding("memory", "warn", detail, "activations come on top: gradient_checkpointing, micro_batch_size")
    else:
        yield Finding("memory", "ok", detail)


def _disk(root: Path, parameters: int) -> Iterator[Finding]:
    needed = parameters * (SAVED_MODELS * WEIGHT_BYTES + CHECKPOINTS) + 0.5 * GB
    free = shutil.disk_usage(root).free
    detail = f"models and checkpoints take about {needed / GB:.1f} GB, {free / GB:.0f} GB are free"
    yield Finding("disk", "stop" if free < needed else "ok", detail,
                  "free some: `dvc gc -w` removes old versions from the cache" if free < needed else "")


def _servers() -> Iterator[Finding]:
    """Servers of one's own that are named must answer; without them a run starts what it needs."""
    import asyncio

    from flows.preflight import check_server

    if os.environ.get("PREFECT_API_URL"):
        asyncio.run(check_server())
    named = [name for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI") if os.environ.get(name)]
    yield Finding("servers", "ok", f"named: {', '.join(named)}" if named else "none are needed")


# --- the command ------------------------------------------------------------------------------------------------------


def params_of(root: Path, profile: str | None, changes: Changes) -> Params:
    """The parameters as a run with these changes would have them. Raises UserError."""
    check_params(root, profile)
    if not profile and not changes:
        return load_params(root)
    top = read_yaml(root / PARAMS_FILE)
    name = profile or str(top["profile"])
    path = root / PROFILES_DIR / f"{name}.yaml"
    stages = load_changed(path, changed_profile(read_yaml(path), changes, path)) if changes else load_profile(path)
    return Params(int(top.get("seed", 1)), name, stages)


def stop_early(params: Params, root: Path, elsewhere: bool = False) -> None:
    """Raises UserError with what would stop the run; for a run's start, where data or model are the user's own and have
    not been read with these parameters yet. `elsewhere`: other machines train, so this one's size says nothing."""
    profile = params.stages
    if profile.ingest.source == "embedded" and not profile.pretrain.base_model:
        return
    if is_resolved(profile, root) and (root / MODELS["base"] / "config.json").is_file():
        return
    stops = []
    for item in findings(params, root):
        if item.state == "stop" and not (elsewhere and item.what in OF_THE_MACHINE):
            stops.append(item)
            if item.what == "machine":
                break  # known at once; what follows may wait for a hub that does not answer
    if stops:
        raise UserError("; ".join(f"{item.what}: {item.detail}" + (f" → {item.change}" if item.change else "")
                                  for item in stops[:3]))


def main() -> None:
    parser = argparse.ArgumentParser(prog=program("flows.check"), description=(
        "Looks for all that would stop a run later, before anything runs."))
    parser.add_argument("--profile", help="a file of profiles/; without: that of params.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.NAME=VALUE", help="as of a run")
    options = parser.parse_args()
    imports_done()
    root = Path.cwd()
    with one_line("check"):
        changes = Changes(stages=changed_by(assigned(options.set)))
        params = params_of(root, options.profile or None, changes)
        found = list(findings(params, root))
        show_findings(((MARKS[item.state], item.what, item.detail, "" if item.state == "ok" else item.change)
                       for item in found), terminal())
        stops = sum(item.state == "stop" for item in found)
    if stops:
        print(f"check: {stops} finding{'s' if stops > 1 else ''} would stop the run", file=sys.stderr)
        raise SystemExit(2)
    chosen = (f" --profile {options.profile}" if options.profile else "") + "".join(
        f" --set {shlex.quote(text)}" for text in options.set)
    doubts = sum(item.state == "warn" and item.what.startswith("data") and "are lost" in item.detail for item in found)
    certain = "Nothing would stop the run." if not doubts else (
        "The first rows would stop the run; it goes on only if the later ones are better: read the warnings.")
    print(f"{certain} Next: instructflow run{chosen}")


if __name__ == "__main__":
    main()

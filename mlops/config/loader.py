"""Reads params.yaml and the profile it names into the typed parameters of `rlhf.params`.

A wrong key or value is refused in one line: the file, the key, the value and what is allowed.
"""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from datetime import date
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from mlops.config.paths import PARAMETERS
from rlhf.errors import UserError
from rlhf.files import write_atomic
from rlhf.params import PpoParams, Profile, RmParams, SftParams

PARAMS_FILE = "params.yaml"
PROFILES_DIR = "profiles"
SOURCES_DIR = "sources"  # in the profiles' folder
# Defaults of a profile whose data come from a source description: the others are those of the embedded data.
OF_DESCRIBED_SOURCES: dict[str, dict[str, Any]] = {"validate": {
    "counts": "none", "min_k": 2, "max_prompt_chars": 100_000, "max_completion_chars": 100_000}}
LIMIT_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
VLLM_HOTTEST = 2.0  # its highest temperature
RENAMED = {("ppo", "kept_passes"): "reuse_forward_passes"}  # (section or "", former name): name
LONGEST_YAML, MOST_VALUES = 2**19, 100_000  # bytes, values
PROFILE_NAME = re.compile(r"\w[\w.-]*")
ONE_ARM: dict[str, Any] = {"ppo": {}}  # of a profile that names none
# Names of models, stages and files, and endings of metric keys, that no arm can have.
NO_ARMS = ("base", "base_prompted", "sft", "rm", "pretrain", "rounds", "promoted", "policies", "ingest", "validate",
           "evaluate", "promote", "best_of_n", "mean")
NO_ENDINGS = ("_low", "_high", "_n", "_equal_length", "_length_weight")


@dataclass(frozen=True)
class Params:
    """params.yaml (seed, name of the profile) and the profile itself."""

    seed: int
    profile: str
    stages: Profile
    rounds: Mapping[str, "Round"] = field(default_factory=dict)


class Round(BaseModel):
    """One entry of `rounds` in params.yaml, for which dvc.yaml has one stage each: the inputs of the round.

    `policy`: folder of the policy that is sampled. `reward_model`, `ensemble`: those of the previous round; models/sft
    in the first round, which has none. `rows`: the ranked rows so far.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    number: int = Field(ge=1)
    policy: str
    reward_model: str
    ensemble: str
    rows: str


class _TopLevel(BaseModel):
    """params.yaml."""

    model_config = ConfigDict(extra="forbid", strict=True)
    seed: int = Field(ge=0, lt=2**31)
    profile: str
    arms: list[str] = Field(default_factory=lambda: list(ONE_ARM))
    promoted: str = next(iter(ONE_ARM))
    rounds: dict[str, Round] = Field(default_factory=dict)


@cache
def model_of(params_class: type) -> type[BaseModel]:
    """The pydantic model with the fields, types, limits and help texts of a dataclass from `rlhf.params`."""
    hints = get_type_hints(params_class)
    definitions: dict[str, Any] = {}
    for item in fields(params_class):
        metadata = dict(item.metadata)
        help_text = metadata.pop("help")
        default: dict[str, Any] = {"default": item.default}
        if item.default_factory is not MISSING:
            default = {"default_factory": item.default_factory}
        if typing.get_origin(hints[item.name]) is dict:  # the limits apply to its values
            kind = typing.get_args(hints[item.name])[1]
            definitions[item.name] = (dict[str, Annotated[kind, Field(**metadata)]],  # type: ignore[valid-type]
                                      Field(description=help_text, **default))
            continue
        definitions[item.name] = (hints[item.name], Field(description=help_text, **default, **metadata))
    config = ConfigDict(extra="forbid", allow_inf_nan=False)
    return create_model(params_class.__name__, __config__=config, **definitions)


class _UniqueKeys(yaml.SafeLoader):
    """YAML that refuses a key that appears twice in a mapping; PyYAML silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(problem=f"key {key.value} appears twice",
                                                        problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> Any:
        """YAML 1.1 reads 010 as 8 and 1:30 as 90, which nobody means who writes it today."""
        if ":" in node.value or re.match(r"[+-]?0[0-9_]", node.value):
            raise yaml.constructor.ConstructorError(
                problem=f"YAML reads {node.value} as another number; write that number, or a text in quotes",
                problem_mark=node.start_mark)
        is_int = node.tag.endswith(":int")
        return self.construct_yaml_int(node) if is_int else self.construct_yaml_float(node)


_UniqueKeys.add_constructor("tag:yaml.org,2002:int", _UniqueKeys.construct_number)
_UniqueKeys.add_constructor("tag:yaml.org,2002:float", _UniqueKeys.construct_number)


def _values_in(node: yaml.Node, counted: dict[int, int]) -> int:
    """The values below a node with every alias written out. Raises RecursionError for a node that holds itself."""
    if id(node) not in counted:
        children = [child for item in node.value for child in (item if isinstance(item, tuple) else [item])
                    ] if isinstance(node, yaml.CollectionNode) else []
        total = 1 + sum(_values_in(child, counted) for child in children)
        counted[id(node)] = total
    return counted[id(node)]


def read_yaml(path: Path) -> Mapping[str, Any]:
    """The keys and values of a YAML file.

    Raises UserError for a file that is missing, not UTF-8, not YAML, has a key twice or is no mapping.
    """
    try:
        if path.stat().st_size > LONGEST_YAML:
            raise UserError(f"{path}: has {path.stat().st_size:,} bytes; at most {LONGEST_YAML:,} are read")
        loader = _UniqueKeys(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if node is not None and (values := _values_in(node, {})) > MOST_VALUES:
            raise UserError(f"{path}: its aliases stand for {values:,} values; at most {MOST_VALUES:,} are read")
        content = None if node is None else loader.construct_document(node)
    except RecursionError:
        raise UserError(f"{path}: is nested too deeply, or holds itself") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}") from None
    except (yaml.YAMLError, TypeError, ValueError) as error:  # a list as a key, a date that does not exist
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, Mapping):
        found = "nothing" if content is None else type(content).__name__
        raise UserError(f"{path}: expected keys and values, found {found}")
    return {str(key): value for key, value in content.items()}


def allowed(params_class: type, name: str) -> str:
    """The allowed range of a field in words, for an error line."""
    item = next(item for item in fields(params_class) if item.name == name)
    limits = " and ".join(f"{LIMIT_SIGNS[key]} {item.metadata[key]:g}" for key in LIMIT_SIGNS if key in item.metadata)
    hint = get_type_hints(params_class)[name]
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        kind = "one of " + ", ".join(str(item) or "nothing" for item in typing.get_args(hint))
    elif origin is types.UnionType:
        kind = "a name or a list of names"
    else:
        of = typing.get_args(hint)[1] if origin is dict else None
        values = "texts" if of is str else "numbers" if of in (int, float) else "values"
        kind = {None: getattr(hint, "__name__", ""), dict: f"names and {values}", list: "a list of names"}[origin]
    return kind + (f" {limits}" if limits else "")


def unknown_key(path: Path, key: str, known: list[str]) -> UserError:
    """The error for a key that does not exist: it gives the new or the closest name, else all of them."""
    section, _, name = key.rpartition(".")
    former = ("ppo" if section.startswith("arms.") else section, name)
    if former in RENAMED:
        return UserError(f"{path}: {key} is now called {key.removesuffix(name)}{RENAMED[former]}")
    close = difflib.get_close_matches(name, known, n=1)
    advice = f"did you mean {close[0]}?" if close else "known keys: " + ", ".join(known)
    return UserError(f"{path}: unknown key {key}; {advice}")


def check_section(params_class: type, values: Any, path: Path, section: str) -> Any:
    """One section of a profile, checked, as an instance of its dataclass.

    Raises UserError with the file, the key, the value and the allowed range.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{path}: {section}: expected keys and values, found {values!r}")
    values = {str(key): value.isoformat() if type(value) is date else value for key, value in values.items()}
    known = get_type_hints(params_class)
    for name, value in values.items():
        if isinstance(value, bool) and known.get(name) in (int, float):  # pydantic would read true as 1
            raise UserError(f"{path}: {section}.{name} = {value!r}: must be {allowed(params_class, name)}")
    try:
        checked = model_of(params_class).model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            raise unknown_key(path, f"{section}.{name}", [item.name for item in fields(params_class)]) from None
        raise UserError(
            f"{path}: {section}.{name} = {first['input']!r}: must be {allowed(params_class, name)}"
        ) from None
    return params_class(**checked.model_dump())


def check_values(section: str, values: Mapping[str, Any], where: Path) -> None:
    """Values for some parameters of a section, `arms.NAME` for an arm's, each by its own limits. Raises UserError."""
    hints = get_type_hints(Profile)
    first, _, arm = section.partition(".")
    if first not in hints or bool(arm) != (first == "arms"):
        raise unknown_key(where, section, [name for name in hints if name != "arms"] + ["arms.NAME"])
    check_section(PpoParams if arm else hints[first], values, where, section)


def load_params(root: Path = Path(".")) -> Params:
    """Reads `root`/params.yaml and the profile it names.

    Raises UserError, one line, for a missing file, an unknown profile or key, and a value out of range.
    """
    path = root / PARAMS_FILE
    content = read_yaml(path)
    try:
        top = _TopLevel.model_validate(dict(content))
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            raise unknown_key(path, name, list(_TopLevel.model_fields)) from None
        allowed = {"seed": "an int >= 0 and < 2^31", "profile": "the name of a file in profiles/",
                   "arms": "what `python -m mlops.config.arms` writes",
                   "promoted": "what `python -m mlops.config.arms` writes",
                   "rounds": "what `python -m flows.rounds` writes"}[name]
        problem = "is missing" if first["type"] == "missing" else f"= {first['input']!r}"
        raise UserError(f"{path}: {name} {problem}: must be {allowed}") from None
    profiles = sorted(item.stem for item in (root / PROFILES_DIR).glob("*.yaml"))
    if not PROFILE_NAME.fullmatch(top.profile):
        raise UserError(f"{path}: profile = {top.profile!r}: a profile's name has letters, digits, _, . and -")
    if top.profile not in profiles:
        raise UserError(f"{path}: unknown profile {top.profile!r}: must be one of {', '.join(profiles)}")
    profile = load_profile(root / PROFILES_DIR / f"{top.profile}.yaml")
    for name, given, wanted in (("arms", top.arms, list(profile.arms)), ("promoted", top.promoted, profile.promoted)):
        if given != wanted:
            raise UserError(f"{path}: {name} = {as_yaml(given)}: must be {as_yaml(wanted)}, as in "
                            f"{PROFILES_DIR}/{top.profile}.yaml; `python -m mlops.config.arms` writes it")
    if top.rounds:
        check_rounds(profile, root / PROFILES_DIR / f"{top.profile}.yaml")
    return Params(top.seed, top.profile, profile, top.rounds)


def check_rounds(profile: Profile, path: Path) -> None:
    """The rules for a profile whose rounds are run. Raises UserError."""
    rounds, ppo = profile.rounds, profile.arms.get(profile.promoted, profile.ppo)
    for holds, message in (
        (rounds.episodes >= ppo.batch_size,
         f"rounds.episodes = {rounds.episodes}: must be >= ppo.batch_size = {ppo.batch_size}"),
        (rounds.restart or not ppo.lora_rank,
         "rounds.restart = False: must be True where ppo.lora_rank > 0: the reference is the policy without adapters"),
    ):
        if not holds:
            raise UserError(f"{path}: {message}")


def as_yaml(value: str | list[str]) -> str:
    """A name, or names as a list in one line."""
    return value if isinstance(value, str) else f"[{', '.join(value)}]"


def load_profile(path: Path, changed: Mapping[str, Any] | None = None) -> Profile:
    """Reads one profile; missing sections and keys take their defaults, some of which follow from the data source.

    `changed`: sections in the place of those in the file. Raises UserError.
    """
    content = _with_source_defaults(read_yaml(path) if changed is None else changed, path)
    hints = get_type_hints(Profile)
    for section in content:
        if section not in hints:
            raise unknown_key(path, str(section), list(hints))
    sections = {name: check_section(hints[name], {} if content.get(name) is None else content[name], path, name)
                for name in hints if name != "arms"}
    changes = _changes_of_arms(ONE_ARM if content.get("arms") is None else content["arms"], sections, path)
    profile = Profile(**sections, arms={name: dataclasses.replace(sections["ppo"], **own)
                                        for name, own in changes.items()})
    _check_together(profile, path)
    _check_corpus(profile, content, path)
    for name, own in changes.items():
        _check_ppo(profile.arms[name], path, dict.fromkeys(own, f"arms.{name}"))
    if profile.promoted not in changes or (len(changes) > 1 and not profile.promote.arm):
        why = "" if profile.promote.arm else " where there are several arms"
        raise UserError(f"{path}: promote.arm = {profile.promote.arm!r}: must be one of {', '.join(changes)}{why}")
    return profile


def described_source(profile: Profile, root: Path) -> dict[str, Any]:
    """The content of the source description that the profile names; empty for the embedded source. What is wrong with
    it is said by whoever reads the data."""
    spec = root / PROFILES_DIR / SOURCES_DIR / f"{profile.ingest.spec}.yaml"
    return dict(read_yaml(spec)) if profile.ingest.spec and spec.is_file() else {}


def resolved(profile: Profile, root: Path) -> dict[str, Any]:
    """All that DVC compares: every section of a profile with its defaults filled in, and `source`, the description."""
    return {**dataclasses.asdict(profile), "source": described_source(profile, root)}


def write_resolved(profile: Profile, root: Path) -> None:
    """Writes build/parameters.yaml."""
    text = yaml.safe_dump(resolved(profile, root), sort_keys=False, allow_unicode=True)
    write_atomic(root / PARAMETERS, f"# Made by stage parameters; change profiles/ instead.\n{text}".encode())


def is_resolved(profile: Profile, root: Path) -> bool:
    """Whether build/parameters.yaml holds these parameters."""
    try:
        return bool(yaml.safe_load((root / PARAMETERS).read_text(encoding="utf-8")) == resolved(profile, root))
    except (OSError, ValueError, yaml.YAMLError):
        return False


def _description(content: Mapping[str, Any], path: Path) -> tuple[Path, Mapping[str, Any]] | None:
    """The source description that the profile at `path` names, with its keys; None for the embedded source."""
    ingest = content.get("ingest")
    name = ingest.get("spec") if isinstance(ingest, Mapping) and ingest.get("source") != "embedded" else None
    if not isinstance(name, str) or not name or "source" not in content["ingest"]:
        return None
    spec = path.parent / SOURCES_DIR / f"{name}.yaml"
    if not spec.is_file():
        known = ", ".join(sorted(file.stem for file in spec.parent.glob("*.yaml"))) or "none"
        raise UserError(f"{path}: ingest.spec = {name!r}: {spec} is not there; descriptions: {known}")
    return spec, read_yaml(spec)


def _with_source_defaults(content: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """The profile with the defaults that follow from its data source, where it says nothing itself: those of a source
    description, and of one without pretraining text."""
    found = _description(content, path)
    if found is None:
        return content
    defaults = {section: dict(values) for section, values in OF_DESCRIBED_SOURCES.items()}
    if not found[1].get("corpus"):
        defaults |= {"sft": {"pretrain_mix": 0.0}}
    evaluate = content.get("evaluate")
    if not isinstance(evaluate, Mapping) or evaluate.get("judge", "auto") == "auto":
        defaults |= {"judge": {"share": 0.5}}
    sections = dict(content)
    for section, values in defaults.items():
        own = sections.get(section)
        if own is None or isinstance(own, Mapping):
            sections[section] = {**values, **(own or {})}
    return sections


def _check_corpus(profile: Profile, content: Mapping[str, Any], path: Path) -> None:
    """Raises UserError where pretraining text is asked for and the source description has none."""
    found = _description(content, path)
    if found is None or found[1].get("corpus"):
        return
    lacks = f"{found[0]} has no corpus; add a `corpus:` entry there"
    if not profile.pretrain.base_model:
        raise UserError(f"{path}: pretrain.base_model is empty, so a model is trained from scratch, but {lacks}, or "
                        "name a Hugging Face model")
    if profile.sft.pretrain_mix > 0:
        raise UserError(f"{path}: sft.pretrain_mix = {profile.sft.pretrain_mix:g}: {lacks}, or set it to 0")
    for name, arm in profile.arms.items():
        if arm.ptx_coef > 0:
            raise UserError(f"{path}: ptx_coef = {arm.ptx_coef:g} of arm {name}: {lacks}, or set it to 0")


def _changes_of_arms(arms: Any, sections: Mapping[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    """Section `arms`: name → what the arm changes of section `ppo`, checked. Raises UserError."""
    if not isinstance(arms, Mapping) or not arms:
        raise UserError(f"{path}: arms = {arms!r}: must name one policy or more, each with what it changes of section "
                        "ppo, e.g. ppo: {}")
    found = {}
    for name, values in arms.items():
        if (not re.fullmatch("[a-z][a-z0-9_]*", str(name)) or name in NO_ARMS or name.endswith(NO_ENDINGS)
                or "_vs_" in name):
            raise UserError(f"{path}: arms.{name}: must be a name of small letters, digits and _, none of "
                            f"{', '.join(NO_ARMS)}, without _vs_, not ending in {', '.join(NO_ENDINGS)}")
        if name in sections["evaluate"].others:
            raise UserError(f"{path}: arms.{name}: evaluate.others names a model so; give one of them another name")
        checked = check_section(PpoParams, {} if values is None else values, path, f"arms.{name}")
        found[name] = {str(key): getattr(checked, str(key)) for key in values or {}}
    return found


def _check_ppo(ppo: PpoParams, path: Path, sections: Mapping[str, str]) -> None:
    """The rules between PPO's parameters. `sections`: parameter → where it stands if not in `ppo`. Raises UserError."""
    def named(key: str) -> str:
        return f"{sections.get(key, 'ppo')}.{key} = {getattr(ppo, key)}"

    for holds, message in (
        (ppo.beta_min <= ppo.beta <= ppo.beta_max,
         f"{named('beta')}: must lie between {named('beta_min')} and {named('beta_max')}"),
        (ppo.batch_size % ppo.minibatch_size == 0,
         f"{named('batch_size')}: must be a multiple of {named('minibatch_size')}"),
        (ppo.batch_size % ppo.samples_per_prompt == 0,
         f"{named('batch_size')}: must be a multiple of {named('samples_per_prompt')}"),
        (ppo.episodes >= ppo.batch_size, f"{named('episodes')}: must be >= {named('batch_size')}"),
        (ppo.value_warmup_iterations < max(ppo.episodes // ppo.batch_size, 1),
         f"{named('value_warmup_iterations')}: must be < {ppo.episodes // ppo.batch_size}, the iterations of the run "
         f"({named('episodes')} / {named('batch_size')}), or the policy may never be trained"),
        (not ppo.vllm_url or all(re.fullmatch(r"https?://[^\s/?#]+/?", url.strip()) for url in ppo.vllm_url.split(",")),
         f"{named('vllm_url')}: must be addresses like http://127.0.0.1:8000, separated by commas"),
        (not ppo.vllm_url or ppo.temperature <= VLLM_HOTTEST,
         f"{named('temperature')}: must be <= {VLLM_HOTTEST:g} where {named('vllm_url')}, for vLLM takes no more"),
        (not ppo.rollout_correction or ppo.staleness > 0 or ppo.vllm_url != "",
         f"{named('rollout_correction')}: needs staleness: 1 or vllm_url; without them every token is drawn by the "
         "policy that is trained on it"),
        *_lora_rules(ppo, named), *_layout_rules(ppo, named, ("batch_size", "minibatch_size")),
    ):
        if not holds:
            raise UserError(f"{path}: {message}")


def _lora_rules(params: SftParams | RmParams | PpoParams, named: Callable[[str], str]) -> list[tuple[bool, str]]:
    """The rules for LoRA's parameters of a section: (whether it holds, the message)."""
    return [(params.lora_base == "fp32" or params.lora_rank > 0,
             f"{named('lora_base')}: must be fp32 where {named('lora_rank')}, which trains all weights"),
            (params.lora_base != "bf16" or params.precision != "fp32",
             f"{named('lora_base')}: must be fp32 where {named('precision')}"),
            *((params.lora_base != "nf4" or not getattr(params, option),
               f"{named('lora_base')}: cannot be combined with {named(option)}") for option in ("shard", "compile"))]


def _layout_rules(params: SftParams | RmParams | PpoParams, named: Callable[[str], str], batches: Sequence[str]
                  ) -> list[tuple[bool, str]]:
    """The rules for how a section's models lie in memory, and for its processes: (whether it holds, the message)."""
    degree = params.tensor_parallel
    rules = [(not getattr(params, option) or getattr(params, needed), f"{named(option)}: needs {needed}: true")
             for option, needed in (("cpu_offload", "shard"), ("offload_activations", "gradient_checkpointing"))]
    if degree > 1:
        split = named("tensor_parallel")
        rules += [(params.shard, f"{split}: needs shard: true"),
                  *((not getattr(params, option), f"{split}: cannot be combined with {named(option)}")
                    for option in ("lora_rank", "compile")),
                  (params.processes % degree == 0, f"{split}: must divide {named('processes')}")]  # 0: not known yet
    groups = max(1, params.processes // degree)
    what = named("processes") if degree == 1 else f"{groups}, {named('processes')} by {named('tensor_parallel')}"
    return rules + [(getattr(params, name) % groups == 0, f"{named(name)}: must be a multiple of {what}")
                    for name in batches]


def _named_in(params: Any, section: str, key: str) -> str:
    return f"{section}.{key} = {getattr(params, key)}"


def _is_date(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _check_together(profile: Profile, path: Path) -> None:
    """The rules between parameters of several sections; those between PPO's first. Raises UserError."""
    pretrain = profile.pretrain
    _check_ppo(profile.ppo, path, {})
    rules = [
        (pretrain.n_embd % pretrain.n_head == 0,
         f"pretrain.n_embd = {pretrain.n_embd}: must be a multiple of pretrain.n_head = {pretrain.n_head}"),
        (_is_date(pretrain.template_date),
         f"pretrain.template_date = {pretrain.template_date!r}: must be a date such as 2024-07-26"),
    ]
    for section in ("sft", "rm"):
        params = getattr(profile, section)
        named = partial(_named_in, params, section)
        rules += [*_lora_rules(params, named), *_layout_rules(params, named, ["batch_size"])]
    described = profile.ingest.source != "embedded"
    rules += [
        (not described or profile.validate.counts == "none",
         f"validate.counts = paper: must be none where ingest.source is {profile.ingest.source}; the paper's counts by "
         "source and use case are those of the embedded data"),
        (described == bool(profile.ingest.spec),
         f"ingest.spec = {profile.ingest.spec!r}: must name a file of profiles/sources/ where ingest.source is hub or "
         "files, and be empty where it is embedded"),
    ]
    evaluate = profile.evaluate
    rules += [
        (re.fullmatch(r"[\w.-]*", profile.promote.registry) is not None,
         f"promote.registry = {profile.promote.registry!r}: must have letters, digits, _, . and - only"),
        ((evaluate.judge == "auto") == (not evaluate.judge_model),
         f"evaluate.judge_model = {evaluate.judge_model!r}: must name a model where evaluate.judge is {evaluate.judge}"
         if evaluate.judge != "auto" else
         f"evaluate.judge_model = {evaluate.judge_model!r}: must be empty where evaluate.judge is auto"),
        (not evaluate.prompt_form or "{prompt}" in evaluate.prompt_form,
         f"evaluate.prompt_form = {evaluate.prompt_form!r}: must contain {{prompt}}"),
    ]
    rules.append((not profile.judge.share or (described and evaluate.judge == "auto"),
                  f"judge.share = {profile.judge.share:g}: must be 0 where " + (
                      f"evaluate.judge is {evaluate.judge}, which judges" if described else
                      "ingest.source is embedded: its gold labeler judges")))
    if not pretrain.base_model:
        degrees = {name: getattr(profile, name).tensor_parallel for name in ("sft", "rm", "ppo")}
        degrees |= {f"arms.{arm}": params.tensor_parallel for arm, params in profile.arms.items()}
        rules += [(degree == 1,
                   f"{name}.tensor_parallel = {degree}: must be 1 where pretrain.base_model is empty: what is trained "
                   "from scratch is a GPT-NeoX; Llama and Qwen2 can be split") for name, degree in degrees.items()]
        longest = max(profile.sft.max_tokens, profile.rm.max_tokens, *(
            arm.max_prompt_tokens + arm.max_new_tokens for arm in (profile.ppo, *profile.arms.values())))
        rules.append((longest <= pretrain.context,
                      f"pretrain.context = {pretrain.context}: must be >= {longest}, the longest sequence in "
                      "sft, rm or ppo"))
    for holds, message in rules:
        if not holds:
            raise UserError(f"{path}: {message}")

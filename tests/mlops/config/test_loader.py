"""params.yaml and the profiles: every mistake is one line that names file, key, value and what is allowed."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

from mlops.config import loader
from mlops.config.loader import load_params, load_profile
from rlhf.errors import UserError
from rlhf.params import PpoParams, Profile

ROOT = Path(__file__).resolve().parents[3]
Write = Callable[..., Path]
PAIRS = "rm: [{files: pairs.jsonl, columns: {prompt: p, chosen: c, rejected: r}}]\n"  # a source description


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """write(profile text, params text) makes a checkout with one more profile; returns its root."""
    def make(profile: str = "", params: str = "seed: 1\nprofile: mine\n") -> Path:
        (tmp_path / "profiles").mkdir()
        (tmp_path / "params.yaml").write_text(params, encoding="utf-8")
        (tmp_path / "profiles" / "mine.yaml").write_text(profile or "ingest: {}\n", encoding="utf-8")
        (tmp_path / "profiles" / "other.yaml").write_text("ingest: {}\n", encoding="utf-8")
        (tmp_path / "profiles" / "sources").mkdir()
        for name, text in (("pairs", PAIRS), ("with_text", f"{PAIRS}corpus: [{{files: text.jsonl}}]\n")):
            (tmp_path / "profiles" / "sources" / f"{name}.yaml").write_text(text)
        return tmp_path
    return make


def message(root: Path) -> str:
    """The one line that the user gets."""
    with pytest.raises(UserError) as caught:
        load_params(root)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", ["smoke", "cpu", "gpu"])
def test_the_shipped_profiles_load(name: str) -> None:
    path = ROOT / "profiles" / f"{name}.yaml"
    profile = load_profile(path)
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    for section, values in content.items():
        for key, value in values.items():
            if section == "arms":
                assert profile.arms[key] == dataclasses.replace(profile.ppo, **value)
            else:
                assert getattr(getattr(profile, section), key) == value


def test_the_shipped_params_load() -> None:
    params = load_params(ROOT)
    assert params.profile in {"smoke", "cpu", "gpu"}
    assert params.stages == load_profile(ROOT / "profiles" / f"{params.profile}.yaml")


def test_missing_keys_and_sections_have_their_defaults(write: Write) -> None:
    root = write("ppo:\n  kl_goal: 3.5\n  lr: 1e-4\n")  # YAML 1.1 reads 1e-4 as a text
    params = load_params(root)
    assert (params.seed, params.profile) == (1, "mine")
    assert params.stages.ppo == dataclasses.replace(PpoParams(), kl_goal=3.5, lr=1e-4)
    assert isinstance(params.stages.ppo.lr, float)
    assert params.stages.sft == get_type_hints(Profile)["sft"]()


def test_defaults_are_within_their_own_limits() -> None:
    for section in (hint for name, hint in get_type_hints(Profile).items() if name != "arms"):
        for item in dataclasses.fields(section):
            value, limits = item.default, item.metadata
            if isinstance(value, (int, float)):
                assert limits.get("ge", value) <= value <= limits.get("le", value), item.name
                assert not value <= limits.get("gt", float("-inf")), item.name
                assert not value >= limits.get("lt", float("inf")), item.name
            assert limits["help"]


@pytest.mark.parametrize(("profile", "parts"), [
    ("ppo:\n  kl_gaol: 3\n", ["profiles/mine.yaml", "unknown key ppo.kl_gaol", "did you mean kl_goal?"]),
    ("ppo:\n  lr: 1.0e-4\n  lr: 1.0e-5\n", ["profiles/mine.yaml", "key lr appears twice", "line 3"]),
    ("validate:\n  mostly: {filled_prompt: 1.5}\n", ["validate.mostly = 1.5", "names and numbers > 0 and <= 1"]),
    ("validate:\n  warn: language\n", ["validate.warn = 'language'", "a list of names"]),
    ("poo:\n  kl_goal: 3\n", ["profiles/mine.yaml", "unknown key poo", "did you mean ppo?"]),
    ("sft:\n  zzzzz: 3\n", ["unknown key sft.zzzzz", "known keys: epochs, batch_size, lr"]),
    ("ppo:\n  lr: 0\n", ["profiles/mine.yaml", "ppo.lr = 0", "must be float > 0 and <= 1"]),
    ("ppo:\n  lr: 1.5\n", ["ppo.lr = 1.5", "> 0 and <= 1"]),
    ("sft:\n  dropout: 1\n", ["sft.dropout = 1", ">= 0 and < 1"]),
    ("sft:\n  epochs: -1\n", ["sft.epochs = -1", "must be int >= 0 and <= 1000"]),
    ("sft:\n  epochs: 1.5\n", ["sft.epochs = 1.5", "must be int"]),
    ("sft:\n  epochs: many\n", ["sft.epochs = 'many'", "must be int"]),
    ("sft:\n  epochs:\n", ["sft.epochs = None", "must be int"]),
    ("ppo:\n  gamma: .nan\n", ["ppo.gamma = nan", "must be float > 0"]),
    ("ppo:\n  max_grad_norm: .inf\n", ["ppo.max_grad_norm = inf", "must be float > 0"]),
    ("sft:\n  precision: fp8\n", ["sft.precision = 'fp8'", "must be one of auto, fp32, bf16"]),
    ("sft: 3\n", ["mine.yaml", "sft: expected keys and values, found 3"]),
    ("- sft\n", ["mine.yaml", "expected keys and values, found list"]),
    ("sft: {\n", ["mine.yaml", "not valid YAML"]),
])
def test_a_mistake_in_a_profile_is_one_clear_line(write: Write, profile: str, parts: list[str]) -> None:
    text = message(write(profile))
    for part in parts:
        assert part in text


@pytest.mark.parametrize(("params", "parts"), [
    ("seed: 1\nprofile: hpu\n", ["params.yaml", "unknown profile 'hpu'", "must be one of mine, other"]),
    ("seed: 1\nprofile: ../profiles/mine\n", ["profile = '../profiles/mine'", "a profile's name has letters"]),
    ("profile: mine\n", ["params.yaml", "seed is missing", "an int >= 0"]),
    ("seed: 1\n", ["profile is missing", "the name of a file in profiles/"]),
    ("seed: -1\nprofile: mine\n", ["seed = -1", ">= 0"]),
    ("seed: 2147483648\nprofile: mine\n", ["seed = 2147483648", "< 2^31"]),
    ("seed: one\nprofile: mine\n", ["seed = 'one'"]),
    ("seed: 1\nprofile: mine\nsede: 2\n", ["unknown key sede", "did you mean seed?"]),
    ("", ["params.yaml", "expected keys and values"]),
])
def test_a_mistake_in_params_is_one_clear_line(write: Write, params: str, parts: list[str]) -> None:
    text = message(write(params=params))
    for part in parts:
        assert part in text


@pytest.mark.parametrize(("profile", "params"), [
    ("sft:\n  1: 2\n", ""), ("sft:\n  on: 2\n", ""), ("", "1: 2\nseed: 1\nprofile: mine\n")])
def test_a_key_that_is_not_a_string_is_named(write: Write, profile: str, params: str) -> None:
    assert "unknown key" in message(write(profile, params or "seed: 1\nprofile: mine\n"))


TWO = "ppo:\n  kl_goal: 3\narms:\n  ppo: {}\n  ppo_ptx:\n    ptx_coef: 0.5\npromote:\n  arm: ppo_ptx\n"
LISTED = "seed: 1\nprofile: mine\narms: [ppo, ppo_ptx]\npromoted: ppo_ptx\n"


def test_an_arm_has_the_parameters_of_section_ppo_and_its_own(write: Write) -> None:
    stages = load_params(write(TWO, LISTED)).stages
    assert list(stages.arms) == ["ppo", "ppo_ptx"]
    assert stages.promoted == "ppo_ptx"
    assert stages.arms["ppo"] == stages.ppo == dataclasses.replace(PpoParams(), kl_goal=3)
    assert stages.arms["ppo_ptx"] == dataclasses.replace(stages.ppo, ptx_coef=0.5)


@pytest.mark.parametrize("profile", ["", "arms:\n  ppo: {}\n", "arms:\n  ppo:\n"])
def test_a_profile_of_one_arm_needs_no_word_about_it(write: Write, profile: str) -> None:
    stages = load_params(write(profile)).stages
    assert (list(stages.arms), stages.promoted) == (["ppo"], "ppo")
    assert stages.arms["ppo"] == PpoParams()


@pytest.mark.parametrize(("change", "parts"), [
    (("ptx_coef: 0.5", "ptx_cof: 0.5"), ["unknown key arms.ppo_ptx.ptx_cof", "did you mean ptx_coef?"]),
    (("ptx_coef: 0.5", "ptx_coef: -1"), ["arms.ppo_ptx.ptx_coef = -1", "must be float >= 0"]),
    (("ptx_coef: 0.5", "kept_passes: 1"), ["arms.ppo_ptx.kept_passes is now called arms.ppo_ptx.reuse_forward_passes"]),
    (("ptx_coef: 0.5", "episodes: 100"), ["arms.ppo_ptx.episodes = 100", "must be >= ppo.batch_size = 256"]),
    (("ptx_coef: 0.5", "max_new_tokens: 99"), ["pretrain.context = 128", ">= 163"]),
    (("ppo_ptx:", "PPO:"), ["arms.PPO: must be a name of small letters"]),
    (("ppo_ptx:", "sft:"), ["arms.sft: must be a name", "none of base, base_prompted, sft"]),
    (("ppo_ptx:", "ppo_low:"), ["arms.ppo_low: must be a name", "not ending in _low"]),
    (("ppo_ptx:", "a_vs_b:"), ["arms.a_vs_b: must be a name", "without _vs_"]),
    (("  ppo: {}\n", "  ppo: 3\n"), ["arms.ppo: expected keys and values, found 3"]),
    (("arm: ppo_ptx", "arm: ptx"), ["promote.arm = 'ptx': must be one of ppo, ppo_ptx"]),
    (("arm: ppo_ptx", "arm: ''"), ["promote.arm = '': must be one of ppo, ppo_ptx where there are several arms"]),
    (("promote:\n", "evaluate:\n  others: {ppo_ptx: x}\npromote:\n"), ["arms.ppo_ptx: evaluate.others names a model"]),
])
def test_a_mistake_in_an_arm_is_one_clear_line(write: Write, change: tuple[str, str], parts: list[str]) -> None:
    assert change[0] in TWO
    text = message(write(TWO.replace(*change), LISTED))
    assert "profiles/mine.yaml: " in text
    for part in parts:
        assert part in text


@pytest.mark.parametrize(("params", "parts"), [
    ("seed: 1\nprofile: mine\n", ["arms = [ppo]: must be [ppo, ppo_ptx], as in profiles/mine.yaml",
                                  "`python -m mlops.config.arms` writes it"]),
    (LISTED.replace("[ppo, ppo_ptx]", "[ppo_ptx, ppo]"), ["arms = [ppo_ptx, ppo]: must be [ppo, ppo_ptx]"]),
    (LISTED.replace("promoted: ppo_ptx", "promoted: ppo"), ["promoted = ppo: must be ppo_ptx"]),
    (LISTED.replace("[ppo, ppo_ptx]", "{ppo: 1}"), ["arms = {'ppo': 1}", "must be what `python -m mlops.config.arms`"]),
])
def test_arms_out_of_step_are_refused_with_what_to_write(write: Write, params: str, parts: list[str]) -> None:
    text = message(write(TWO, params))
    for part in ("params.yaml: ", *parts):
        assert part in text


def test_a_file_that_is_not_utf8_is_named(write: Write) -> None:
    root = write()
    (root / "params.yaml").write_bytes(b"seed: 1\nprofile: m\xefne\n")
    assert "params.yaml" in message(root)


def test_a_renamed_parameter_is_refused_with_its_new_name(write: Write) -> None:
    text = message(write("ppo:\n  kept_passes: 2\n"))
    assert text.endswith("profiles/mine.yaml: ppo.kept_passes is now called ppo.reuse_forward_passes")


def test_a_renamed_section_is_refused_with_its_new_name(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loader.RENAMED, ("", "reward_model"), "rm")
    text = message(write("reward_model:\n  epochs: 2\n"))
    assert text.endswith("profiles/mine.yaml: reward_model is now called rm")


def test_every_renamed_parameter_has_a_new_name_that_exists() -> None:
    sections = get_type_hints(Profile)
    for (section, former), name in loader.RENAMED.items():
        known = get_type_hints(sections[section]) if section else sections
        assert name in known
        assert former not in known


def test_true_is_not_a_number(write: Write) -> None:
    assert "must be int" in message(write("sft:\n  epochs: true\n"))


def test_a_missing_params_file_is_named(tmp_path: Path) -> None:
    assert message(tmp_path).endswith("params.yaml: no such file")


RULES: list[tuple[dict[str, dict[str, Any]], list[str]]] = [
    ({"ppo": {"beta": 0.5, "beta_max": 0.4}}, ["ppo.beta = 0.5", "ppo.beta_min", "ppo.beta_max = 0.4"]),
    ({"ppo": {"beta": 0.01, "beta_min": 0.02}}, ["ppo.beta = 0.01", "ppo.beta_min = 0.02"]),
    ({"ppo": {"batch_size": 100, "minibatch_size": 64}}, ["ppo.batch_size = 100", "ppo.minibatch_size = 64"]),
    ({"ppo": {"batch_size": 64, "samples_per_prompt": 3}}, ["ppo.batch_size = 64", "ppo.samples_per_prompt = 3"]),
    ({"ppo": {"episodes": 255}}, ["ppo.episodes = 255", "ppo.batch_size = 256"]),
    ({"ppo": {"episodes": 1024, "value_warmup_iterations": 4}},
     ["ppo.value_warmup_iterations = 4: must be < 4, the iterations of the run", "the policy may never be trained"]),
    ({"pretrain": {"n_embd": 130}}, ["pretrain.n_embd = 130", "pretrain.n_head = 4"]),
    ({"sft": {"max_tokens": 129}}, ["pretrain.context = 128", ">= 129"]),
    ({"rm": {"max_tokens": 200}}, ["pretrain.context = 128", ">= 200"]),
    ({"ingest": {"source": "files", "spec": "with_text"}, "validate": {"counts": "paper"}},
     ["validate.counts = paper", "must be none"]),
    ({"ingest": {"source": "files", "spec": "mine"}}, ["ingest.spec = 'mine'", "not there; descriptions: pairs, with"]),
    ({"ingest": {"source": "files", "spec": "pairs"}}, ["pretrain.base_model is empty", "pairs.yaml has no corpus"]),
    ({"ingest": {"source": "files", "spec": "pairs"}, "pretrain": {"base_model": "gpt2"}, "sft": {"pretrain_mix": 0.1}},
     ["sft.pretrain_mix = 0.1", "pairs.yaml has no corpus; add a `corpus:` entry there, or set it to 0"]),
    ({"ingest": {"source": "files", "spec": "pairs"}, "pretrain": {"base_model": "gpt2"},
      "arms": {"mixed": {"ptx_coef": 0.5}}}, ["ptx_coef = 0.5 of arm mixed", "pairs.yaml has no corpus"]),
    ({"ingest": {"source": "hub"}, "validate": {"counts": "none"}}, ["ingest.spec = ''", "profiles/sources/"]),
    ({"ingest": {"spec": "mine"}}, ["ingest.spec = 'mine'", "be empty where it is embedded"]),
    ({"ppo": {"vllm_url": "localhost:8000"}}, ["ppo.vllm_url = localhost:8000", "http://127.0.0.1:8000, separated"]),
    ({"ppo": {"vllm_url": "http://a:1,,http://b:1"}}, ["ppo.vllm_url = http://a:1,,http://b:1"]),
    ({"ppo": {"vllm_url": "http://a:1", "temperature": 2.5}}, ["ppo.temperature = 2.5: must be <= 2 where"]),
    ({"ppo": {"rollout_correction": 2.0}}, ["ppo.rollout_correction = 2.0: needs staleness: 1 or vllm_url"]),
    ({"ppo": {"max_prompt_tokens": 100, "max_new_tokens": 29}}, ["pretrain.context = 128", ">= 129"]),
]


@pytest.mark.parametrize(("profile", "parts"), RULES)
def test_rules_between_parameters(write: Write, profile: dict[str, dict[str, Any]], parts: list[str]) -> None:
    text = message(write(yaml.safe_dump(profile)))
    assert "profiles/mine.yaml: " in text
    for part in parts:
        assert part in text


@pytest.mark.parametrize("profile", [
    {"ppo": {"beta": 0.4, "beta_max": 0.4}}, {"ppo": {"batch_size": 128, "minibatch_size": 64}},
    {"ingest": {"source": "hub", "spec": "with_text"}, "validate": {"counts": "none"}},
    {"ppo": {"vllm_url": "http://a:1, https://b/", "rollout_correction": 2.0}},
    {"ppo": {"staleness": 1, "rollout_correction": 2.0}},
    {"ppo": {"episodes": 256}}, {"sft": {"max_tokens": 128}},
    {"sft": {"max_tokens": 900}, "pretrain": {"base_model": "gpt2"}},  # its context is its own
])
def test_the_rules_allow_their_limits(write: Write, profile: dict[str, dict[str, Any]]) -> None:
    stages = load_params(write(yaml.safe_dump(profile))).stages
    for section, values in profile.items():
        assert all(getattr(getattr(stages, section), key) == value for key, value in values.items())


def test_some_defaults_follow_from_the_data_source(write: Write) -> None:
    """A profile of pairs without text had to say eight things that could not be otherwise."""
    root = write("ingest: {source: files, spec: pairs}\npretrain: {base_model: gpt2}\n")
    stages = load_params(root).stages
    assert (stages.validate.counts, stages.validate.min_k, stages.sft.pretrain_mix) == ("none", 2, 0)
    assert stages.validate.max_prompt_chars == stages.validate.max_completion_chars == 100_000
    profile = root / "profiles" / "mine.yaml"
    profile.write_text(profile.read_text().replace("pairs", "with_text") + "validate: {min_k: 3}\n")
    stages = load_params(root).stages
    assert (stages.validate.counts, stages.validate.min_k, stages.sft.pretrain_mix) == ("none", 3, 0.1)
    profile.write_text("validate: {min_k: 3}\n")
    stages = load_params(root).stages
    assert (stages.validate.counts, stages.validate.max_prompt_chars, stages.sft.pretrain_mix) == ("paper", 400, 0.1)


def test_the_resolved_parameters_are_all_with_their_values(write: Write) -> None:
    root = write("ppo: {kl_goal: 3}\narms: {a: {}, b: {kl_goal: 4}}\npromote: {arm: b}\n")
    stages = load_profile(root / "profiles" / "mine.yaml")
    assert not loader.is_resolved(stages, root)
    loader.write_resolved(stages, root)
    found = yaml.safe_load((root / "build" / "parameters.yaml").read_text())
    assert found == json.loads(json.dumps(dataclasses.asdict(stages))) | {"source": {}}
    assert (found["ppo"]["kl_goal"], found["arms"]["b"]["kl_goal"], found["sft"]["epochs"]) == (3, 4, 2)
    assert loader.is_resolved(stages, root)
    assert not loader.is_resolved(dataclasses.replace(stages, sft=dataclasses.replace(stages.sft, epochs=7)), root)


def test_the_resolved_parameters_hold_the_description_of_the_data(write: Write) -> None:
    root = write("ingest: {source: files, spec: team}\npretrain: {base_model: base}\n")
    spec = root / "profiles" / "sources" / "team.yaml"
    spec.parent.mkdir(exist_ok=True)
    spec.write_text("sft: [{files: a.csv}]  # rows\n")
    stages = load_profile(root / "profiles" / "mine.yaml")
    loader.write_resolved(stages, root)
    assert yaml.safe_load((root / "build" / "parameters.yaml").read_text())["source"] == {"sft": [{"files": "a.csv"}]}
    spec.write_text("# a comment is no change\nsft: [{files: a.csv}]\n")
    assert loader.is_resolved(stages, root)
    spec.write_text("sft: [{files: b.csv}]\n")
    assert not loader.is_resolved(stages, root)


@pytest.mark.parametrize(("profile", "line"), [
    ("sft: {lora_base: bf16}", "sft.lora_base = bf16: must be fp32 where sft.lora_rank = 0, which trains all weights"),
    ("rm: {lora_base: bf16, lora_rank: 4, precision: fp32}",
     "rm.lora_base = bf16: must be fp32 where rm.precision = fp32"),
    ("arms: {ppo: {lora_base: bf16}}",
     "arms.ppo.lora_base = bf16: must be fp32 where ppo.lora_rank = 0, which trains all weights"),
    ("rm: {lora_base: nf4}", "rm.lora_base = nf4: must be fp32 where rm.lora_rank = 0, which trains all weights"),
    ("ppo: {lora_base: nf4, lora_rank: 4, shard: true}",
     "ppo.lora_base = nf4: cannot be combined with ppo.shard = True"),
    ("rm: {lora_base: nf4, lora_rank: 4, compile: true}",
     "rm.lora_base = nf4: cannot be combined with rm.compile = True")])
def test_a_narrow_base_needs_adapters_and_what_it_is_combined_with(write: Write, profile: str, line: str) -> None:
    root = write(profile + "\n")
    assert message(root) == f"{root}/profiles/mine.yaml: {line}"
    (root / "profiles" / "mine.yaml").write_text("sft: {lora_base: bf16, lora_rank: 4}\n")
    assert load_params(root).stages.sft.lora_base == "bf16"
    (root / "profiles" / "mine.yaml").write_text("sft: {lora_base: nf4, lora_rank: 4, precision: fp32}\n")
    assert load_params(root).stages.sft.lora_base == "nf4"


BASE = "pretrain: {base_model: some/model}\n"


@pytest.mark.parametrize(("profile", "line"), [
    ("sft: {processes: 2, tensor_parallel: 2}", "sft.tensor_parallel = 2: needs shard: true"),
    ("rm: {processes: 3, batch_size: 6, shard: true, tensor_parallel: 2}",
     "rm.tensor_parallel = 2: must divide rm.processes = 3"),
    ("ppo: {processes: 2, shard: true, tensor_parallel: 2, lora_rank: 4}",
     "ppo.tensor_parallel = 2: cannot be combined with ppo.lora_rank = 4"),
    ("arms: {ppo: {processes: 2, shard: true, tensor_parallel: 2, compile: true}}",
     "arms.ppo.tensor_parallel = 2: cannot be combined with arms.ppo.compile = True"),
    ("sft: {cpu_offload: true}", "sft.cpu_offload = True: needs shard: true"),
    ("ppo: {offload_activations: true}", "ppo.offload_activations = True: needs gradient_checkpointing: true"),
    ("sft: {processes: 2, batch_size: 15}", "sft.batch_size = 15: must be a multiple of sft.processes = 2"),
    ("ppo: {processes: 4, batch_size: 66, minibatch_size: 33, tensor_parallel: 2, shard: true}",
     "ppo.minibatch_size = 33: must be a multiple of 2, ppo.processes = 4 by ppo.tensor_parallel = 2")])
def test_what_a_stage_would_refuse_of_its_processes_is_refused_with_the_profile(write: Write, profile: str, line: str
                                                                                ) -> None:
    """Hours later, after SFT and the reward model were trained, it was said by PPO."""
    root = write(f"{BASE}{profile}\n")
    assert message(root) == f"{root}/profiles/mine.yaml: {line}"
    groups = "{processes: 4, shard: true, tensor_parallel: 2, batch_size: 66, minibatch_size: 66}"
    (root / "profiles" / "mine.yaml").write_text(f"{BASE}ppo: {groups}\nsft: {{processes: 0, tensor_parallel: 2, "
                                                 "shard: true}\n")
    assert load_params(root).stages.ppo.tensor_parallel == 2


def test_a_model_from_scratch_cannot_be_split(write: Write) -> None:
    root = write("rm: {processes: 2, shard: true, tensor_parallel: 2}\n")
    assert message(root) == (f"{root}/profiles/mine.yaml: rm.tensor_parallel = 2: must be 1 where pretrain.base_model "
                             "is empty: what is trained from scratch is a GPT-NeoX; Llama and Qwen2 can be split")


def test_what_only_rounds_need_is_asked_where_there_are_rounds(write: Write) -> None:
    """A profile with LoRA and no rounds did not load: it had to say how a round's policy starts."""
    root = write("ppo: {lora_rank: 4, batch_size: 64}\nrounds: {episodes: 32}\n")
    assert load_params(root).stages.ppo.lora_rank == 4
    first = {"number": 1, "policy": "models/sft", "reward_model": "models/sft", "ensemble": "models/sft",
             "rows": "data/rm.jsonl"}
    (root / "params.yaml").write_text(yaml.safe_dump({"seed": 1, "profile": "mine", "rounds": {"r1": first}}))
    assert message(root) == f"{root}/profiles/mine.yaml: rounds.episodes = 32: must be >= ppo.batch_size = 64"
    (root / "profiles" / "mine.yaml").write_text("ppo: {lora_rank: 4, batch_size: 64}\n")
    assert "rounds.restart = False: must be True where ppo.lora_rank > 0" in message(root)
    (root / "profiles" / "mine.yaml").write_text("ppo: {lora_rank: 4, batch_size: 64}\nrounds: {restart: true}\n")
    assert load_params(root).stages.rounds.restart


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(  # 9 ** 9 texts
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize(("profile", "said"), [
    ("sft: {epochs: 010}", "YAML reads 010 as another number"),
    ("ppo: {episodes: 1:30}", "YAML reads 1:30 as another number"),
    ("sft: " + "[" * 3000 + "]" * 3000, "is nested too deeply"),
    ("".join(" " * depth + "a:\n" for depth in range(990)), "is nested too deeply"),
    ("sft: &a {lr: *a}", "is nested too deeply, or holds itself"),
    ("sft: {lr: '" + "x" * 100_000 + "'}", "sft.lr = 'xxx"),
    ('sft: {"\\e[31mred": 1}', "unknown key sft.\\x1b[31mred"),
    ("ingest: {}\n" + "# filler\n" * 80_000, "bytes; at most 524,288 are read"),
    (BOMB, "its aliases stand for "),
    ("sft: !!python/object/apply:os.system [ls]", "not valid YAML"),
    ("promote: {registry: \"it's\"}", "promote.registry = \"it's\": must have letters"),
])
def test_a_hostile_profile_is_one_short_line(write: Write, profile: str, said: str) -> None:
    text = message(write(profile))
    assert said in text
    assert len(text) < 2100
    assert text.isprintable()


@pytest.mark.parametrize("name", ["a b", "{x}", "$x", "-x", "../mine", "it's", "a\nb"])
def test_a_name_that_no_profile_has(write: Write, name: str) -> None:
    root = write(params=f"seed: 1\nprofile: {json.dumps(name)}\n")
    assert "a profile's name has letters, digits, _, . and -" in message(root)

"""Every parameter of the pipeline: plain dataclasses whose fields carry their limits and help texts.

`mlops.config.loader` turns these classes into pydantic models and reads profiles/<profile>.yaml into them, so each
limit is written once, here. This module imports only the standard library.
"""

from dataclasses import dataclass, field
from typing import Any, Literal


def param(default: Any, help: str, *, gt: float | None = None, ge: float | None = None, lt: float | None = None,
          le: float | None = None) -> Any:
    """A dataclass field with a default, a help text and numeric limits (checked by `mlops.config.loader`)."""
    limits = {name: value for name, value in (("gt", gt), ("ge", ge), ("lt", lt), ("le", le)) if value is not None}
    metadata = {"help": help, **limits}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


# --- parameters of several sections ----------------------------------------------------------------------------------

Precision = Literal["auto", "fp32", "bf16"]
LoraBase = Literal["fp32", "bf16", "nf4"]


def processes(what: str = "each batch") -> Any:
    return param(1, f"processes per machine that share {what}; one per GPU, or one thread each on CPU; 0: as many as "
                    "there are GPUs", ge=0, le=1024)


def precision(default: Precision) -> Any:
    return param(default, "precision of the forward pass (weights stay fp32); auto: bf16 where the machine has it")


def gradient_checkpointing() -> Any:
    return param(False, "recompute activations in the backward pass: less memory, more time")


def compile_training() -> Any:
    return param(False, "use torch.compile for the training passes")


def shard() -> Any:
    return param(False, "split weights, gradients and optimizer state over the processes (FSDP2)")


def tensor_parallel() -> Any:
    return param(1, "with shard: neighbouring processes of one machine that compute each pass together, each with its "
                    "share of the heads and of the MLPs' inner width; Llama and Qwen2; must divide processes",
                 ge=1, le=64)


def micro_batch_size(of: str) -> Any:
    return param(0, f"{of} per forward pass, 0: the whole step; changes memory and speed, not the update", ge=0)


def micro_batch_tokens() -> Any:
    return param(0, "tokens per forward pass, PADs included; a longer row goes alone; 0: as many as the rows have; "
                    "changes memory and speed, not the update", ge=0)


def offload_activations() -> Any:
    return param(False, "with gradient_checkpointing: what it keeps for the backward pass is kept on the CPU")


def cpu_offload() -> Any:
    return param(False, "with shard: each process has its part of weights, gradients and optimizer state on the CPU, "
                        "which takes the optimizer's steps (FSDP2)")


def max_tokens(help: str = "longest prompt + completion, tokens") -> Any:
    return param(96, help, ge=2)


def pretrain_row_tokens() -> Any:
    return param(0, "tokens per row of pretraining text; 0: the model's context, at most 2,048", ge=0)


def peak_lr(default: float) -> Any:
    return param(default, "peak learning rate, cosine decay to 10 %", gt=0, le=1)


def lora_rank(of: str) -> Any:
    return param(0, f"rank of the LoRA adapters of {of}; 0: train all weights", ge=0)


def lora_alpha() -> Any:
    return param(32, "LoRA alpha: updates are scaled by alpha / rank", ge=1)


def lora_base() -> Any:
    return param("fp32", "precision of the frozen weights under LoRA adapters; bf16: half the memory, in bf16 passes; "
                         "nf4: 4 bits (QLoRA), needs bitsandbytes, not with shard, compile")


def max_new_tokens(help: str) -> Any:
    return param(32, help, ge=1)


def temperature(help: str) -> Any:
    return param(1.0, help, gt=0, le=10)


# --- the sections of a profile ---------------------------------------------------------------------------------------

@dataclass(frozen=True)
class IngestParams:
    """The data source and its size."""

    source: Literal["embedded", "hub", "files"] = param("embedded", "where the datasets come from")
    spec: str = param("", "name of the source description in profiles/sources/ for hub and files; empty for embedded")
    scale: float = param(1.0, "share of the paper's row counts; 1 is 14,378 / 51,094 / 47,329 rows", gt=0, le=1)
    corpus_documents: int = param(60_000, "pretraining documents", ge=100, le=10_000_000)
    tax_items: int = param(400, "held-out items per alignment-tax task", ge=10, le=100_000)


@dataclass(frozen=True)
class ValidateParams:
    """Limits of the data checks."""

    counts: Literal["paper", "none"] = param("paper", "the paper's exact row counts and use-case mix, or any")
    min_k: int = param(4, "minimum completions per ranking [InstructGPT: 4]; 2 for pairwise datasets", ge=2, le=9)
    max_prompts_per_user: int = param(200, "maximum prompts per user in a dataset [InstructGPT §3.2]", ge=1)
    max_prompt_chars: int = param(400, "longest prompt, characters", ge=1)
    max_completion_chars: int = param(400, "longest completion, characters", ge=1)
    near_duplicate_chars: int = param(40, "prompts are near duplicates if they share a prefix this long ...", ge=1)
    near_duplicate_share: float = param(0.9, "... that is at least this share of the longer prompt", gt=0, le=1)
    language: str = param("en", "ISO 639-1 code of the language that prompts must have")
    mostly: dict[str, float] = param({}, "rule: share of rows that must satisfy it, instead of all", gt=0, le=1)
    warn: list[str] = param([], "rules that only warn")
    stop: list[str] = param([], "rules that stop the run although they only warn by default")


@dataclass(frozen=True)
class PretrainParams:
    """The base model: trained from scratch, or a Hugging Face model used unchanged."""

    base_model: str = param("", "Hugging Face name or folder of a causal model; empty: train a small GPT from scratch")
    vocab_size: int = param(1024, "size of the byte-level BPE vocabulary", ge=300, le=100_000)
    n_layer: int = param(4, "transformer blocks", ge=1, le=200)
    n_head: int = param(4, "attention heads", ge=1, le=200)
    n_embd: int = param(128, "hidden size", ge=8, le=20_000)
    context: int = param(128, "context length, tokens", ge=16, le=1_000_000)
    document_mask: bool = param(False, "attention stays within each document of a packed row, positions restart at 0")
    steps: int = param(1000, "optimizer steps", ge=1)
    batch_size: int = param(16, "sequences of `context` tokens per step", ge=1)
    lr: float = param(3e-3, "peak learning rate of embeddings, norms and biases (AdamW)", gt=0, le=1)
    muon_lr: float = param(0.02, "peak learning rate of the blocks' weight matrices (Muon)", gt=0, le=1)
    warmup_steps: int = param(50, "steps of linear warm-up", ge=0)
    weight_decay: float = param(0.01, "weight decay of Muon", ge=0, le=10)
    processes: int = processes()
    precision: Precision = precision("auto")
    template_date: str = param("2024-07-26", "of base_model: the date for a chat template that asks for today's")


@dataclass(frozen=True)
class SftParams:
    """Supervised fine-tuning on demonstrations [InstructGPT App. C.1]."""

    epochs: int = param(2, "passes over the train split; 0: the base model as it is", ge=0, le=1000)
    batch_size: int = param(32, "demonstrations per step", ge=1)
    lr: float = peak_lr(1e-3)
    train_on: Literal["completion", "all_answers"] = param(
        "completion", "what of a conversation the loss is on: its last answer, or all answers, their ends included")
    pretrain_mix: float = param(0.1, "share of pretraining text in each batch [InstructGPT App. C.3: 0.1]",
                                ge=0, lt=1)
    pretrain_row_tokens: int = pretrain_row_tokens()
    dropout: float = param(0.0, "residual dropout [InstructGPT: 0.2]", ge=0, lt=1)
    max_tokens: int = max_tokens("longest prompt + completion, tokens; longer rows are dropped and counted")
    packing: bool = param(False, "pack demonstrations into rows of at most max_tokens; attention stays within each")
    checkpoint: Literal["last", "valid_loss", "rm_score"] = param(
        "last", "which epoch's weights are saved; rm_score needs reward_model [InstructGPT App. C.1]")
    reward_model: str = param("", "folder of the reward model that selects the epoch")
    lora_rank: int = lora_rank("all linear layers but the output")
    lora_alpha: int = lora_alpha()
    lora_base: LoraBase = lora_base()
    gradient_checkpointing: bool = gradient_checkpointing()
    offload_activations: bool = offload_activations()
    compile: bool = compile_training()
    micro_batch_size: int = micro_batch_size("demonstrations")
    micro_batch_tokens: int = micro_batch_tokens()
    processes: int = processes()
    shard: bool = shard()
    tensor_parallel: int = tensor_parallel()
    cpu_offload: bool = cpu_offload()
    precision: Precision = precision("auto")


@dataclass(frozen=True)
class RmParams:
    """Reward model: SFT backbone, one linear head, K-way ranking loss [InstructGPT §3.5]."""

    max_prompts: int = param(0, "ranked prompts to train on, 0 for all", ge=0)
    max_valid_prompts: int = param(0, "validation prompts to measure accuracy on, 0 for all", ge=0)
    epochs: int = param(1, "passes over the train split [InstructGPT: 1, more overfits]", ge=1, le=100)
    loss: Literal["ranking", "best_of"] = param(
        "ranking", "all pairs of K [InstructGPT], or the best of best_of_n by softmax [Ziegler, seed]")
    best_of_n: int = param(4, "completions per choice, for loss best_of", ge=2, le=9)
    normalise: Literal["demonstrations", "gain_and_bias"] = param(
        "demonstrations", "labeler demonstrations score mean 0 [InstructGPT], or the SFT policy's samples mean 0 and "
        "standard deviation 1 [Ziegler]")
    normalise_samples: int = param(512, "samples of the SFT policy, for gain_and_bias", ge=2)
    batch_size: int = param(64, "rankings per step, with all completions of each; those of one prompt come together "
                             "[InstructGPT 64, best-of-4 8]", ge=1)
    lr: float = peak_lr(5e-4)
    max_tokens: int = max_tokens()
    checkpoint: Literal["last", "valid_accuracy"] = param(
        "last", "which weights are saved; valid_accuracy: the best of `checks`")
    checks: int = param(4, "times that accuracy and loss on valid rankings are measured while training: of 500, for "
                        "checkpoint valid_accuracy of all", ge=1, le=100)
    lora_rank: int = lora_rank("the backbone, whose head is trained whole")
    lora_alpha: int = lora_alpha()
    lora_base: LoraBase = lora_base()
    gradient_checkpointing: bool = gradient_checkpointing()
    offload_activations: bool = offload_activations()
    compile: bool = compile_training()
    micro_batch_size: int = micro_batch_size("prompts")
    micro_batch_tokens: int = micro_batch_tokens()
    processes: int = processes()
    shard: bool = shard()
    tensor_parallel: int = tensor_parallel()
    cpu_offload: bool = cpu_offload()
    precision: Precision = precision("auto")


@dataclass(frozen=True)
class JudgeParams:
    """An independent judge for own data: a second reward model on comparisons that the first never sees."""

    share: float = param(0.0, "share of the training comparisons that train the judge instead of the reward model; 0: "
                         "no judge; default 0.5 where a source description has no other judge", ge=0, lt=1)


@dataclass(frozen=True)
class PpoParams:
    """PPO against the reward model with a KL penalty to the SFT policy [InstructGPT §3.5, App. C.4]."""

    episodes: int = param(15_360, "rollouts in total [InstructGPT: 256K]", ge=1)
    batch_size: int = param(256, "rollouts per iteration [512]", ge=1)
    minibatch_size: int = param(64, "rollouts per optimizer step [64]", ge=1)
    micro_batch_size: int = param(32, "rollouts per forward pass; changes memory and speed, not the update", ge=1)
    micro_batch_tokens: int = micro_batch_tokens()
    reuse_forward_passes: int = param(0, "micro-batches whose activations from scoring the rollouts are reused by the "
                                      "iteration's first update; changes memory and speed, not the update", ge=0)
    rollout_batch_size: int = param(256, "responses sampled at once (rows of the KV cache)", ge=1)
    compile_rollouts: bool = param(False, "use torch.compile for the sampling step; needs a C++ compiler on a CPU")
    vllm_url: str = param("", "vLLM servers that sample the rollouts, separated by commas, e.g. "
                          "http://127.0.0.1:8000,http://127.0.0.1:8001; empty: none")
    weight_transport: Literal["gloo", "nccl"] = param("gloo", "how vLLM servers get the policy's weights: over the "
                                                      "network, or between GPUs")
    staleness: int = param(0, "1: an iteration's responses are drawn while the one before is trained on, from the "
                           "policy as it was before that", ge=0, le=1)
    rollout_correction: float = param(0.0, "with staleness or vLLM: a token's policy loss is multiplied by the "
                                      "policy's probability over that of its sampler, at most by this; 0: never", ge=0)
    inner_epochs: int = param(2, "passes over an iteration's rollouts [InstructGPT 1, Ziegler 4]", ge=1, le=100)
    samples_per_prompt: int = param(1, "rollouts per prompt", ge=1)
    max_prompt_tokens: int = param(64, "longest prompt, tokens; longer ones are dropped and counted", ge=1)
    max_new_tokens: int = max_new_tokens("response length in tokens, cut at the first EOS")
    temperature: float = temperature("divides the logits in sampling and in every log-prob")
    lr: float = param(1e-4, "policy learning rate, constant after the warm-up", gt=0, le=1)
    value_lr: float = param(3e-4, "value model learning rate", gt=0, le=1)
    warmup_iterations: int = param(5, "linear warm-up of the policy learning rate, from a tenth of it [10]", ge=0)
    value_warmup_iterations: int = param(0, "iterations at the start, at most, that train the value model alone while "
                                         "its explained variance is below zero", ge=0)
    adam_eps: float = param(1e-5, "Adam epsilon", gt=0, le=1)
    max_grad_norm: float = param(1.0, "gradient norm is clipped to this", gt=0)
    gamma: float = param(1.0, "discount", gt=0, le=1)
    lam: float = param(0.95, "GAE lambda", ge=0, le=1)
    clip: float = param(0.2, "PPO ratio clip", gt=0, lt=1)
    value_clip: float = param(0.2, "value clip", gt=0)
    whiten_rewards: bool = param(False, "divide rewards by their standard deviation, without shifting the mean")
    whiten_advantages: bool = param(True, "normalise advantages over the batch")
    no_eos_score: float = param(-1.0, "score of a response without EOS, if its own is not lower")
    beta_rule: Literal["step", "step_ahead", "proportional", "fixed"] = param(
        "step_ahead", "how beta adapts: step doubles or halves it [seed], step_ahead does so for where KL is heading, "
        "proportional [Ziegler], fixed [InstructGPT]")
    beta: float = param(0.05, "initial KL coefficient", gt=0, le=1000)
    beta_min: float = param(1e-3, "lower bound of beta", gt=0)
    beta_max: float = param(10.0, "upper bound of beta", gt=0)
    kl_goal: float = param(2.0, "target of the mean KL(policy || reference) per response, nats", gt=0, le=1000)
    beta_band: float = param(1.5, "step, step_ahead: KL may be this many times its goal, or its goal KL", gt=1)
    beta_factor: float = param(2.0, "step, step_ahead: beta is multiplied or divided by this", gt=1, le=100)
    beta_interval: int = param(2, "step_ahead: iterations between adjustments", ge=1)
    beta_smoothing: float = param(0.4, "step_ahead: weight of the newest KL in its moving average", gt=0, le=1)
    beta_brake: int = param(8, "step_ahead: iterations that it looks ahead before it raises beta", ge=0, le=1000)
    beta_patience: int = param(25, "step_ahead: iterations that it looks ahead before it lowers beta", ge=0, le=1000)
    beta_window: int = param(6, "step_ahead: iterations whose KL gives the direction", ge=2, le=1000)
    beta_start: float = param(0.25, "step_ahead: beta is not raised below this share of the goal", ge=0, le=1)
    beta_gain: float = param(0.1, "proportional: gain on the relative KL error [Ziegler 0.1]", gt=0, le=5)
    beta_limit: float = param(0.2, "proportional: the relative KL error is clipped to this [Ziegler 0.2]", gt=0, le=10)
    ema_decay: float = param(0.0, "decay of the moving average that is saved as the policy; 0: off [InstructGPT 0.992]",
                             ge=0, lt=1)
    value_init: Literal["reward_model", "policy"] = param("reward_model", "initial weights of the value model")
    lora_rank: int = lora_rank("policy and value model")
    lora_alpha: int = lora_alpha()
    lora_base: LoraBase = lora_base()
    frozen_precision: Literal["fp32", "bf16"] = param(
        "fp32", "weights of reference and reward model; bf16 where the passes are in bf16: half the memory")
    frozen_on_cpu: bool = param(False, "keep reference and reward model on the CPU between their uses")
    gradient_checkpointing: bool = gradient_checkpointing()
    offload_activations: bool = offload_activations()
    compile: bool = compile_training()
    kl_limit: float = param(20.0, "stop when an iteration's KL exceeds this many times kl_goal; 0: never", ge=0)
    entropy_floor: float = param(0.02, "stop when entropy falls below this share of the first iteration's; 0: never",
                                 ge=0, lt=1)
    min_entropy: float = param(0.001, "stop when entropy falls below this, nats a token; 0: never", ge=0)
    min_eos_rate: float = param(0.005, "stop when, of the responses of ten iterations (at least 256), fewer end; 0: "
                                "never", ge=0, lt=1)
    ptx_coef: float = param(0.0, "weight of the pretraining loss [InstructGPT 27.8; 0 is plain PPO]", ge=0)
    ptx_batch_size: int = param(0, "pretraining rows per minibatch where ptx_coef > 0; 0: 8 per episode [InstructGPT]",
                                ge=0)
    ptx_row_tokens: int = pretrain_row_tokens()
    processes: int = processes()
    shard: bool = shard()
    tensor_parallel: int = tensor_parallel()
    cpu_offload: bool = cpu_offload()
    precision: Precision = precision("auto")


@dataclass(frozen=True)
class EvaluateParams:
    """Held-out comparison of models: preference, alignment tax, safety, over-optimisation."""

    prompts: int = param(1000, "held-out prompts", ge=2)
    max_new_tokens: int = max_new_tokens("response length in tokens")
    temperature: float = temperature("sampling temperature")
    shots: int = param(4, "demonstrations in the few-shot prompt of the base model, as many as fit", ge=0)
    prompt_form: str = param("", "template with {prompt} for the prompted base model; empty: the chat format")
    others: dict[str, str] = param({}, "further models to compare, name: folder (e.g. an earlier run's PPO)")
    judge: Literal["auto", "reward_model", "model"] = param(
        "auto", "who judges: the embedded world's gold labeler (else the run's reward model), or judge_model")
    judge_model: str = param("", "folder or hub name of a held-out reward model, or of a causal model that judges")
    bootstrap: int = param(2000, "bootstrap resamples for the 95 % intervals", ge=100)
    tax_tasks: list[str] = param([], "lm-eval tasks that count as alignment tax, in addition to those of data/tax")
    other_tasks: list[str] = param([], "lm-eval tasks that are only reported (truthfulness, toxicity, bias)")
    task_data: dict[str, str] = param({}, "task: JSON Lines file that replaces its hub dataset, in the same format")
    chat_tasks: list[str] = param([], "tasks asked in the chat format; the others are plain text [InstructGPT App. E]")
    tax_items: int = param(0, "items per task, 0 for all", ge=0)
    few_shot: int = param(0, "few-shot examples before each task item", ge=0, le=100)
    task_batch_size: int = param(128, "sequences per forward pass of the tasks", ge=1)
    best_of: int = param(16, "samples per prompt for the best-of-n curve; 0: no curve", ge=0, le=1024)
    best_of_prompts: int = param(150, "prompts of the best-of-n curve", ge=2)
    batch_size: int = param(256, "prompts per forward pass", ge=1)
    processes: int = processes("the prompts and task items")
    precision: Precision = precision("fp32")


@dataclass(frozen=True)
class PromoteParams:
    """The gates between a trained policy and its release."""

    arm: str = param("", "arm that the gates and the registry take; empty: the only one")
    registry: str = param("instructflow", "the models are registered in MLflow as NAME-policy and NAME-rm; empty: not")
    judged: bool = param(True, "the win rate must be an independent judge's, not the run's own reward model's")
    min_win_rate: float = param(0.5, "minimum win rate against SFT, lower end of its interval", ge=0, le=1)
    champion_margin: float = param(0.05, "how far below one half the low end of the win rate against the champion "
                                   "may be", ge=0, le=0.5)
    kl_band: float = param(1.5, "KL must lie within [kl_goal / kl_band, kl_goal * kl_band]", ge=1)
    max_tax: float = param(0.05, "maximum alignment tax of a task, as a share of a perfect score", ge=-1, le=1)
    max_mean_tax: float = param(0.02, "maximum mean alignment tax", ge=-1, le=1)
    max_toxic: float = param(0.05, "maximum share of toxic responses", ge=0, le=1)


@dataclass(frozen=True)
class RoundsParams:
    """Alternating rounds [Ziegler §2.2, seed]: sample, have people rank, retrain the reward model, train the policy."""

    prompts: int = param(1000, "prompts labeled per round", ge=1)
    k: int = param(4, "completions per prompt: 4 to choose from, up to 9 to rank", ge=2, le=9)
    task: Literal["rank", "choose"] = param("rank", "labelers rank all completions, ties allowed, or choose the best")
    labelers: list[str] = param(["labeler-01", "labeler-02", "labeler-03", "labeler-04"], "names of the labelers")
    trusted: str = param("", "labeler whose rankings the others are screened against; empty: the gold labels if known")
    overlap: float = param(0.2, "share of prompts that several labelers rank", ge=0, le=1)
    per_item: int = param(2, "labelers of each such prompt", ge=1)
    with_sft: bool = param(False, "sample half of the completions from the SFT policy, half from the current one")
    with_data: bool = param(False, "train the reward model on the rounds' labels and on the ranked rows of data/")
    rm_epochs: int = param(1, "training epochs of the reward model over the labels so far", ge=1, le=100)
    episodes: int = param(5120, "PPO rollouts per round", ge=1)
    restart: bool = param(False, "start each policy from SFT [InstructGPT], not from the previous round [Ziegler]")
    select: Literal["random", "disagreement"] = param(
        "random", "prompts at random, or those on whose completions an ensemble of reward models disagrees most")
    ensemble: int = param(3, "reward models in the ensemble, for select disagreement", ge=2, le=10)
    candidates: int = param(2, "candidate prompts per selected prompt, for select disagreement", ge=1, le=100)


@dataclass(frozen=True)
class Profile:
    """One file in profiles/: a section per stage, one for the rounds, and the arms of PPO.

    `arms`: the policies that PPO trains, each with all its parameters: those of section `ppo` and what the arm changes.
    """

    ingest: IngestParams
    validate: ValidateParams
    pretrain: PretrainParams
    sft: SftParams
    rm: RmParams
    judge: JudgeParams
    ppo: PpoParams
    evaluate: EvaluateParams
    promote: PromoteParams
    rounds: RoundsParams
    arms: dict[str, PpoParams]

    @property
    def promoted(self) -> str:
        """The arm that the gates and the registry take."""
        return self.promote.arm or next(iter(self.arms))

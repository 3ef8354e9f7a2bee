"""Every parameter of the line: plain dataclasses whose fields carry their limits and their help.

`mlops.config.loader` turns the same classes into pydantic models and reads profiles/<profile>.yaml into them, so each
limit is written once, here. The library itself needs only the standard library to build them.
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


@dataclass(frozen=True)
class IngestParams:
    """Which data, and how much of it."""

    source: Literal["embedded", "hub", "files"] = param("embedded", "where the datasets come from")
    spec: str = param("", "profiles/sources/<name>.yaml, which describes the source where it is not embedded")
    scale: float = param(1.0, "share of the paper's row counts to make; 1 is 14,378 / 51,094 / 47,329", gt=0, le=1)
    corpus_documents: int = param(60_000, "pretraining documents", ge=100, le=10_000_000)
    tax_items: int = param(400, "held-out items per alignment-tax task", ge=10, le=100_000)


@dataclass(frozen=True)
class ValidateParams:
    """Limits of the data checks."""

    counts: Literal["paper", "none"] = param("paper", "exact row counts and use-case mix, or any")
    min_k: int = param(4, "least completions of a ranking [InstructGPT: 4]; 2 for sets of pairs", ge=2, le=9)
    max_prompts_per_user: int = param(200, "prompts one user may have in a dataset [InstructGPT §3.2]", ge=1)
    max_prompt_chars: int = param(400, "longest prompt, characters", ge=1)
    max_completion_chars: int = param(400, "longest completion, characters", ge=1)
    near_duplicate_chars: int = param(40, "a shared prefix this long makes prompts near duplicates ...", ge=1)
    near_duplicate_share: float = param(0.9, "... where it is this share of the longer one", gt=0, le=1)
    mostly: dict[str, float] = param({}, "rule: share of rows that must keep it, instead of all", gt=0, le=1)
    warn: list[str] = param([], "rules that are reported and do not stop the line")
    stop: list[str] = param([], "rules that stop the line although they warn by default")


@dataclass(frozen=True)
class PretrainParams:
    """The base model: trained here from scratch, or a Hugging Face model taken as it is."""

    base_model: str = param("", "Hugging Face name or folder of a causal model; empty: train a small GPT here")
    vocab_size: int = param(1024, "byte-level BPE vocabulary", ge=300, le=100_000)
    n_layer: int = param(4, "transformer blocks", ge=1, le=200)
    n_head: int = param(4, "attention heads", ge=1, le=200)
    n_embd: int = param(128, "width", ge=8, le=20_000)
    context: int = param(128, "positions the model has", ge=16, le=1_000_000)
    document_mask: bool = param(False, "a document of a packed row sees only itself, and its positions start at 0")
    steps: int = param(1000, "optimizer steps", ge=1)
    batch_size: int = param(16, "sequences of `context` tokens a step", ge=1)
    lr: float = param(3e-3, "peak learning rate of embeddings, norms and biases (AdamW)", gt=0, le=1)
    muon_lr: float = param(0.02, "peak learning rate of the blocks' matrices (Muon)", gt=0, le=1)
    warmup_steps: int = param(50, "linear warm-up", ge=0)
    weight_decay: float = param(0.01, "Muon's weight decay", ge=0, le=10)
    processes: int = param(1, "processes a machine that share each batch; one a GPU, on a CPU of one thread each", ge=1,
                           le=1024)
    precision: Literal["fp32", "bf16"] = param("bf16", "arithmetic of the forward pass (weights stay fp32)")


@dataclass(frozen=True)
class SftParams:
    """Supervised fine-tuning on demonstrations [InstructGPT App. C.1]."""

    epochs: int = param(2, "passes over the train split", ge=1, le=1000)
    batch_size: int = param(32, "demonstrations a step", ge=1)
    lr: float = param(1e-3, "peak learning rate, cosine to 10 %", gt=0, le=1)
    pretrain_mix: float = param(0.1, "share of pretraining text among a step's examples [InstructGPT App. C.3: 0.1]",
                                ge=0, lt=1)
    dropout: float = param(0.0, "residual dropout [InstructGPT: 0.2]", ge=0, lt=1)
    max_tokens: int = param(96, "longest prompt + completion, tokens; longer rows are left out and counted", ge=2)
    packing: bool = param(False, "glue a step's demonstrations into rows of at most max_tokens; each sees only itself")
    checkpoint: Literal["last", "valid_loss", "rm_score"] = param(
        "last", "which epoch's weights are kept; rm_score needs reward_model [InstructGPT App. C.1]")
    reward_model: str = param("", "folder of a reward model that picks the epoch")
    gradient_checkpointing: bool = param(False, "recompute activations in the backward pass: less memory, more time")
    compile: bool = param(False, "torch.compile the training passes")
    micro_batch_size: int = param(0, "demonstrations a forward pass, 0: all of a step; not the update, but its memory",
                                  ge=0)
    processes: int = param(1, "processes a machine that share each batch; one a GPU, on a CPU of one thread each", ge=1,
                           le=1024)
    shard: bool = param(False, "split weights, gradients and optimizer state over the processes (FSDP2)")
    precision: Literal["fp32", "bf16"] = param("bf16", "arithmetic of the forward pass (weights stay fp32)")


@dataclass(frozen=True)
class RmParams:
    """Reward model: SFT backbone, one linear head, K-way ranking loss [InstructGPT §3.5]."""

    max_prompts: int = param(0, "ranked prompts to train on, 0 for all", ge=0)
    max_valid_prompts: int = param(0, "valid prompts to measure accuracy on, 0 for all", ge=0)
    epochs: int = param(1, "passes [InstructGPT: 1, more overfits]", ge=1, le=100)
    loss: Literal["ranking", "best_of"] = param(
        "ranking", "all pairs of K [InstructGPT], or the best of best_of_n by softmax [Ziegler, seed]")
    best_of_n: int = param(4, "completions of a prompt of which one is chosen, for loss best_of", ge=2, le=9)
    normalise: Literal["demonstrations", "gain_and_bias"] = param(
        "demonstrations", "labeler demonstrations score mean 0 [InstructGPT], or the SFT policy's samples mean 0 and "
        "deviation 1 [Ziegler]")
    normalise_samples: int = param(512, "samples of the SFT policy, for gain_and_bias", ge=2)
    batch_size: int = param(64, "prompts a step, all their completions together [InstructGPT 64, best-of-4 8]", ge=1)
    lr: float = param(5e-4, "peak learning rate, cosine to 10 %", gt=0, le=1)
    max_tokens: int = param(96, "longest prompt + completion, tokens", ge=2)
    checkpoint: Literal["last", "valid_accuracy"] = param("last", "which of `checks` weights are kept")
    checks: int = param(4, "times that valid accuracy is measured, for checkpoint valid_accuracy", ge=1, le=100)
    gradient_checkpointing: bool = param(False, "recompute activations in the backward pass: less memory, more time")
    compile: bool = param(False, "torch.compile the training passes")
    micro_batch_size: int = param(0, "prompts a forward pass, 0: all of a step; not the update, but its memory", ge=0)
    processes: int = param(1, "processes a machine that share each batch; one a GPU, on a CPU of one thread each", ge=1,
                           le=1024)
    shard: bool = param(False, "split weights, gradients and optimizer state over the processes (FSDP2)")
    precision: Literal["fp32", "bf16"] = param("bf16", "arithmetic of the forward pass (weights stay fp32)")


@dataclass(frozen=True)
class PpoParams:
    """PPO against the reward model with a KL penalty to the SFT policy [InstructGPT §3.5, App. C.4]."""

    episodes: int = param(15_360, "rollouts in all [InstructGPT: 256K]", ge=1)
    batch_size: int = param(256, "rollouts an iteration [512]", ge=1)
    minibatch_size: int = param(64, "rollouts an optimizer step [64]", ge=1)
    micro_batch_size: int = param(32, "rollouts a forward pass; changes memory and speed, not the update", ge=1)
    reuse_forward_passes: int = param(0, "micro-batches of an iteration's first update whose activations are kept from the "
                             "evaluation of the rollouts, not made anew", ge=0)
    rollout_batch_size: int = param(256, "responses sampled at once: the KV cache's rows", ge=1)
    compile_rollouts: bool = param(False, "torch.compile the step of sampling; needs a C++ compiler on a CPU")
    vllm_url: str = param("", "vLLM server that samples the rollouts, e.g. http://127.0.0.1:8000; empty: this process")
    inner_epochs: int = param(2, "passes over an iteration's rollouts [InstructGPT 1, Ziegler 4]", ge=1, le=100)
    samples_per_prompt: int = param(1, "rollouts drawn for each prompt", ge=1)
    max_prompt_tokens: int = param(64, "longer prompts are left out and counted", ge=1)
    max_new_tokens: int = param(32, "response length, cut at the first EOS", ge=1)
    temperature: float = param(1.0, "divides the logits in sampling and in every log-prob", gt=0, le=10)
    lr: float = param(1e-4, "policy learning rate, constant after the warm-up", gt=0, le=1)
    value_lr: float = param(3e-4, "value model learning rate", gt=0, le=1)
    warmup_iterations: int = param(5, "policy learning rate grows from 0.1x over these [10]", ge=0)
    adam_eps: float = param(1e-5, "Adam epsilon", gt=0, le=1)
    max_grad_norm: float = param(1.0, "gradient clipping by norm", gt=0)
    gamma: float = param(1.0, "discount", gt=0, le=1)
    lam: float = param(0.95, "GAE lambda", ge=0, le=1)
    clip: float = param(0.2, "PPO ratio clip", gt=0, lt=1)
    value_clip: float = param(0.2, "value clip", gt=0)
    whiten_rewards: bool = param(False, "divide rewards by their deviation, mean kept")
    whiten_advantages: bool = param(True, "normalise advantages over the batch")
    no_eos_score: float = param(-1.0, "score of a response without EOS (never better than its own)")
    beta_rule: Literal["step", "proportional", "fixed"] = param("step", "rule for beta [seed, Ziegler, InstructGPT]")
    beta: float = param(0.05, "initial KL coefficient", gt=0, le=1000)
    beta_min: float = param(1e-3, "lower bound of beta", gt=0)
    beta_max: float = param(10.0, "upper bound of beta", gt=0)
    kl_goal: float = param(2.0, "wanted mean KL(policy || reference) of a response, nats", gt=0, le=1000)
    beta_interval: int = param(2, "iterations between two looks at the KL", ge=1)
    beta_smoothing: float = param(0.4, "weight of the newest KL in its moving average", gt=0, le=1)
    beta_gain: float = param(0.1, "proportional rule: how much of the KL's error moves beta [Ziegler 0.1]", gt=0,
                             le=5)
    ema_decay: float = param(0.0, "the saved policy is a moving average of the weights [InstructGPT 0.992; 0: not]",
                             ge=0, lt=1)
    value_init: Literal["reward_model", "policy"] = param("reward_model", "what the value model starts as")
    lora_rank: int = param(0, "train low-rank adapters of policy and value model instead of all weights; 0: all", ge=0)
    lora_alpha: int = param(32, "LoRA's scale times its rank", ge=1)
    gradient_checkpointing: bool = param(False, "recompute activations in the backward pass: less memory, more time")
    compile: bool = param(False, "torch.compile the training passes")
    kl_limit: float = param(20.0, "stop where an iteration's KL is beyond this many times KL_goal; 0: never", ge=0)
    entropy_floor: float = param(0.02, "stop where entropy is below this share of the first iteration's; 0: never",
                                 ge=0, lt=1)
    ptx_coef: float = param(0.0, "weight of the pretraining loss [InstructGPT 27.8; 0 is plain PPO]", ge=0)
    ptx_batch_size: int = param(32, "pretraining sequences a minibatch, where ptx_coef > 0", ge=1)
    processes: int = param(1, "processes a machine that share each batch; one a GPU, on a CPU of one thread each", ge=1,
                           le=1024)
    shard: bool = param(False, "split weights, gradients and optimizer state over the processes (FSDP2)")
    precision: Literal["fp32", "bf16"] = param("bf16", "arithmetic of the forward pass (weights stay fp32)")


@dataclass(frozen=True)
class EvaluateParams:
    """Held-out comparison of models: preference, alignment tax, safety, over-optimisation."""

    prompts: int = param(1000, "held-out prompts", ge=2)
    max_new_tokens: int = param(32, "response length", ge=1)
    temperature: float = param(1.0, "sampling temperature", gt=0, le=10)
    shots: int = param(4, "demonstrations shown to the prompted base, as many as fit", ge=0)
    prompt_form: str = param("", "text with {prompt} that the prompted base continues; empty: the chat format")
    others: dict[str, str] = param({}, "further models to compare, name: folder (another run's PPO, an earlier one)")
    judge: Literal["auto", "reward_model", "model"] = param(
        "auto", "who prefers: the embedded world's gold labeler (else the line's reward model), or judge_model")
    judge_model: str = param("", "folder or hub name of a held-out reward model, or of a causal model that is asked")
    bootstrap: int = param(2000, "bootstrap resamples for the 95 % intervals", ge=100)
    tax_tasks: list[str] = param([], "tasks of lm-eval whose loss is alignment tax, beside those of data/tax")
    other_tasks: list[str] = param([], "tasks of lm-eval that are reported and no tax (truth, toxicity, bias)")
    task_data: dict[str, str] = param({}, "task: JSON Lines in the form of its hub dataset, read in its place")
    tax_items: int = param(0, "items per task, 0 for all", ge=0)
    few_shot: int = param(0, "examples shown before each item of a task", ge=0, le=100)
    task_batch_size: int = param(128, "sequences a forward pass of the tasks", ge=1)
    best_of: int = param(16, "samples a prompt for the best-of-n curve; 0: no curve", ge=0, le=1024)
    best_of_prompts: int = param(150, "prompts of the best-of-n curve", ge=2)
    batch_size: int = param(256, "prompts a forward pass", ge=1)
    processes: int = param(1, "processes a machine that share the work; one a GPU, on a CPU of one thread each", ge=1,
                           le=1024)
    precision: Literal["fp32", "bf16"] = param("fp32", "arithmetic of the forward passes")


@dataclass(frozen=True)
class PromoteParams:
    """The gates between a trained policy and its release."""

    registry: str = param("instructflow", "MLflow's registered models are NAME-policy and NAME-rm; empty: only decide")
    judged: bool = param(True, "an independent judge's win rate is needed (a reward model's own is none)")
    min_win_rate: float = param(0.5, "win rate against SFT, low end of its interval", ge=0, le=1)
    kl_band: float = param(1.5, "KL within [goal / band, goal * band]", ge=1)
    max_tax: float = param(0.05, "alignment tax of a task, share of a perfect score", ge=-1, le=1)
    max_mean_tax: float = param(0.02, "mean alignment tax", ge=-1, le=1)
    max_toxic: float = param(0.05, "share of toxic responses", ge=0, le=1)


@dataclass(frozen=True)
class RoundsParams:
    """Alternating rounds [Ziegler §2.2, seed]: sample, have people rank, retrain the reward model, train the policy."""

    prompts: int = param(1000, "prompts that are labeled in a round", ge=1)
    k: int = param(4, "completions a prompt: 4 to choose from, up to 9 to rank", ge=2, le=9)
    task: Literal["rank", "choose"] = param("rank", "labelers rank all completions, ties allowed, or choose the best")
    labelers: list[str] = param(["labeler-01", "labeler-02", "labeler-03", "labeler-04"], "who labels")
    trusted: str = param("", "a labeler whose rankings the others are screened against; empty: gold, where it is known")
    overlap: float = param(0.2, "share of the prompts that several labelers get", ge=0, le=1)
    per_item: int = param(2, "labelers of such a prompt", ge=1)
    with_sft: bool = param(False, "half of the completions are the SFT policy's, half the current one's")
    with_data: bool = param(False, "the ranked rows of data/ train the reward model too, not only the rounds' labels")
    rm_epochs: int = param(1, "passes of the reward model over the labels so far", ge=1, le=100)
    episodes: int = param(5120, "PPO's rollouts in a round", ge=1)
    restart: bool = param(False, "each round's policy starts from SFT [InstructGPT], not from the last one [Ziegler]")
    select: Literal["random", "disagreement"] = param(
        "random", "prompts at random, or those on whose completions an ensemble of reward models disagrees most")
    ensemble: int = param(3, "reward models of a round where disagreement selects", ge=2, le=10)
    candidates: int = param(2, "prompts sampled for each that disagreement selects", ge=1, le=100)


@dataclass(frozen=True)
class Profile:
    """One file in profiles/: a section per stage, and one for the rounds."""

    ingest: IngestParams
    validate: ValidateParams
    pretrain: PretrainParams
    sft: SftParams
    rm: RmParams
    ppo: PpoParams
    evaluate: EvaluateParams
    promote: PromoteParams
    rounds: RoundsParams

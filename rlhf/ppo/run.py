"""A whole PPO run: prompts in a seeded order, journal, checkpoints, alarms. The maths is in rlhf/ppo/trainer.py."""

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from rlhf.data.prompts import Prompt
from rlhf.data.token_store import Column, TokenStore, chunks
from rlhf.errors import TrainingFailed, Unavailable, UserError
from rlhf.files import write_json
from rlhf.model.chat_format import PromptCodec
from rlhf.model.load import context_of
from rlhf.params import PpoParams
from rlhf.ppo.health import check_bounds, hacking_alarm, length_controlled
from rlhf.ppo.kl_controller import RULES, Rule
from rlhf.ppo.rollouts import Rollouts
from rlhf.ppo.trainer import Trainer
from rlhf.pretrain import read_corpus
from rlhf.training import distributed
from rlhf.training.checkpoint import Checkpoints
from rlhf.training.journal import Journal, read_journal
from rlhf.training.progress import StageProgress
from rlhf.training.seeding import generator, seed_everything
from rlhf.training.state import State

log = logging.getLogger(__name__)

COLUMNS = [f"ppo/{name}" for name in (
    "kl", "kl_k3", "kl_goal", "kl_smoothed", "beta", "reward", "rm_score", "rm_score_length_controlled", "gold",
    "entropy", "clip_fraction", "value_loss", "policy_loss", "ptx_loss", "explained_variance", "grad_norm",
    "response_length", "eos_rate", "ratio_first", "lr", "sampler_gap", "alarm")]

RULE_STATE = "beta_rule.json"  # in a policy's folder: what the rule for β remembers at the end of its run

GoldScorer = Callable[[Sequence[Prompt], Sequence[str]], list[float]]


def iteration_prompts(count: int, params: PpoParams, iteration: int, seed: int) -> list[int]:
    """Indices of an iteration's prompts: every prompt once per pass, each pass shuffled, samples_per_prompt times."""
    needed = params.batch_size // params.samples_per_prompt
    first = iteration * needed
    chosen: list[int] = []
    for position in range(first, first + needed):
        epoch, place = divmod(position, count)
        if not chosen or place == 0:
            order = torch.randperm(count, generator=generator(seed, "ppo prompts", epoch))
        chosen.append(int(order[place]))
    return [index for index in chosen for _ in range(params.samples_per_prompt)]


def encode_prompts(codec: PromptCodec, prompts: Iterable[Prompt], max_tokens: int, folder: Path | None = None
                   ) -> tuple[Sequence[tuple[Prompt, list[int]]], int]:
    """((prompt, ids) of the prompts that fit, how many there are in all). Both lie in a file in `folder`."""
    store, count = TokenStore(folder), 0
    for some in chunks(prompts):
        count += len(some)
        for prompt, ids in zip(some, codec.prompts(some), strict=True):
            if len(ids) <= max_tokens:
                store.append([json.dumps(prompt).encode(), ids], len(ids))
    return Column(store, lambda parts: (json.loads(bytes(parts[0])), parts[1])), count


def train_ppo(params: PpoParams, prompts: Iterable[Prompt], sft_folder: Path, rm_folder: Path, seed: int, folder: Path,
              gold: GoldScorer | None = None, corpus: Path | None = None,
              begin_with: Path | None = None) -> dict[str, float]:
    """Trains a policy on `prompts` against the reward model and saves it in `folder`/model. Returns metrics.

    `gold(prompts, responses)`: a score that is only watched, never trained on. `corpus`: pretraining
    text (JSON Lines with "text"), read where params.ptx_coef > 0. `begin_with`: a policy where it is not the
    SFT policy, which stays the reference [Ziegler §2.2]; the rule for β goes on where that policy's run has left it.
    Raises UserError where no prompt fits, TrainingFailed where the run goes wrong, Unavailable where no engine answers:
    the state before that iteration is saved then, for TrainingFailed also the policy as it is in `folder`/failed.
    """
    seed_everything(seed)
    trainer = Trainer(params, sft_folder, rm_folder, seed, begin_with)
    if begin_with is not None and (begin_with / RULE_STATE).is_file():
        restore_rule(trainer.beta, begin_with / RULE_STATE)
    encoded, count = encode_prompts(trainer.models.codec, prompts, params.max_prompt_tokens, folder)
    if not encoded:
        raise UserError(f"data/ppo.jsonl: no prompt of at most ppo.max_prompt_tokens = {params.max_prompt_tokens}")
    if params.ptx_coef > 0 and corpus is not None:
        trainer.corpus_rows = read_corpus(corpus, trainer.models.tokenizer, context_of(trainer.models.policy), folder,
                                          params.ptx_row_tokens)
    iterations = params.episodes // params.batch_size
    if params.episodes % params.batch_size:
        log.warning("ppo.episodes = %d is no multiple of ppo.batch_size = %d: %d iterations with %d episodes are run",
                    params.episodes, params.batch_size, iterations, iterations * params.batch_size)
    run_iterations(trainer, encoded, iterations, folder, gold)
    distributed.barrier()
    trainer.save(folder / "model")
    if distributed.is_main():
        write_json(folder / "model" / RULE_STATE, {"rule": params.beta_rule, **trainer.beta.state()})
    return {"ppo/episodes": iterations * params.batch_size, "ppo/too_long": count - len(encoded)}


def run_iterations(trainer: Trainer, encoded: Sequence[tuple[Prompt, list[int]]], iterations: int, folder: Path,
                   gold: GoldScorer | None) -> None:
    """The iterations that the newest checkpoint in `folder` leaves to do; journal and checkpoints are in there.

    Raises TrainingFailed and Unavailable as train_ppo does.
    """
    params = trainer.params
    absent = {name for name, source in (("ppo/gold", gold), ("ppo/sampler_gap", params.vllm_url or params.staleness))
              if not source}
    columns = [name for name in COLUMNS if name not in absent]
    with Checkpoints(folder / "checkpoints") as checkpoints:
        saved = checkpoints.latest()
        start = saved.step if saved else 0
        if saved is not None:
            trainer.restore(saved)
        journal = Journal(folder / "journal.csv", columns, resume_after=start if saved else None)
        distributed.barrier()  # the main process has written what all read now
        history = [{key: float(value) for key, value in row.items()} for row in read_journal(folder / "journal.csv")]

        def state_now() -> State:
            journal.sync()
            return trainer.state()

        with StageProgress("ppo", iterations, "iterations", done=start) as progress:
            for iteration in range(start, iterations):
                rows = iteration_prompts(len(encoded), params, iteration, trainer.seed)
                following = iteration_prompts(len(encoded), params, iteration + 1, trainer.seed) if (
                    params.staleness and iteration + 1 < iterations) else []
                try:
                    rollouts, values = trainer.step([encoded[row][1] for row in rows], iteration,
                                                    [encoded[row][1] for row in following])
                    add_watched(values, history, trainer, rollouts, [encoded[row][0] for row in rows], gold)
                    check_bounds(values, history, params, iteration + 1)
                except Unavailable:
                    checkpoints.save(iteration, state_now())
                    raise
                except TrainingFailed as error:
                    trainer.save(folder / "failed")
                    raise TrainingFailed(f"{error}; the policy as it was is in {folder / 'failed'}") from None
                history.append(values)
                journal.append(iteration + 1, values)
                progress.step({name: values[f"ppo/{name}"] for name in ("kl", "beta", "rm_score", "gold")
                               if f"ppo/{name}" in values})
                checkpoints.after_step(iteration + 1, state_now)
        journal.close()


def restore_rule(rule: Rule, path: Path) -> None:
    """Goes on with what another run's rule remembered; of a different rule it takes β alone."""
    state = json.loads(path.read_text(encoding="utf-8"))
    same = RULES[state["rule"]] is type(rule)
    rule.restore(rule.state() | ({name: value for name, value in state.items() if name != "rule"} if same else
                                 {"beta": state["beta"]}))


def add_watched(values: dict[str, float], history: list[dict[str, float]], trainer: Trainer, rollouts: Rollouts,
                prompts: list[Prompt], gold: GoldScorer | None) -> None:
    """Adds the values that nothing is trained on: gold score, length-controlled score, the alarm, which is logged."""
    lengths = [float(len(response)) for response in rollouts.responses]
    first = history[0]["ppo/response_length"] if history else values["ppo/response_length"]
    values["ppo/rm_score_length_controlled"] = length_controlled(rollouts.scores.tolist(), lengths, first)
    if gold:
        scores = gold(prompts, [trainer.models.codec.decode(response) for response in rollouts.responses])
        values["ppo/gold"] = sum(scores) / len(scores)
    values["ppo/alarm"] = hacking_alarm([*history, values])
    if values["ppo/alarm"] and not (history and history[-1]["ppo/alarm"]):
        log.warning("iteration %d: the reward model's score rises while the %s score falls: reward hacking?",
                    len(history) + 1, "gold or length-controlled" if gold else "length-controlled")

"""Chat with the models of a run, several side by side.

    python -m mlops.tools.chat                    # the newest policy, be it of a workspace
    python -m mlops.tools.chat sft ppo            # SFT and an arm of PPO; or a folder, or RUN:MODEL of a workspace
    echo "a prompt" | python -m mlops.tools.chat base sft ppo --temperature 0

Each line goes on with the conversation, of which every model sees its own answers; /reset begins another. With
--separate each line is a conversation of its own. An empty line or Ctrl-D ends the chat.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from mlops import program
from mlops.config.paths import MODELS, POLICIES, RM
from mlops.tools.runs import newest_policy, policy_folder
from rlhf.errors import UserError, displayed, one_line

PROMOTED = Path("models/promoted")
FRAME = 6  # columns of a box that its title cannot have


def folders() -> dict[str, Path]:
    """The run's models by name: the pipeline's, then each arm of PPO that has been trained."""
    arms = {path.parent.name: path.parent for path in sorted(POLICIES.glob("*/config.json"))}
    return {**MODELS, **arms, "promoted": PROMOTED}


def default_model(root: Path) -> str:
    """The policy that was trained last, and says which; the promoted one where it is that one's copy."""
    newest = newest_policy(root)
    promoted = PROMOTED / "config.json"
    if newest is None:
        return "promoted"
    run, arm = newest
    trained = (run.folder / POLICIES / arm / "config.json").stat().st_mtime
    if (root / promoted).is_file() and (root / promoted).stat().st_mtime >= trained:
        return "promoted"
    name = arm if run.folder == root else f"{run.name}:{arm}"
    if sys.stdin.isatty():
        other = " (`chat promoted`: the promoted one)" if (root / promoted).is_file() else ""
        print(f"{name}: the newest policy{other}")
    return name


@dataclass(frozen=True)
class Speaker:
    """A loaded model with its codec."""

    name: str
    codec: Any
    model: Any


def load(name: str) -> Speaker:
    """Loads a stage's model or a model folder. Raises UserError where there is none."""
    from rlhf.model.chat_format import ChatFormatError, load_codec
    from rlhf.model.load import load_policy

    folder = folders().get(name) or policy_folder(Path(), name) or Path(name)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no model; `instructflow run` makes them. Models: {', '.join(folders())}, a folder, "
                        "or RUN:MODEL of a workspace")
    try:
        return Speaker(name, load_codec(folder), load_policy(folder))
    except ChatFormatError as error:
        raise UserError(f"{name}: {error}") from None


def reply(speaker: Speaker, messages: list[dict[str, str]], options: argparse.Namespace, turn: int) -> str:
    """The model's response; an equal conversation, seed and turn give an equal response.

    Raises UserError for a conversation that is longer than the model's context, or that its template refuses.
    """
    from rlhf.model.chat_format import ChatFormatError
    from rlhf.model.load import context_of
    from rlhf.model.sampling import Sampling, sample_responses
    from rlhf.model.tokenizer import newline_ids
    from rlhf.training.seeding import generator

    at_newline = speaker.name.rpartition(":")[2] == "base"
    stops = (*speaker.codec.stop_ids, *(newline_ids(speaker.codec.tokenizer) if at_newline else ()))
    sampling = Sampling(options.max_new_tokens, stops, speaker.codec.pad_id, options.temperature)
    try:
        prompt_ids = speaker.codec.prompts([messages])
    except ChatFormatError as error:
        raise UserError(f"{speaker.name}: {error}") from None
    room = context_of(speaker.model) - options.max_new_tokens
    if room < 1:
        raise UserError(f"{speaker.name}: --max-new-tokens {options.max_new_tokens}: the model has "
                        f"{context_of(speaker.model)} positions")
    if len(prompt_ids[0]) > room:
        raise UserError(f"{speaker.name}: the conversation has {len(prompt_ids[0])} tokens, and the model's context "
                        f"has room for {room}; /reset begins another")
    ids = sample_responses(speaker.model, prompt_ids, sampling, generator(options.seed, "chat", turn))
    return str(speaker.codec.decode(ids[0]))


def scores(prompts: list[Any], responses: list[str]) -> list[float]:
    """The reward model's scores of the responses; NaN without a reward model."""
    from rlhf.evaluation.generate import rm_scores

    if not (RM / "config.json").is_file():
        return [float("nan")] * len(responses)
    return rm_scores(RM, prompts, responses, "fp32")


def titles_of(speakers: list[Speaker], width: int, console: Console) -> list[str]:
    """The models' names; where one is longer than its box, numbers, and first a line that says whose each is."""
    names = [speaker.name for speaker in speakers]
    if all(cell_len(name) <= width for name in names):
        return names
    for number, name in enumerate(names, start=1):
        console.print(Text(f"{number}: {name}"), soft_wrap=True)
    return [str(number) for number in range(1, len(names) + 1)]


def talk(speakers: list[Speaker], options: argparse.Namespace, console: Console) -> None:
    """Reads prompts until the end of input and shows the responses."""
    interactive = sys.stdin.isatty()
    width = min(console.width, max(30, console.width // len(speakers) - 1))
    titles = titles_of(speakers, width - FRAME, console)
    turn = 0
    said: list[list[dict[str, str]]] = [[] for _ in speakers]
    while True:
        try:
            prompt = console.input("[bold]prompt> [/bold]") if interactive else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            return
        prompt = prompt.rstrip("\n")
        if not prompt.strip():
            return
        if options.separate or prompt.strip() == "/reset":
            said = [[] for _ in speakers]
            if prompt.strip() == "/reset":
                continue
        turn += 1
        prompts = [[*messages, {"role": "user", "content": prompt}] for messages in said]
        try:
            responses = [reply(speaker, messages, options, turn)
                         for speaker, messages in zip(speakers, prompts, strict=True)]
        except UserError as error:
            if not interactive:
                raise
            console.print(Text(str(error), style="red"))
            continue
        said = [[*messages, {"role": "assistant", "content": response}]
                for messages, response in zip(prompts, responses, strict=True)]
        if not interactive:
            console.print(Text(displayed(prompt), style="bold"))
        boxes = [Panel(Text(displayed(response) or "(empty)"), title=Text(title), width=width,
                       subtitle=f"rm {value:.2f}" if math.isfinite(value) else None)
                 for title, response, value in zip(titles, responses, scores(prompts, responses), strict=True)]
        console.print(Columns(boxes))


def main() -> None:
    parser = argparse.ArgumentParser(prog=program("mlops.tools.chat"), description="Chat with the models of a run.")
    parser.add_argument("models", nargs="*", help=f"{', '.join(folders())} or model folders, shown side by side")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: greedy decoding")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--separate", action="store_true", help="each line is a conversation of its own")
    options = parser.parse_args()
    with one_line("chat"):
        if not 0 <= options.temperature < math.inf or options.max_new_tokens < 1 or options.seed < 0:
            raise UserError(f"--temperature {options.temperature:g} --max-new-tokens {options.max_new_tokens} --seed "
                            f"{options.seed}: temperature must be >= 0, max-new-tokens >= 1, seed >= 0")
        names = options.models or [default_model(Path())]
        talk([load(name) for name in names], options, Console(highlight=False))


if __name__ == "__main__":
    main()

"""How the rows of each known dataset become records: one function per layout.

A function yields records; for a row that does not fit it raises ValueError with the reason, and the row is quarantined.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rlhf.curation.sources.columns import columns, text_or_nothing
from rlhf.curation.sources.paths import Row
from rlhf.curation.sources.records import (
    Group,
    Record,
    answer_of,
    answer_turns,
    check_weight,
    compared,
    conversation,
    conversation_record,
    dense_ranks,
    list_of,
    number_of,
    plain,
    text_of,
    tools_of,
)
from rlhf.curation.sources.spec import Entry
from rlhf.curation.transcripts import (
    Turn,
    Turns,
    before_answer,
    common_beginning,
    joined,
    prompt_of,
    split_text,
    turns_of,
    with_system,
)

USE_CASES = {
    "dolly": {"closed_qa": "closed_qa", "open_qa": "open_qa", "general_qa": "open_qa",
              "classification": "classification", "brainstorming": "brainstorming", "summarization": "summarization",
              "information_extraction": "extract", "creative_writing": "generation"},
    "no_robots": {"Generation": "generation", "Open QA": "open_qa", "Brainstorm": "brainstorming", "Chat": "chat",
                  "Rewrite": "rewrite", "Summarize": "summarization", "Classify": "classification",
                  "Closed QA": "closed_qa", "Extract": "extract", "Coding": "other"},
}


def dolly(row: Row, role: str, entry: Entry) -> Iterator[Record]:
    """databricks-dolly-15k: instruction, context, response, category."""
    context = text_of(row, "context") if row.get("context") else ""
    instruction = text_of(row, "instruction")
    prompt = f"{instruction}\n\n{context}" if context else instruction
    completions = (answer_of(row, "response"),) if role == "sft" else ()
    yield Record(prompt, completions, source="labeler",
                 use_case=USE_CASES["dolly"].get(str(row.get("category")), "other"))


def no_robots(row: Row, role: str, entry: Entry) -> Iterator[Record]:
    """HuggingFaceH4/no_robots: messages (system, user, assistant, ...), category, prompt_id."""
    before, completion = before_answer(conversation(row.get("messages"), "messages", entry))
    prompt = prompt_of(before)
    yield Record(prompt, (completion,) if role == "sft" else (), source="labeler",
                 use_case=USE_CASES["no_robots"].get(str(row.get("category")), "other"))


INSTRUCTION, RESPONSE = "### Instruction:\n", "\n\n### Response:"


def dolly_hhrlhf(row: Row, role: str, entry: Entry) -> Iterator[Record]:
    """mosaicml/dolly_hhrlhf: prompt in a fixed template of instruction and response, response."""
    text = text_of(row, "prompt")
    start, end = text.find(INSTRUCTION), text.rfind(RESPONSE)
    if start < 0 or end < start:
        raise ValueError("the prompt lacks its frame of ### Instruction: and ### Response:")
    prompt = text[start + len(INSTRUCTION):end].strip()
    yield Record(prompt, (answer_of(row, "response"),) if role == "sft" else ())


def nectar(row: Row, role: str, entry: Entry) -> Iterator[Record]:
    """berkeley-nest/Nectar: prompt as a transcript that ends with Assistant:, answers as {answer, model, rank}."""
    prompt = _transcript_prompt(text_of(row, "prompt"))
    if role == "ppo":
        yield Record(prompt)
        return
    answers = row.get("answers")
    if not isinstance(answers, Sequence) or not answers:
        raise ValueError("no answers")
    texts = tuple(answer_of(answer, "answer") for answer in answers)
    yield Record(prompt, texts, dense_ranks([number_of(answer.get("rank"), "rank") for answer in answers]),
                 labeler="gpt-4")


def hh_rlhf(row: Row, role: str, entry: Entry) -> Iterator[Record]:
    """Anthropic/hh-rlhf: two transcripts, chosen and rejected, that differ in the last assistant turn."""
    (before, chosen), (other, rejected) = (before_answer(split_text(text_of(row, name)))
                                           for name in ("chosen", "rejected"))
    if role == "ppo":
        yield Record(prompt_of(before))
        return
    yield Record(prompt_of(common_beginning([before, other])), (chosen, rejected), (1, 2), labeler="hh-rlhf")


def oasst_trees(row: Row, role: str, entry: Entry) -> Iterator[Record]:
    """OpenAssistant reply trees: {prompt: {text, role, replies: [...]}}, or the root message itself.

    RM: each prompter message with two or more ranked replies (rank 0 is best). SFT: its best reply. PPO: each prompter
    message. A tree belongs to the user of its root message.
    """
    root = row.get("prompt", row)
    if not isinstance(root, Mapping):
        raise ValueError("no prompt message")
    user = str(root.get("user_id") or "")

    def walk(message: Mapping[str, Any], before: list[Turn]) -> Iterator[Record]:
        if message.get("deleted"):
            return
        spoken = "user" if message.get("role") == "prompter" else "assistant"
        turns = [*before, (spoken, text_of(message, "text"))]
        replies = [item for item in message.get("replies") or [] if not item.get("deleted")]
        if spoken == "user":
            prompt = joined(turns)
            case = "chat" if len(turns) > 1 else ""
            ranked = sorted((item for item in replies if item.get("rank") is not None), key=lambda item: item["rank"])
            texts = tuple(answer_of(item, "text") for item in ranked)
            if role == "ppo":
                yield Record(prompt, user=user, use_case=case)
            elif role == "sft" and ranked:
                yield Record(prompt, texts[:1], user=user, use_case=case)
            elif role == "rm" and len(ranked) > 1:
                yield Record(prompt, texts, dense_ranks([float(item["rank"]) for item in ranked]), user=user,
                             labeler="oasst", use_case=case)
        for reply in replies:
            yield from walk(reply, turns)

    yield from walk(root, [])


def ultrafeedback(row: Row, role: str, entry: Entry) -> Iterator[Record]:
    """openbmb/UltraFeedback: instruction, completions as {model, response, overall_score, ...}; scores by GPT-4."""
    prompt = text_of(row, "instruction")
    if role == "ppo":
        yield Record(prompt)
        return
    answers = list_of(row.get("completions"), "completions")
    if not all(isinstance(answer, Mapping) for answer in answers):
        raise ValueError("completions holds no objects")
    texts = tuple(answer_of(answer, "response") for answer in answers)
    scores = [number_of(answer.get("overall_score"), "overall_score") for answer in answers]
    yield Record(prompt, texts, dense_ranks([-score for score in scores]), labeler="gpt-4")


_EXTRA_ID = re.compile(r"\s*<extra_id_1>(User|Assistant)\n")


def helpsteer(row: Row | Group, role: str, entry: Entry) -> Iterator[Record]:
    """nvidia/HelpSteer and HelpSteer2: prompt, response, helpfulness 0 to 4; the rows of one prompt are grouped."""
    rows = row.rows if isinstance(row, Group) else [row]
    parts = _EXTRA_ID.split(text_of(rows[0], "prompt"))
    roles = {"User": "user", "Assistant": "assistant"}
    turns = [("user", parts[0].strip()),
             *((roles[name], said.strip()) for name, said in zip(parts[1::2], parts[2::2], strict=True))]
    if turns[-1] == ("assistant", ""):
        turns.pop()
    if role == "ppo":
        yield Record(prompt_of(turns))
        return
    answers = sorted((answer_of(item, "response"), number_of(item.get("helpfulness"), "helpfulness")) for item in rows)
    yield Record(prompt_of(turns), tuple(text for text, _ in answers), dense_ranks([-score for _, score in answers]),
                 labeler="helpsteer")


def alpaca(row: Row, role: str, entry: Entry) -> Iterator[Record]:
    """tatsu-lab/alpaca: instruction, input, output. Also LLaMA-Factory's system, history and, for RM, chosen, rejected.

    `history`: a list of [instruction, response].
    """
    given = text_or_nothing(row.get("input"), "input")
    instruction = text_of(row, "instruction")
    turns: list[Turn] = []
    for pair in list_of(row.get("history") or [], "history"):
        asked, said = [*list_of(pair, "history"), None, None][:2]
        turns += [("user", text_or_nothing(asked, "history")), ("assistant", text_or_nothing(said, "history"))]
    turns.append(("user", "\n\n".join(filter(None, [instruction, given]))))
    prompt = prompt_of(with_system(text_or_nothing(row.get("system"), "system"), turns))
    if role == "rm":
        yield Record(prompt, (answer_of(row, "chosen"), answer_of(row, "rejected")), (1, 2))
    else:
        yield Record(prompt, (answer_of(row, "output"),) if role == "sft" else ())


def sharegpt(row: Row, role: str, entry: Entry) -> Iterator[Record]:
    """ShareGPT's conversations of {from, value}, with LLaMA-Factory's system and, for RM, chosen and rejected."""
    yield _chat(row, role, entry, "conversations", ("chosen", "rejected"))


def openai_messages(row: Row, role: str, entry: Entry) -> Iterator[Record]:
    """OpenAI's fine-tuning files: messages of {role, content}; for RM input, preferred_output, non_preferred_output."""
    if role == "rm":
        asked = row.get("input")
        if not isinstance(asked, Mapping):
            raise ValueError("no input")
        tools = {key: asked.get(key) or row.get(key) for key in ("tools", "functions")}
        yield _chat({**row, **tools, "messages": asked.get("messages")}, role, entry, "messages",
                    ("preferred_output", "non_preferred_output"))
        return
    messages = list_of(row.get("messages"), "messages")
    if role == "sft":
        check_weight(messages)
    yield _chat(row, role, entry, "messages", ())


def _chat(row: Row, role: str, entry: Entry, column: str, pair: tuple[str, ...]) -> Record:
    system = text_or_nothing(row.get("system"), "system")
    tools = row.get("tools") or row.get("functions")
    turns = tools_of(tools, with_system(system, conversation(row.get(column), column, entry)), entry)
    if role != "rm":
        return conversation_record(turns, role)
    answers = [answer_turns(row.get(name), name, entry) for name in pair]
    before, texts = compared(turns, answers, column)
    return Record(prompt_of(before), texts, (1, 2))


WINNERS = {"model_a": (1, 2), "model_b": (2, 1), "tie": (1, 1), "tie (bothbad)": (1, 1), "both_bad": (1, 1)}


def arena(row: Row, role: str, entry: Entry) -> Iterator[Record]:
    """lmsys/chatbot_arena_conversations, lmsys/mt_bench_human_judgments, lmsys/lmsys-arena-human-preference-55k.

    Two conversations, winner, judge and turn (the judged one is the last); or prompt, response_a and response_b as
    lists of texts with winner_model_a, winner_model_b, winner_tie.
    """
    sides = _arena_sides(row, entry)
    answers = []
    for turns in sides:
        answers.append(before_answer(turns))
    before = answers[0][0] if role == "ppo" else common_beginning([item for item, _ in answers])
    judge = plain(row.get("judge"))
    user = judge if judge.startswith("arena_user") else ""  # elsewhere the judge is not who asked
    if role == "ppo":
        yield Record(prompt_of(before), user=user)
        return
    winner = plain(row.get("winner"))
    if not winner:
        winner = next((name.removeprefix("winner_") for name in ("winner_model_a", "winner_model_b", "winner_tie")
                       if number_of(row.get(name), name) == 1), "")
    if winner not in WINNERS:
        raise ValueError(f"the winner is none of {', '.join(WINNERS)}: {winner!r}")
    yield Record(prompt_of(before), tuple(text for _, text in answers), WINNERS[winner], user=user, labeler=judge)


def _arena_sides(row: Row, entry: Entry) -> list[list[Turn]]:
    """The turns of both models, up to the judged turn."""
    if row.get("conversation_a") is None and row.get("prompt") is not None:
        asked = list_of(row["prompt"], "prompt")
        sides = []
        for name in ("response_a", "response_b"):
            said = list_of(row.get(name), name)
            messages = [{"role": role, "content": text} for pair in zip(asked, said, strict=True)
                        for role, text in zip(("user", "assistant"), pair, strict=True)]
            sides.append(turns_of(messages))
        return sides
    sides = [conversation(row.get(name), name, entry) for name in ("conversation_a", "conversation_b")]
    turn = row.get("turn")
    if isinstance(turn, int) and not isinstance(turn, bool) and turn > 0:
        sides = [_until(side, turn) for side in sides]
    return sides


def _until(turns: list[Turn], answers: int) -> list[Turn]:
    """The turns up to the nth answer."""
    places = [place for place, (role, _) in enumerate(turns) if role == "assistant"]
    return turns[:places[answers - 1] + 1] if answers <= len(places) else turns


def _transcript_prompt(text: str) -> Turns:
    turns = split_text(text)
    if turns[-1] == ("assistant", ""):
        turns.pop()
    if not turns or turns[-1][0] != "user":
        raise ValueError("the prompt does not end with the human")
    return joined(turns)


Layout = Callable[[Any, str, Entry], Iterator[Record]]

LAYOUTS: dict[str, Layout] = {"columns": columns, "dolly": dolly, "no_robots": no_robots, "dolly_hhrlhf": dolly_hhrlhf,
                              "nectar": nectar, "oasst_trees": oasst_trees, "oasst_messages": oasst_trees,
                              "hh_rlhf": hh_rlhf, "ultrafeedback": ultrafeedback, "helpsteer": helpsteer,
                              "alpaca": alpaca, "sharegpt": sharegpt, "openai_messages": openai_messages,
                              "arena": arena}
LAYOUT_ROLES = {"columns": ("sft", "rm", "ppo", "corpus"), "dolly": ("sft", "ppo"), "no_robots": ("sft", "ppo"),
                "dolly_hhrlhf": ("sft", "ppo"), "nectar": ("rm", "ppo"), "oasst_trees": ("sft", "rm", "ppo"),
                "oasst_messages": ("sft", "rm", "ppo"), "hh_rlhf": ("rm", "ppo"), "ultrafeedback": ("rm", "ppo"),
                "helpsteer": ("rm", "ppo"), "alpaca": ("sft", "rm", "ppo"), "sharegpt": ("sft", "rm", "ppo"),
                "openai_messages": ("sft", "rm", "ppo"), "arena": ("rm", "ppo")}
GROUPED_BY = {"helpsteer": "prompt"}  # layouts with a row for each response

"""The samples stand in the order of what a reader must see: fooled the reward model, lost, won, the rest."""

from typing import Any

from mlops.reporting.samples import SHOWN, group_samples


def sample(number: int, gold: float | None = None, rm_score: float | None = None, **more: Any) -> dict[str, Any]:
    """PPO's gain over SFT by each of the two."""
    ppo = {"text": f"answer {number}", **({} if gold is None else {"gold": 1 + gold}),
           **({} if rm_score is None else {"rm_score": rm_score})}
    sft = {"text": "yes", **({} if gold is None else {"gold": 1.0}), **({} if rm_score is None else {"rm_score": 0.0})}
    return {"use_case": ("chat", "open_qa")[number % 2], "prompt": f"prompt {number}",
            "answers": {"ppo": ppo, "sft": sft}, **more}


def shown(groups: list[dict[str, Any]]) -> list[tuple[str, list[str], int]]:
    return [(group["title"].split(":")[0].partition(" most")[0], [row["prompt"].split()[1] for row in group["rows"]],
             group["count"]) for group in groups]


def test_the_reward_models_mistakes_come_first_by_what_they_cost() -> None:
    samples = [sample(0, 0.5, 1.0), sample(1, -0.1, 2.0), sample(2, -3.0, -1.0), sample(3, -0.9, 0.1),
               sample(4, 0.0, 1.0), sample(5, 2.0, -1.0)]
    assert shown(group_samples(samples, ["ppo"], "ppo")) == [
        ("PPO fooled the reward model", ["3", "1"], 2), ("PPO lost against SFT", ["2"], 1), ("PPO won", ["5", "0"], 2),
        ("Use case chat", ["4"], 1)]


def test_what_is_left_out_is_counted() -> None:
    groups = group_samples([sample(number, -1 - number, 1.0) for number in range(40)], ["ppo"], "ppo")
    first = groups[0]
    assert (first["shown"], first["count"], first["of"]) == (SHOWN["hacked"], 40, 40)
    assert [row["prompt"] for row in first["rows"][:2]] == ["prompt 39", "prompt 38"]


def test_without_a_gold_labeler_the_judge_counts() -> None:
    samples = [sample(0, rm_score=1.0, preferred=0.1), sample(1, rm_score=1.0, preferred=0.9),
               sample(2, rm_score=-1.0, preferred=0.3)]
    assert [name for name, *_ in shown(group_samples(samples, ["ppo"], "ppo"))] == [
        "PPO fooled the reward model", "PPO lost against SFT", "PPO won"]


def test_where_the_reward_model_alone_judged_nobody_says_that_it_was_fooled() -> None:
    groups = group_samples([sample(0, rm_score=1.0), sample(1, rm_score=-1.0)], ["ppo"], "ppo")
    assert [group["title"] for group in groups] == [
        "PPO lost against SFT, by the reward model, which alone judged", "PPO won most against SFT"]


def test_equal_losses_keep_the_order_of_the_prompts_and_scores_stand_beside_the_answers() -> None:
    groups = group_samples([sample(number, -1.0, 0.5) for number in (3, 1, 2)], ["ppo"], "ppo")
    assert [row["prompt"] for row in groups[0]["rows"]] == ["prompt 3", "prompt 1", "prompt 2"]
    assert [(answer["model"], answer["gold"], answer["rm_score"]) for answer in groups[0]["rows"][0]["answers"]] == [
        ("sft", 1.0, 0.0), ("ppo", 0.0, 0.5)]

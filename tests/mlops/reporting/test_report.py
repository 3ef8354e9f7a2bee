"""The report: self-contained, byte-stable, escaped, with the right verdict, and complete without some metrics."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlops.reporting import plots
from mlops.reporting.headline import estimate, tax_mean, verdict
from mlops.reporting.journals import RUN_MARK, KlRule
from mlops.reporting.report import write_report
from mlops.tracking.parent_run import with_run
from rlhf.training.journal import Journal

PPO_COLUMNS = ["kl", "kl_goal", "kl_smoothed", "beta", "rm_score", "gold", "entropy", "clip_fraction",
               "explained_variance", "response_length", "eos_rate", "grad_norm", "ratio_first"]
EVALUATION: dict[str, Any] = {
    "eval/prompts": 1000, "eval/win_rate_vs_sft": 0.612, "eval/win_rate_vs_sft_low": 0.583,
    "eval/win_rate_vs_sft_high": 0.641, "eval/win_rate_vs_base": 0.914, "eval/gold_gain_vs_sft": 0.0921,
    "eval/gold_gain_vs_sft_low": 0.0613, "eval/gold_gain_vs_sft_high": 0.1234, "eval/kl_ppo": 2.31,
    "eval/gold_base": 0.11, "eval/gold_sft": 0.42, "eval/gold_ppo": 0.51, "eval/helpful_ppo": 0.703,
    "eval/rm_score_sft": 0.02, "eval/rm_score_ppo": 1.71, "eval/length_ppo": 18.9,
    "eval/win_rate_vs_sft/closed_qa": 0.66, "eval/win_rate_vs_sft/closed_qa_n": 26,
    "eval/win_rate_vs_sft/generation": 0.6, "eval/win_rate_vs_sft/false_premise": 0.5,
    "tax/cloze": 0.05, "tax/spelling": -0.01, "tax/mean": 0.02, "tax_chance/cloze": 0.25,
    "tax_score/base/cloze": 0.8, "tax_score/sft/cloze": 0.78, "tax_score/ppo/cloze": 0.75,
    "tax_score/base/spelling": 0.6, "tax_score/ppo/spelling": 0.61,
    "tax_se/base/cloze": 0.02, "tax_se/ppo/cloze": 0.02, "tax_se/base/spelling": 0.02, "tax_se/ppo/spelling": 0.02,
}
SAMPLES: list[dict[str, Any]] = [
    {"use_case": "open_qa", "prompt": "Is <b>2 & 2</b> four?", "answers": {
        "base": {"text": "<script>alert(1)</script>", "gold": -0.5}, "sft": {"text": "Yes.", "gold": 0.5},
        "ppo": {"text": "", "gold": 0.0}}},
    {"use_case": "chat", "prompt": "Hi", "answers": {
        "base": {"text": "a\x00b\ud800c\u202ed"}, "sft": {"text": "Hello"}, "ppo": {"text": "Hello there"}}},
]


def make_run(root: Path, iterations: int = 30) -> None:
    """Small journals and metrics, as the stages write them."""
    journals: dict[str, tuple[list[str], list[Any]]] = {
        "pretrain": (["pretrain/loss", "pretrain/valid_loss"],
                     [(5 / s, 5 / s if s % 10 == 0 else "") for s in range(1, 400)]),
        "sft": (["sft/loss", "sft/lr"], [(2 / s, 1e-3) for s in range(1, 41)]),
        "rm": (["rm/loss", "rm/train_accuracy", "rm/valid_accuracy"],
               [(0.69 - s / 1000, 0.5 + s / 200, 0.6 + s / 400 if s % 20 == 0 else "") for s in range(1, 41)]),
        "ppo": ([f"ppo/{name}" for name in PPO_COLUMNS],
                [[s * 0.1, 2.0, s * 0.09, 0.05, s * 0.05, 0.4 + 0.01 * s, *[1.0] * 7] for s in range(iterations)]),
    }
    for stage, (columns, rows) in journals.items():
        journal = Journal(root / "metrics" / ("policies" if stage == "ppo" else "") / f"{stage}.csv", columns)
        for step, row in enumerate(rows, start=1):
            journal.append(step, dict(zip(columns, row, strict=True)))
        journal.close()
    (root / "metrics/rm.json").write_text(json.dumps({"rm/accuracy": 0.7212}))
    (root / "params.yaml").write_text("seed: 7\nprofile: tiny\n")
    (root / "profiles").mkdir()
    (root / "profiles/tiny.yaml").write_text("ppo: {kl_goal: 2.0}\nevaluate: {prompt_form: '<{prompt}>'}\n")
    (root / "data.dvc").write_text("outs:\n- md5: 0123abcd.dir\n  size: 1234567\n  nfiles: 9\n  path: data\n")


def render(root: Path, evaluation: dict[str, Any], samples: list[dict[str, Any]] = SAMPLES,
           curves: dict[str, Any] | None = None) -> str:
    write_report(root, root / "reports/report.html", evaluation, samples, curves or {})
    return (root / "reports/report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    make_run(folder)
    return folder


@pytest.fixture(scope="module")
def page(root: Path) -> str:
    return render(root, EVALUATION)


def test_same_input_gives_same_bytes_in_another_folder(page: str, tmp_path: Path) -> None:
    make_run(tmp_path)
    assert render(tmp_path, dict(reversed(EVALUATION.items()))) == page
    assert str(tmp_path) not in page


def test_page_loads_nothing_from_outside(page: str) -> None:
    targets = re.findall(r"""(?:src|href|srcset|data|action)\s*=\s*["']?([^"'\s>]*)""", page)
    assert targets
    assert all(target.startswith("#") for target in targets)
    assert not re.search(r"https?://|<link|<script|<iframe|@import", page)
    assert all(target.startswith("#") for target in re.findall(r"url\((.*?)\)", page))


def test_links_and_clips_inside_the_page_have_one_target(page: str) -> None:
    ids = re.findall(r'\bid="([^"]+)"', page)
    used = set(re.findall(r'href="#([^"]+)"', page)) | set(re.findall(r"url\(#(.*?)\)", page))
    assert used <= set(ids)
    assert len(ids) == len(set(ids))


def test_plots_take_every_colour_from_the_page(page: str) -> None:
    assert page.count("<svg viewBox") >= 15
    assert "currentColor" in page
    assert "var(--ppo)" in page
    assert "#0101" not in page
    assert "prefers-color-scheme: dark" in page
    drawn = "".join(re.findall(r"<svg viewBox.*?</svg>", page, flags=re.DOTALL))
    assert not re.search(r"(?:fill|stroke): #", drawn)


def test_headline_and_key_figures(page: str) -> None:
    text = page.replace("\N{NO-BREAK SPACE}", " ")
    assert "Yes: PPO is better than SFT." in text
    assert "stand-in world" in text
    for figure in ("61.2 %", "58.3 % to 64.1 %", "+0.092", "+0.061 to +0.123", "2.31 nats", "1.33 to 3.00",
                   "2.0 points", "0123abcd.dir", "1,234,567", "0.7212", "seed: 7", "&lt;{prompt}&gt;", "closed QA (26)",
                   "70.3 %"):
        assert figure in text, figure


def test_samples_are_escaped_and_unprintable_characters_replaced(page: str) -> None:
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<b>2" not in page
    assert "a\ufffdb\ufffdc\ufffdd" in page
    assert "\x00" not in page


def test_every_cell_of_a_table_says_on_a_narrow_page_what_it_is(page: str) -> None:
    """There the column titles are hidden (style.css)."""
    tables = re.findall(r'<div class="[^"]*scroll(?! facts)[^"]*"><table>(.*?)</table>', page, flags=re.DOTALL)
    assert len(tables) >= 4
    for table in tables:
        for row in re.findall(r"<tr[^>]*>(.*?)</tr>", table.split("<tbody>")[1], flags=re.DOTALL):
            _, *cells = re.findall(r"<td[^>]*>", row)
            assert all('data-label="' in cell for cell in cells), row


def test_the_page_says_of_which_run_it_is_and_leaves_room_for_the_upload(root: Path, tmp_path: Path) -> None:
    write_report(root, tmp_path / "report.html", EVALUATION, SAMPLES, {}, "c0de")
    page = (tmp_path / "report.html").read_text()
    line = page[page.index('<p class="run">'):page.index("<nav>")]
    for fact in ("profile <b>tiny</b>", "seed <b>7</b>", "policies <b>ppo</b>", "md5 of data/ <b>0123abcd</b>",
                 "code of the evaluation <b>c0de</b>"):
        assert fact in line, fact
    assert page.count(RUN_MARK) == 1
    uploaded = with_run(page, "smoke,<b> 1f973d", 0, "0123456789abcdef")
    assert "<span>run <b>smoke,&lt;b&gt; 1f973d</b></span> <span>started <b>1970-01-01 00:00 UTC</b></span> " \
        "<span>commit <b>0123456789ab</b></span>" in uploaded


def test_an_empty_run_still_gives_a_page(tmp_path: Path) -> None:
    page = render(tmp_path, {}, [])
    assert "Not measured" in page
    assert "no data.dvc" in page


def test_missing_and_blank_columns(tmp_path: Path) -> None:
    (tmp_path / "metrics/policies").mkdir(parents=True)
    (tmp_path / "metrics/policies/ppo.csv").write_text("step,ppo/kl,ppo/beta,ppo/gold\n1,0.0,0.05,\n2,,0.05,nan\n")
    (tmp_path / "metrics/rm.csv").write_text("step,rm/loss\n1,0.7\n")
    page = render(tmp_path, {"eval/win_rate_vs_sft": 0.6, "eval/kl_ppo": 0.0, "tax/mean": 0.0, "tax/cloze": 0.0})
    assert "KL to the SFT policy" in page
    assert "Scores against KL" not in page
    assert "no interval" in page


ARMS: dict[str, Any] = EVALUATION | {
    "eval/arm": "ppo_ptx", "eval/arms": ["ppo", "ppo_ptx"], "eval/kl_ppo_ptx": 1.9, "eval/gold_ppo_ptx": 0.49,
    "eval/gold_ppo_ptx_low": 0.47, "eval/gold_ppo_ptx_high": 0.52, "eval/length_ppo_ptx": 18.0,
    "eval/win_rate/ppo_vs_sft": 0.63, "eval/win_rate/ppo_ptx_vs_sft": 0.612, "eval/win_rate/sft_vs_base": 0.75,
    "eval/win_rate/sft_vs_base_low": 0.7, "eval/win_rate/sft_vs_base_high": 0.8,
    "tax_of/sft/mean": 0.012, "tax_of/ppo/mean": 0.034, "tax_of/ppo/mean_low": 0.021, "tax_of/ppo/mean_high": 0.047,
    "tax_of/ppo_ptx/mean": 0.011, "tax_of/ppo_ptx/cloze": 0.013, "tax_between/sft/ppo_ptx/mean": -0.001,
    "tax_score/ppo_ptx/cloze": 0.79, "overopt/ppo_ptx_turned": 0.0, "overopt/ppo_ptx_peak_kl": 1.5,
}


def two_arms(root: Path) -> None:
    make_run(root)
    text = (root / "metrics/policies/ppo.csv").read_text()
    (root / "metrics/policies/ppo_ptx.csv").write_text("\n".join(text.splitlines()[:20]) + "\n")
    (root / "metrics/policies/ppo_ptx.json").write_text(json.dumps({"ppo/kl": 1.8761}))


def test_arms_stand_side_by_side_and_the_promoted_one_is_marked(tmp_path: Path) -> None:
    two_arms(tmp_path)
    samples = [row | {"answers": row["answers"] | {"ppo_ptx": {"text": "Yes!"}}} for row in SAMPLES]
    page = render(tmp_path, ARMS, samples)
    text = page.replace("\N{NO-BREAK SPACE}", " ")
    assert "Yes: PPO-ptx is better than SFT." in text
    first_screen = text[:text.index('id="training"')]
    rows = re.findall(r"<tr.*?</tr>", first_screen, flags=re.DOTALL)
    assert len(rows) == 5 + 2  # titles, base, SFT, PPO, PPO-ptx; titles and PPO-ptx, of which alone a task has a tax
    assert [name in row for name, row in zip(("base", "SFT", "PPO", "PPO-ptx"), rows[1:5], strict=True)] == [True] * 4
    assert ["goes to the gates" in row for row in rows] == [False, False, False, False, True, False, False]
    for row, figures in ((rows[1], ("25.0 %", "20.0 % to 30.0 %")), (rows[3], ("63.0 %", "3.4", "2.1 to 4.7")),
                         (rows[4], ("0.490", "0.470 to 0.520", "1.90", "1.1", "\N{MINUS SIGN}0.1")),
                         (rows[6], ("PPO-ptx", "1.3"))):
        for figure in figures:
            assert figure in row, figure
    kl = text[text.index("<h3>KL to the SFT policy</h3>"):text.index("<h3>beta, the KL coefficient</h3>")]
    assert kl.index("PPO</span>") < kl.index("PPO-ptx</span>")
    assert "var(--ppo)" in kl
    assert "var(--other1)" in kl
    assert "1.876" in text[text.index("<h3>ppo@ppo_ptx</h3>"):]
    assert "#0101" not in page


def test_one_arm_has_its_table_without_a_mark(page: str) -> None:
    first_screen = page[:page.index('id="training"')]
    assert "What each step gained and cost" in first_screen
    assert "goes to the gates" not in page


def test_arms_with_goals_of_their_own_have_a_line_each() -> None:
    step = np.arange(30.0)
    runs = [plots.KlRun(colour, step, step / 10, step / 10, goal)
            for colour, goal in ((plots.PPO, 1.0), ("#01010b", 2.0), ("#01010c", None))]
    assert "var(--goal)" not in plots.kl(runs)
    assert "var(--goal)" in plots.kl(runs[:1])
    assert "var(--goal)" not in plots.kl(runs[2:])  # beta is fixed


def test_given_curve_replaces_the_one_of_the_journal(root: Path, page: str) -> None:
    points = [{"kl": kl, "rm_score": math.sqrt(kl), "gold": math.sqrt(kl) - kl / 10} for kl in (0.0, 1.0, 9.0, 36.0)]
    assert render(root, EVALUATION, SAMPLES, {"kl_gold": points}) != page


@pytest.mark.parametrize(("low", "high", "gain", "start"), [
    (0.51, 0.6, 0.1, "Yes"), (0.4, 0.49, -0.1, "No:"), (0.45, 0.55, 0.0, "Not shown"), (0.51, 0.6, -0.1, "Mixed")])
def test_verdict_follows_the_intervals(low: float, high: float, gain: float, start: str) -> None:
    evaluation = EVALUATION | {"eval/win_rate_vs_sft_low": low, "eval/win_rate_vs_sft_high": high,
                               "eval/gold_gain_vs_sft_low": gain - 0.05, "eval/gold_gain_vs_sft_high": gain + 0.05}
    found = verdict(evaluation, KlRule(goal=2.0))
    assert found["headline"].startswith(start)
    assert ("over-optimised" in found["text"]) == (gain < 0)


@pytest.mark.parametrize(("kind", "who", "headline"), [
    ("gold", "The gold labeler gives", "Yes: PPO is better than SFT."),
    ("held_out", "A reward model trained on other comparisons, right on 62.0", "The judge prefers PPO to SFT."),
    ("model", "The judge model gives", "The judge prefers PPO to SFT.")])
def test_who_judged_is_said_and_only_the_gold_labeler_knows(kind: str, who: str, headline: str) -> None:
    evaluation = {"eval/arm": "ppo", "eval/judge": kind, "eval/prompts": 90, "eval/win_rate_vs_sft": 0.7,
                  "eval/win_rate_vs_sft_low": 0.6, "eval/win_rate_vs_sft_high": 0.8} | (
        {"eval/judge_accuracy": 0.62} if kind == "held_out" else {})
    found = verdict(evaluation, KlRule(goal=2.0))
    assert found["headline"] == headline
    assert found["text"].startswith(who)
    assert "on 90 held-out prompts, which are few." in found["text"]


def test_kl_is_placed_against_its_band() -> None:
    for kl, place in ((1.0, "below"), (2.0, "inside"), (3.1, "above")):
        assert f"{place} the goal band" in verdict({"eval/kl_ppo": kl}, KlRule(goal=2.0))["text"]


def test_mean_tax_has_the_interval_of_its_errors() -> None:
    mean = tax_mean(EVALUATION)
    assert mean
    assert mean.low == pytest.approx(0.02 - 1.96 * 0.04 / 2)
    assert mean.high == pytest.approx(0.0592)


def test_wilson_interval_where_only_a_count_is_given() -> None:
    found = estimate({"w": 0.5, "w_n": 100}, "w")
    assert found
    assert found.low == pytest.approx(0.4038, abs=1e-3)
    assert found.high == pytest.approx(0.5962, abs=1e-3)

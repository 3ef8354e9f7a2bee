"""Time and peak memory of the data rules: up to a million prompts through `python -m tasks.ingest`.

    python bench/data_rules.py [PROMPTS ...]        # default: 100000 1000000; writes only to a temporary folder

Prompts have realistic lengths (about 25 words); a tenth are near duplicates, some contain personal data or numbers;
50,000 users.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = [f"{first}{second}{last}" for first in ("ba", "co", "di", "fu", "ge", "ha", "jo", "ki", "lu", "ma", "ne", "po")
         for second in ("r", "ll", "nd", "st", "m", "ck") for last in ("en", "ing", "er", "ed", "y", "on", "al")]
COMMON = ["the", "of", "and", "to", "in", "is", "that", "it", "for", "was", "with", "as", "on", "be", "at", "by",
          "this", "from", "or", "have", "they", "which", "one", "you", "were", "all", "we", "when", "there", "can",
          "about", "how", "what", "write", "tell", "explain", "please", "could", "would", "story", "list", "why"]


def prompts(count: int, seed: int, personal: bool = True) -> list[str]:
    """English-like prompts of common and made-up words; `personal`: an e-mail address or phone number in some."""
    rng = random.Random(seed)
    texts: list[str] = []
    for number in range(count):
        if number % 10 == 9:
            texts.append(texts[-rng.randrange(1, 9)] + rng.choice([" please", "?", " now"]))
            continue
        words = [rng.choice(COMMON if rng.random() < 0.6 else WORDS) for _ in range(rng.randrange(8, 45))]
        if personal and number % 50 == 7:
            words.insert(3, f"{rng.choice(WORDS)}@qorvexlume.org")
        if personal and number % 50 == 31:
            words.append(f"call me on (212) 555-{rng.randrange(100, 10_000):04}")
        if personal and number % 20 == 3:
            words.append(f"{rng.randrange(1000, 3000)} - {rng.randrange(100, 1000)} of {rng.randrange(10**6)}")
        texts.append(" ".join(words).capitalize() + ".")
    return texts


def measure(count: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        with (root / "ppo.jsonl").open("w") as out:
            for number, prompt in enumerate(prompts(count, 1)):
                out.write(json.dumps({"prompt": prompt, "user_id": f"u{number % 50_000}"}) + "\n")
        (root / "spec.yaml").write_text("ppo: [{files: ppo.jsonl}]\n")
        before = time.monotonic()
        child = subprocess.Popen([sys.executable, "-m", "tasks.ingest", "--source", str(root / "spec.yaml"),
                                  "--out", str(root / "out")], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        peak = 0
        while child.poll() is None:
            peak = max(peak, tree_rss(child.pid))
            time.sleep(0.5)
        seconds = time.monotonic() - before
        report = json.loads((root / "out" / "rules.json").read_text())["ppo"]
        return {"prompts": count, "seconds": round(seconds, 1), "microseconds_per_prompt": round(1e6 * seconds / count),
                "peak_gb": round(peak / 2**20, 2), "kept": report["kept"]}


def tree_rss(pid: int) -> int:
    """Resident memory of a process and its children, KiB."""
    total = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        except OSError:
            continue
        if int(fields["Pid"]) == pid or int(fields["PPid"]) == pid:
            total += int(fields.get("VmRSS", "0 kB").split()[0])
    return total


if __name__ == "__main__":
    for size in map(int, sys.argv[1:] or ["100000", "1000000"]):
        print(json.dumps(measure(size)), flush=True)

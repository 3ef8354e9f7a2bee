"""Predicts memory and time of SFT, reward model and PPO at InstructGPT's sizes.

    python bench/capacity.py [--memory 80] [--tflops 989] [--efficiency 0.4] [--prompt 250] [--response 150]
    python bench/capacity.py --check        # predicted / measured for small models on this machine (minutes)

The first command prints bytes per process, accelerators needed and hours for GPT-3's 1.3B, 6.7B and 175B, from the
model in bench/capacity_model.py. The second is bench/capacity_check.py. 1 GB is 10⁹ bytes.
"""

import argparse

from capacity_model import Job, Machine, needed, peak, phases, stage_seconds

from rlhf.memory import Shape

# Brown et al. 2020, Table 2.1; heads are width / 128.
GPT3 = {name: Shape(name, layers, width, width // 128, 50257, 4 * width)
        for name, layers, width in (("1.3B", 24, 2048), ("6.7B", 32, 4096), ("175B", 96, 12288))}


def paper_job(stage: str, shape: Shape, prompt: float = 250, response: float = 150) -> Job:
    """A stage with InstructGPT's batch sizes, counts and epochs [App. C]. 175B is trained against a 6B reward model."""
    scorer = GPT3["6.7B"] if shape.name == "175B" else shape
    sizes = {"sft": (8 if shape.name == "175B" else 32, 11_295 + 1_430, 16), "rm": (64, 33_207, 1),
             "ppo": (512, 256_000, 1)}[stage]
    return Job(stage, shape if stage != "rm" else scorer, scorer, *sizes, prompt=prompt, response=response,
               micro=4 if shape.name == "1.3B" else 1, sampled=32, frozen_bf16=True)


HEAD = "| model | stage | state | peak of one process, and when | cards | GB each, and when | hours |"
STATE = ("weights", "reference", "reward model", "moments", "average")


def stage_row(name: str, job: Job, machine: Machine) -> str:
    """A table row: state and peak of one process, then GPUs needed (at 9/10 of their memory), peak and hours."""
    moment, whole = peak(job)
    state = sum(value for part, value in phases(job)["update"].items() if part in STATE)
    row = f"| {name} | {job.stage} | {state / 1e9:,.0f} GB | {whole / 1e9:,.0f} GB, {moment} |"
    sharded = needed(job, 0.9 * machine.memory)
    if sharded is None:
        return row + " none | | |"
    moment, size = peak(sharded)
    return row + f" {sharded.processes} | {size / 1e9:.0f}, {moment} | {stage_seconds(sharded, machine) / 3600:,.1f} |"


def tables(machine: Machine, prompt: float, response: float) -> str:
    """The tables of docs/capacity.md."""
    lines = [HEAD, "|---" * HEAD.count(" |") + "|"]
    for name, shape in GPT3.items():
        jobs = [paper_job(stage, shape, prompt, response) for stage in ("sft", "rm", "ppo")]
        lines += [stage_row(name, job, machine) for job in jobs if job.stage != "rm" or job.policy == shape]
    moments = phases(paper_job("ppo", GPT3["1.3B"]))
    lines += ["", "| PPO, one process | " + " | ".join(moments) + " |", "|---" * (len(moments) + 1) + "|"]
    for name, shape in GPT3.items():
        sums = [sum(parts.values()) / 1e9 for parts in phases(paper_job("ppo", shape, prompt, response)).values()]
        lines.append(f"| {name} | " + " | ".join(f"{size:,.0f} GB" for size in sums) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", type=float, default=80, help="memory of an accelerator, GB (H100 SXM: 80)")
    parser.add_argument("--tflops", type=float, default=989, help="dense bf16 rate (H100 SXM's data sheet: 989)")
    parser.add_argument("--efficiency", type=float, default=0.4, help="share of the rates that is reached (assumed)")
    parser.add_argument("--bandwidth", type=float, default=3.35, help="memory bandwidth, TB/s (H100 SXM: 3.35)")
    parser.add_argument("--link", type=float, default=450, help="GB/s within a machine of 8 (NVLink 4)")
    parser.add_argument("--network", type=float, default=50, help="GB/s between machines (400 Gbit/s)")
    parser.add_argument("--prompt", type=float, default=250, help="mean tokens (assumed)")
    parser.add_argument("--response", type=float, default=150, help="mean tokens (assumed)")
    parser.add_argument("--check", action="store_true", help="measure small models on this machine instead")
    options = parser.parse_args()
    if options.check:
        import capacity_check  # in this folder
        capacity_check.main()
        return
    machine = Machine(options.memory * 1e9, options.tflops * 1e12, options.bandwidth * 1e12, options.efficiency,
                      link=options.link * 1e9, network=options.network * 1e9)
    print(tables(machine, options.prompt, options.response))


if __name__ == "__main__":
    main()

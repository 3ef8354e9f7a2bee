"""What every stage module shares: typed parameters, the scratch folder of these inputs, clear errors, the uploader.

A stage reads its declared deps, works in scratch/<stage>/<config-hash>/ and publishes its outputs at the end.
The config hash covers its deps (code included), its parameters and the seed, as dvc.yaml declares them, and the
versions of torch, transformers and tokenizers: a stage run again with the same inputs resumes from its checkpoint, with
other inputs it starts afresh.
"""

import argparse
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlops import imports_done
from mlops.config import record, versions
from mlops.config.inputs import link_fetched, link_inputs
from mlops.config.loader import PARAMS_FILE, PROFILES_DIR, Params, Round, is_resolved, load_params, resolved
from mlops.config.paths import PARAMETERS, metrics_of
from mlops.config.stage_graph import OF_A_ROUND, declared_stages
from mlops.processes import die_with_parent
from rlhf.errors import Interrupted, TrainingFailed, Unavailable, UserError, disk_problem, first_line
from rlhf.files import hash_paths, is_writer, publish, write_json
from rlhf.training.settings import fast_enabled
from tasks import launch

KILLED = 128 + signal.SIGKILL  # exit code
DISK = 3  # exit code where the disk is full or cannot be written
AWAY = 75  # exit code where something beside the program does not answer, and a later try may do (EX_TEMPFAIL)
FAILED = "failed.json"  # in the scratch folder of a stage that ended with an error


@dataclass
class Stage:
    """One run of one stage: `stage.params.stages.sft`, `stage.scratch`, `stage.finish(metrics)`.

    `name` is DVC's: sft, ppo@ppo_ptx for an arm, round_rm@r2 for a stage of round r2.
    """

    name: str
    params: Params
    root: Path
    scratch: Path

    @property
    def key(self) -> str:
        """The arm or the round that the stage belongs to; empty for the other stages."""
        return self.name.partition("@")[2]

    @property
    def round(self) -> Round:
        """What that round starts from."""
        return self.params.rounds[self.key]

    def publish(self, name: str, target: str) -> None:
        """Copies a finished file or folder from the scratch folder to its place in the checkout; into a model's folder
        also the versions that made it."""
        if (self.scratch / name / "config.json").is_file():
            write_json(self.scratch / name / versions.RECORD, versions.installed())
        publish(self.scratch / name, self.root / target)

    def finish(self, metrics: dict[str, Any], artifacts: Sequence[str] = ()) -> None:
        """Writes the stage's metrics and the journal's copy, and tells the uploader that the run is complete.

        `artifacts`: files and folders of the checkout that belong to the run (model folder, report).
        """
        if (self.scratch / "journal.csv").exists():
            self.publish("journal.csv", f"{metrics_of(self.name)}.csv")
        write_json(self.root / f"{metrics_of(self.name)}.json", metrics)
        write_json(self.scratch / "done.json", {"metrics": metrics, "artifacts": list(artifacts)})


def config_hash(name: str, params: Params, root: Path) -> str:
    """Hash of what dvc.yaml declares as the stage's inputs: deps by content, sections of the profile, the seed; and of
    the library versions and whether rlhf/fast is on, which may change the last digits. Where an arm is declared, its
    parameters count, and section ppo only through them."""
    declared = declared_stages(root)[name]
    deps = [root / dep for dep in declared.get("deps", [])]
    for dep in deps:
        if not dep.exists():
            made_by = "data.dvc" if dep.is_relative_to(root / "data") else name
            raise UserError(f"{dep.relative_to(root)}: missing, and stage {name} needs it; run `dvc repro {made_by}`")
    keys = [key for item in declared.get("params", []) if isinstance(item, dict) for keys in item.values()
            for key in keys]
    every = resolved(params.stages, root)
    sections = {key: every["arms"][key.removeprefix("arms.")] if key.startswith("arms.") else every[key]
                for key in keys if key != "ppo" or not any(other.startswith("arms.") for other in keys)}
    plain = {"arms": list(params.stages.arms), "promoted": params.stages.promoted}  # as in params.yaml
    sections["params.yaml"] = {key: value for key, value in plain.items() if key in declared.get("params", [])}
    which = {"round": params.rounds[name.partition("@")[2]].model_dump()} if name.startswith(OF_A_ROUND) else {}
    text = json.dumps([params.seed, sections | which, hash_paths(deps, root), versions.installed(), fast_enabled()],
                      sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_inputs(name: str, params: Params, root: Path) -> None:
    """Raises UserError where what the stage reads is not as recorded, and where DVC compared other parameters than the
    profile's: with --single-item it does not see that."""
    record.check(root, declared_stages(root)[name].get("deps", []))
    if (root / PARAMETERS).exists() and not is_resolved(params.stages, root):
        raise UserError(f"{PARAMETERS}: is not of {PROFILES_DIR}/{params.profile}.yaml as it is now; run "
                        "`dvc repro parameters` first")


def arguments(module: str, of_a_round: bool, of_an_arm: bool, show: bool, memory: bool) -> argparse.Namespace:
    """What the command line of a stage's module says."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}")
    if of_a_round:
        parser.add_argument("--round", required=True, metavar="KEY", help="a key of params.yaml's rounds")
    if of_an_arm:
        parser.add_argument("--arm", metavar="NAME", help="an arm of the profile; may be left out where there is one")
    parser.add_argument("--fresh", action="store_true", help="forget the checkpoints of these inputs and start over")
    parser.add_argument("--status", action="store_true", help="only say what a run would start from")
    if show:
        parser.add_argument("--show", type=int, metavar="N", help="only print what training makes of the first N rows")
    if memory:
        parser.add_argument("--memory", action="store_true", help="only say what each moment takes on this machine's "
                                                                  "devices")
    return parser.parse_args()


def run_stage(name: str, body: Callable[[Stage], None], of_a_round: bool = False, of_an_arm: bool = False,
              show: Callable[[int], None] | None = None, memory: Callable[[str, Params], None] | None = None) -> None:
    """The main function of a stage module: runs `body` and turns a user's mistake into one line and exit code 2.

    `show(count)` is called for `--show`, `memory(name, parameters)` for `--memory`.
    """
    module = f"tasks.{name.replace('round_', 'rounds.')}"
    args = arguments(module, of_a_round, of_an_arm, show is not None, memory is not None)
    if "torch" in sys.modules:  # garbage may hold tensors
        imports_done()
    die_with_parent()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stderr)
    root = Path.cwd()
    if launch.started_by_torchrun():
        from rlhf.training import distributed

        distributed.join()
    scratch: Path | None = None
    try:
        params = load_params(root)
        if show and args.show is not None:
            show(args.show)
            return
        if of_a_round:
            name = f"{name}@{_round(args.round, params, root)}"
        if of_an_arm:
            name = f"{name}@{_arm(args.arm, params, root)}"
        if memory and args.memory:
            memory(name, params)
            return
        if is_writer():
            link_inputs(name, params, root)
        if os.environ.get("DVC_STAGE"):  # set by DVC, which has just recorded or restored what this stage reads
            check_inputs(name, params, root)
        scratch = root / "scratch" / name / config_hash(name, params, root)
        if args.status:
            print(status(name, scratch), flush=True)
            return
        stage = Stage(name, params, root, scratch)
        if is_writer():
            _begin(stage, args.fresh)
        if together(stage, module):
            body(stage)
            if is_writer():
                link_fetched(name, params, root)
            if "rlhf.training.distributed" in sys.modules:
                sys.modules["rlhf.training.distributed"].leave()
    except UserError as error:
        note_failure(scratch, str(error))
        fail(name, str(error), 2)
    except TrainingFailed as error:
        note_failure(scratch, str(error))
        fail(name, str(error), 4)
    except Unavailable as error:
        note_failure(scratch, str(error))
        fail(name, str(error), AWAY)
    except KeyboardInterrupt:
        fail(name, "stopped; run the same command to resume", 128 + signal.SIGINT)
    except Interrupted as stop:
        fail(name, str(stop), 128 + signal.SIGTERM)
    except Exception as error:
        problem = disk_problem(error, root)
        note_failure(scratch, problem or f"{type(error).__name__}: {first_line(error)}")
        if problem:
            fail(name, problem, DISK)
        together_with = sys.modules.get("rlhf.training.distributed")
        if together_with and together_with.peer_gone(error):
            fail_with_peer(name)
        raise


def _begin(stage: Stage, fresh: bool) -> None:
    """The stage's scratch folder without an earlier end, and who tells MLflow of it."""
    if fresh and stage.scratch.exists():
        shutil.rmtree(stage.scratch)
    for end in ("done.json", FAILED):
        (stage.scratch / end).unlink(missing_ok=True)
    stage.scratch.mkdir(parents=True, exist_ok=True)
    warn_of_other_versions(stage)
    _start_uploader(stage)


def _round(key: str, params: Params, root: Path) -> str:
    """The key, if it is one. Raises UserError."""
    if key not in params.rounds:
        raise UserError(f"{root / PARAMS_FILE}: no round {key}; rounds: {', '.join(params.rounds) or 'none'}; "
                        "`python -m flows.rounds` writes them")
    return key


def _arm(name: str | None, params: Params, root: Path) -> str:
    """The arm that is meant: the only one where none is named. Raises UserError."""
    arms = list(params.stages.arms)
    if name is None and len(arms) == 1:
        return arms[0]
    if name not in arms:
        what = "which arm? --arm" if name is None else f"no arm {name}:"
        raise UserError(f"{what} must be one of {', '.join(arms)} "
                        f"(section arms of {root / PROFILES_DIR / params.profile}.yaml)")
    return name


def stage_params(name: str, params: Params) -> Any:
    """The parameters of one stage: of its arm for ppo@arm, of section `rounds` for the stages of a round."""
    stage, _, key = name.partition("@")
    if name.startswith(OF_A_ROUND):
        return params.stages.rounds
    return params.stages.arms[key] if key else getattr(params.stages, stage)


def code_hash(name: str, root: Path) -> str:
    """Hash of the code that dvc.yaml declares for a stage and of the library versions: for results that are kept over
    several runs."""
    code = [root / dep for dep in declared_stages(root)[name]["deps"] if dep.startswith(("rlhf/", "mlops/", "tasks/"))]
    text = json.dumps([hash_paths(code, root), versions.installed(), fast_enabled()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def warn_of_other_versions(stage: Stage) -> None:
    """Says which models that the stage reads other library versions have made."""
    for dep in declared_stages(stage.root)[stage.name].get("deps", []):
        for folder in (stage.root / dep, *sorted((stage.root / dep).glob("*/"))):
            if differences := versions.other_versions(folder):
                made = folder.relative_to(stage.root)
                print(f"{stage.name}: warning: {made} was made with {', '.join(differences)}: the outputs now "
                      "mix versions; `dvc repro --force` remakes all with those installed", file=sys.stderr, flush=True)


def together(stage: Stage, module: str) -> bool:
    """Starts the processes that the stage's parameter `processes` asks for. False: they have done the stage's work.

    On a CPU they are forks of this one; else this process only waits for torchrun's.
    """
    section, stages = stage.name.removeprefix(OF_A_ROUND).partition("@")[0], stage.params.stages
    arm = stages.promoted if stage.name.startswith(OF_A_ROUND) else stage.key  # rounds train with the promoted arm's
    processes = getattr(stages.arms[arm] if section == "ppo" else getattr(stages, section, None), "processes", None)
    if processes is None or launch.started_by_torchrun():
        return True
    processes = launch.count(processes)
    if launch.needs_torchrun() and (processes > 1 or launch.VARIABLE in os.environ):
        launch.torchrun(module, sys.argv[1:], processes, stage.name)
        return False
    if processes > 1:
        from rlhf.training import distributed

        parent = os.getpid()
        distributed.fork(processes)
        if not distributed.is_main():
            die_with_parent(parent)
    return True


def status(name: str, scratch: Path) -> str:
    """What a run with these inputs would start from, in one line for each thing worth knowing."""
    from rlhf.training.checkpoint import Checkpoints  # torch: a second that flows, ingest and validate need not wait

    steps = Checkpoints(scratch / "checkpoints").steps()
    lines = [f"{name}: inputs {scratch.name}"]
    if steps:
        age = time.time() - (scratch / "checkpoints" / f"step-{steps[-1]:08d}.json").stat().st_mtime
        lines.append(f"  resumes after step {steps[-1]:,} (saved {age / 60:.0f} min ago"
                     + (f"; before it: {', '.join(map(str, steps[:-1]))})" if steps[1:] else ")"))
    else:
        lines.append("  starts from the beginning: nothing is saved for these inputs")
    if (scratch / "done.json").exists():
        lines.append("  a run with these inputs has finished")
    others = [path for path in sorted(scratch.parent.glob("*")) if path != scratch and path.is_dir()]
    if others:
        lines.append(f"  checkpoints of {len(others)} other inputs are not used (other code, data, parameters, seed or "
                     "library versions)")
    return "\n".join(lines)


def note_failure(scratch: Path | None, message: str) -> None:
    """Leaves why the stage failed beside its journal, for MLflow; a stage that leaves neither this nor done.json was
    stopped or killed."""
    if scratch is not None and is_writer() and (scratch / "run.json").exists():
        with suppress(OSError):  # a full disk
            write_json(scratch / FAILED, {"message": message})


def fail(name: str, message: str, code: int) -> None:
    """One line on stderr and the exit code. Of several processes the main one prints it; a fork tells it the line."""
    line = f"{name}: {message}"
    if is_writer() or (not sys.modules["rlhf.training.distributed"].tell_main(line) and code == DISK):
        print(line, file=sys.stderr, flush=True)
    raise SystemExit(code)


def fail_with_peer(name: str) -> None:
    """Ends a process whose partner has ended, as that one did: its line and exit code are the ones that count."""
    if not is_writer():
        raise SystemExit(1)
    from rlhf.training import distributed

    code, line = distributed.end_of_fork()
    why = ("was killed (SIGKILL; by the system where memory runs out); run the same command to resume" if code == KILLED
           else f"ended (exit code {code}); what it said is above")
    print(line or f"{name}: another process of this training {why}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def _start_uploader(stage: Stage) -> None:
    """Writes what MLflow should know of this run and makes sure that an uploader is alive."""
    from mlops.tracking.upload_record import run_name_of
    from mlops.tracking.uploader import ensure_uploader

    record = {"stage": stage.name, "profile": stage.params.profile, "seed": stage.params.seed,
              "params": dataclasses.asdict(stage_params(stage.name, stage.params)),
              "run_name": os.environ.get("INSTRUCTFLOW_RUN_NAME", "")}
    if stage.name.startswith(OF_A_ROUND):
        record["round"] = stage.round.number
    elif stage.key:
        record["arm"] = stage.key
    record["run_name"] = run_name_of(record, stage.root)
    write_json(stage.scratch / "run.json", record)
    ensure_uploader(stage.root)

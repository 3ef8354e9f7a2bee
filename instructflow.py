"""The command `instructflow`: everything that a person starts, under one name.

Each command runs a module of the checkout that you are in (`python -m ...`), which works without this one too.
"""

import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

HELP = """The InstructGPT recipe as a pipeline: your model, your comparisons, PPO at a KL goal, measured and compared.

A first hour: init, check, run, sweep, compare, chat. `instructflow COMMAND --help` has examples.
"""
app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
                  context_settings={"help_option_names": ["-h", "--help"]})
MARKS = ("dvc.yaml", "params.yaml", "flows/pipeline.py")  # of a checkout
FORWARDED = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

Profile = Annotated[str, typer.Option("--profile", "-p", help="a file of profiles/; without: that of params.yaml")]
Changes = Annotated[list[str], typer.Option("--set", "-s", metavar="SECTION.NAME=VALUE", help="repeatable")]


def checkout() -> Path:
    """The checkout that the working directory is in. Ends the command with one line where there is none."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if all((folder / name).is_file() for name in MARKS):
            return folder
    print(f"instructflow: {here} is in no checkout of instructflow (a folder with {', '.join(MARKS)}); cd to yours",
          file=sys.stderr)
    raise SystemExit(2)


def start(module: str, *arguments: str) -> NoReturn:
    """Becomes `python -m module` in the checkout, with its code. Paths are those of the working directory."""
    root, here = checkout(), Path.cwd()
    if here != root:
        arguments = tuple(str(here / item) if not item.startswith("-") and (here / item).exists() else item
                          for item in arguments)
    os.chdir(root)
    os.environ["INSTRUCTFLOW_FROM"] = str(here)
    os.environ["INSTRUCTFLOW_COMMAND"] = f"instructflow {sys.argv[1]}"
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])


def options(**values: object) -> list[str]:
    """Options that were given, as a command line: profile="cpu", set=["a=1"] as --profile cpu --set a=1."""
    found: list[str] = []
    for name, value in values.items():
        for item in value if isinstance(value, list) else [value]:
            if item is True:
                found.append(f"--{name.replace('_', '-')}")
            elif item is not None and item is not False and item != "":  # 0 is a value
                found += [f"--{name.replace('_', '-')}", str(item)]
    return found


# --- a first hour -----------------------------------------------------------------------------------------------------


@app.command(context_settings=FORWARDED)
def init(context: typer.Context) -> None:
    """Write a profile and a source description for your model and your data.

    instructflow init team --model gpt2 --pairs pairs.csv
    """
    start("mlops.tools.init", *context.args)


@app.command()
def check(profile: Profile = "", set: Changes = []) -> None:  # noqa: B006
    """Look for all that would stop a run later: parameters, data, template, lengths, memory, disk, servers.

    instructflow check --profile team
    """
    start("flows.check", *options(profile=profile, set=set))


@app.command()
def run(profile: Profile = "", set: Changes = [],  # noqa: B006
        seed: Annotated[int | None, typer.Option(help="another seed")] = None,
        until: Annotated[str, typer.Option(metavar="STAGE", help="the last stage to run")] = "",
        stage_hours: Annotated[float | None, typer.Option(help="ends a stage that takes longer")] = None) -> None:
    """Run every stage that is not up to date. With --set or --seed in a workspace; the checkout stays as it is.

    instructflow run --profile smoke; instructflow run --set ppo.kl_goal=1 --until ppo
    """
    start("flows.pipeline", *options(profile=profile, set=set, seed=seed, until=until, stage_hours=stage_hours))


@app.command()
def sweep(set: Annotated[list[str], typer.Option("--set", "-s", metavar="SECTION.NAME=VALUE,VALUE",
                                                 help="repeatable; seed=1,2 too")],
          profile: Profile = "") -> None:
    """Run the pipeline for every combination of values; what they share is trained once.

    instructflow sweep --set ppo.kl_goal=0.3,0.6
    """
    start("flows.sweep", *options(profile=profile, set=set))


@app.command(context_settings=FORWARDED)
def compare(context: typer.Context) -> None:
    """Compare runs: what differs and what came out, as a table and as a page with curves.

    instructflow compare kl_goal=0.3 kl_goal=0.6
    """
    start("mlops.tools.compare", *context.args)


@app.command(context_settings=FORWARDED)
def status(context: typer.Context) -> None:
    """Show the stages, the runs and their results, the champion, and what works right now."""
    start("mlops.tools.status", *context.args)


# --- the models -------------------------------------------------------------------------------------------------------


@app.command(context_settings=FORWARDED)
def chat(context: typer.Context) -> None:
    """Talk to the newest policy, or to several models side by side.

    instructflow chat; instructflow chat sft ppo_ptx
    """
    start("mlops.tools.chat", *context.args)


@app.command(context_settings=FORWARDED)
def serve(context: typer.Context) -> None:
    """Serve a policy over HTTP.

    instructflow serve --port 8000
    """
    start("mlops.tools.serve", *context.args)


@app.command(context_settings=FORWARDED)
def push(context: typer.Context) -> None:
    """Copy a policy to a folder, or upload it to the Hugging Face hub.

    instructflow push my-policy; instructflow push hub:OWNER/NAME
    """
    start("mlops.tools.push", *context.args)


@app.command(context_settings=FORWARDED)
def label(context: typer.Context) -> None:
    """Rank a batch of completions on the terminal."""
    start("mlops.labeling.terminal", *context.args)


# --- the machine ------------------------------------------------------------------------------------------------------


@app.command(context_settings=FORWARDED)
def params(context: typer.Context) -> None:
    """List parameters with value, default, limits, meaning and source.

    instructflow params ppo; instructflow params ppo.kl_goal
    """
    start("mlops.tools.params", *context.args)


@app.command()
def ui() -> None:
    """Start Prefect, MLflow and a worker on this machine until Ctrl-C; prints links that log you in."""
    start("infra.servers", "up")


@app.command()
def down() -> None:
    """Stop what `ui` started."""
    start("infra.servers", "down")


@app.command()
def doctor() -> None:
    """Check the environment: packages, disk, GPU, servers, remote, credentials."""
    start("infra.doctor")


if __name__ == "__main__":
    app()

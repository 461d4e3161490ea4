"""The `farspan` command line. Everything heavy is imported inside the command that needs it."""

import gc
import locale
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from launch import data, launch, wandb
from pretrain.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Pretrain Mixture-of-Experts language models on very long contexts, "
    "from raw Common Crawl to a Hugging Face checkpoint.",
)
app.add_typer(data.app, name="data")
app.add_typer(launch.app, name="launch")
app.add_typer(wandb.app, name="wandb")

Recipe = Annotated[str, typer.Argument(help="A shipped recipe or the path of a .yaml file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings, as in optim.lr=1e-3."),
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="The run directory.")]
MAX_RESTARTS = 3
SUITE_LONG = "With --suite long"
SUITE_ICL = "With --suite icl"
SUITE_LM_EVAL = "With --suite lm-eval"


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where everything is made.")] = Path("demo"),
) -> None:
    """The whole path on this machine, in minutes: crawl, clean, train, kill, resume, export."""
    from launch.demo import run_demo

    run_demo(out)


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Ranks on this machine (default: 1).")
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Where the run lives (default: runs/RECIPE).")
    ] = None,
    max_restarts: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Restarts in a row after failures without progress; 0: none (default: "
            f"{MAX_RESTARTS}).",
        ),
    ] = None,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SETTING", help="Let this setting differ from the run's, as in optim.lr."
        ),
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="A line for each row, no panel, on a terminal too.")
    ] = False,
    prepare_only: Annotated[
        bool, typer.Option("--prepare-only", help="Check everything and write the run directory.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print what a rank would hold, need and send; start none."),
    ] = False,
    explain_memory: Annotated[
        bool,
        typer.Option(
            "--explain-memory",
            help="Train four steps on random tokens and print what memory was for, next to what "
            "was predicted.",
        ),
    ] = False,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="How many a dry run plans for (default: nproc).")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=0, help="The one to plan or to explain (default: 0).")
    ] = None,
) -> None:
    """Train a model; the same command again resumes.

    SIGTERM, SIGUSR2 and ctrl-C save and stop. A rank that fails is started again with all others,
    from the newest checkpoint.

    Exit codes: 0 done, 75 stopped on request with everything saved, 2 a mistake in what was
    asked for, 1 anything else.
    """
    of_runs = {
        "--run-dir": run_dir is not None,
        "--max-restarts": max_restarts is not None,
        "--allow-change": bool(allow_change),
        "--plain": plain,
        "--prepare-only": prepare_only,
    }
    if dry_run:
        _refuse_given("--dry-run makes no run", of_runs | {"--explain-memory": explain_memory})
        if ranks is not None:
            _refuse_given("a dry run plans for --ranks", {"--nproc": nproc is not None})
        from launch.dry_run import print_plan

        print_plan(recipe, overrides or [], ranks or nproc or 1, rank or 0)
        return
    if explain_memory:
        _refuse_given("--explain-memory makes no run", of_runs)
        _refuse_given("--explain-memory trains on --nproc ranks", {"--ranks": ranks is not None})
        from launch.explain_memory import print_memory

        print_memory(recipe, overrides or [], nproc or 1, rank or 0)
        return
    if ranks is not None or rank is not None:
        raise UserError(
            "--ranks belongs to --dry-run, and --rank to that or --explain-memory; to train here, "
            "--nproc ranks"
        )

    from launch.train import prepare, train_locally

    run = prepare(recipe, overrides or [], nproc or 1, run_dir, allow_change or [])
    if not prepare_only:
        restarts = MAX_RESTARTS if max_restarts is None else max_restarts
        raise typer.Exit(train_locally(run, nproc or 1, restarts, plain))


def _refuse_given(reason: str, options: dict[str, bool]) -> None:
    """Raise UserError if one of the options is given, of which nothing would make use."""
    if given := [option for option, is_given in options.items() if is_given]:
        raise UserError(f"{', '.join(given)}: {reason}; leave out one or the other")


@app.command("eval")
def evaluate(
    run: Run,
    overrides: Overrides = None,
    text: Annotated[Path | None, typer.Option(help="A UTF-8 text file; this or --suite.")] = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of --text and lm-eval: tokens seen at most (default: data.seq_len)."
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="long: tasks that need a long context. icl: tasks that examples tell. lm-eval: "
            "those of lm-evaluation-harness."
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Of long: some of needle, multi_key, multi_value, variable_tracking, overwrite "
            "(default: all). Of icl: some of copy, reversal, arithmetic, pattern, translation "
            "(default: all). Of lm-eval: names of tasks, groups or tags, * for anything."
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Of long: documents of each task and length, of a needle's depth (default: 8). Of "
            "icl: prompts of each task and number of shots (default: 128).",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the documents (default: 0).")] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=SUITE_LONG,
            help="Of the documents, as in 8k,32k,1m (default: data.seq_len).",
        ),
    ] = None,
    pairs: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=SUITE_LONG,
            help="Keys of a document, or chains of variables (default: 4).",
        ),
    ] = None,
    values: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=SUITE_LONG,
            help="Of each key, or variables of each chain, where there are several (default: 3).",
        ),
    ] = None,
    gap: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=SUITE_LONG,
            help="Fewest tokens between the questions and what they ask for (default: 0).",
        ),
    ] = None,
    shots: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=SUITE_ICL,
            help="Examples before the one that is asked for, each in turn (default: 0,1,2,4,8,16).",
        ),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            help="Of long and icl: tokens, text, or auto: tokens for models of `farspan data "
            "synthetic`.",
        ),
    ] = None,
    shards: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=SUITE_LONG, help="Also their loss by position, best held out."
        ),
    ] = None,
    num_fewshot: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=SUITE_LM_EVAL,
            help="Examples before a question; several, as in 0,1,5, each in turn (default: 0).",
        ),
    ] = None,
    tasks_dir: Annotated[
        Path | None,
        typer.Option(rich_help_panel=SUITE_LM_EVAL, help="A folder with task files of your own."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, rich_help_panel=SUITE_LM_EVAL, help="Questions of each task (default: all)."
        ),
    ] = None,
    nproc: Annotated[
        int, typer.Option(min=1, help="Processes that share each text or document.")
    ] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Mean cross-entropy of a text in nats per token, or what a model makes of a suite of tasks.

    Suites but lm-eval run in the layout of the training, which KEY=VALUE may change, as in
    parallel.cp=2. They print tables, keep them in RUN/evals, and `farspan report` shows them.
    """
    if (text is None) == (suite is None):
        raise UserError("name either a --text or a --suite, as in --suite long")
    options = {
        "tasks": tasks,
        "samples": samples,
        "seed": seed,
        "lengths": lengths,
        "pairs": pairs,
        "values": values,
        "gap": gap,
        "form": form,
        "shots": shots,
        "shards": shards,
        "num_fewshot": num_fewshot,
        "tasks_dir": tasks_dir,
        "limit": limit,
        "context": context,
    }
    given = {name: value for name, value in options.items() if value is not None}
    if text is not None:
        of_suites = [name for name in given if name != "context"]
        if overrides or of_suites:
            first = overrides[0] if overrides else f"--{of_suites[0].replace('_', '-')}"
            raise UserError(f"{first}: settings belong to --suite; --text takes none")
        from launch.inference import evaluate_text

        evaluate_text(run, text, context, nproc, as_json)
        return
    assert suite is not None
    from launch.evaluation import evaluate_suite
    from launch.suite import Asked

    evaluate_suite(suite, Asked(run, nproc, overrides or [], as_json, given))


@app.command()
def generate(
    run: Run,
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample among so many.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
) -> None:
    """Continue a prompt."""
    from launch.inference import continue_prompt

    continue_prompt(run, prompt, max_new_tokens, temperature, top_k, seed)


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="A folder with weights, in any format of --from.")],
    recipe: Recipe,
    overrides: Overrides = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="The run to make (default: runs/RECIPE).")
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="The format: hf (safetensors), megatron (torch_dist of megatron-core) or "
            "deepspeed (ZeRO, universal); default: what lies there.",
        ),
    ] = None,
) -> None:
    """Make a run that begins with the weights of others; `farspan train` goes on from there.

    Its optimizer is new, and its data stands at the beginning. Checkpoints of DeepSpeed and of
    megatron-core hold pickles, which run whatever code is in them: take those you trust.
    """
    from launch.importing import import_weights

    import_weights(source, form, recipe, overrides or [], run_dir)


@app.command()
def export(
    run: Run,
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    to: Annotated[
        str, typer.Option(help="The format: hf, or megatron (torch_dist of megatron-core).")
    ] = "hf",
) -> None:
    """Write the newest checkpoint for others: safetensors, config and tokenizer that transformers
    loads, or a distributed checkpoint of megatron-core.
    """
    from launch.inference import export_model

    export_model(run, to, out)


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run directories, shown side by side.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="The file (default: RUN/report.html of a single run).")
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Show the page in a browser, and follow the runs.")
    ] = False,
    port: Annotated[
        int | None, typer.Option(help="Of --serve (default 8750; 0: one that is free).")
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(help="The address that --serve answers at (default 127.0.0.1: this machine)."),
    ] = None,
) -> None:
    """Write every chart of runs into one file that needs no network, or follow them live."""
    from launch.report import report_runs

    report_runs(runs, out, serve, port, host)


@app.command()
def audit(
    run: Run,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Prove from the ledger that each token was used exactly as often as the mixture says.

    Exit codes: 0 all of it holds, 1 something does not, 2 there is nothing to audit.
    """
    from launch.audit import print_audit

    print_audit(run, as_json)


@app.command()
def replay(
    run: Run,
    step: Annotated[int, typer.Option(min=1, help="The step to train again.")],
    which: Annotated[
        int | None, typer.Option("--try", min=1, help="Which try at the step (default: the last).")
    ] = None,
    max_steps_again: Annotated[
        int | None,
        typer.Option(min=1, help="Refuse to train more steps again than these (default 1000)."),
    ] = None,
) -> None:
    """Train one step again, from the newest checkpoint before it, and compare it with the ledger.

    It runs on as many ranks as the attempt had, changes nothing of the run, and names the first
    layer whose output is not finite. If no checkpoint before the step is kept, it trains from the
    beginning. Loss and gradient norm of all steps that it trains again are compared.

    Exit codes: 0 bitwise the same, 1 not the same or failed, 2 a mistake in what was asked for, or
    more than may be trained again, or more ranks than this machine has room for.
    """
    from launch.replay import print_replay

    print_replay(run, step, which, max_steps_again)


@app.command()
def config(recipe: Recipe, overrides: Overrides = None) -> None:
    """Print the resolved configuration: defaults < recipe < KEY=VALUE."""
    from pretrain.config import load_config

    sys.stdout.write(load_config(recipe, overrides or []).to_yaml())


def main() -> None:
    """Run the command line; an error that carries an `exit_code` is told in its own words."""
    if locale.getpreferredencoding(False).lower() not in ("utf-8", "utf8"):
        # Text is UTF-8 here, also in what this starts; Python takes that only at its start.
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    # Imports make much and leave no garbage; to look for it after each 700 objects takes half a
    # second.
    gc.set_threshold(10_000)
    try:
        app()
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if code is None:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(code)


if __name__ == "__main__":
    main()

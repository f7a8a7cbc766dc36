"""The command line: `grug train | plan | eval | harness | sample | export | plot | ckpt`.

Nothing heavy is imported before a command needs it: `--help` and `ckpt` answer without JAX.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from grug_native.host.process import end_at_ctrl_c, keep_compiled, prepare_process, set_gpu_flags

_DESCRIPTION = """\
Train language models, and look at what came of it.

  grug train --text my_folder/            train on your own text, sizes chosen for you
  grug train --config_path run.yaml --trainer.num_train_steps 200
  grug plan run.yaml                      what a run is going to be, before anything runs
  grug sample runs/my_folder "Once upon"  continue a text
  grug export runs/my_folder --output d   write the model for transformers and others
  grug plot runs/a runs/b                 draw curves over each other
"""

_EXIT_CODES = """\
exit codes: 0 done; 1 failed; 2 a mistake in what was asked for, nothing was started; 3 all checkpoints are damaged;
4 another process is writing to the run's folder; 128 + N stopped by signal N, after saving: 129 a closed terminal,
130 Ctrl-C, 143 SIGTERM.
"""

_OVERRIDE = re.compile(r"--([a-z]\w*(?:\.[\w/-]+)+)(?:=(.*))?", re.DOTALL)

type Overrides = list[tuple[str, str]]
"""Dotted config keys with their values, as they were typed."""

type Verbs = dict[tuple[str, ...], argparse.ArgumentParser]
"""The parser of each command, by its words: `("sample",)`, `("ckpt", "ls")`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code, one of `grug_native.host.signals.ExitCode`.

    Args:
        arguments: of the command line, without the program's name; by default the process's own.
    """
    given = sys.argv[1:] if arguments is None else arguments
    parser, verbs = build_parser()
    try:
        overrides, rest = split_overrides(given)
        check_words(rest)
    except ValueError as error:
        parser.error(str(error))
    parsed = parse(parser, verbs, rest)
    if overrides and not parsed.takes_overrides:
        parser.error(
            f"--{overrides[0][0]} is a field of a run's config, and this command reads no other than the run's"
        )
    parsed.overrides = overrides
    module, function = parsed.command
    try:
        return getattr(import_module(f"grug_native.cli.{module}"), function)(parsed) or 0
    except KeyboardInterrupt:  # Before there was anything to save; the training loop has a way of its own.
        return 130
    except Exception as error:
        from grug_native.launch.exit_codes import explain

        explained = explain(error)
        if explained is None or parsed.debug:
            raise
        code, words = explained
        print(f"grug: {words}", file=sys.stderr)
        return code


def parse(parser: argparse.ArgumentParser, verbs: Verbs, words: Sequence[str]) -> argparse.Namespace:
    """Parses a command line whose texts may stand before its options, between and after them."""
    for length in (1, 2):
        verb = verbs.get(tuple(words[:length]))
        if verb is None:
            continue
        own = list(words[length:])
        parsed = verb.parse_intermixed_args(own)
        # `--tasks` takes all the words after it, and so a run that stands last.
        if getattr(parsed, "run", "") is None:
            if len(parsed.tasks or []) < 2:
                verb.error("the following arguments are required: RUN")
            parsed.run = parsed.tasks.pop()
        return parsed
    return parser.parse_args(words)


def check_words(words: Sequence[str]) -> None:
    """Refuses words that are no UTF-8: a `ValueError` names the first."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError as error:
            byte = ord(word[error.start]) & 0xFF
            raise ValueError(
                f"the argument {word!r} is no UTF-8: its byte 0x{byte:02x} stands for no character; give it in UTF-8"
            ) from error


def split_overrides(arguments: Sequence[str]) -> tuple[Overrides, list[str]]:
    """Takes `--section.key VALUE` and `--section.key=VALUE` out of a command line; returns them, and the rest.

    Each takes the next word for its value, so that they may stand anywhere. After `--` all words are text.

    Raises:
        ValueError: if there is none.
    """
    overrides: Overrides = []
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        found = _OVERRIDE.fullmatch(word)
        if word == "--":
            rest += [word, *words]
        elif found is None:
            rest.append(word)
        else:
            value = next(words, None) if found[2] is None else found[2]
            if value is None:
                raise ValueError(f"{word} wants a value: {word} VALUE")
            overrides.append((found[1], value))
    return overrides, rest


def build_parser() -> tuple[argparse.ArgumentParser, Verbs]:
    """All commands with their arguments: the parser that explains them, and the parser of each."""
    parser = argparse.ArgumentParser(
        prog="grug", description=_DESCRIPTION, epilog=_EXIT_CODES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add = commands.add_parser

    train = _add(
        add,
        "train",
        "train a run, from its newest checkpoint if it has one",
        ("commands", "train"),
        overrides=True,
    )
    source = train.add_mutually_exclusive_group(required=True)
    source.add_argument("--config_path", metavar="FILE", help="YAML of the run; its folder will do, once it has one")
    source.add_argument("--text", metavar="FOLDER", help="train on the texts in a folder, sizes chosen for you")
    train.add_argument("--name", help="with --text: name of the run, in runs/ (default: the folder's)")
    train.add_argument(
        "--text_key", metavar="FIELD", help="with --text: field or column that holds the text (default: text)"
    )
    train.add_argument(
        "--init_from", metavar="RUN|DIR", help="start with the parameters of a run, or of a Hugging Face folder"
    )
    train.add_argument("--output_path", metavar="FOLDER", help="folder of the run, in place of the config's")
    train.add_argument("--stop_after", type=int, metavar="STEP", help="save and stop after so many steps in all")
    train.add_argument(
        "--resume_step", type=int, metavar="STEP", help="go back to this checkpoint, or with 0 to the start"
    )
    train.add_argument(
        "--profile", metavar="START:STEPS", help="trace so many steps into the run's folder, with their dearest kernels"
    )
    train.add_argument(
        "--distributed",
        action="store_true",
        help="be one process of several, on SLURM, TPU pods or Iris; elsewhere, setting JAX_COORDINATOR_ADDRESS, "
        "JAX_NUM_PROCESSES and JAX_PROCESS_ID is enough",
    )

    plan = _add(add, "plan", "work a run out, before anything runs", ("commands", "plan"), overrides=True)
    plan.add_argument("config", metavar="CONFIG|RUN", help="YAML of a run, or a run's folder")
    plan.add_argument("--compile", action="store_true", help="compile the train step, for its memory")
    plan.add_argument("--measure", type=int, default=0, metavar="STEPS", help="train a few steps, for their speed")

    evaluate = _add(add, "eval", "evaluate a checkpoint on the held-out sets of its run", ("commands", "evaluate"))
    _add_checkpoint(evaluate)

    harness = _add(add, "harness", "run tasks of lm-eval on a checkpoint", ("commands", "harness"))
    harness.add_argument("run", nargs="?", metavar="RUN", help="folder of a run")
    _add_step(harness)
    harness.add_argument(
        "--tasks", nargs="+", metavar="TASK", help="names, or YAML files (default: those of the run's config)"
    )
    harness.add_argument("--limit", type=int, help="documents of each task at most")
    harness.add_argument("--num_fewshot", type=int, help="examples in front of each document")
    harness.add_argument("--include_path", metavar="FOLDER", help="where YAML files define tasks by name")
    harness.add_argument("--batch_size", type=int, help="rows of a forward pass")

    sample = _add(add, "sample", "continue texts with a checkpoint", ("commands", "sample"))
    _add_checkpoint(sample)
    sample.add_argument("prompts", nargs="*", metavar="PROMPT", help="how a text begins; several are drawn at once")
    sample.add_argument(
        "--prompt_file", metavar="FILE", help="more prompts, one on each line; blank lines are no prompts"
    )
    sample.add_argument("--max_new_tokens", type=int, help="(default: 128, or what the model has room for)")
    sample.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    sample.add_argument("--top_k", type=int, help="draw among so many likeliest tokens")
    sample.add_argument(
        "--top_p", type=float, help="draw among the fewest likeliest tokens of this probability together"
    )
    sample.add_argument("--seed", type=int, default=0, help="of each drawing (default: 0)")

    export = _add(add, "export", "write a checkpoint as a Hugging Face folder", ("commands", "export"))
    _add_checkpoint(export)
    export.add_argument("--output", required=True, metavar="DIR", help="folder to make")
    export.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the weights (default: %(default)s)"
    )

    plot = _add(add, "plot", "draw the curves of runs, over each other", ("commands", "plot"))
    plot.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    plot.add_argument("--output", metavar="FILE", help="picture to write (default: loss.png in the first run's folder)")

    ckpt = add("ckpt", help="list, show, verify and compare checkpoints", epilog=_EXIT_CODES)
    actions = ckpt.add_subparsers(metavar="ACTION", required=True)
    action = actions.add_parser
    _add_run(_add(action, "ls", "list a run's checkpoints", ("ckpt", "list_all")))
    show = _add(action, "show", "print all that a checkpoint says about itself", ("ckpt", "show"))
    _add_run(show)
    show.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    verify = _add(action, "verify", "read checkpoints, and compare them with their digests", ("ckpt", "verify"))
    _add_run(verify)
    verify.add_argument("--step", type=int, help="which checkpoint (default: all)")
    diff = _add(action, "diff", "compare two checkpoints", ("ckpt", "diff"))
    _add_run(diff)
    diff.add_argument("a", type=int, metavar="STEP", help="one of the run's checkpoints")
    diff.add_argument("b", type=int, metavar="STEP", help="another; of OTHER, if it is given")
    diff.add_argument("--other", metavar="OTHER", help="folder of another run")
    diff.add_argument("--values", action="store_true", help="read the arrays that differ, to say by how much")
    verbs: Verbs = {(name,): verb for name, verb in commands.choices.items() if verb is not ckpt}
    return parser, verbs | {("ckpt", name): verb for name, verb in actions.choices.items()}


def _add(
    add_parser: Callable[..., argparse.ArgumentParser],
    name: str,
    help: str,
    command: tuple[str, str],
    *,
    overrides: bool = False,
) -> argparse.ArgumentParser:
    words = f"{help[0].upper()}{help[1:]}."
    if overrides:
        words += " Any field of the config can be set, as in --trainer.seed 1; a run's config.yaml has them all."
    parser = add_parser(name, help=help, description=words, epilog=_EXIT_CODES, allow_abbrev=False)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(command=command, takes_overrides=overrides)
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder of a run")


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    _add_step(parser)


def _add_step(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    parser.add_argument("--ema", action="store_true", help="take the moving average of the parameters")


def program() -> int:
    """`grug`, as a process of its own."""
    end_at_ctrl_c()
    if sys.argv[1:2] == ["train"]:
        prepare_process()
    else:
        keep_compiled()
        set_gpu_flags()
    return main()


if __name__ == "__main__":
    sys.exit(program())

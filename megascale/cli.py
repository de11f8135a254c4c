"""The command line: one verb, one function."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import pairwise
from typing import Any, NoReturn

from megascale import __version__
from megascale.errors import RankError, UserError, plain_file_errors
from megascale.installation import complaint_about
from megascale.runtime.process_exit import ends_with
from megascale.runtime.terminal import escaped_output

VERBS = {
    "prepare": (
        "megascale.commands.prepare:prepare",
        "turn text into corpora of indexed shards",
        "megascale prepare data/python_stdlib.yaml",
    ),
    "data check": (
        "megascale.commands.data_check:check",
        "find faults in a corpus, or in the sources of a run, before training",
        "megascale data check corpora/python_stdlib",
    ),
    "infowindow train-m1": (
        "megascale.commands.train_m1:train_m1",
        "train the byte model behind Equal-Info Windows",
        "megascale infowindow train-m1 corpora/python_stdlib --out m1",
    ),
    "infowindow compile": (
        "megascale.commands.infowindow:compile",
        "run it once, to make the codebook that codes without it",
        "megascale infowindow compile m1/m1.safetensors --out m1/b16.safetensors",
    ),
    "infowindow encode": (
        "megascale.commands.infowindow:encode",
        "code any file in windows of equally many bits",
        "megascale infowindow encode README.md README.eqi --codebook m1/b16.safetensors",
    ),
    "infowindow decode": (
        "megascale.commands.infowindow:decode",
        "get the file back",
        "megascale infowindow decode README.eqi again.md --codebook m1/b16.safetensors",
    ),
    "infowindow inspect": (
        "megascale.commands.infowindow:inspect",
        "show what windows hold",
        "megascale infowindow inspect m1/b16.safetensors --text README.md",
    ),
    "plan": (
        "megascale.commands.plan:plan",
        "print everything that follows from a config, without starting it",
        "megascale plan configs/quickstart.yaml --ranks 2 train.tokens=20M",
    ),
    "simulate": (
        "megascale.commands.simulate:simulate",
        "replay steps at cluster scale on paper, planner beside planner",
        "megascale simulate --ranks 12288 --context 2048Ki --lengths github --model 7b",
    ),
    "hparams steplaw": (
        "megascale.commands.hparams:steplaw",
        "learning rate and batch size by the Step Law",
        "megascale hparams steplaw --params 1B --tokens 100B",
    ),
    "hparams growth": (
        "megascale.commands.hparams:growth",
        "which smaller model to train first and stack, and for how long",
        "megascale hparams growth --target-params 7B --tokens 2T --layers 32",
    ),
    "calibrate": (
        "megascale.commands.calibrate:calibrate",
        "measure what micro-batches take on this machine, for the planner",
        "megascale calibrate configs/quickstart.yaml --ranks 2 --minutes 1",
    ),
    "train": (
        "megascale.commands.train:train",
        "train on this machine, on one rank or many; under torchrun, one of its ranks",
        "megascale train configs/quickstart.yaml --ranks 2 --resume auto",
    ),
    "demo": (
        "megascale.commands.demo:demo",
        "measure static context parallelism against hybrid here, on documents of mixed lengths",
        "megascale demo --ranks 4",
    ),
    "launch": (
        "megascale.commands.launch:launch",
        "train on this node and start again what fails; one on every node of a job",
        "megascale launch configs/quickstart.yaml --ranks-per-node 2",
    ),
    "submit": (
        "megascale.commands.submit:submit",
        "submit a run, a sweep or the preparation of a corpus to Slurm",
        "megascale submit configs/quickstart.yaml --nodes 2 --dry-run",
    ),
    "branch": (
        "megascale.commands.train:branch",
        "train a new run that begins with the weights of a checkpoint",
        "megascale branch runs/base configs/quickstart.yaml --ranks 2",
    ),
    "grow": (
        "megascale.commands.grow:grow",
        "make a larger model's checkpoint from the checkpoints of smaller ones",
        "megascale grow runs/base --operator stack --factor 4 --out grown/base4x",
    ),
    "lineage": (
        "megascale.commands.lineage:lineage",
        "show which runs a run comes from, and which come from it",
        "megascale lineage runs/more",
    ),
    "experts": (
        "megascale.commands.experts:experts",
        "show which experts a checkpoint uses for the held-out text of each source",
        "megascale experts runs/moe",
    ),
    "import": (
        "megascale.commands.import_model:import",
        "make a checkpoint of a Hugging Face model",
        "megascale import models/Qwen3-0.6B imports/qwen3",
    ),
    "export": (
        "megascale.commands.export_model:export",
        "make a Hugging Face model of a checkpoint",
        "megascale export runs/quickstart models/quickstart",
    ),
    "eval": (
        "megascale.commands.eval:eval",
        "judge a checkpoint by the tasks of lm-eval",
        "megascale eval runs/quickstart --tasks lambada_openai --limit 100",
    ),
    "doctor": (
        "megascale.commands.doctor:doctor",
        "say what this machine has, and what is wrong with it",
        "megascale doctor",
    ),
    "checkpoint list": (
        "megascale.commands.checkpoint:list",
        "what a run has saved",
        "megascale checkpoint list runs/quickstart",
    ),
    "checkpoint verify": (
        "megascale.commands.checkpoint:verify",
        "read checkpoints and compare their checksums",
        "megascale checkpoint verify runs/quickstart",
    ),
    "checkpoint prune": (
        "megascale.commands.checkpoint:prune",
        "delete old checkpoints",
        "megascale checkpoint prune runs/quickstart --keep-last 1 --dry-run",
    ),
    "status": (
        "megascale.commands.status:status",
        "where a run is, and where its time went",
        "megascale status runs/quickstart --watch",
    ),
    "report": (
        "megascale.commands.report:report",
        "a run as one HTML page: curves, lost time, starts, events, config",
        "megascale report runs/quickstart",
    ),
    "plot": (
        "megascale.commands.plot:plot",
        "draw the curves of one or more runs",
        "megascale plot runs/quickstart",
    ),
}

HELP = ("-h", "--help")
MOST_NUMBER = 2**62
CONFIG_KIND = "megascale.config:RunConfig"
OPTIONS = frozenset({"overrides", "words"})
"""What verbs call their arguments a.b=c."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status: 0, or 2 for bad input, in one line on stderr.

    What is printed controls no terminal, whatever the files hold that it comes from.
    """
    with escaped_output():
        try:
            status = _answer_or_complain(list(sys.argv[1:] if argv is None else argv))
        except Exception:
            if argv is not None:
                raise
            traceback.print_exc()  # here, where its message is escaped
            status = 1
    ends_with(status)
    return status


def _answer_or_complain(words: list[str]) -> int:
    try:
        with plain_file_errors():
            status = _answer(words)
        sys.stdout.flush()  # here, where a reader that has left is no error
        return status
    except UserError as error:
        return _complain(error)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _answer(words: list[str]) -> int:
    if not words or words[0] in HELP:
        print(_overview())
        return 0
    if words[0] == "--version":
        print(f"megascale {__version__}")
        return 0
    family = [verb for verb in VERBS if verb.startswith(f"{words[0]} ")]
    if family and len(words) == 2 and words[1] in HELP:
        print(f"usage: megascale {words[0]} VERB ...\n\n{_purposes(family)}")
        return 0
    return _run(*_split(words))


def _split(words: list[str]) -> tuple[str, list[str]]:
    for count in (2, 1):
        verb = " ".join(words[:count])
        if verb in VERBS:
            return verb, words[count:]
    examples = [VERBS[verb][2] for verb in VERBS if verb.split()[0] == words[0]]
    if examples:
        raise UserError(f"{words[0]}: write it as '" + "' or '".join(examples) + "'")
    near = difflib.get_close_matches(words[0], VERBS, n=1, cutoff=0.4)
    hint = f"did you mean '{near[0]}'?" if near else f"verbs: {', '.join(VERBS)}"
    raise UserError(f"unknown verb '{words[0]}'; {hint}")


def _run(verb: str, words: list[str]) -> int:
    """Run a verb. Raises UserError for bad input, and for a package that is not installed."""
    try:
        return _run_provider(verb, words)
    except ModuleNotFoundError as error:
        complaint = complaint_about(error, verb)
        if complaint is None:
            raise
        raise UserError(complaint) from None


def _run_provider(verb: str, words: list[str]) -> int:
    where, purpose, example = VERBS[verb]
    module, name = where.split(":")
    provider = import_module(module)
    parser = _Parser(
        prog=f"megascale {verb}",
        description=f"{purpose[0].upper()}{purpose[1:]}.",
        epilog=f"example: {example}",
        allow_abbrev=False,
    )
    declare: Callable[[argparse.ArgumentParser], None] = getattr(provider, f"add_{name}_arguments")
    declare(parser)
    run: Callable[[argparse.Namespace], int] = getattr(provider, f"run_{name}")
    args, unknown = parser.parse_known_intermixed_args(words)
    if unknown:
        takes_options = not OPTIONS.isdisjoint(vars(args))
        raise UserError(_unknown_flag(verb, unknown[0], words, takes_options))
    return run(args)


def _unknown_flag(verb: str, flag: str, words: Sequence[str], takes_options: bool) -> str:
    """What is wrong with a flag, and what would work where it names an option of a config."""
    text = f"unrecognized argument {flag}"
    if takes_options and flag.startswith("--"):
        from megascale.config.load import options_called

        name, equals, value = flag.removeprefix("--").partition("=")
        after = next((b for a, b in pairwise(words) if a == flag and not b.startswith("-")), "...")
        kind = "megascale.corpus.recipe:Recipe" if verb == "prepare" else CONFIG_KIND
        found = options_called(_load(kind), name.replace("-", "_"))
        if found:
            value = value if equals else after
            return f"{text}; write it as {' or '.join(f'{option}={value}' for option in found)}"
    return f"{text}; 'megascale {verb} --help' says what would work"


def _load(where: str) -> Any:
    module, name = where.split(":")
    return getattr(import_module(module), name)


class _Parser(argparse.ArgumentParser):
    """What cannot be parsed is bad input like any other."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register("type", int, _whole_number)
        self.register("type", float, _finite_number)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; '{self.prog} --help' says what would work")


def _whole_number(text: str) -> int:
    """The `int` of all verbs: such that any program can count with it."""
    number = int(text)
    if abs(number) > MOST_NUMBER:
        raise argparse.ArgumentTypeError(f"{text[:20]}... is too large; the most is {MOST_NUMBER}")
    return number


def _finite_number(text: str) -> float:
    """The `float` of all verbs."""
    number = float(text)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text[:20]} is no finite number")
    return number


def _overview() -> str:
    return "\n".join(
        [
            "usage: megascale VERB ...",
            "",
            "Pretrain and continually train language models on megatron-core.",
            "",
            _purposes(list(VERBS)),
            "",
            "'megascale VERB --help' says more.  --version prints the version.",
        ]
    )


def _purposes(verbs: Sequence[str]) -> str:
    width = max(map(len, verbs))
    return "\n".join(f"  {verb:<{width}}  {VERBS[verb][1]}" for verb in verbs)


def _complain(error: UserError) -> int:
    """One line; from one rank alone where every rank meets the same bad input."""
    rank = os.environ.get("RANK", "0")
    if isinstance(error, RankError) and "RANK" in os.environ:
        print(f"megascale: rank {rank}: {error}", file=sys.stderr)
    elif rank == "0":
        print(f"megascale: {error}", file=sys.stderr)
    return 2

"""The command line: `nabla-rl <verb>`, and the one-line errors of every script.

Heavy libraries are imported by the verb that needs them, so that `nabla-rl --help` is quick.
"""

from __future__ import annotations

import difflib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from nabla_rl import __version__

VERBS = {
    "decode": "answer problems with several decoders, every cost counted",
    "align": "train a LoRA adapter by KL-regularised reinforcement learning, same reward, same beta",
    "distill": "carry what decoding found into a LoRA adapter of the same or a lighter model",
    "ablate": "hold the two sides against each other: studies over variants and seeds",
    "train-tiny": "make one of the embedded tiny models",
    "config": "print the commented configuration of decode, align or distill",
}
CONFIGURED = ("decode", "align", "distill")
USAGE = """usage: nabla-rl <verb> [options]

Better answers from a language model at test time, by gradient or by value, and the reinforcement
learning that this is the dual of.

verbs:
{verbs}

`nabla-rl <verb> --help` lists a verb's options; `nabla-rl config <verb> > mine.yaml` writes them down."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the `nabla-rl` command. Returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE.format(verbs="\n".join(f"  {name:<12}{text}" for name, text in VERBS.items())))  # noqa: T201
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb == "--version":
        print(__version__)  # noqa: T201
        return 0
    if verb not in VERBS:
        return complain(f"nabla-rl: expected a verb ({', '.join(VERBS)}), found {verb!r}.{meant(verb, VERBS)}")
    return {"decode": decode, "align": align, "distill": distill, "ablate": ablate, "train-tiny": train_tiny,
            "config": config}[verb](rest)  # fmt: skip


def meant(found: str, known: Sequence[str] | dict[str, str]) -> str:
    """A guess at what was meant."""
    close = difflib.get_close_matches(found.replace("_", "-"), list(known), 1)
    return f" Did you mean {close[0]}?" if close else " See nabla-rl --help."


def decode(arguments: Sequence[str] | None = None) -> int:
    """`nabla-rl decode`, `python scripts/decode.py`."""
    return run("decode", arguments)


def align(arguments: Sequence[str] | None = None) -> int:
    """`nabla-rl align`, `python scripts/align.py`."""
    return run("align", arguments)


def distill(arguments: Sequence[str] | None = None) -> int:
    """`nabla-rl distill`, `python scripts/distill.py`."""
    return run("distill", arguments)


def ablate(arguments: Sequence[str] | None = None) -> int:
    """`nabla-rl ablate`, `python scripts/ablate.py`."""
    return run("ablate", arguments)


def train_tiny(arguments: Sequence[str] | None = None) -> int:
    """`nabla-rl train-tiny`, `python scripts/train_tiny.py`."""
    return run("train_tiny", arguments)


def config(arguments: Sequence[str]) -> int:
    """`nabla-rl config VERB [options]`: the commented configuration that the options give."""
    verb = arguments[0] if arguments else ""
    if verb not in CONFIGURED:
        known = ", ".join(CONFIGURED)
        return complain(f"nabla-rl config: expected one of {known}, found {verb!r}.{meant(verb, CONFIGURED)}")
    return run(verb, arguments[1:], lambda main, rest: main(rest, prints_config=True))


def run(
    verb: str,
    arguments: Sequence[str] | None,
    call: Callable[[Callable[..., int], list[str]], int] = lambda main, rest: main(rest),
) -> int:
    """Run a verb; what is wrong with the input becomes one line and exit code 2."""
    quiet()
    module = import_module(f"nabla_rl.cli.{verb}")
    quiet_loggers()
    from jsonargparse import ArgumentError

    from nabla_rl.cli.base import Complaint
    from nabla_rl.types import UserError

    try:
        return call(module.main, list(sys.argv[1:] if arguments is None else arguments))
    except (Complaint, UserError, ArgumentError) as error:
        return complain(str(error))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return complain(
            f"expected enough memory, found too little ({first_sentence(error)}). Lower --data.batch_size, take fewer "
            "rollouts or shorter completions, or set --model.nabla.support to a few tokens. What is finished is kept."
        )
    except KeyboardInterrupt as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            complain("interrupted. What is finished is kept; the same command resumes it.")
        return 128 + (error.args[0] if error.args else signal.SIGINT)


def complain(message: str) -> int:
    """Print one line to the error stream; the exit code for bad input."""
    print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)  # noqa: T201
    return 2


def is_out_of_memory(error: BaseException) -> bool:
    """Was it memory that ran out? PyTorch says so by a class of its own on a GPU, by the message alone on a CPU."""
    return (
        isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error)
    )


def first_sentence(error: BaseException) -> str:
    """The beginning of an error's message."""
    return str(error).strip().split("\n")[0].split(". ")[0][:160] or type(error).__name__


def quiet() -> None:
    """Keep the libraries' own notices out of a run's output, and idle threads from spinning."""
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is imported
    warnings.filterwarnings("ignore", module=r"(lightning|torch|jsonargparse|transformers)\b.*")
    quiet_loggers()


def quiet_loggers() -> None:
    """The part of `quiet` that an import of Lightning undoes, and what transformers reads only when it is imported."""
    import logging

    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())

"""`odtk COMMAND …`: flags → settings → one call. No tensors here, and no heavy import on top.

The flags of a command are made from the fields of its settings (settings/) by one loop over argparse, so a default,
a help text and a check stand in one place. argparse itself only splits the line: every value, also a settings file's,
is checked by the settings.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from . import __version__, commands
from .config import OdtkError
from .settings import (
    SWITCH,
    BenchmarkSettings,
    CheckSettings,
    ConvertSettings,
    EvaluateSettings,
    ExportSettings,
    InferSettings,
    InfoSettings,
    Option,
    PlanSettings,
    PretrainSettings,
    Settings,
    SynthSettings,
    TrainSettings,
    VisualizeSettings,
    flag,
    options,
)
from .text import printable

SPAWNING = ("train", "pretrain", "infer", "benchmark")  # commands of several processes, which meet at --master
COMMANDS: dict[str, tuple[type[Settings], Callable[..., Any], str]] = {
    "train": (TrainSettings, commands.train, "train a detector, or resume its training"),
    "plan": (PlanSettings, commands.plan, "what train would decide for a dataset on this machine, and why"),
    "pretrain": (
        PretrainSettings,
        commands.pretrain,
        "train a backbone as a classifier of images, for train to start from",
    ),
    "infer": (InferSettings, commands.infer, "detect objects in images"),
    "export": (ExportSettings, commands.export, "write a model as ONNX or as a TensorRT engine"),
    "evaluate": (EvaluateSettings, commands.evaluate, "COCO figures of a file of detections"),
    "check": (CheckSettings, commands.check, "every fault of a dataset, and what its boxes are like"),
    "convert": (ConvertSettings, commands.convert, "annotations from one format to another"),
    "benchmark": (BenchmarkSettings, commands.benchmark, "speed and memory of a model"),
    "info": (InfoSettings, commands.info, "what is and isn't available here, or what a file says of itself"),
    "visualize": (
        VisualizeSettings,
        commands.visualize,
        "pictures of detections, ground truth, features, anchors or curves",
    ),
    "synth": (SynthSettings, commands.synth, "draw a dataset of shapes to try things with"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 1 for an error (one sentence on stderr), or that of exit_code.
    ODTK_DEBUG=1 adds the traceback."""
    try:
        args, rest = build_parser().parse_known_args(argv)
        if rest:
            raise OdtkError(unknown_argument(args.command, rest[0]))
        settings = settings_of(args)
        more = {"master": args.master} if args.command in SPAWNING else {}
        with commands.explaining():
            result = COMMANDS[args.command][1](settings, **more)
        return exit_code(args.command, result)
    except KeyboardInterrupt:
        return fail("Interrupted.")
    except BrokenPipeError:  # `odtk … | head`: what is still buffered has no reader
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OdtkError as error:
        return fail(str(error))
    except OSError as error:
        return fail(f"{error.strerror or error}: {error.filename}." if error.filename else f"{error}.")


def exit_code(command: str, result: Any) -> int:
    """Of a command that ran: 1 where `check` found what would stop training; 2 where the file that `export --verify`
    measured loses more than it may, 3 where it seems to, but the images cannot tell; else 0."""
    if command == "export" and result is not None:
        return result.exit_code
    return int(command == "check" and result is False)


def fail(sentence: str) -> int:
    if os.environ.get("ODTK_DEBUG") == "1":
        traceback.print_exc()
    print(f"odtk: {printable(sentence)}", file=sys.stderr)
    return 1


def unknown_argument(command: str, argument: str) -> str:
    """The sentence for a flag or a word that a command does not take; the nearest flag is offered."""
    flags = [flag(name) for name in options(COMMANDS[command][0])]
    near = difflib.get_close_matches(argument.partition("=")[0], flags, n=1) if argument.startswith("-") else []
    offer = f"did you mean {near[0]}?" if near else f"`odtk {command} --help` lists the flags."
    return f"`odtk {command}` takes no {argument}: {offer}"


class Parser(argparse.ArgumentParser):
    """A wrong flag is an error like any other: one sentence."""

    def error(self, message: str) -> NoReturn:
        raise OdtkError(f"{message} (`{self.prog} --help` lists the flags).")


def build_parser() -> Parser:
    parser = Parser(prog="odtk", description="Train a one-stage object detector, export it to TensorRT, run it.")
    parser.add_argument("--version", action="version", version=f"odtk {__version__}")
    parser.add_argument(
        "--master",
        metavar="ADDR:PORT",
        default="127.0.0.1:29500",
        help="where the processes of a run meet (%(default)s)",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for name, (settings, _, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        add_options(command, settings)
    return parser


def add_options(parser: argparse.ArgumentParser, cls: type[Settings]) -> None:
    """The flags of a settings class; what is not given stays out of the parsed arguments."""
    sections: dict[str, Any] = {"": parser}
    for name, one in options(cls).items():
        if one.section not in sections:
            sections[one.section] = parser.add_argument_group(one.section)
        more: dict[str, Any] = {"help": f"{one.help} ({default_of(cls, name, one)})".replace("%", "%%")}
        if one.check is SWITCH:
            more["action"] = argparse.BooleanOptionalAction  # --no-… takes back what a settings file says
        else:
            more["metavar"] = one.metavar or (f"{{{','.join(map(str, one.choices))}}}" if one.choices else name.upper())
            if one.count is not None:
                least = one.count if isinstance(one.count, int) else one.count[0]
                more["nargs"] = one.count if isinstance(one.count, int) else "+" if least else "*"
        if one.positional:
            more["nargs"] = "?"  # a settings file may give it; what is missing is said by the settings
            sections[one.section].add_argument(name, default=argparse.SUPPRESS, **more)
        else:
            sections[one.section].add_argument(flag(name), *one.flags, dest=name, default=argparse.SUPPRESS, **more)
        if name == "loader":
            parser.add_argument(
                "--with-dali",
                dest=name,
                action="store_const",
                const="dali",
                default=argparse.SUPPRESS,
                help="same as --loader dali (off)",
            )
    suppress = argparse.SUPPRESS
    parser.add_argument(
        "--settings", metavar="YAML", default=suppress, help="file of settings, by their flags' names (none)"
    )
    if cls.PRESETS:
        names = tuple(cls.PRESETS)
        parser.add_argument(
            "--preset", choices=names, default=suppress, help="settings as a whole: odtk is NVIDIA's ODTK (none)"
        )


def default_of(cls: type[Settings], name: str, one: Option) -> str:
    """A default in words."""
    if one.shown is not None:
        return one.shown
    value = getattr(cls, name, None)  # a dataclass keeps plain defaults as class attributes
    if value is None:
        return "required"
    if value is False:
        return "off"
    return " ".join(map(shown, value)) if isinstance(value, tuple) else shown(value)


def shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def settings_of(args: argparse.Namespace) -> Settings:
    """Flags over a settings file over a preset over the defaults."""
    cls = COMMANDS[args.command][0]
    names = {*options(cls), "settings", "preset"}
    return cls.of({name: value for name, value in vars(args).items() if name in names})

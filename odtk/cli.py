"""`odtk SUBCOMMAND …`: command line → config dataclass → one call. No tensors here, and no heavy import on top."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from . import __version__
from .config import (
    ROTATED_ANGLES,
    AugmentConfig,
    BenchmarkConfig,
    ExportConfig,
    InferConfig,
    LoaderConfig,
    LossConfig,
    ModelConfig,
    OdtkError,
    PostprocessConfig,
    TrainConfig,
)

LR_BATCH = 16  # the default learning rate is meant for this global batch and scaled to others
LR = 0.01
RESNET_OPTIONS = {  # of --resnet → fields of ModelConfig
    "caffe-stride": "caffe_stride",
    "deep-stem": "deep_stem",
    "avg-down": "avg_down",
    "zero-init": "zero_init",
    "norm-eval": "norm_eval",
}


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand and returns its exit code: 0, 1 for an error (one sentence on stderr), 2 when
    `export --verify` finds a drop beyond the allowed one. ODTK_DEBUG=1 adds the traceback."""
    try:
        args = build_parser().parse_args(argv)
        with explaining():
            return args.run(args) or 0
    except KeyboardInterrupt:
        return fail("Interrupted.")
    except BrokenPipeError:  # `odtk … | head`: what is still buffered has no reader
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OdtkError as error:
        return fail(str(error))
    except OSError as error:
        return fail(f"{error.strerror or error}: {error.filename}." if error.filename else f"{error}.")


def explanation(error: Exception) -> str | None:
    """The sentence for an error of torch or the system that is the user's to mend, None for any other."""
    if "Expected more than 1 value per channel" in str(error):  # BatchNorm, of one image that became a single cell
        return (
            "--norm batch cannot train on one value per channel: give every device more images (--batch) or "
            "larger ones (--jitter, --max-size), or use --norm group."
        )
    on_cpu = isinstance(error, MemoryError) or "can't allocate memory" in str(error)  # the latter is torch's
    if on_cpu or type(error).__name__ == "OutOfMemoryError":  # torch's on GPUs, by name: torch is not imported here
        return f"Out of {'' if on_cpu else 'GPU '}memory: try a smaller --batch, or smaller images."
    return None


@contextmanager
def explaining() -> Iterator[None]:
    """Raises an OdtkError in place of an error that has an explanation."""
    try:
        yield
    except (MemoryError, RuntimeError, ValueError) as error:
        sentence = explanation(error)
        if sentence is None:
            raise
        raise OdtkError(sentence) from error


def explained(job: Callable[..., Any], config: Any, rank: int = 0, world: int = 1) -> Any:
    """A job as each process of a run does it, where the error of a process is to be explained."""
    with explaining():
        return job(config, rank, world)


def fail(sentence: str) -> int:
    if os.environ.get("ODTK_DEBUG") == "1":
        traceback.print_exc()
    print(f"odtk: {sentence}", file=sys.stderr)
    return 1


# ---------------------------------------------------------------------------------------------------------------------
# Values


class Parser(argparse.ArgumentParser):
    """A wrong flag is an error like any other: one sentence."""

    def error(self, message: str) -> NoReturn:
        raise OdtkError(f"{message} (`{self.prog} --help` lists the flags).")


def positive(text: str) -> int:
    return checked(text, int, lambda v: v > 0, "a positive whole number")


def count(text: str) -> int:
    return checked(text, int, lambda v: v >= 0, "a whole number, 0 or more")


def seed(text: str) -> int:
    return checked(text, int, lambda v: 0 <= v < 2**64, "a whole number from 0 to 2^64 - 1")  # as torch takes them


def positive_float(text: str) -> float:
    return checked(text, float, lambda v: 0 < v < math.inf, "a positive number")


def number(text: str) -> float:
    return checked(text, float, lambda v: 0 <= v < math.inf, "a number, 0 or more")


def angle(text: str) -> float:
    return checked(text, float, math.isfinite, "a number of degrees")


def fraction(text: str) -> float:
    return checked(text, float, lambda v: 0 <= v <= 1, "a number from 0 to 1")


def checked(text: str, kind: type, good: Any, what: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not good(value):
        raise argparse.ArgumentTypeError(f"'{text}' is not {what}")
    return value


def devices(text: str) -> str:
    kind, _, number = text.partition(":")
    if text == "cpu" or (kind == "cpu" and number.isdigit() and int(number)):
        return text
    return str(checked(text, int, lambda v: v > 0, "a number of GPUs, cpu or cpu:N"))


def size_of(values: list[int] | None) -> tuple[int, int] | None:
    """--size H [W] → (H, W)."""
    if values is None:
        return None
    if len(values) > 2:
        raise OdtkError("--size takes one number (a square) or two, H W.")
    return (values[0], values[-1])


# ---------------------------------------------------------------------------------------------------------------------
# Flags that several subcommands share


def add_devices(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--devices",
        metavar="N|cpu",
        type=devices,
        help="GPUs to use, one process each; cpu, or cpu:N processes (all visible GPUs, else cpu)",
    )


def add_resize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resize", metavar="PIXELS", type=positive, default=800, help="shorter side of the image (%(default)s)"
    )
    parser.add_argument(
        "--max-size", metavar="PIXELS", type=positive, default=1333, help="cap of the longer side (%(default)s)"
    )


def add_size(parser: argparse.ArgumentParser, **kwargs: Any) -> None:
    parser.add_argument("--size", metavar=("H", "W"), nargs="+", type=positive, **kwargs)


def add_loader(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--loader",
        choices=("dali", "torch"),
        default="dali",
        help="who reads the images (dali where importable, else torch)",
    )
    parser.add_argument("--with-dali", dest="loader", action="store_const", const="dali", help="same as --loader dali")


def add_thresholds(parser: argparse.ArgumentParser) -> None:
    default = PostprocessConfig()
    parser.add_argument(
        "--score-threshold",
        metavar="SCORE",
        type=fraction,
        help=f"detections score above this ({default.score_threshold})",
    )
    parser.add_argument(
        "--nms-threshold",
        metavar="IOU",
        type=fraction,
        help=f"a box that overlaps a better one by more is dropped ({default.nms_threshold})",
    )
    parser.add_argument(
        "--detections", metavar="N", type=positive, help=f"detections per image at most ({default.detections})"
    )


def add_rotated(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rotated-bbox",
        action="store_true",
        help="boxes are [x, y, w, h, theta], theta in radians, counterclockwise (off)",
    )


def add_anchors(parser: argparse.ArgumentParser) -> None:
    default = ModelConfig()
    parser.add_argument(
        "--anchor-ious",
        metavar=("BG", "FG"),
        nargs=2,
        type=fraction,
        default=[0.4, 0.5],
        help="an anchor that overlaps less than BG is background, from FG on foreground (0.4 0.5)",
    )
    parser.add_argument(
        "--anchor-scales",
        metavar="SCALE",
        nargs="+",
        type=positive_float,
        default=list(default.scales),
        help="sides of the anchors, in strides of their level: smaller for small objects; "
        "`odtk check` counts the boxes that no anchor matches (4 5.04 6.35)",
    )
    parser.add_argument(
        "--anchor-ratios",
        metavar="RATIO",
        nargs="+",
        type=positive_float,
        default=list(default.ratios),
        help="height over width of the anchors (1 2 0.5)",
    )


def build_parser() -> Parser:
    parser = Parser(prog="odtk", description="Train a one-stage object detector, export it to TensorRT, run it.")
    parser.add_argument("--version", action="version", version=f"odtk {__version__}")
    parser.add_argument(
        "--master",
        metavar="ADDR:PORT",
        default="127.0.0.1:29500",
        help="where the processes of a run meet (%(default)s)",
    )
    commands = parser.add_subparsers(metavar="SUBCOMMAND", required=True, parser_class=Parser)
    for name, add, run, text in (
        ("train", add_train, run_train, "train a detector, or resume its training"),
        ("infer", add_infer, run_infer, "detect objects in images"),
        ("export", add_export, run_export, "write a model as ONNX or as a TensorRT engine"),
        ("evaluate", add_evaluate, run_evaluate, "COCO figures of a file of detections"),
        ("check", add_check, run_check, "every fault of a dataset, and what its boxes are like"),
        ("benchmark", add_benchmark, run_benchmark, "speed and memory of a model"),
        ("info", add_info, run_info, "versions, devices, what is and isn't available here"),
        ("visualize", add_visualize, run_visualize, "pictures of detections, truth, features, anchors, curves"),
        ("synth", add_synth, run_synth, "draw a dataset of shapes to try things with"),
    ):
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        add(command)
        command.set_defaults(run=run)
    return parser


# ---------------------------------------------------------------------------------------------------------------------
# train


def add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL.pth", help="checkpoint to write; training resumes from it if it exists")
    add_devices(parser)

    data = parser.add_argument_group("data")
    data.add_argument("--annotations", metavar="JSON", required=True, help="COCO annotations to train on")
    data.add_argument("--images", metavar="DIR", default=".", help="folder of the images (%(default)s)")
    data.add_argument(
        "--val-annotations",
        metavar="JSON",
        help="COCO annotations to evaluate on while training; the best checkpoint is kept (none)",
    )
    data.add_argument("--val-images", metavar="DIR", help="folder of the validation images (the one of --images)")
    data.add_argument(
        "--val-iters", metavar="N", type=positive, default=8000, help="iterations between evaluations (%(default)s)"
    )
    data.add_argument("--batch", metavar="N", type=positive, help="images per iteration over all devices (2 × devices)")
    add_resize(data)  # type: ignore[arg-type]
    data.add_argument(
        "--jitter",
        metavar=("MIN", "MAX"),
        nargs=2,
        type=positive,
        default=[640, 1024],
        help="range of the shorter side in training (640 1024)",
    )
    add_loader(data)  # type: ignore[arg-type]

    model = parser.add_argument_group("model")
    model.add_argument(
        "--backbone",
        metavar="NAME",
        nargs="+",
        default=["ResNet50FPN"],
        help="one or several, whose levels are concatenated (ResNet50FPN)",
    )
    model.add_argument("--head", choices=("retinanet", "fcos"), default="retinanet", help="(%(default)s)")
    model.add_argument("--classes", metavar="N", type=positive, help="number of classes (from the annotations)")
    model.add_argument(
        "--norm",
        choices=("frozen", "batch", "group"),
        help="normalization of the backbone (frozen when pretrained, else batch)",
    )
    model.add_argument(
        "--freeze-at",
        metavar="N",
        type=count,
        default=0,
        help="ResNet stages 1 to N, the stem being 1, are not trained (%(default)s)",
    )
    model.add_argument("--grad-checkpoint", action="store_true", help="recompute activations to save memory (off)")
    model.add_argument(
        "--dcn",
        metavar="STAGE",
        nargs="+",
        type=int,
        choices=(2, 3, 4, 5),
        default=[],
        help="ResNet stages, 2 to 5, with deformable convolution (none)",
    )
    model.add_argument("--dcn-v1", action="store_true", help="deformable convolution without its masks (off: v2)")
    model.add_argument(
        "--resnet",
        metavar="OPTION",
        nargs="+",
        choices=tuple(RESNET_OPTIONS),
        default=[],
        help=f"what ResNets are built like: {', '.join(RESNET_OPTIONS)} (none)",
    )
    model.add_argument(
        "--backbone-weights",
        metavar="PATH",
        help="weights to start from; none: from scratch (torchvision's ImageNet weights by URL)",
    )
    model.add_argument(
        "--fine-tune",
        metavar="PATH",
        help="checkpoint of which every matching tensor is taken, the rest is initialized (none)",
    )
    model.add_argument("--override", action="store_true", help="start anew over an existing MODEL.pth (off)")
    add_rotated(model)  # type: ignore[arg-type]
    model.add_argument(
        "--absolute-angle",
        action="store_true",
        help="rotated boxes keep their angle instead of being brought within 45 degrees (off)",
    )
    add_anchors(model)  # type: ignore[arg-type]

    schedule = parser.add_argument_group("schedule")
    schedule.add_argument("--iters", metavar="N", type=positive, default=90000, help="iterations (%(default)s)")
    schedule.add_argument(
        "--milestones",
        metavar="N",
        nargs="*",
        type=positive,
        default=[60000, 80000],
        help="iterations at which the learning rate falls (60000 80000)",
    )
    schedule.add_argument(
        "--schedule",
        metavar="FACTOR",
        type=positive_float,
        default=1.0,
        help="scales --iters and --milestones (%(default)s)",
    )
    schedule.add_argument(
        "--warmup",
        metavar="N",
        type=count,
        default=1000,
        help="iterations of linear warm-up from a tenth of the learning rate (%(default)s)",
    )
    schedule.add_argument(
        "--gamma",
        metavar="FACTOR",
        type=positive_float,
        default=0.1,
        help="the learning rate falls by this factor (%(default)s)",
    )
    schedule.add_argument(
        "--lr",
        metavar="RATE",
        type=positive_float,
        help=f"learning rate ({LR} for a batch of {LR_BATCH}, scaled with the batch)",
    )
    schedule.add_argument(
        "--regularization-l2", metavar="DECAY", type=number, default=0.0001, help="weight decay (%(default)s)"
    )
    schedule.add_argument("--precision", choices=("fp16", "bf16", "fp32"), help="(mixed: fp16 on GPUs, bf16 on CPUs)")
    schedule.add_argument("--full-precision", action="store_true", help="same as --precision fp32")
    schedule.add_argument(
        "--accumulate",
        metavar="N",
        type=positive,
        default=1,
        help="batches whose gradients are added up for one iteration (%(default)s)",
    )
    schedule.add_argument(
        "--clip-grad",
        metavar="NORM",
        type=number,
        default=5.0,
        help="cap of the gradient's norm, 0 for none (%(default)s)",
    )
    schedule.add_argument(
        "--ema",
        metavar="DECAY",
        type=fraction,
        help="keep an exponential moving average of the weights, 0.9998 say (none)",
    )
    schedule.add_argument("--seed", metavar="N", type=seed, default=0, help="(%(default)s)")

    augment = parser.add_argument_group("augmentation")
    augment.add_argument("--augment-rotate", action="store_true", help="turn by multiples of 90 degrees (off)")
    augment.add_argument(
        "--augment-crop",
        metavar="PROBABILITY",
        type=fraction,
        default=1.0,
        help="cut out a window that keeps boxes (%(default)s); 0 suits short training from scratch",
    )
    augment.add_argument(
        "--augment-free-rotate",
        metavar=("MIN", "MAX"),
        nargs=2,
        type=angle,
        default=[0.0, 0.0],
        help="turn by degrees from this range (0 0)",
    )
    for name in ("brightness", "contrast", "hue", "saturation"):
        augment.add_argument(
            f"--augment-{name}",
            metavar="STD",
            type=number,
            default=getattr(AugmentConfig(), name),
            help="standard deviation of the change (%(default)s)",
        )

    log = parser.add_argument_group("log")
    log.add_argument("--logdir", metavar="DIR", help="TensorBoard files and metrics.jsonl (none)")
    log.add_argument("--post-metrics", metavar="URL", help="POST metrics as JSON to this address (none)")


def run_train(args: argparse.Namespace) -> int:
    from . import launch
    from .training.train import train

    world = launch.world_size(args.devices)
    config = train_config(args, world)
    launch.launch(functools.partial(explained, train), config, devices=args.devices, master=args.master)
    return 0


def train_config(args: argparse.Namespace, world: int) -> TrainConfig:
    """The settings of a run over `world` processes."""
    if args.full_precision and args.precision not in (None, "fp32"):
        raise OdtkError(f"--full-precision contradicts --precision {args.precision}.")
    if args.head == "fcos" and args.rotated_bbox:
        raise OdtkError("--head fcos has no angle: rotated boxes need --head retinanet.")
    if args.absolute_angle and not args.rotated_bbox:
        raise OdtkError("--absolute-angle is of rotated boxes: add --rotated-bbox.")
    if args.dcn_v1 and not args.dcn:
        raise OdtkError("--dcn-v1 is of deformable convolution: name its stages with --dcn, 3 4 5 say.")
    for flag, (low, high) in (
        ("--jitter", args.jitter),
        ("--anchor-ious", args.anchor_ious),
        ("--augment-free-rotate", args.augment_free_rotate),
    ):
        if low > high:
            raise OdtkError(f"{flag} {low} {high}: the first number must not be above the second.")
    if sorted(set(args.milestones)) != args.milestones:
        raise OdtkError("--milestones must rise from one to the next.")
    batch = share(args.batch, world)
    global_batch = batch * world * args.accumulate
    pretrained = args.backbone_weights != "none" or args.fine_tune is not None
    data = LoaderConfig(
        images=args.images,
        annotations=args.annotations,
        batch=batch,
        training=True,
        resize=args.resize,
        max_size=args.max_size,
        jitter=tuple(args.jitter),
        rotated=args.rotated_bbox,
        absolute_angle=args.absolute_angle,
        augment=AugmentConfig(
            crop=args.augment_crop,
            rotate=args.augment_rotate,
            free_rotate=tuple(args.augment_free_rotate),
            brightness=args.augment_brightness,
            contrast=args.augment_contrast,
            hue=args.augment_hue,
            saturation=args.augment_saturation,
        ),
        loader=args.loader,
        workers=workers_of(world),
        seed=args.seed,
        world=world,
    )
    val_data = dataclasses.replace(
        data, images=args.val_images or args.images, annotations=args.val_annotations, training=False
    )
    return TrainConfig(
        path=args.model,
        model=ModelConfig(
            backbones=tuple(args.backbone),
            head=args.head,
            classes=args.classes or count_categories(args.annotations),
            ratios=tuple(args.anchor_ratios),
            scales=tuple(args.anchor_scales),
            angles=ROTATED_ANGLES if args.rotated_bbox else (),
            norm=args.norm or ("frozen" if pretrained else "batch"),
            freeze_at=args.freeze_at,
            dcn=tuple(sorted(set(args.dcn))),
            dcn_modulated=not args.dcn_v1,
            grad_checkpoint=args.grad_checkpoint,
            **{RESNET_OPTIONS[option]: True for option in args.resnet},
        ),
        data=data,
        val_data=val_data if args.val_annotations else None,
        loss=LossConfig(
            background_iou=args.anchor_ious[0],
            foreground_iou=args.anchor_ious[1],
            absolute_angle=args.absolute_angle,
        ),
        iters=args.iters,
        milestones=tuple(args.milestones),
        schedule=args.schedule,
        warmup=args.warmup,
        gamma=args.gamma,
        lr=args.lr or LR * global_batch / LR_BATCH,
        weight_decay=args.regularization_l2,
        precision=precision_of(args),
        val_iters=args.val_iters,
        fine_tune=args.fine_tune,
        backbone_weights=args.backbone_weights,
        override=args.override,
        accumulate=args.accumulate,
        clip_grad=args.clip_grad or None,
        ema=args.ema,
        logdir=args.logdir,
        post_metrics=args.post_metrics,
        seed=args.seed,
    )


def share(batch: int | None, world: int) -> int:
    """The global --batch, of which each of `world` processes gets an equal part."""
    if batch is None:
        return 2
    if batch % world:
        near = batch - batch % world or world
        raise OdtkError(f"--batch {batch} does not divide by the {world} devices: {near} does.")
    return batch // world


def precision_of(args: argparse.Namespace) -> str:
    return "fp32" if args.full_precision else getattr(args, "precision", None) or "mixed"


def workers_of(world: int) -> int:
    """Threads or processes that read images, per device."""
    return max(1, min(8, (os.cpu_count() or 1) // world))


def count_categories(annotations: str) -> int:
    """Number of categories in a COCO file: those listed, or those that its annotations name (data/coco.py)."""
    from pathlib import Path

    from .data.coco import categories_of, load_json

    categories = categories_of(load_json(Path(annotations)))
    if not categories:
        raise OdtkError(f"The annotations {annotations} have no categories: add them, one per class.")
    return len({str(category.get("id")) for category in categories})  # a wrong id is refused with the dataset


# ---------------------------------------------------------------------------------------------------------------------
# infer


def add_infer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL.{pth,onnx,plan,engine}", help="checkpoint or exported file")
    parser.add_argument("--images", metavar="DIR", default=".", help="folder of the images (%(default)s)")
    parser.add_argument(
        "--annotations",
        metavar="JSON",
        help="COCO annotations: take their images and print COCO figures (every image of the folder)",
    )
    parser.add_argument(
        "--output",
        metavar="JSON",
        nargs="+",
        default=["detections.json"],
        help="files to write the detections to, in COCO result form (detections.json)",
    )
    parser.add_argument("--batch", metavar="N", type=positive, help="images at a time over all devices (2 × devices)")
    add_resize(parser)
    add_size(parser, help="fit images inside H×W and pad them instead of --resize (that of an .onnx or .plan)")
    parser.add_argument("--full-precision", action="store_true", help="a .pth computes in fp32 (mixed precision)")
    add_loader(parser)
    add_thresholds(parser)
    parser.add_argument(
        "--draw", metavar="DIR", help="write the images with their detections that score above 0.3 there (none)"
    )
    add_devices(parser)


def run_infer(args: argparse.Namespace) -> int:
    from . import launch

    need_file(args.model, "model")
    config = infer_config(args, launch.world_size(args.devices))
    launch.launch(functools.partial(explained, infer_rank), config, devices=args.devices, master=args.master)
    return 0


def infer_config(args: argparse.Namespace, world: int) -> InferConfig:
    data = LoaderConfig(
        images=args.images,
        annotations=args.annotations,
        batch=share(args.batch, world),
        resize=args.resize,
        max_size=args.max_size,
        size=size_of(args.size),
        loader=args.loader,
        workers=workers_of(world),
        world=world,
    )
    return InferConfig(
        path=args.model,
        data=data,
        output=tuple(args.output),
        precision=precision_of(args),
        postprocess=PostprocessConfig(**thresholds_given(args)),
        explicit=tuple(thresholds_given(args)),
        draw=args.draw,
    )


def infer_rank(config: InferConfig, rank: int = 0, world: int = 1) -> None:
    """What each process of `odtk infer` does; rank 0 has all detections, scores and draws them."""
    from .inference.infer import infer

    pictures = None
    if config.draw and not rank:
        from .evaluation.pictures import open_pictures
        from .evaluation.visualize import draw_detections

        # Before the work: a file that appears later would shift the ids of a folder.
        pictures = open_pictures(config.data, config.draw)

    detections = infer(config, rank, world)
    if rank:
        return
    if config.data.annotations:
        from pathlib import Path

        from .data.coco import load_json
        from .evaluation.evaluate import evaluate, filter_categories, print_metrics

        truth = load_json(Path(config.data.annotations))
        print_metrics(evaluate(filter_categories(detections, truth), truth))
    if pictures is not None:
        draw_detections(detections, pictures)


def thresholds_given(args: argparse.Namespace) -> dict[str, Any]:
    """The thresholds that were on the command line; the others keep their default, or what a file has baked in."""
    names = ("score_threshold", "nms_threshold", "detections")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def need_file(path: str, what: str) -> None:
    if not os.path.isfile(path):
        raise OdtkError(f"There is no {what} {path}.")


# ---------------------------------------------------------------------------------------------------------------------
# export


def add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL.pth", help="checkpoint")
    parser.add_argument("output", metavar="OUT.{onnx,plan,engine}", help="file to write")
    add_size(parser, default=[1280], help="input size in pixels, one number for a square (1280)")
    parser.add_argument(
        "--batch",
        "--dynamic-batch-opts",
        metavar=("MIN", "OPT", "MAX"),
        nargs=3,
        type=positive,
        default=[1, 8, 16],
        help="batch sizes that the file accepts and is tuned for (1 8 16)",
    )
    parser.add_argument("--full-precision", action="store_true", help="fp32 (fp16)")
    parser.add_argument("--int8", action="store_true", help="int8, with fp16 where it would cost accuracy (fp16)")
    parser.add_argument("--calibration-images", metavar="DIR", help="images for --int8")
    parser.add_argument(
        "--calibration-batches",
        metavar="N",
        type=positive,
        help="batches of calibration images to use (as many as hold 500 images)",
    )
    parser.add_argument(
        "--calibration-table",
        metavar="PATH",
        help="table of --int8: read instead of images when it exists, else written (beside OUT)",
    )
    parser.add_argument(
        "--calibration-method",
        choices=("entropy", "percentile", "minmax"),
        default="entropy",
        help="how the range of an activation is chosen (%(default)s)",
    )
    parser.add_argument(
        "--opset", metavar="N", type=positive, default=ExportConfig.opset, help="ONNX operator set (%(default)s)"
    )
    add_thresholds(parser)
    parser.add_argument(
        "--rotated-bbox",
        action="store_true",
        help="refuse a MODEL.pth without rotated boxes (the checkpoint says which it has)",
    )
    parser.add_argument("--timing-cache", metavar="PATH", help="TensorRT's timing cache, read and updated (none)")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="run the written file beside PyTorch in fp32 on --annotations and --images (off)",
    )
    parser.add_argument("--annotations", metavar="JSON", help="COCO annotations for --verify")
    parser.add_argument("--images", metavar="DIR", default=".", help="images for --verify (%(default)s)")
    parser.add_argument(
        "--max-ap-drop",
        metavar="POINTS",
        type=number,
        default=0.3,
        help="points of AP (0 to 100) that --verify allows to be lost, else exit code 2 (%(default)s)",
    )
    parser.add_argument("--verbose", action="store_true", help="print the log of the conversion (off)")
    parser.add_argument(
        "--devices",
        metavar="N|cpu",
        type=devices,
        help="cpu: no GPU is to be used (an .onnx is written on the CPU, an engine on the first GPU)",
    )


def run_export(args: argparse.Namespace) -> int:
    from .export.export import export
    from .model.checkpoint import load

    config = export_config(args)
    need_file(args.model, "model")
    if args.rotated_bbox and not load(args.model).model.rotated:
        raise OdtkError(f"--rotated-bbox: {args.model} was not trained with rotated boxes.")
    export(config)
    if not args.verify:
        return 0
    from .evaluation.verify import verify

    within = verify(config, annotations=args.annotations, images=args.images, max_ap_drop=args.max_ap_drop)
    return 0 if within else 2


def export_config(args: argparse.Namespace) -> ExportConfig:
    if os.path.splitext(args.output)[1] not in (".onnx", ".plan", ".engine"):
        raise OdtkError(f"{args.output} must end in .onnx, .plan or .engine.")
    if args.devices and args.devices.startswith("cpu") and not args.output.endswith(".onnx"):
        raise OdtkError(f"--devices cpu: {args.output} is built on the GPU that will run it; an .onnx needs none.")
    if args.int8 and args.full_precision:
        raise OdtkError("--int8 contradicts --full-precision.")
    if args.int8 and not args.calibration_images and not args.calibration_table:
        raise OdtkError("--int8 needs --calibration-images DIR, or a --calibration-table PATH written earlier.")
    if args.verify and not args.annotations:
        raise OdtkError("--verify needs --annotations JSON and --images DIR.")
    low, best, high = args.batch
    if not low <= best <= high:
        raise OdtkError(f"--batch {low} {best} {high}: the numbers are MIN, OPT and MAX, in rising order.")
    return ExportConfig(
        path=args.model,
        output=args.output,
        size=size_of(args.size) or ExportConfig.size,
        batch=(low, best, high),
        precision="int8" if args.int8 else "fp32" if args.full_precision else "fp16",
        opset=args.opset,
        postprocess=PostprocessConfig(**thresholds_given(args)),
        calibration_images=args.calibration_images,
        calibration_batches=args.calibration_batches,
        calibration_table=args.calibration_table,
        calibration_method=args.calibration_method,
        timing_cache=args.timing_cache,
        verbose=args.verbose,
    )


# ---------------------------------------------------------------------------------------------------------------------
# evaluate, check


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("detections", metavar="DETECTIONS.json", help="COCO results, such as `odtk infer` writes")
    parser.add_argument("--annotations", metavar="JSON", required=True, help="COCO annotations of the same images")
    parser.add_argument(
        "--segmentation",
        action="store_true",
        help="overlap of masks; rotated boxes count as polygons (off: of boxes, rotated if they are)",
    )
    parser.add_argument("--output", metavar="JSON", help="write the figures there too (none)")


def run_evaluate(args: argparse.Namespace) -> int:
    from .evaluation.evaluate import evaluate, print_metrics
    from .files import write_json

    metrics = evaluate(args.detections, args.annotations, segmentation=args.segmentation)
    print_metrics(metrics)
    if args.output:
        write_json(metrics.to_dict(), args.output)
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# benchmark, info


def add_benchmark(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL.{pth,onnx,plan,engine}", help="checkpoint or exported file")
    add_size(parser, help="input size of a .pth in pixels, one number for a square (800 1280)")
    parser.add_argument("--batch", metavar="N", type=positive, help="images at a time over all devices (1 × devices)")
    parser.add_argument("--iters", metavar="N", type=positive, default=50, help="timed batches (%(default)s)")
    parser.add_argument("--warmup", metavar="N", type=count, default=5, help="batches before those (%(default)s)")
    parser.add_argument(
        "--images",
        metavar="DIR",
        help="time the loader and the model on these images too (the model alone, on random images)",
    )
    parser.add_argument("--full-precision", action="store_true", help="a .pth computes in fp32 (mixed precision)")
    add_loader(parser)
    parser.add_argument("--output", metavar="JSON", help="write the figures there too (none)")
    add_devices(parser)


def run_benchmark(args: argparse.Namespace) -> int:
    from . import launch
    from .evaluation.benchmark import benchmark

    need_file(args.model, "model")
    world = launch.world_size(args.devices)
    data = LoaderConfig(
        images=args.images or "",
        batch=share(args.batch or world, world),
        size=size_of(args.size),
        loader=args.loader,
        workers=workers_of(world),
        world=world,
    )
    config = BenchmarkConfig(
        path=args.model,
        data=data,
        iters=args.iters,
        warmup=args.warmup,
        precision=precision_of(args),
        output=args.output,
    )
    launch.launch(functools.partial(explained, benchmark), config, devices=args.devices, master=args.master)
    return 0


def add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as JSON (a table)")


def run_info(args: argparse.Namespace) -> int:
    from .info import environment, print_environment

    found = environment()
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        print_environment(found)
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# visualize, synth


def add_visualize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL.pth", nargs="?", help="checkpoint, for --features and --anchors")
    parser.add_argument("--images", metavar="DIR", default=".", help="folder of the images (%(default)s)")
    parser.add_argument("--annotations", metavar="JSON", help="COCO annotations: draws the ground truth")
    parser.add_argument("--detections", metavar="JSON", help="COCO results: draws the detections, beside the truth")
    parser.add_argument(
        "--score-threshold",
        metavar="SCORE",
        type=fraction,
        default=0.3,
        help="draw detections above this score (%(default)s)",
    )
    parser.add_argument(
        "--features", metavar="LAYER", help="draw the feature maps of this layer of MODEL.pth, layer4 say"
    )
    parser.add_argument("--anchors", action="store_true", help="draw which anchors match which boxes (off)")
    parser.add_argument(
        "--anchor-ious",
        metavar=("BG", "FG"),
        nargs=2,
        type=fraction,
        default=[0.4, 0.5],
        help="bounds of the match, as in training (0.4 0.5)",
    )
    parser.add_argument("--curves", metavar="LOGDIR", help="draw the training curves of LOGDIR/metrics.jsonl")
    add_resize(parser)
    add_size(parser, help="fit images inside H×W and pad them instead of --resize")
    parser.add_argument("--count", metavar="N", type=positive, default=16, help="images to draw (%(default)s)")
    parser.add_argument("--output", metavar="DIR", default="pictures", help="folder for the pictures (%(default)s)")


def run_visualize(args: argparse.Namespace) -> int:
    from .evaluation import anchor_matches, curves, features, visualize

    if (args.features or args.anchors) and not args.model:
        raise OdtkError("--features and --anchors need MODEL.pth.")
    if args.anchors and not args.annotations:
        raise OdtkError("--anchors needs --annotations JSON.")
    data = LoaderConfig(
        images=args.images,
        annotations=args.annotations,
        resize=args.resize,
        max_size=args.max_size,
        size=size_of(args.size),
        loader="torch",
    )
    written: list[str] = []
    if args.curves:
        written += curves.draw_curves(args.curves, args.output)
    if args.features:
        written += features.draw_features(args.model, args.features, data, args.output, count=args.count)
    if args.anchors:
        from .training.assign import assign

        background, foreground = args.anchor_ious
        rule = functools.partial(assign, background_iou=background, foreground_iou=foreground)
        written += anchor_matches.draw_anchors(args.model, data, rule, args.output, count=args.count)
    if args.detections:
        written += visualize.draw_results(
            args.detections, data, args.output, score_threshold=args.score_threshold, count=args.count
        )
    elif args.annotations and not (args.features or args.anchors or args.curves):
        written += visualize.draw_ground_truth(data, args.output, count=args.count)
    if not written:
        raise OdtkError("Nothing to draw: give --detections, --annotations, --features, --anchors or --curves.")
    print(f"Wrote {len(written)} picture{'s' * (len(written) > 1)} to {args.output}.")
    return 0


def add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--annotations", metavar="JSON", required=True, help="COCO annotations")
    parser.add_argument("--images", metavar="DIR", default=".", help="folder of the images (%(default)s)")
    add_resize(parser)
    parser.add_argument(
        "--backbone",
        metavar="NAME",
        nargs="+",
        default=["ResNet50FPN"],
        help="whose levels the anchors stand on (ResNet50FPN)",
    )
    add_anchors(parser)
    add_rotated(parser)
    parser.add_argument("--headers-only", action="store_true", help="do not decode the images to their end (off)")


def run_check(args: argparse.Namespace) -> int:
    from .data.check import check, unmatched_boxes
    from .model.detector import Detector

    report = check(args.annotations, args.images, rotated=args.rotated_bbox, pixels=not args.headers_only)
    for fault in report.faults:
        print(f"{'fixed' if fault.fixed else 'REFUSED':8}{fault}")
    for line in report.summary():
        print(line)
    model = ModelConfig(
        backbones=tuple(args.backbone),
        classes=max(1, len(report.dataset.categories)),
        ratios=tuple(args.anchor_ratios),
        scales=tuple(args.anchor_scales),
    )
    detector = Detector(model)
    anchors = [(s, a.numpy()) for s, a in zip(detector.strides, detector.anchors(), strict=True)]
    _, advice = unmatched_boxes(
        report.dataset, anchors, resize=args.resize, max_size=args.max_size, threshold=args.anchor_ious[1]
    )
    print(advice or f"every box has an anchor that overlaps it by {args.anchor_ious[1]:g}")
    print(f"{report.refused} faults would stop training, {len(report.faults) - report.refused} would be fixed")
    return 1 if report.refused else 0


def add_synth(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="where to write train/, val/, train.json and val.json")
    parser.add_argument(
        "--images",
        metavar="N",
        type=positive,
        default=240,
        help="images of both sets together, every fifth for validation (%(default)s)",
    )
    add_size(parser, default=[240, 320], help="height and width of the images in pixels (240 320)")
    parser.add_argument("--classes", metavar="N", type=positive, default=4, help="kinds of shapes (%(default)s)")
    parser.add_argument(
        "--rotated", "--rotated-bbox", action="store_true", help="elongated shapes with boxes [x, y, w, h, theta] (off)"
    )
    parser.add_argument("--seed", metavar="N", type=seed, default=0, help="(%(default)s)")


def run_synth(args: argparse.Namespace) -> int:
    from .data.synthetic import synthesize

    height, width = size_of(args.size) or (240, 320)
    synthesize(
        args.folder,
        images=args.images,
        size=(height, width),
        classes=args.classes,
        rotated=args.rotated,
        seed=args.seed,
    )
    print(f"Drew {args.images} images of {width}×{height} pixels into {args.folder}: train/, val/ and their .json.")
    return 0

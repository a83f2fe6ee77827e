"""Settings of a command → one call of the stage that does it: for the command line and the Python API alike."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from .config import (
    ROTATED_ANGLES,
    BenchmarkConfig,
    ExportConfig,
    InferConfig,
    LoaderConfig,
    LossConfig,
    ModelConfig,
    OdtkError,
    PostprocessConfig,
    TilesConfig,
    VideoConfig,
)
from .settings import (
    BenchmarkSettings,
    CheckSettings,
    ConvertSettings,
    EvaluateSettings,
    ExportSettings,
    InferSettings,
    InfoSettings,
    PlanSettings,
    PretrainSettings,
    Settings,
    SynthSettings,
    TrainSettings,
    VisualizeSettings,
    flag,
    options,
)
from .text import say

PRECISIONS = ("mixed", "fp16", "bf16", "fp32")  # in which a .pth can compute

if TYPE_CHECKING:
    from .data.dataset import Dataset
    from .deploy.as_fed import FedVerdict
    from .evaluation.report import Verdict

# ---------------------------------------------------------------------------------------------------------------------
# Errors that have an explanation


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


# ---------------------------------------------------------------------------------------------------------------------
# What several commands need


def images_of(images: str | None, annotations: str | None) -> str:
    """The image folder: the one given, else the one where the images of the annotations are, else this one."""
    if images or not annotations:
        return images or "."
    from .data.layouts import image_folder

    return image_folder(annotations)


def measured(annotations: str | None) -> str | None:
    """Annotations to measure something on: of several splits, val."""
    if not annotations:
        return None
    from .data.layouts import with_split

    return with_split(annotations, "val")


M = TypeVar("M", InferSettings, BenchmarkSettings)


def with_file(settings: M, *, gpu: bool | None = None) -> M:
    """Settings whose model is a file, or on a server: of a bundle, its engine or its ONNX file.

    Args:
        gpu: one is to be used; None: where there is one, unless ``devices`` says cpu.

    Raises:
        OdtkError: there is no such model, or a file of the bundle is not as it was written.
    """
    if not os.path.isdir(settings.model):
        if "://" not in settings.model:
            from .files import need_file

            need_file(settings.model, "model")
        return settings
    import torch

    from .deploy.manifest import artifact

    if gpu is None:
        gpu = torch.cuda.is_available() and not (settings.devices or "").startswith("cpu")
    return dataclasses.replace(settings, model=artifact(settings.model, gpu=gpu))


# ---------------------------------------------------------------------------------------------------------------------
# The commands


def train(settings: TrainSettings, master: str | None = None) -> str:
    """Trains, or resumes, and returns the path of the checkpoint."""
    from . import launch
    from .training.plan import this_machine
    from .training.run import continued
    from .training.start import Task, begin

    settings, earlier = continued(settings)
    machine = this_machine(settings, launch.world_size(settings.devices))
    launch.share(settings.batch or machine.processes, machine.processes)  # refused before any process starts
    task = Task(settings, machine, earlier)
    launch.launch(functools.partial(explained, begin), task, devices=settings.devices, master=master)
    return settings.model


def pretrain(settings: PretrainSettings, master: str | None = None) -> str:
    """Trains a backbone as a classifier, or resumes that, and returns the path of its weights."""
    from . import launch
    from .data.labeled import list_labeled
    from .training.configs import pretrain_config
    from .training.pretrain import pretrain
    from .training.run import continued

    settings, _ = continued(settings)
    world = launch.world_size(settings.devices)
    listing = list_labeled(settings.images, settings.labels)
    config = pretrain_config(settings, world, len(listing.files), len(listing.classes))
    launch.launch(functools.partial(explained, pretrain), config, devices=settings.devices, master=master)
    return settings.model


def plan(settings: PlanSettings) -> dict[str, Any]:
    """Prints what `odtk train` would decide, and returns the settings of that run by name."""
    from . import launch
    from .data.listing import list_images
    from .data.tars import is_tar
    from .files import atomic_write, check_writable, need_file
    from .training.plan import plan, this_machine

    if settings.output:
        check_writable(settings.output)
    given = {name: getattr(settings, name) for name in settings.given() if name != "output"}
    asked = TrainSettings.layered({"model": settings.model}, given)
    if asked.teacher:
        need_file(asked.teacher, "checkpoint for --teacher")
    if asked.unlabeled and not is_tar(asked.unlabeled[0]):
        list_images(asked.unlabeled)
    made = plan(asked, this_machine(asked, launch.world_size(asked.devices)))
    for line in made.lines():
        say(line)
    if not made.decisions:
        recipe = f"--head {asked.head} keeps its own recipe: leave the flag out for a plan by the data."
        say("Every setting is given: nothing is left to decide." if asked.head == "dense" else recipe)
    if settings.output:
        with atomic_write(settings.output) as file:
            file.write(made.to_yaml().encode())
        say(f"Wrote {settings.output}. Next: odtk train {settings.model} --settings {settings.output}")
    return dataclasses.asdict(made.config_settings())


def infer(settings: InferSettings, master: str | None = None, *, returns: bool = False) -> list[dict[str, Any]] | None:
    """Detects in every image; if ``returns``, returns the detections (COCO results) where one process did all.

    Of a video, it writes the detections as they come and returns None.
    """
    from . import launch

    settings = with_file(settings)
    if settings.video:
        infer_video(settings)
        return None
    config = infer_config(settings, launch.world_size(settings.devices))
    config = dataclasses.replace(config, returns=returns or bool(config.data.annotations or config.draw))
    return launch.launch(functools.partial(explained, infer_rank), config, devices=settings.devices, master=master)


def infer_video(settings: InferSettings) -> None:
    """Detects in the frames of a video, on one device."""
    import torch

    from . import launch
    from .inference.stream import infer_video

    devices = settings.devices or ("1" if torch.cuda.is_available() else "cpu")
    if launch.world_size(devices) > 1:
        raise OdtkError(f"--video runs on one device, not {launch.world_size(devices)}: pass --devices 1, or cpu.")
    launch.launch(functools.partial(explained, infer_video), infer_config(settings, 1), devices=devices)


def load(settings: InferSettings, *, device: str | None = None, precision: str = "mixed") -> Any:
    """The model of an inference (inference.predict.Model), in this process."""
    import torch

    from .inference.predict import Model

    if precision not in PRECISIONS:
        raise OdtkError(f"precision: {precision!r} is not one of {', '.join(PRECISIONS)}.")
    found = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        kind = torch.device(found).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise OdtkError(f"device: {device!r} is not cpu, cuda or cuda:N.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise OdtkError(f"device: {device!r} needs a GPU, and torch finds none: `odtk info` says what is missing.")
    config = infer_config(with_file(settings, gpu=kind == "cuda"), 1)
    data = dataclasses.replace(config.data, device="cuda:0" if found == "cuda" else found)
    return Model.load(dataclasses.replace(config, data=data, precision=precision))


def infer_config(settings: InferSettings, world: int) -> InferConfig:
    """What each process of an inference is told."""
    from .launch import share, workers_of

    given = settings.images or ()
    annotations = measured(settings.annotations)
    folder = images_of(given[0] if given else None, annotations)
    data = LoaderConfig(
        images=given if given and (not annotations or len(given) > 1) else folder,
        annotations=annotations,
        skip_damaged=not settings.strict,
        batch=share(settings.batch or 2 * world, world),
        size=settings.height_width,
        loader=settings.loader,
        workers=workers_of(world),
        world=world,
    )
    return InferConfig(
        path=settings.model,
        data=data,
        resize=settings.resize,
        max_size=settings.max_size,
        output=settings.outputs,
        precision=settings.computing_precision,
        postprocess=PostprocessConfig(**settings.thresholds),
        explicit=tuple(settings.thresholds),
        draw=settings.draw,
        draw_threshold=settings.draw_threshold,
        video=video_config(settings),
        tiles=TilesConfig((settings.tiles[0], settings.tiles[-1]), settings.overlap) if settings.tiles else None,
        override=settings.override,
    )


def video_config(settings: InferSettings) -> VideoConfig | None:
    """How the video is read, if there is one."""
    if not settings.video:
        return None
    return VideoConfig(
        settings.video,
        every=settings.every,
        realtime=settings.realtime,
        transport=settings.rtsp_transport,
        track=settings.track,
        track_threshold=settings.track_threshold,
    )


def infer_rank(config: InferConfig, rank: int = 0, world: int = 1) -> list[dict[str, Any]] | None:
    """What each process of `odtk infer` does; rank 0 has all detections, scores and draws them."""
    from .inference.infer import infer

    pictures = None
    if config.draw and not rank:
        from .evaluation.pictures import open_pictures

        # Before the work: a file that appears later would shift the ids of a folder.
        pictures = open_pictures(config.data, config.draw)

    detections = infer(config, rank, world)
    if rank:
        return None
    truth = None
    if config.data.annotations:
        from .data.coco import reading_fault
        from .evaluation.evaluate import evaluate, filter_categories, load_truth, print_metrics

        truth = load_truth(config.data.annotations, detections, config.data.images)
        # Boxes of a damaged image whose size is not known, where the format needs it; the image was named already.
        truth["annotations"] = [entry for entry in truth.get("annotations", []) if not reading_fault(entry)]
        print_metrics(evaluate(filter_categories(detections, truth), truth))
    if pictures is not None:
        from .evaluation.operating_point import choose
        from .evaluation.visualize import draw_detections

        chosen, words = choose(detections, truth, config.draw_threshold)
        draw_detections(chosen, pictures)
        say(f"The pictures in {config.draw} show {words}; --draw-threshold SCORE changes that.")
    return detections


def export(settings: ExportSettings) -> Verdict | FedVerdict | None:
    """Writes the artifact or the bundle; returns what --verify found, or None if that was not asked for."""
    from .exporting.export import export
    from .files import need_file
    from .model.checkpoint import load

    need_file(settings.model, "model")
    if settings.rotated_bbox and not load(settings.model).model.rotated:
        raise OdtkError(f"--rotated-bbox: {settings.model} was not trained with rotated boxes.")
    config = export_config(settings)
    proof = None
    if settings.verify:
        annotations = measured(settings.annotations)
        assert annotations is not None  # checked with the settings
        proof = (annotations, images_of(settings.images, annotations), settings.max_ap_drop)
    if settings.bundle:
        from .deploy.bundle import write_bundle

        engine = not (settings.devices or "").startswith("cpu")
        return write_bundle(config, proof, command=command_of("export", settings), settings=settings, engine=engine)
    export(config)
    if proof is None:
        return None
    from .evaluation.verify import verify

    return verify(config, annotations=proof[0], images=proof[1], max_ap_drop=proof[2])


def command_of(name: str, settings: Settings) -> str:
    """The command line that gives these settings."""
    known, places, flags = options(type(settings)), [], []
    for key in settings.given():
        value = getattr(settings, key)
        values = [str(one) for one in (value if isinstance(value, tuple) else [value])]
        if known[key].positional:
            places += values
        elif value is True:
            flags.append(flag(key))
        elif value is not None and value is not False:
            flags += [flag(key), *values]
    words = ["odtk", name, *places, *flags]  # in this order: a flag of several values would take what comes after them
    return shlex.join(words)


def export_config(settings: ExportSettings) -> ExportConfig:
    """What the export is told."""
    return ExportConfig(
        path=settings.model,
        output=settings.output,
        size=settings.height_width,
        batch=settings.batch,  # type: ignore[arg-type]
        precision="int8" if settings.int8 else "fp32" if settings.full_precision else "fp16",
        input_type=settings.input_type,
        opset=settings.opset,
        postprocess=PostprocessConfig(**settings.thresholds),
        calibration_images=settings.calibration_images,
        calibration_batches=settings.calibration_batches,
        calibration_table=settings.calibration_table,
        calibration_method=settings.calibration_method,
        timing_cache=settings.timing_cache,
        hardware_compatible=settings.hardware_compatible,
        version_compatible=settings.version_compatible,
        verbose=settings.verbose,
    )


def evaluate(settings: EvaluateSettings) -> Any:
    """Prints the COCO figures of a detections file, and returns them (evaluation.evaluate.Metrics)."""
    from .evaluation.evaluate import metrics_of, print_metrics, run_cocoeval
    from .files import check_writable, write_json

    annotations = measured(settings.annotations)
    assert annotations is not None  # required
    for path in filter(None, (settings.output, settings.report)):
        check_writable(path)
    evaluation = run_cocoeval(
        settings.detections,
        annotations,
        images=settings.images,
        segmentation=settings.segmentation,
        evaluator=settings.evaluator,
    )
    for ids, what in ((evaluation.params.imgIds, "images"), (evaluation.params.catIds, "categories")):
        if not len(ids):
            raise OdtkError(f"{annotations} has no {what}, so there is nothing to evaluate.")
    metrics = metrics_of(evaluation)
    print_metrics(metrics)
    if settings.output:
        write_json(metrics.to_dict(), settings.output)
    if settings.report:
        write_report(settings, evaluation, annotations)
    return metrics


def write_report(settings: EvaluateSettings, evaluation: Any, annotations: str) -> None:
    """Writes the page of an evaluation; without pictures, and saying so, where the images cannot be read."""
    from .data.dataset import Dataset
    from .evaluation.evaluation_page import evaluation_page
    from .evaluation.pictures import has_angles
    from .files import atomic_write

    assert settings.report is not None
    pictures: Any
    try:
        images = images_of(settings.images, annotations)
        rotated = has_angles(annotations, images)
        pictures = {i.id: i for i in Dataset.load(annotations, images, rotated=rotated, skip_damaged=True).images}
    except OdtkError as error:
        pictures = f"There are no pictures: {error} --images DIR says where the images are."
        say(pictures)
    names = [os.path.basename(os.path.normpath(path)) for path in (settings.detections, annotations)]
    content = evaluation_page(evaluation, " on ".join(names), pictures, say)
    with atomic_write(settings.report) as file:
        file.write(content.encode())
    say(f"Wrote {settings.report}")


def check(settings: CheckSettings) -> bool:
    """Prints what is wrong with a dataset; returns whether training would start on it, or for a folder without
    annotations, whether no image is damaged."""
    from .data.check import check
    from .text import plural

    images = images_of(settings.images, settings.annotations)
    report = check(settings.annotations, images, rotated=settings.rotated_bbox, pixels=not settings.headers_only)
    for line in report.lines(verbose=settings.verbose) + report.summary(settings.resize, settings.max_size):
        say(line)
    if settings.annotations is None:
        say(f"{plural(report.damaged, 'damaged image')} in {images}")
        return not report.damaged
    if settings.head == "retinanet" and report.dataset.images:
        for line in anchor_advice(settings, report.dataset):
            say(line)
    fixed = len(report.faults) - report.refused
    say(f"{plural(report.refused, 'fault')} would stop training, {fixed} would be fixed")
    return not report.refused


def anchor_advice(settings: CheckSettings, dataset: Dataset) -> list[str]:
    """What training's own rule says of the anchors that the settings give."""
    from .model.detector import Detector
    from .training.anchor_advice import anchor_advice

    model = ModelConfig(
        backbones=settings.backbone,
        classes=max(1, len(dataset.categories)),
        ratios=settings.anchor_ratios,
        scales=settings.anchor_scales,
        angles=ROTATED_ANGLES if settings.rotated_bbox else (),
    )
    loss = LossConfig(background_iou=settings.anchor_ious[0], foreground_iou=settings.anchor_ious[1])
    detector = Detector(model)
    return anchor_advice(
        dataset,
        model,
        loss,
        detector.strides,
        padding=detector.stride,
        resize=settings.resize,
        max_size=settings.max_size,
    )


def benchmark(settings: BenchmarkSettings, master: str | None = None) -> None:
    """Times a model and prints a table."""
    from . import launch
    from .evaluation.benchmark import benchmark

    settings = with_file(settings)
    world = launch.world_size(settings.devices)
    data = LoaderConfig(
        images=settings.images or "",
        batch=launch.share(settings.batch or world, world),
        size=settings.height_width,
        loader=settings.loader,
        workers=launch.workers_of(world),
        world=world,
    )
    config = BenchmarkConfig(
        path=settings.model,
        data=data,
        iters=settings.iters,
        warmup=settings.warmup,
        precision=settings.computing_precision,
        output=settings.output,
    )
    launch.launch(functools.partial(explained, benchmark), config, devices=settings.devices, master=master)


def info(settings: InfoSettings) -> dict[str, Any]:
    """Prints and returns what this machine can do, or what a file says of itself.

    Raises:
        OdtkError: as describe.describe_file; or, once all is printed, files of a bundle are not as they were written.
    """
    from .describe import describe_file, environment, print_environment, print_file

    found = describe_file(settings.model) if settings.model else environment()
    if settings.json:
        print(json.dumps(found, indent=2))
    elif settings.model:
        print_file(found)
    else:
        print_environment(found)
    if faults := found.get("faults"):
        named = ", ".join(f"{name} is {fault}" for name, fault in faults.items())
        raise OdtkError(f"{settings.model}: {named}: copy the whole bundle again, or export it again.")
    return found


def visualize(settings: VisualizeSettings) -> list[str]:
    """Draws pictures and returns their paths."""
    from .evaluation import anchor_matches, curves, features, visualize
    from .text import plural

    data = LoaderConfig(
        images=images_of(settings.images, settings.annotations),
        annotations=settings.annotations,
        resize=settings.resize or LoaderConfig.resize,
        max_size=settings.max_size or LoaderConfig.max_size,
        size=settings.height_width,
        loader="torch",
    )
    output, count = settings.output, settings.count
    written: list[str] = []
    if settings.curves:
        written += curves.draw_curves(settings.curves, output)
    if settings.features:
        assert settings.model is not None  # checked with the settings
        written += features.draw_features(settings.model, settings.features, data, output, count=count)
    if settings.anchors:
        from .training.assign import assign

        assert settings.model is not None
        background, foreground = settings.anchor_ious
        rule = functools.partial(assign, background_iou=background, foreground_iou=foreground)
        written += anchor_matches.draw_anchors(settings.model, data, rule, output, count=count)
    if settings.detections:
        threshold = settings.score_threshold
        written += visualize.draw_results(settings.detections, data, output, score_threshold=threshold, count=count)
    elif settings.annotations and not (settings.features or settings.anchors or settings.curves):
        written += visualize.draw_ground_truth(data, output, count=count)
    if not written:
        raise OdtkError("Nothing to draw: give --detections, --annotations, --features, --anchors or --curves.")
    shown = f": detections that score above {settings.score_threshold:g}" if settings.detections else ""
    say(f"Wrote {plural(len(written), 'picture')} to {output}{shown}.")
    return written


def convert(settings: ConvertSettings) -> None:
    """Writes annotations in another format, and says what was written."""
    from .data.convert import convert

    for line in convert(
        settings.source,
        settings.target,
        settings.to,
        images=settings.images,
        box_format=settings.box_format,
        lossy=settings.lossy,
    ):
        say(line)


def synth(settings: SynthSettings) -> None:
    """Draws a dataset of shapes."""
    from .data.synthetic import Scene, synthesize
    from .text import plural

    synthesize(
        settings.folder,
        images=settings.images,
        size=(settings.size[0], settings.size[-1]),
        classes=settings.classes,
        rotated=settings.rotated,
        seed=settings.seed,
        scene=Scene(
            sides=(settings.object_size[0], settings.object_size[1]),
            objects=(settings.objects[0], settings.objects[1]),
            imbalance=settings.imbalance,
            gray=settings.gray,
            clutter=settings.clutter,
        ),
    )
    height, width = settings.size[0], settings.size[-1]
    drawn = f"{plural(settings.images, 'image')} of {width}×{height} pixels"
    say(f"Drew {drawn} into {settings.folder}: train/, val/ and their .json.")

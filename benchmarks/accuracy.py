"""AP after equal minutes of training: odtk without flags beside what users would pick instead.

    python benchmarks/accuracy.py --annotations TRAIN.json --images DIR --val-annotations VAL.json --val-images DIR
        --peer-python PEER/bin/python [--minutes 8] [--seeds 0 1 2] [--output accuracy]

Each candidate trains in processes of its own, one after another, on all cores, for --minutes of wall clock; the
seeds are the outer loop, so that a machine that becomes slower disturbs all alike. AP is pycocotools' for everybody.
Then the exported files are timed in ONNX Runtime, in turns. The peers run in the environment of --peer-python
(torch 2.14.1, torchvision 0.29.1; ultralytics 8.4.190 by its command line, from its yaml, without weights).

    odtk                  no flags but --time: from ImageNet weights where the extra `pretrained` is installed
    odtk from scratch     the same with --backbone-weights none
    torchvision           RetinaNet R18-FPN, bf16 autocast and channels-last, at --torchvision-size
    YOLO11n, YOLO11s      from scratch, at --yolo-size

Writes into --output: runs.jsonl (one line per run; runs that are in it are not repeated), table.md, plot.png.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

CANDIDATES = ("odtk", "odtk from scratch", "torchvision", "YOLO11n", "YOLO11s")
ROUNDS = 30  # timed images of each file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--annotations", "--images", "--val-annotations", "--val-images"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--peer-python", type=Path, help="Python with torchvision and ultralytics")
    parser.add_argument("--candidates", nargs="+", default=CANDIDATES, choices=CANDIDATES)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--yolo-size", type=int, default=320, help="longer side")
    parser.add_argument("--torchvision-size", type=int, nargs=2, default=[240, 320], help="shorter and longer side")
    parser.add_argument("--output", type=Path, default=Path("accuracy"))
    args = parser.parse_args()
    if args.peer_python is None and any(not name.startswith("odtk") for name in args.candidates):
        parser.error("the peers need --peer-python, or name what to run by --candidates.")
    args.output.mkdir(parents=True, exist_ok=True)
    record = args.output / "runs.jsonl"
    runs = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    for seed in args.seeds:
        for name in args.candidates:
            if any((run["name"], run["seed"], run["minutes"]) == (name, seed, args.minutes) for run in runs):
                continue
            print(f"{name}, seed {seed}, {args.minutes:g} minutes", flush=True)
            folder = args.output / f"{name.replace(' ', '-')}-{seed}"
            folder.mkdir(exist_ok=True)
            start = time.time()
            run = train(name, seed, folder, args)
            run |= {"name": name, "seed": seed, "minutes": args.minutes, "took": (time.time() - start) / 60}
            run |= score(Path(run["detections"]), args.val_annotations)
            print(f"  AP {run['ap']:.3f}, AP50 {run['ap50']:.3f}", flush=True)
            runs.append(run)
            with record.open("a") as file:
                file.write(json.dumps(run) + "\n")
    ms = times(runs)
    write_table(runs, ms, args.output / "table.md")
    plot(runs, ms, args.output / "plot.png")


def call(command: list[str | Path], log: Path, **environment: str) -> str:
    """Runs a command, keeps what it prints in ``log``, and returns it; a failure ends everything."""
    done = subprocess.run(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
    )
    with log.open("a") as file:
        file.write(done.stdout)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\nended with {done.returncode}:\n{done.stdout[-2000:]}")
    return done.stdout


def train(name: str, seed: int, folder: Path, args: argparse.Namespace) -> dict:
    if name.startswith("odtk"):
        return train_odtk(name, seed, folder, args)
    if name == "torchvision":
        return train_torchvision(seed, folder, args)
    return train_yolo(name, seed, folder, args)


def train_odtk(name: str, seed: int, folder: Path, args: argparse.Namespace) -> dict:
    odtk: list[str | Path] = [sys.executable, "-m", "odtk"]
    log, model = folder / "log.txt", folder / "model.pth"
    command = [*odtk, "train", model, "--annotations", args.annotations, "--images", args.images, "--override"]
    command += ["--time", f"{args.minutes:g}m", "--seed", str(seed)]
    call(command + (["--backbone-weights", "none"] if "scratch" in name else []), log)
    best = folder / "model.best.pth"  # the file that the run's last line names
    call([*odtk, "export", best, folder / "model.onnx", "--full-precision"], log)
    files = {"fp32": str(folder / "model.onnx")}
    if seed == args.seeds[0]:  # to be timed
        call([*odtk, "export", best, folder / "int8.onnx", "--int8", "--calibration-images", args.images], log)
        files["int8"] = str(folder / "int8.onnx")
    val = ["--images", args.val_images, "--annotations", args.val_annotations]
    call([*odtk, "infer", folder / "model.onnx", *val, "--output", folder / "detections.json"], log)
    return {"detections": str(folder / "detections.json"), "files": files}


def train_torchvision(seed: int, folder: Path, args: argparse.Namespace) -> dict:
    command = [args.peer_python, Path(__file__).with_name("peer_torchvision.py"), "--minutes", args.minutes]
    command += ["--annotations", args.annotations, "--images", args.images, "--seed", seed]
    command += ["--resize", args.torchvision_size[0], "--max-size", args.torchvision_size[1]]
    command += ["--val-annotations", args.val_annotations, "--val-images", args.val_images]
    said = call([*command, "--output", folder / "detections.json"], folder / "log.txt")
    return {"detections": str(folder / "detections.json"), "eager_ms": json.loads(said.splitlines()[-1])["ms"]}


def train_yolo(name: str, seed: int, folder: Path, args: argparse.Namespace) -> dict:
    """Trains by the command `yolo`, and turns its detections back into the ids of the annotations."""
    log, yolo = folder / "log.txt", args.peer_python.with_name("yolo")
    offline = {"YOLO_OFFLINE": "1"}
    data = yolo_data(args)
    size = f"imgsz={args.yolo_size}"
    common = [f"project={folder.resolve()}", "exist_ok=True", "device=cpu", "workers=2", size]
    command = [yolo, "detect", "train", f"model={name.lower()}.yaml", "pretrained=False", f"data={data}"]
    command += ["name=train", "batch=8", f"seed={seed}", f"time={args.minutes / 60}", "epochs=1000", "plots=False"]
    call([*command, "val=False", *common], log, **offline)
    weights = folder / "train" / "weights" / "last.pt"
    command = [yolo, "detect", "val", f"model={weights.resolve()}", f"data={data}", "save_json=True", "name=val"]
    call([*command, "plots=False", "batch=1", *common], log, **offline)
    call([yolo, "export", f"model={weights.resolve()}", "format=onnx", "nms=True", size], log, **offline)
    truth = json.loads(args.val_annotations.read_text())
    ids = {name_of(Path(image["file_name"]).stem): image["id"] for image in truth["images"]}
    categories = [category["id"] for category in truth["categories"]]
    found = json.loads((folder / "val" / "predictions.json").read_text())
    for row in found:
        row["image_id"] = ids[name_of(row["image_id"])]
        row["category_id"] = categories[row["category_id"] - 1]  # its classes are counted from 1 in this file
    (folder / "detections.json").write_text(json.dumps(found))
    return {"detections": str(folder / "detections.json"), "files": {"fp32": str(weights.with_suffix(".onnx"))}}


def name_of(stem: str | int) -> str:
    """A file's stem as YOLO's predictions have it, where 007 is 7."""
    return str(int(stem)) if str(stem).isnumeric() else str(stem)


def yolo_data(args: argparse.Namespace) -> Path:
    """The data.yaml of the dataset in YOLO's layout, written by `odtk convert`."""
    folder = (args.output / "yolo").resolve()
    folder.mkdir(exist_ok=True)
    if not (folder / "data.yaml").exists():
        for split in ("train", "val"):
            annotations, images = (
                (args.annotations, args.images) if split == "train" else (args.val_annotations, args.val_images)
            )
            command = [sys.executable, "-m", "odtk", "convert", annotations, folder / split, "--to", "yolo", "--lossy"]
            call([*command, "--images", images], args.output / "convert.txt")
        names = [category["name"] for category in json.loads(args.val_annotations.read_text())["categories"]]
        lines = ["train: train/train.txt", "val: val/train.txt", "names:"]
        lines += [f"  {i}: {json.dumps(name)}" for i, name in enumerate(names)]
        (folder / "data.yaml").write_text("\n".join([f"path: {folder}", *lines]) + "\n")
    return folder / "data.yaml"


def score(detections: Path, annotations: Path) -> dict:
    """AP, AP50 and AP per class by pycocotools."""
    from odtk.evaluation.evaluate import evaluate

    metrics = evaluate(json.loads(detections.read_text()), json.loads(annotations.read_text()))
    return {"ap": metrics.ap, "ap50": metrics.ap50, "classes": {c.name: c.ap for c in metrics.classes}}


def times(runs: list[dict]) -> dict[tuple[str, str], float]:
    """(candidate, precision) → median ms of one image in ONNX Runtime, each file in turns on all cores."""
    import numpy as np
    import onnxruntime

    sessions: dict[tuple[str, str], tuple] = {}
    seconds: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        for precision, file in run.get("files", {}).items():
            if (run["name"], precision) in sessions or not Path(file).exists():
                continue
            session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
            (entry,) = session.get_inputs()
            dtype = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32}[entry.type]
            image = np.random.default_rng(0).integers(0, 256, [d if isinstance(d, int) else 1 for d in entry.shape])
            scale = 1 if "odtk" in run["name"] or dtype == np.uint8 else 1 / 255
            sessions[run["name"], precision] = session, {entry.name: (image * scale).astype(dtype)}
    for key in [key for _ in range(ROUNDS) for key in sessions]:
        session, feed = sessions[key]
        start = time.perf_counter()
        session.run(None, feed)
        seconds.setdefault(key, []).append(time.perf_counter() - start)
    found = {key: statistics.median(values) * 1e3 for key, values in seconds.items()}
    return found | {(run["name"], "eager"): run["eager_ms"] for run in runs if "eager_ms" in run}


def write_table(runs: list[dict], ms: dict[tuple[str, str], float], path: Path) -> None:
    """One row per candidate: mean (and range) over seeds."""
    rows = ["| | seeds | AP | AP50 | AP per class | ms fp32 | ms INT8 |", "|---|---|---|---|---|---|---|"]
    for name in dict.fromkeys(run["name"] for run in runs):
        own = [run for run in runs if run["name"] == name]
        ap = [run["ap"] for run in own]
        classes = {c: statistics.mean(run["classes"][c] for run in own) for c in own[0]["classes"]}
        shown = ", ".join(f"{c} {value:.3f}" for c, value in classes.items())
        fp32 = f"{ms[name, 'fp32']:.1f}" if (name, "fp32") in ms else f"{ms[name, 'eager']:.1f} (eager torch)"
        int8 = f"{ms[name, 'int8']:.1f}" if (name, "int8") in ms else "–"
        rows.append(
            f"| {name} | {len(own)} | **{statistics.mean(ap):.3f}** ({min(ap):.3f}–{max(ap):.3f}) "
            f"| {statistics.mean(run['ap50'] for run in own):.3f} | {shown} | {fp32} | {int8} |"
        )
    path.write_text("\n".join(rows) + "\n")
    print("\n".join(rows))


def plot(runs: list[dict], ms: dict[tuple[str, str], float], path: Path) -> None:
    """AP over milliseconds: a point per seed, the name above the best."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name in dict.fromkeys(run["name"] for run in runs):
        x = ms[(name, "fp32") if (name, "fp32") in ms else (name, "eager")]
        ap = [run["ap"] for run in runs if run["name"] == name]
        points = axes.scatter([x] * len(ap), ap, s=30)
        label = name if (name, "fp32") in ms else f"{name} (eager torch)"
        axes.annotate(
            label,
            (x, max(ap)),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            color=points.get_facecolor()[0],
        )
    axes.set_xlabel("ms per image, fp32, ONNX Runtime")
    axes.set_ylabel("AP")
    axes.margins(0.2, 0.12)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()

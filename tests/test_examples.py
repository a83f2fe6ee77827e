"""The Python examples and the notebook run as they stand, and the code in docs/python.md and README.md does."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import numpy as np
import pytest
from PIL import Image

from odtk.config import ExportConfig, ModelConfig
from odtk.exporting import export
from tests.random_models import detector_of, save
from tests.videos import make_video

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples" / "python"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(*argv: object, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, argv)], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """model.pth and model.onnx."""
    folder = tmp_path_factory.mktemp("models")
    pth = save(detector_of(ModelConfig(backbones=("ResNet18C4",), classes=2), bias=0.0), folder)
    export.export(ExportConfig(pth, str(folder / "model.onnx"), size=(48, 64), precision="fp32"))
    return Path(pth), folder / "model.onnx"


@pytest.fixture
def folder(models: tuple[Path, Path], tmp_path: Path) -> Path:
    """model.pth, model.onnx, photos/ of three images, photo.jpg, clip.gif and clip.mp4, as the documents name them."""
    for path in models:
        shutil.copy(path, tmp_path)
    images = [Image.effect_noise((64, 48), 60 + i).convert("RGB") for i in range(3)]
    (tmp_path / "photos").mkdir()
    for i, image in enumerate(images):
        image.save(tmp_path / "photos" / f"{i}.png")
    images[0].save(tmp_path / "photo.jpg")
    images[0].save(tmp_path / "clip.gif", save_all=True, append_images=images[1:])
    if importlib.util.find_spec("av"):
        make_video(tmp_path / "clip.mp4", 3)
    return tmp_path


@pytest.mark.slow
def test_prediction(folder: Path) -> None:
    (folder / "photos" / "damaged.png").write_bytes(b"\x89PNG")
    said = run(EXAMPLES / "predict.py", "model.onnx", "photos", "--threshold", 0.2, "--draw", "pictures", cwd=folder)
    assert "objects>" in said and "thing 0" in said and "cannot be read" in said
    assert sorted(path.name for path in (folder / "pictures").iterdir()) == ["1.png", "2.png", "3.png"]
    said = run(EXAMPLES / "frames.py", "model.onnx", "clip.gif", "marked.gif", cwd=folder)
    assert said.count("<Detections in image") == 3
    with Image.open(folder / "marked.gif") as clip:
        assert clip.n_frames == 3 and clip.size == (64, 48)  # type: ignore[attr-defined]


@pytest.mark.slow
def test_ray_finds_what_infer_does(folder: Path) -> None:
    pytest.importorskip("ray.data", reason="ray is not installed")
    script = EXAMPLES.parent / "ray_infer.py"
    run(script, "model.pth", "photos", "found", "--cpus", 2, cwd=folder)
    run(
        "-m",
        "odtk",
        "infer",
        "model.pth",
        "--images",
        "photos",
        "--batch",
        1,
        "--devices",
        "cpu",
        "--output",
        "o.json",
        cwd=folder,
    )
    import pyarrow.parquet

    rows = [row for part in (folder / "found").iterdir() for row in pyarrow.parquet.read_table(part).to_pylist()]
    keys = ("category_id", "score", "x", "y", "w", "h")
    found = [(int(Path(row["path"]).stem) + 1, *(row[key] for key in keys)) for row in rows]
    expected = json.loads((folder / "o.json").read_text())
    assert expected
    assert sorted(found) == sorted((r["image_id"], r["category_id"], r["score"], *r["bbox"]) for r in expected)


@pytest.fixture
def ray_infer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example as a module; Ray itself is not needed for its detector and its checks."""
    pytest.importorskip("pyarrow")
    for name in ("ray", "ray.data"):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    spec = importlib.util.spec_from_file_location("ray_infer", EXAMPLES.parent / "ray_infer.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ray_adds_to_no_folder(ray_infer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would: a second run would double every detection."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b").mkdir()
    assert ray_infer.is_empty("a b") and ray_infer.is_empty("none") and ray_infer.is_empty(f"file://{tmp_path}/none")
    (tmp_path / "a b" / "1.parquet").touch()
    monkeypatch.setattr(sys, "argv", ["ray_infer.py", "model.pth", "photos", "a b"])
    with pytest.raises(SystemExit, match="^a b is not empty, and Ray would add to it: give another folder"):
        ray_infer.main()
    assert not ray_infer.ray.init.called


@pytest.mark.parametrize("rotated", [False, True])
def test_ray_has_columns_of_boxes_and_angles(rotated: bool, ray_infer: ModuleType, tmp_path: Path) -> None:
    config = ModelConfig(backbones=("ResNet18C4",), classes=2, angles=(0.0,) if rotated else ())
    detector = ray_infer.Detector(save(detector_of(config, bias=0.0), tmp_path), 1, device="cpu")
    photo = tmp_path / "1.png"
    Image.effect_noise((64, 48), 60).convert("RGB").save(photo)
    found = detector({"path": np.array([str(photo)]), "bytes": np.array([photo.read_bytes()], dtype=object)})
    assert list(found) == ["path", "category_id", "category", "score", "x", "y", "w", "h"] + ["theta"] * rotated
    assert found["score"] and len({len(column) for column in found.values()}) == 1


@pytest.mark.slow
def test_training_and_export(tmp_path: Path) -> None:
    said = run(EXAMPLES / "train_and_export.py", "demo", "--iters", 2, "--images", 10, cwd=tmp_path)
    assert "Next: odtk export" in said and re.search(r"model\.onnx: AP \d\.\d\d\d", said)
    assert (tmp_path / "demo" / "model.best.pth").is_file()


@pytest.mark.slow
def test_the_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    for name, value in {**ENVIRONMENT, "ODTK_QUICKSTART_ITERS": "2", "ODTK_QUICKSTART_IMAGES": "20"}.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert "image/png" in notebook.cells[-1].outputs[0].data
    shown = [output for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    assert any("<Model model.onnx" in output["data"]["text/plain"] for output in shown)


def test_the_notebook_is_kept_without_outputs() -> None:
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(code) > 5 and all(not cell["outputs"] and cell["execution_count"] is None for cell in code)


@pytest.mark.slow
@pytest.mark.parametrize("document", ["docs/python.md", "README.md"])
def test_the_code_in_the_documents(document: str, folder: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), flags=re.DOTALL)
    assert blocks
    run("-c", "\n".join(blocks), cwd=folder)

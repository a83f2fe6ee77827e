"""The import order of the house (CONTRIBUTING.md), read from the source, so that it cannot erode."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "odtk"
ORDER = [
    {"config"},
    {"boxes"},
    {"ops"},
    {"postprocess"},
    {"data", "model"},
    {"export"},
    {"inference"},
    {"evaluation"},
    {"training"},
    {"launch"},
    {"cli"},
]
MOVING = {  # what the next steps lay lower
    "model/checkpoint.py imports data",
    "evaluation/visualize.py imports training",
}
RANK = {room: i for i, rooms in enumerate(ORDER) for room in rooms}
HEAVY = {"torch", "numpy", "onnx", "onnxruntime", "PIL", "pycocotools", "rich", "requests"}


def rooms_imported(path: Path) -> set[str]:
    """Rooms of odtk (second component of the dotted name) that a file imports, anywhere in it."""
    package = ["odtk", *path.relative_to(PACKAGE).parent.parts]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module.split(".") if node.module else [])]
            names = [".".join([*module, alias.name]) for alias in node.names] + [".".join(module)]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "odtk" and len(parts) > 1:
                found.add(parts[1])
    return found & RANK.keys()


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def violations(files: list[Path]) -> list[str]:
    return [
        f"{path.relative_to(PACKAGE)} imports {other}"
        for path in files
        if (room := room_of(path)) in RANK
        for other in rooms_imported(path)
        if other != room and RANK[other] >= RANK[room]
    ]


def test_every_file_is_a_room_of_the_house() -> None:
    known = RANK.keys() | {"__init__", "__main__"}
    assert [p for p in PACKAGE.rglob("*.py") if room_of(p) not in known] == []


def test_data_flows_one_way() -> None:
    assert set(violations(sorted(PACKAGE.rglob("*.py")))) <= MOVING


def test_a_wrong_import_is_seen(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    (tmp_path / "boxes.py").write_text("from . import ops\nfrom .config import OdtkError\n")
    (tmp_path / "ops.py").write_text("import odtk.training.train\n")
    assert violations(sorted(tmp_path.glob("*.py"))) == ["boxes.py imports ops", "ops.py imports training"]


def test_the_command_line_starts_light() -> None:
    """Top-level imports of config, cli and __init__ stay in the standard library: `odtk --help` answers at once."""
    for name in ("__init__", "config", "cli"):
        tree = ast.parse((PACKAGE / f"{name}.py").read_text())
        for node in tree.body:
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not HEAVY & {m.split(".")[0] for m in modules}, f"{name}.py imports {modules} at the top"

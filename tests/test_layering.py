"""The import order of the house (CONTRIBUTING.md), read from the source of every file, so that it cannot erode."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "odtk"
RULE = (
    "data flows one way: text, config → settings → categories → boxes → box_coder → kernels → ops → postprocess → "
    "files, launch, ranks → data, model → exporting → inference → evaluation → training → "
    "deploy → describe → commands → api → cli, and data and model are apart"
)
ORDER = [
    {"text"},
    {"config"},
    {"settings"},
    {"categories"},
    {"boxes"},
    {"box_coder"},
    {"kernels"},
    {"ops"},
    {"postprocess"},
    {"files", "launch", "ranks"},
    {"data", "model"},
    {"exporting"},
    {"inference"},
    {"evaluation"},
    {"training"},
    {"deploy"},
    {"describe"},
    {"commands"},
    {"api"},
    {"cli"},
]
RANK = {room: i for i, rooms in enumerate(ORDER) for room in rooms}
HEAVY = {"torch", "numpy", "onnx", "onnxruntime", "PIL", "pycocotools", "rich", "requests"}


def module_of(path: Path) -> str:
    """odtk/data/coco.py → data.coco; a folder's __init__.py → the folder; the package's own → an empty string."""
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, modules: set[str]) -> set[str]:
    """Modules of odtk that a file imports, anywhere in it: data.coco, ops …"""
    package = ["odtk", *path.relative_to(PACKAGE).parent.parts]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module.split(".") if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names] + [module]
        else:
            continue
        found |= {name.removeprefix("odtk.") for name in names if name.startswith("odtk.")}
    return found & modules


def graph_of(files: list[Path]) -> dict[str, set[str]]:
    """Every file's module and the modules that it imports; folders (their empty __init__.py) left out."""
    modules = {module_of(path) for path in files}
    return {module_of(path): imports_of(path, modules) for path in files if path.name != "__init__.py"}


def violations(files: list[Path]) -> list[str]:
    """One sentence for each import against the order."""
    found = []
    for module, others in sorted(graph_of(files).items()):
        room = module.partition(".")[0]
        for other in sorted(others):
            target = other.partition(".")[0]
            if room != target and room in RANK and target in RANK and RANK[target] >= RANK[room]:
                found.append(f"{module} imports {other}, but {RULE}")
    return found


def circles(files: list[Path]) -> list[str]:
    """One sentence for each pair of files on a circle: each can be reached from the other."""
    graph = graph_of(files)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        stack = [start]
        while stack:
            new = graph.get(stack.pop(), set()) - seen
            seen |= new
            stack += new
        return seen

    reach = {module: reached(module) for module in graph}
    return [
        f"{module} imports {other}, which leads back to {module}: no circle between files"
        for module in sorted(graph)
        for other in sorted(graph[module])
        if module in reach.get(other, set())
    ]


def test_every_file_is_in_a_room_of_the_house() -> None:
    known = RANK.keys() | {"", "__main__"}
    assert [path for path in PACKAGE.rglob("*.py") if module_of(path).partition(".")[0] not in known] == []


def test_data_flows_one_way() -> None:
    assert violations(sorted(PACKAGE.rglob("*.py"))) == []


def test_no_circle_between_files() -> None:
    assert circles(sorted(PACKAGE.rglob("*.py"))) == []


def test_a_name_has_one_home() -> None:
    """Folders keep an empty __init__.py, so no name can be imported from two places; settings is the exception."""
    front = PACKAGE / "settings" / "__init__.py"
    assert [path for path in PACKAGE.glob("*/**/__init__.py") if path.read_text().strip()] == [front]


def past_the_front(files: list[Path]) -> list[str]:
    """One sentence for each import of a file in settings/ from outside, or of its __init__.py from inside."""
    found = []
    for module, others in sorted(graph_of(files).items()):
        for other in sorted(others):
            if module.startswith("settings.") and other == "settings":
                found.append(f"{module} imports settings, which imports it")
            if not module.startswith("settings.") and other.startswith("settings."):
                found.append(f"{module} imports {other}: the name must come from settings itself")
    return found


def test_settings_are_imported_from_its_front() -> None:
    """Its __init__.py only hands names on: then each has one home inside, and one place to import it from outside."""
    assert past_the_front(sorted(PACKAGE.rglob("*.py"))) == []
    docstring, *body = ast.parse((PACKAGE / "settings" / "__init__.py").read_text()).body
    *imports, listed = body
    assert all(isinstance(node, ast.ImportFrom) and node.level == 1 for node in imports)
    assert isinstance(docstring, ast.Expr) and isinstance(listed, ast.Assign)


def test_imports_past_the_front_are_seen(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    for name, text in {
        "settings/__init__.py": "from .train import TrainSettings\n",
        "settings/train.py": "from .fields import flag\n",
        "settings/fields.py": "def late():\n    from odtk.settings import TrainSettings\n",
        "api.py": "from .settings import TrainSettings\n",
        "cli.py": "from .settings.fields import flag\n",
        "training/plan.py": "from ..settings import train\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert past_the_front(sorted(tmp_path.rglob("*.py"))) == [
        "cli imports settings.fields: the name must come from settings itself",
        "settings.fields imports settings, which imports it",
        "training.plan imports settings.train: the name must come from settings itself",
    ]


def test_wrong_imports_are_seen_in_folders_too(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    for name, text in {
        "boxes.py": "from . import ops\nfrom .config import OdtkError\n",
        "ops.py": "def late():\n    import odtk.training.train\n",
        "config.py": "",
        "data/coco.py": "from .dataset import Dataset\nfrom ..model import heads\n",
        "data/dataset.py": "from .records import Image\n",
        "data/records.py": "from . import coco\n",
        "model/heads.py": "",
        "training/train.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    files = sorted(tmp_path.rglob("*.py"))
    assert [line.partition(", but data flows one way")[0] for line in violations(files)] == [
        "boxes imports ops",
        "data.coco imports model.heads",
        "ops imports training.train",
    ]
    assert circles(files) == [
        "data.coco imports data.dataset, which leads back to data.coco: no circle between files",
        "data.dataset imports data.records, which leads back to data.dataset: no circle between files",
        "data.records imports data.coco, which leads back to data.records: no circle between files",
    ]


def test_the_command_line_starts_light() -> None:
    """Top-level imports of these files stay in the standard library: `odtk --help` answers at once."""
    files = [PACKAGE / f"{name}.py" for name in ("__init__", "config", "commands", "api", "cli")]
    for path in files + sorted((PACKAGE / "settings").glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not HEAVY & {m.split(".")[0] for m in modules}, f"{path} imports {modules} at the top"

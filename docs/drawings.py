"""Draws docs/pipeline.svg and docs/house.svg: what happens to an image, and which file may import which.

    python docs/drawings.py

Their colors suit a light page and a dark one.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

HERE = Path(__file__).parent
INK, PAPER, LINE = "#16343a", "#d7ecec", "#2a8c8c"
FONT = "font-family='system-ui, sans-serif'"

# Rows of boxes: title, what it does. An arrow leads from each row to the next.
STAGES = (
    (("your images", "files, folders, videos, cameras"), ("your annotations", "COCO, YOLO, Pascal VOC")),
    (("data/", "checked, sampled, decoded, augmented; DALI or torch: the same batches"),),
    (("model/", "backbone, pyramid, head: raw levels"),),
    (
        ("training/", "targets, losses, optimizer, validation"),
        ("exporting/", "one traced graph: FP16 or INT8, NMS inside"),
    ),
    (
        ("MODEL.pth", "weights, classes, settings"),
        ("model.onnx", "ONNX Runtime"),
        ("model.plan", "TensorRT, our plugins"),
    ),
    (("inference/", "any of the three as a function of images"),),
    (("evaluation/", "AP, errors, the exported file against PyTorch"), ("deploy/", "a folder for a server")),
)
# Floors of the house, the top first: a file imports only from floors below.
FLOORS = (
    ("cli · api · commands · describe", "flags and keywords → one call"),
    ("deploy", "checkpoint → what a server takes"),
    ("training", "batches → checkpoint"),
    ("evaluation", "detections → metrics, reports, pictures"),
    ("inference", "images → detections"),
    ("exporting", "checkpoint → .onnx, .plan"),
    ("data | model", "files → batches | images → raw levels"),
    ("files · launch · ranks", "what is written, which processes run"),
    ("postprocess · ops · kernels", "raw levels → detections; decode, NMS; csrc/"),
    ("box_coder · boxes · categories", "what numbers mean"),
    ("settings · config · text", "what can be set; standard library only"),
)
WIDTH, ROW, GAP = 860, 58, 34


def box(x: float, y: float, width: float, title: str, says: str) -> str:
    middle = x + width / 2
    return (
        f"<rect x='{x:g}' y='{y:g}' width='{width:g}' height='{ROW}' rx='8' fill='{PAPER}' stroke='{LINE}'/>"
        f"<text x='{middle:g}' y='{y + 24:g}' text-anchor='middle' font-size='16' font-weight='600' fill='{INK}'>"
        f"{escape(title)}</text>"
        f"<text x='{middle:g}' y='{y + 44:g}' text-anchor='middle' font-size='13' fill='{INK}'>{escape(says)}</text>"
    )


def svg(parts: list[str], height: float, title: str) -> str:
    head = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height:g}' role='img' {FONT}>"
    arrow = (
        f"<defs><marker id='tip' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='8' markerHeight='8' orient='auto'>"
        f"<path d='M0 0 8 4 0 8z' fill='{LINE}'/></marker></defs>"
    )
    return f"{head}<title>{escape(title)}</title>{arrow}{''.join(parts)}</svg>\n"


def pipeline() -> str:
    parts, y = [], 10.0
    for index, row in enumerate(STAGES):
        width = (WIDTH - 20 - 20 * (len(row) - 1)) / len(row)
        parts += [box(10 + i * (width + 20), y, width, *one) for i, one in enumerate(row)]
        if index + 1 < len(STAGES):
            line = f"x1='{WIDTH / 2:g}' x2='{WIDTH / 2:g}' y1='{y + ROW + 4:g}' y2='{y + ROW + GAP - 4:g}'"
            parts.append(f"<line {line} stroke='{LINE}' stroke-width='2' marker-end='url(#tip)'/>")
        y += ROW + GAP
    return svg(parts, y - GAP + 10, "From images and annotations to detections and metrics")


def house() -> str:
    parts = [box(60, 10 + i * (ROW + 6), WIDTH - 70, *floor) for i, floor in enumerate(FLOORS)]
    height = 10 + len(FLOORS) * (ROW + 6)
    line = f"x1='30' x2='30' y1='20' y2='{height - 16:g}'"
    parts.append(f"<line {line} stroke='{LINE}' stroke-width='2' marker-end='url(#tip)'/>")
    turned = f"transform='rotate(-90 18 {height / 2:g})' text-anchor='middle' font-size='13' fill='{LINE}'"
    parts.append(f"<text x='18' y='{height / 2:g}' {turned}>imports</text>")
    return svg(parts, height + 4, "The floors of the package: a file imports only from floors below its own")


if __name__ == "__main__":
    (HERE / "pipeline.svg").write_text(pipeline())
    (HERE / "house.svg").write_text(house())

#!/usr/bin/env bash
# Trains the rows of NVIDIA's published table of ODTK again on COCO 2017, and the dense head beside them; writes a table.
#
#   recipes/coco.sh COCO OUTPUT [ROW…]
#
# NOT VERIFIED: it ran end to end on a small set of COCO's layout (tests/test_recipes.py), never yet on COCO or a GPU.
#
# COCO    holds train2017/ (118287 images), val2017/ (5000), annotations/instances_{train,val}2017.json; the images may lie
#         in COCO/images/ too. It is only read.
# OUTPUT  gets ROW.pth, ROW.detections.json, ROW.figures.json, ROW.logs/, and table.md. What is there is not made again: after
#         an interruption the same command goes on, in the middle of a training too.
# ROW     which rows (all): ResNet18FPN ResNet34FPN ResNet50FPN ResNet101FPN ResNet152FPN dense-large.
#
# Hours that NVIDIA states for the training of each on 8 V100 (DGX-1): 5, 6, 7, 10 and 12; 40 in all. dense-large sees as
# many images with the same backbone as ResNet50FPN, so expect about its 7. On one such GPU expect eight times as long.
#
# Environment:
#   GPUS=N          1, 2, 4 or 8 GPUs (all that nvidia-smi lists); 16 images make a batch on any number of them
#   ACCUMULATE=N    each batch in N parts, for GPUs whose memory does not hold 16 / GPUS images (1)
#   WEIGHTS=DIR     folder of torchvision's files, such as resnet50-0676ba61.pth, for machines without a network
#   SUBSET=1        the set is not COCO 2017 as a whole: no count of images is expected
#   TRAIN_FLAGS, INFER_FLAGS    further flags of odtk train and odtk infer
#   ODTK=COMMAND    the odtk to run (odtk)
set -euo pipefail

PUBLISHED="ResNet18FPN:0.318:5 ResNet34FPN:0.343:6 ResNet50FPN:0.358:7 ResNet101FPN:0.376:10 ResNet152FPN:0.393:12"
ROWS="ResNet18FPN ResNet34FPN ResNet50FPN ResNet101FPN ResNet152FPN dense-large"

fail() { echo "recipes/coco.sh: $*" >&2; exit 1; }

[ $# -ge 2 ] || { sed -n '2,/^set -e/p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 2; }
coco=$1 output=$2; shift 2
read -ra known <<< "$ROWS"
rows=("$@")
[ $# -gt 0 ] || rows=("${known[@]}")
for row in "${rows[@]}"; do
  [[ " ${known[*]} " == *" $row "* ]] || fail "there is no row $row: choose from ${known[*]}."
done
read -ra odtk <<< "${ODTK:-odtk}"
read -ra train_flags <<< "${TRAIN_FLAGS:-}"
read -ra infer_flags <<< "${INFER_FLAGS:-}"
command -v "${odtk[0]}" > /dev/null || fail "there is no command ${odtk[0]}: install odtk, or say ODTK=COMMAND."

# ---- devices: nvidia-smi's, unless the flags name others ----
accumulate=${ACCUMULATE:-1}
devices=()
if [[ " ${train_flags[*]-} " != *" --devices "* ]]; then
  gpus=${GPUS:-$(nvidia-smi --list-gpus 2> /dev/null | wc -l)}
  [[ $gpus =~ ^[1248]$ ]] || fail "GPUS is $gpus: a batch of 16 needs 1, 2, 4 or 8 GPUs; say GPUS=N."
  [[ $accumulate =~ ^[1-9][0-9]*$ ]] && [ $((16 % (accumulate * gpus))) = 0 ] ||
    fail "ACCUMULATE is $accumulate: GPUS times ACCUMULATE must divide 16."
  devices=(--devices "$gpus")
fi

# ---- layout ----
folder() {  # NAME COUNT: where its images are
  local place=$coco/$1 count
  [ -d "$place" ] || place=$coco/images/$1
  [ -d "$place" ] || fail "there is neither $coco/$1 nor $place: COCO must hold $1/."
  count=$(find -L "$place" -maxdepth 1 -name '*.jpg' | wc -l)
  [ -n "${SUBSET:-}" ] || [ "$count" = "$2" ] ||
    fail "$place has $count images, COCO 2017 has $2: complete it, or say SUBSET=1 if it is another set."
  echo "$place"
}
train_images=$(folder train2017 118287)
val_images=$(folder val2017 5000)
train=$coco/annotations/instances_train2017.json val=$coco/annotations/instances_val2017.json
for file in "$train" "$val"; do
  [ -f "$file" ] || fail "there is no $file: COCO must hold the annotations of 2017."
done
mkdir -p "$output"
if [ ! -f "$output/checked" ]; then
  "${odtk[@]}" check --annotations "$train" --images "$train_images" --headers-only
  "${odtk[@]}" check --annotations "$val" --images "$val_images"
  touch "$output/checked"
fi

# ---- rows ----
train_row() {  # ROW: trains it, or goes on
  local row=$1 recipe backbone=$1 weights=() file
  if [ "$row" = dense-large ]; then
    backbone=ResNet50FPN
    recipe=(--variant large --iters 90000)
  else
    recipe=(--preset odtk --backbone "$row")
  fi
  if [ -n "${WEIGHTS:-}" ]; then
    file=$(echo "$backbone" | tr '[:upper:]' '[:lower:]')
    file=$(find -L "$WEIGHTS" -maxdepth 1 -name "${file%fpn}-*.pth" | head -1)
    [ -n "$file" ] || fail "there is no ${backbone%FPN} of torchvision in $WEIGHTS."
    weights=(--backbone-weights "$file")
  fi
  "${odtk[@]}" train "$output/$row.pth" "${recipe[@]}" --annotations "$train" --images "$train_images" \
    --val-annotations "$val" --val-images "$val_images" --batch $((16 / accumulate)) --accumulate "$accumulate" \
    --logdir "$output/$row.logs" "${weights[@]}" "${devices[@]}" "${train_flags[@]}"
}

write_table() {
  python3 - "$output" "$PUBLISHED" "${known[@]}" << 'END'
import json, pathlib, sys

output, published, *rows = sys.argv[1:]
stated = {name: (ap, hours) for name, ap, hours in (row.split(":") for row in published.split())}
lines = ["| row | AP | AP50 | AP published | hours of training | published, 8 V100 |", "|---|---|---|---|---|---|"]
for row in rows:
    file = pathlib.Path(output, f"{row}.figures.json")
    if not file.exists():
        continue
    stats = json.loads(file.read_text())["stats"]
    hours = sum(float(line) for line in pathlib.Path(output, f"{row}.seconds").read_text().split()) / 3600
    ap, known = stated.get(row, ("", ""))
    lines.append(f"| {row} | {stats['AP']:.3f} | {stats['AP50']:.3f} | {ap} | {hours:.2f} | {known} |")
table = "\n".join(lines) + "\n"
pathlib.Path(output, "table.md").write_text(table)
print(table, end="")
END
}

for row in "${rows[@]}"; do
  [ ! -f "$output/$row.figures.json" ] || continue
  if [ ! -f "$output/$row.trained" ]; then
    started=$SECONDS
    # Also after an interruption, so that the table counts all hours.
    trap 'echo $((SECONDS - started)) >> "$output/$row.seconds"' EXIT
    train_row "$row"
    trap - EXIT
    echo $((SECONDS - started)) >> "$output/$row.seconds"
    touch "$output/$row.trained"
  fi
  # The last weights, as NVIDIA's are; --resize and --max-size are those of the training.
  "${odtk[@]}" infer "$output/$row.pth" --annotations "$val" --images "$val_images" \
    --output "$output/$row.detections.json" "${devices[@]}" "${infer_flags[@]}"
  "${odtk[@]}" evaluate "$output/$row.detections.json" --annotations "$val" --output "$output/$row.figures.json"
done
write_table

#!/usr/bin/env bash
# Unpack the two ImageNet archives into IMAGENET/train/WNID/*.JPEG and IMAGENET/val/WNID/*.JPEG.
# Usage: scripts/extract_imagenet.sh ILSVRC2012_img_train.tar ILSVRC2012_img_val.tar IMAGENET VAL_LABELS
# VAL_LABELS names the class of each validation image: a text file with lines "ILSVRC2012_val_00000001.JPEG n01751748",
# or ILSVRC2012_devkit_t12.tar.gz (this one needs scipy).
# All names are checked before anything is written. The images gather in IMAGENET/.extract.XXXXXX, which goes when the
# script ends, or if it was killed, when it is called again; they take their places once all are there. Nothing else is
# removed, the archives least of all. python3 is needed.
set -euo pipefail
export LC_ALL=C

refuse() {
    echo "extract_imagenet.sh: error: $1" >&2
    exit 2
}

members() { # ARCHIVE: the names in it, one a line
    [ -f "$1" ] || refuse "$1: no such file"
    tar -tf "$1" 2>/dev/null || refuse "$1: is no complete tar archive"
}

devkit_labels() { # DEVKIT: its labels, as lines of the text form
    python3 - "$1" <<'PY'
import io
import sys
import tarfile

import scipy.io

with tarfile.open(sys.argv[1]) as kit:
    folder = next(name for name in kit.getnames() if name.endswith("data/meta.mat"))[: -len("meta.mat")]
    meta = kit.extractfile(folder + "meta.mat").read()
    truth = kit.extractfile(folder + "ILSVRC2012_validation_ground_truth.txt").read()
synsets = scipy.io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
wnid = {int(synset["ILSVRC2012_ID"]): synset["WNID"] for synset in synsets}
for i, number in enumerate(truth.split(), 1):
    print(f"ILSVRC2012_val_{i:08}.JPEG", wnid[int(number)])
PY
}

# FOLDER: write the images of the archive on stdin. An archive may hold links, devices, owners and modes, and tar makes
# them for root; here each image is a new file of the user's own, and all but plain files named NAME.JPEG is refused.
unpack() {
    python3 -I -c '
import re, shutil, sys, tarfile

count = 0
try:
    with tarfile.open(fileobj=sys.stdin.buffer, mode="r|") as archive:
        for count, member in enumerate(archive, 1):
            if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or not re.fullmatch(r"[\w.-]+\.JPEG", member.name):
                sys.exit(f"{member.name!r} is no plain file NAME.JPEG")
            with open(f"{sys.argv[1]}/{member.name}", "xb") as file:
                shutil.copyfileobj(archive.extractfile(member), file)
except (tarfile.TarError, OSError, ValueError) as error:
    sys.exit(str(error))
if not count:
    sys.exit("no image in it")
' "$1"
}

place() { # SPLIT EXPECTED: move its class folders to where they belong, and count
    mkdir -p "$out/$1"
    mv "$work/$1"/* "$out/$1/"
    count=$(find "$out/$1/" -type f -name '*.JPEG' | wc -l | tr -d ' ')
    echo "$out/$1: $count images"
    [ "$count" -eq "$2" ] || echo "warning: $out/$1 has $count images, the full ImageNet has $2" >&2
}

[ $# -eq 4 ] || refuse "usage: $0 TRAIN.tar VAL.tar IMAGENET VAL_LABELS \
(VAL_LABELS: the devkit ILSVRC2012_devkit_t12.tar.gz, or lines such as 'ILSVRC2012_val_00000001.JPEG n01751748')"
train=$1 val=$2 out=$3

# what is to be done, and whether it can be
for split in train val; do
    [ -z "$(ls -A "$out/$split" 2>/dev/null)" ] || refuse "$out/$split: exists and is not an empty folder"
done
archives=$(members "$train")
images=$(members "$val")
stray=$(awk '!/^n[0-9]+\.tar$/ && !found++' <<<"$archives")
[ -z "$stray" ] && [ -n "$archives" ] || refuse "$train: holds '$stray', not class archives such as n01440764.tar"
stray=$(awk '!/^[^\/]+\.JPEG$/ && !found++' <<<"$images")
[ -z "$stray" ] && [ -n "$images" ] || refuse "$val: holds '$stray', not images such as ILSVRC2012_val_00000001.JPEG"

[ -f "$4" ] || refuse "$4: no such file"
case $4 in
    *.tar | *.tar.gz | *.tgz)
        python3 -c "import scipy.io" 2>/dev/null ||
            refuse "$4: to read it, python3 must have scipy (pip install scipy); a text file of labels needs neither"
        labels=$(devkit_labels "$4" 2>/dev/null) || refuse "$4: is not the devkit ILSVRC2012_devkit_t12.tar.gz"
        ;;
    *) labels=$(tr -d '\000\r' <"$4") ;;
esac
plan=$(awk 'NR == FNR { wnid[$1] = $2; next } { print $1, wnid[$1] }' <(echo "$labels") <(echo "$images"))
stray=$(awk 'NF < 2 && !found++ { print $1 }' <<<"$plan")
[ -z "$stray" ] || refuse "$4: has no label for $stray"
stray=$(awk 'NR == FNR { known[$1]; next } !($2 ".tar" in known) && !found++' <(echo "$archives") <(echo "$plan"))
[ -z "$stray" ] || refuse "$4: says '$stray', and $train has no such class"

rm -rf "$out"/.extract.* # of one that was killed
{ mkdir -p "$out" && work=$(mktemp -d "$out/.extract.XXXXXX"); } 2>/dev/null || refuse "$out: cannot be written"
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM # unlike none, this waits for a running program, which would write on

# the work: each class archive streams from the outer one into its folder
classes=0
while read -r archive; do
    class=${archive%.tar}
    mkdir -p "$work/train/$class"
    why=$(tar -xOf "$train" "$archive" | unpack "$work/train/$class" 2>&1) ||
        refuse "$train: its $archive cannot be unpacked: $why"
    classes=$((classes + 1))
    [ $((classes % 50)) -ne 0 ] || echo "train: $classes classes"
done <<<"$archives"

mkdir "$work/val"
why=$(unpack "$work/val" <"$val" 2>&1) || refuse "$val: cannot be unpacked: $why"
while read -r image class; do
    [ -d "$work/val/$class" ] || mkdir "$work/val/$class"
    mv "$work/val/$image" "$work/val/$class/"
done <<<"$plan"

place train 1281167
place val 50000

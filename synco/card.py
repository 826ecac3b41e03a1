"""A model card: a folder from which timm loads a backbone, and which says what it is and where it comes from."""

import importlib.util
import math
import os
import tempfile
from typing import Any

import torch
import torch.nn as nn

from synco import checkpoint, files, measures, metrics, networks, options
from synco.errors import UserError, one_line

WEIGHTS, CONFIG, README = FILES = ("model.safetensors", "config.json", "README.md")
# the settings of a run that a card lists, as far as the checkpoint has them
DATA = "dataset data train_images limit_images hold_out split_seed img_size stats".split()
RECIPE = (
    "init_from fill_queue epochs steps global_batch processes optimizer lr momentum weight_decay cos schedule lr_min "
    "lr_warmup_epochs lr_warmup clip_grad aug_plus aug_heavy blur crop_scale augment_on mlp moco_dim moco_k moco_m "
    "moco_t symmetric mask_same_image stem bn_splits sync_bn amp tf32 channels_last compile n_hard n1 n2 n3 n4 n5 n6 "
    "n_copied alpha beta gamma sigma delta eta warmup_epochs cooldown_epochs seed"
).split()
# what the result of a program is called, by a part of the program's name
RESULTS = {"lincls": "linear probe", "semisup": "training on labels"}


def check_folder(folder: str, *, force: bool) -> None:
    """Raise UserError unless a card can be written there: in no or an empty folder, with `force` over another card."""
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise UserError(f"--card {folder}: is not a folder")
    beside = os.path.dirname(os.path.abspath(folder))
    if not os.path.isdir(beside):
        raise UserError(f"--card {folder}: there is no folder {beside}")
    held = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    strange = [name for name in held if name not in FILES]
    if strange:
        raise UserError(f"--card {folder}: holds {strange[0]}, which is no part of a card; give another folder")
    if held and not force:
        raise UserError(f"--card {folder}: holds a card already; --force writes over it")
    for name in ("timm", "safetensors"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--card {folder}: {name} is not installed; pip install '.[timm]'")
    files.check_writable(folder)


def read_results(paths: list[str], path: str, digest: str) -> list[dict[str, Any]]:
    """The results in these files, which must be of the checkpoint `path`, whose SHA-256 is the digest.

    A file is a result.json of a trial, or of synco.evaluate, which may have another checkpoint beside this one, and
    each accuracy of which is a result of its own.
    Raises UserError that names a file which is of another checkpoint, or neither of the two.
    """
    if twice := [name for name in paths if paths.count(name) > 1]:
        raise UserError(f"--results {twice[0]}: is given twice")
    results = []
    for name in paths:
        if not os.path.isfile(name):
            raise UserError(f"--results {name}: no such file")
        content = files.read_json(name)
        try:
            of = {entry["checkpoint_sha256"]: entry for entry in content.get("checkpoints", [content])}
            if not of:
                raise ValueError("no checkpoints")
            found = of.get(digest, {})
            images = {"hold_out": content.get("settings", content).get("hold_out")}
            accuracies = found.get("accuracies", {None: found} if found else {})
            rows = [_row(kind, images | one) for kind, one in accuracies.items()]
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            programs = "main_lincls.py, main_semisup.py or synco.evaluate"
            raise UserError(f"--results {name}: is not what {programs} writes") from error
        if digest not in of:
            names = {str(sha)[:12]: one.get("path", one.get("checkpoint")) for sha, one in of.items() if sha}
            others = " and ".join(f"{other}, SHA-256 {sha}..." for sha, other in names.items()) or "random weights"
            raise UserError(f"--results {name}: is of another checkpoint ({others}) than {path} ({digest[:12]}...)")
        if not rows:
            raise UserError(f"--results {name}: holds no accuracies, as its images have no labels")
        rows[0]["command"] = content.get("command", "")  # the same for all
        results += [{"val_images": content.get("val_images", "")} | row for row in rows]
    return results


def _row(measure, result):
    """What the table shows of a trial's result, or of one measure of an evaluation."""
    if measure is not None:
        kind = measures.in_words(measure)
    else:
        program = os.path.basename(str(result.get("command", "")).partition(" ")[0])
        kind = next((words for part, words in RESULTS.items() if part in program), "classifier")
        if isinstance(result.get("train_percent"), int):
            how = "fine-tuning" if result.get("weights") == "finetune" else "linear classifier"
            part = "a list of labels" if result.get("subset_file") else f"{result['train_percent']} % of the labels"
            kind = f"{how} on {part}"
    if isinstance(result.get("val"), dict):  # the best was chosen on other images
        result = result | result["val"] | {"val_images": ""}
    elif result.get("hold_out"):
        kind += ", on held-out training images"
    elif isinstance(result.get("heads"), list) and len(result["heads"]) > 1:
        kind += f", the best of {len(result['heads'])} settings on these images"
    row = {name: float(result[name]) for name in ("top1", "low", "high") if name == "top1" or name in result}
    if not all(map(math.isfinite, [*row.values(), result.get("top5") or 0.0])):
        raise ValueError("an accuracy that is no number")
    return row | {"kind": kind} | {name: result[name] for name in ("top5", "val_images") if name in result}


def write(folder: str, network: nn.Module, head: str, saved: dict[str, Any], text: str) -> None:
    """Write the card of a network's backbone: weights and configuration as timm reads them, and the text.

    network, head, saved: from `export.load`. Before it is there timm has loaded it, and computed the same features.
    Raises UserError if timm has no such network, or the folder cannot be written; nothing is left then.
    """
    import safetensors.torch  # an optional package, used for such files alone

    weights = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith(head + ".")}
    config = timm_config(weights, saved)
    try:
        with tempfile.TemporaryDirectory(dir=os.path.dirname(os.path.abspath(folder)), prefix=".card-") as made:
            with files.atomic_write(os.path.join(made, WEIGHTS)) as file:
                file.write(safetensors.torch.save(weights, {"format": "pt"}))
            files.write_json(os.path.join(made, CONFIG), config)
            with files.atomic_write(os.path.join(made, README)) as file:
                file.write(text.encode(errors="replace"))
            check_features(made, network, head, saved)
            os.makedirs(folder, exist_ok=True)
            for name in FILES:
                os.replace(os.path.join(made, name), os.path.join(folder, name))
    except OSError as error:
        raise UserError(f"--card {folder}: cannot be written ({error.strerror or error})") from error


def timm_config(weights: dict[str, torch.Tensor], saved: dict[str, Any]) -> dict[str, Any]:
    """What timm must know of a backbone with these weights. Raises UserError if it has no network that they fit."""
    import timm  # an optional package, used for its networks alone

    name, size = saved["arch"].removeprefix("timm:"), saved["img_size"]
    if not timm.is_model(name):
        raise UserError(f"--card: timm has no network {name!r}; the plain file, OUT.pth, is for torchvision's")
    known = timm.models.get_pretrained_cfg(name)
    arguments = {"img_size": size} if known and known.fixed_input_size else {}
    network = timm.create_model(name, pretrained=False, num_classes=0, **arguments)
    problem = checkpoint.differences(weights, network.state_dict())
    if problem:
        raise UserError(f"--card: timm's {name} is another network: {problem}; write the plain file, OUT.pth")
    mean, std = options.STATS[saved["stats"]]
    views = {
        "input_size": [3, size, size],
        "mean": mean,
        "std": std,
        "interpolation": "bilinear",
        "crop_mode": "center",
    }
    views["crop_pct"] = 1.0 if size < 64 else 224 / 256  # as `augment.center_view`
    theirs = {key: network.pretrained_cfg.get(key) for key in ("classifier", "first_conv", "fixed_input_size")}
    config = {"architecture": name, "num_classes": 0, "num_features": network.num_features}
    return config | {"model_args": arguments, "pretrained_cfg": {**theirs, **views, "num_classes": 0}}


@torch.no_grad()
def check_features(folder: str, network: nn.Module, head: str, saved: dict[str, Any]) -> None:
    """Raise UserError unless what timm loads from the folder computes a network's features, on random images."""
    import timm

    size = saved["img_size"]
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    ours = networks.features(network.eval(), head, images)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(images)
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * ours.abs().max().item()):
        raise UserError(f"--card: timm's {saved['arch']} computes other features from these weights")


def describe(folder: str, path: str, saved: dict[str, Any], digest: str, results: list[dict[str, Any]]) -> str:
    """The card's README. path, digest: the checkpoint and its SHA-256; saved: from `export.load`."""
    config = saved["config"]
    origin = config["origin"] if isinstance(config.get("origin"), dict) else {}
    versions = origin["versions"] if isinstance(origin.get("versions"), dict) else {}
    exported = metrics.origin()
    size = saved["img_size"]
    return f"""---
library_name: timm
pipeline_tag: image-feature-extraction
license: cc-by-nc-4.0
tags:
- timm
---
# {_plain(saved["arch"])}{_length(saved)}

A backbone, which turns images (N, 3, {size}, {size}) into features.

```python
import timm
network = timm.create_model({f"local-dir:{folder}"!r}, pretrained=True).eval()
features = network(images)
```

`timm.data.create_transform(**timm.data.resolve_model_data_config(network))` makes such images from pictures. Once this
folder is uploaded, `hf-hub:OWNER/NAME` takes the place of `local-dir:...`.

## Method

{_plain(origin.get("method", origin.get("backbone", "The checkpoint does not say.")))}

## Data

{_table(config, DATA)}

## Recipe

{_table(config, RECIPE)}

## Results

{_results_table(results)}

## Provenance

| | |
| --- | --- |
| checkpoint | {_plain(os.path.basename(path))} |
| SHA-256 | {digest} |
| made with | {_versions(versions)} |
| command | {_code(origin.get("command", ""))} |
| exported with | {_versions(exported["versions"])} |
| command | {_code(exported["command"])} |

## License

[CC BY-NC 4.0](https://creativecommons.org/licenses/by-nc/4.0/), as the program that trained it.
"""


def _length(saved):
    done, steps, epochs = (saved.get(name) for name in ("step", "steps_per_epoch", "epoch"))
    if not isinstance(epochs, int):
        return ""
    if isinstance(done, int) and isinstance(steps, int) and (epochs - 1) * steps < done < epochs * steps < 2**53:
        epochs = round(done / steps, 2)  # a length in steps ends within an epoch
    return f", {epochs} epochs"


def _plain(value: object) -> str:
    """A value as text of one line, in which nothing is markup: a file may hold anything."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in one_line(str(value)))


def _code(value: object) -> str:
    text = one_line(str(value)).replace("`", "'").replace("|", "\\|")
    return f"`{text}`" if text else "not recorded"


def _table(config, names):
    unset = [name for name in names if config.get(name) is None or config[name] is False or config[name] == ""]
    known = {name: config[name] for name in names if name not in unset}
    if "cos" in known:
        known.pop("schedule", None)
    if not known:
        return "The checkpoint does not say."
    for name in known.keys() & {"data", "init_from"}:  # not where they lie
        known[name] = os.path.basename(os.path.abspath(str(known[name])))
    return "\n".join(["| setting | |", "| --- | --- |", *(f"| {_plain(k)} | {_plain(v)} |" for k, v in known.items())])


def _versions(versions):
    return _plain(", ".join(f"{name} {version}" for name, version in versions.items())) or "not recorded"


def _results_table(results):
    if not results:
        return "None were given."
    lines = ["| | top-1 | top-5 | images | command |", "| --- | --- | --- | --- | --- |"]
    for result in results:
        top1 = f"{result['top1']:.2f} %"
        if {"low", "high"} <= result.keys():
            top1 += f" (95 %: {result['low']:.2f} to {result['high']:.2f})"
        top5 = f"{result['top5']:.2f} %" if isinstance(result.get("top5"), float) else ""
        command = _code(result["command"]) if "command" in result else ""
        cells = [_plain(result["kind"]), top1, top5, _plain(result["val_images"]), command]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)

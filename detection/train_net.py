#!/usr/bin/env python3
"""Fine-tune and evaluate a detector, R50-C4 with one more BatchNorm after res5, on VOC or COCO with detectron2.

  python train_net.py --config-file configs/pascal_voc_R_50_C4_24k_synco.yaml --data-dir DATA --num-gpus 8 \\
    MODEL.WEIGHTS ./output.pkl OUTPUT_DIR runs/voc/trial1
  python train_net.py --config-file configs/pascal_voc_R_50_C4_24k_synco.yaml --data-dir DATA --num-gpus 8 \\
    --eval-only MODEL.WEIGHTS runs/voc/trial1/model_final.pth OUTPUT_DIR runs/voc/trial1

DATA holds VOC2007 and VOC2012, or coco (README.md beside this file). KEY VALUE pairs at the end change the
configuration; those of a plain run are MODEL.WEIGHTS, the file of convert-pretrain-to-detectron2.py, and OUTPUT_DIR.
--eval-only writes to OUTPUT_DIR/eval.
"""

import importlib.util
import json
import os
import pickle
import sys

# the package lies one folder up: works from any folder, without an installation
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

from synco import checkpoint, distributed, options
from synco.options import UserError, number

INSTALL = "python -m pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'"

NETWORKS = {  # converted networks: DEPTH, NUM_GROUPS, WIDTH_PER_GROUP in MODEL.RESNETS
    "resnet18": (18, 1, 64),
    "resnet34": (34, 1, 64),
    "resnet50": (50, 1, 64),
    "resnet101": (101, 1, 64),
    "resnet152": (152, 1, 64),
    "resnext50_32x4d": (50, 32, 4),
    "resnext101_32x8d": (101, 32, 8),
    "resnext101_64x4d": (101, 64, 4),
    "wide_resnet50_2": (50, 1, 128),
    "wide_resnet101_2": (101, 1, 128),
}

# what makes a run another one, so that --resume must not change it
KEPT = (
    "MODEL.WEIGHTS", "DATASETS.TRAIN", "DATASETS.TEST", "SOLVER.BASE_LR", "SOLVER.STEPS", "SOLVER.MAX_ITER",
    "SOLVER.IMS_PER_BATCH", "SOLVER.REFERENCE_WORLD_SIZE",
)  # fmt: skip


def parse():
    parser = options.Parser(__doc__)
    flag = parser.add_argument
    flag("--config-file", required=True, metavar="FILE", help="configuration, such as those in configs/")
    flag(
        "--data-dir",
        metavar="DATA",
        help="folder of VOC2007, VOC2012, coco (unset: DETECTRON2_DATASETS in the environment, or ./datasets)",
    )
    flag("--resume", action="store_true", help="go on from the last checkpoint in OUTPUT_DIR if there is one")
    flag("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS, or with --resume the last checkpoint")
    flag("--num-gpus", default=1, type=number(int, 1), help="GPUs per machine; with MODEL.DEVICE cpu: 1")
    flag("--num-machines", default=1, type=number(int, 1), help="machines")
    flag("--machine-rank", default=0, type=number(int, 0), help="this machine's number, from 0")
    flag("--dist-url", default="auto", metavar="URL", help="where machines meet, tcp://HOST:PORT; auto: one machine")
    flag("opts", nargs="*", metavar="KEY VALUE", help="changes of the configuration")
    args = parser.parse_intermixed_args()
    if len(args.opts) % 2:
        raise UserError(f"{' '.join(args.opts)}: changes of the configuration come as KEY VALUE pairs")
    if not os.path.isfile(args.config_file):
        raise UserError(f"--config-file {args.config_file}: no such file")
    if args.machine_rank >= args.num_machines:
        raise UserError(f"--machine-rank {args.machine_rank} must be below --num-machines {args.num_machines}")
    if args.num_machines > 1 and args.dist_url == "auto":
        raise UserError(f"--num-machines {args.num_machines} needs --dist-url tcp://HOST:PORT, the same for all")
    return args


def run(args):
    """See to it that all is there, then start the processes."""
    if importlib.util.find_spec("detectron2") is None:
        raise UserError(f"detectron2 is not installed; see its installation notes, or try {INSTALL}")
    if args.data_dir is not None:  # detectron2 reads it when its data sets are imported, here and in the processes
        os.environ["DETECTRON2_DATASETS"] = args.data_dir
    config = configuration(args)
    check(config, args)
    if is_finished(config, args):
        print(f"{config.OUTPUT_DIR}: was trained to its end and evaluated; there is nothing left to do")
        return
    checkpoint.make_folders(config.OUTPUT_DIR)
    if not args.eval_only and not products(config.OUTPUT_DIR):
        record_weights(config)
    from detectron2.engine import launch

    launch(work, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, (args,))


def configuration(args):
    """detectron2's configuration: its defaults, the file, the changes on the command line. Raises UserError.

    An evaluation alone has an OUTPUT_DIR of its own in the given one: detectron2 writes config.yaml and log.txt there.
    """
    import yaml  # which comes with detectron2
    from detectron2.config import get_cfg

    config = get_cfg()
    try:
        config.merge_from_file(args.config_file)
        config.merge_from_list(args.opts)
    except (AssertionError, AttributeError, KeyError, OSError, TypeError, ValueError, yaml.YAMLError) as error:
        given = " ".join(["--config-file", args.config_file, *args.opts])
        raise UserError(f"{given}: {' '.join(str(error).split()) or type(error).__name__}") from error
    if args.eval_only:
        config.OUTPUT_DIR = os.path.join(config.OUTPUT_DIR, "eval")
    config.freeze()
    return config


def check(config, args):
    """Raises UserError if weights, data or GPUs are missing or do not fit, or if OUTPUT_DIR holds another run."""
    from detectron2.data import MetadataCatalog

    if not config.MODEL.WEIGHTS:
        raise UserError(f"{args.config_file}: needs MODEL.WEIGHTS PATH, what convert-pretrain-to-detectron2.py wrote")
    check_weights(config)

    gpus = torch.cuda.device_count()
    if config.MODEL.DEVICE.startswith("cuda") and args.num_gpus > gpus:
        raise UserError(
            f"--num-gpus {args.num_gpus}: this machine has {gpus} GPU{'s' * (gpus != 1)}; MODEL.DEVICE cpu uses none"
        )
    if config.MODEL.DEVICE == "cpu" and args.num_gpus * args.num_machines > 1:
        raise UserError(f"--num-gpus {args.num_gpus} --num-machines {args.num_machines}: MODEL.DEVICE cpu takes 1, 1")

    for name in config.DATASETS.TEST if args.eval_only else config.DATASETS.TRAIN + config.DATASETS.TEST:
        known = MetadataCatalog.get(name)
        if known.get("evaluator_type") not in ("pascal_voc", "coco"):
            raise UserError(f"DATASETS: {name!r} is none of VOC's and COCO's, such as voc_2007_test and coco_2017_val")
        for place in places(known):
            if not os.path.exists(place):
                raise UserError(
                    f"{place}: not there, and {name} needs it; --data-dir names the folder of VOC2007 or coco"
                )

    output = config.OUTPUT_DIR
    held = [] if args.eval_only else products(output)
    if held and not args.resume:
        raise UserError(
            f"OUTPUT_DIR {output} holds another run ({held[0]}): --resume goes on with it, another leaves it alone"
        )
    changes = changed(config) if held else []
    if changes:
        raise UserError(
            f"--resume: the run in OUTPUT_DIR {output} is another: {'; '.join(changes)}; "
            "go on with its settings, or give another OUTPUT_DIR"
        )


def check_weights(config):
    """Raises UserError if MODEL.WEIGHTS would leave the network as it is initialised, or feed it other images.

    detectron2 passes over what does not fit, with a warning. A file that would execute code is refused too.
    """
    path = config.MODEL.WEIGHTS
    if "://" in path:
        if path.startswith("detectron2://") and "/torchvision/" not in path and config.INPUT.FORMAT == "RGB":
            raise UserError(f"MODEL.WEIGHTS {path}: is for BGR images; take a configuration without _synco")
    elif not os.path.isfile(path):
        raise UserError(f"MODEL.WEIGHTS {path}: no such file")
    elif path.endswith(".pkl"):
        content = read_pickle(path)
        if isinstance(content.get("model"), dict) and "checkpoint_sha256" in content:
            check_converted(config, content.get("arch"))
    elif path.endswith(".pth"):
        check_detector(path)
    else:
        raise UserError(
            f"MODEL.WEIGHTS {path}: must be a .pkl of convert-pretrain-to-detectron2.py or a detector's .pth"
        )


def check_converted(config, arch):
    """Raises UserError if the configuration is not for what our converter made of a network of that name."""
    path, nets = config.MODEL.WEIGHTS, config.MODEL.RESNETS
    names = ("DEPTH", "NUM_GROUPS", "WIDTH_PER_GROUP")
    if NETWORKS.get(arch) != tuple(nets[name] for name in names):
        given = ", ".join(f"{name} {nets[name]}" for name in names)
        wanted = ", ".join(f"{name} {value}" for name, value in zip(names, NETWORKS.get(arch, ())))
        raise UserError(f"MODEL.WEIGHTS {path}: is a {arch} ({wanted or 'unknown'}); the configuration's is {given}")
    if config.INPUT.FORMAT != "RGB" or nets.STRIDE_IN_1X1:
        raise UserError(f"MODEL.WEIGHTS {path}: is converted and needs INPUT.FORMAT RGB; take a _synco configuration")


def check_detector(path):
    """Raises UserError unless the file is a detector that a training of detectron2 saved."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, *checkpoint.DAMAGED) as error:
        raise UserError(f"MODEL.WEIGHTS {path}: not a file of tensors and plain values, or not a whole one") from error
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not any(str(name).startswith("backbone.") for name in model):
        raise UserError(f"MODEL.WEIGHTS {path}: is no detector; convert it with convert-pretrain-to-detectron2.py")


class ArrayUnpickler(pickle.Unpickler):
    """Reads NumPy's arrays and plain containers; whatever else a pickle names is not looked up, so nothing executes."""

    KNOWN = {
        (f"numpy.{core}.{module}", name)
        for core in ("core", "_core")
        for module, name in (("multiarray", "_reconstruct"), ("numeric", "_frombuffer"))
    } | {("numpy", "ndarray"), ("numpy", "dtype"), ("collections", "OrderedDict"), ("_codecs", "encode")}

    def find_class(self, module, name):
        if (module, name) not in self.KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which would have to be executed")
        return super().find_class(module, name)


def read_pickle(path):
    """A pickle of arrays in a dict, as detectron2 reads it but safely. Raises UserError if it is anything else."""
    try:
        with open(path, "rb") as file:
            content = ArrayUnpickler(file, encoding="latin1").load()
    except pickle.UnpicklingError as error:
        raise UserError(f"MODEL.WEIGHTS {path}: not a pickle of arrays: {error}") from error
    except (MemoryError, *checkpoint.DAMAGED) as error:
        raise UserError(f"MODEL.WEIGHTS {path}: not a whole pickle of arrays") from error
    if not isinstance(content, dict):
        raise UserError(f"MODEL.WEIGHTS {path}: holds a {type(content).__name__}, not weights")
    return content


def places(known):
    """The files and folders that a data set, given by detectron2's metadata, is read from."""
    if known.evaluator_type == "coco":
        return [known.json_file, known.image_root]
    inside = (os.path.join("ImageSets", "Main", f"{known.split}.txt"), "Annotations", "JPEGImages")
    return [known.dirname, *(os.path.join(known.dirname, name) for name in inside)]


def products(folder):
    """The files that a training left in a folder."""
    return [name for name in ("last_checkpoint", "metrics.json") if os.path.exists(os.path.join(folder, name))]


def changed(config):
    """What differs between the run in OUTPUT_DIR and today's configuration: ["SOLVER.BASE_LR 0.01 → 0.02", ...].

    Raises UserError if the run's config.yaml cannot be read.
    """
    import yaml

    path = os.path.join(config.OUTPUT_DIR, "config.yaml")
    if not os.path.exists(path):
        return []
    try:
        with open(path, encoding="utf-8") as file:
            before = yaml.safe_load(file)
        pairs = [(key, value_of(before, key), value_of(config, key)) for key in KEPT]
    except (OSError, LookupError, TypeError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as a run's configuration; give another OUTPUT_DIR") from error
    changes = [f"{key} {old} → {new}" for key, old, new in pairs if old != new]
    recorded = recorded_weights(config)
    if not changes and recorded and recorded != checkpoint.sha256(config.MODEL.WEIGHTS):
        changes = [f"MODEL.WEIGHTS {config.MODEL.WEIGHTS} has other content than at its start"]
    return changes


def value_of(config, key):
    """A configuration's value, {"A": {"B": value}} under the key A.B; tuples as lists, which is how YAML has them."""
    for part in key.split("."):
        config = config[part]
    return list(config) if isinstance(config, tuple) else config


def record_weights(config):
    """Write the SHA-256 of a local MODEL.WEIGHTS to OUTPUT_DIR, as sha256sum does."""
    path = config.MODEL.WEIGHTS
    if os.path.isfile(path):
        with open(os.path.join(config.OUTPUT_DIR, "weights.sha256"), "w", encoding="utf-8") as file:
            file.write(f"{checkpoint.sha256(path)}  {path}\n")


def recorded_weights(config):
    """The SHA-256 that `record_weights` wrote, or None where there is none or the weights are no local file."""
    path = os.path.join(config.OUTPUT_DIR, "weights.sha256")
    if not os.path.isfile(path) or not os.path.isfile(config.MODEL.WEIGHTS):
        return None
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read(64)


def is_finished(config, args):
    """Whether the run in OUTPUT_DIR has its evaluation after the last iteration, so that --resume has nothing to do."""
    from detectron2.engine import DefaultTrainer

    path = os.path.join(config.OUTPUT_DIR, "metrics.json")
    if args.eval_only or not os.path.isfile(path):
        return False
    solver = DefaultTrainer.auto_scale_workers(config, args.num_gpus * args.num_machines).SOLVER
    return last_evaluation(path) >= solver.MAX_ITER - 1  # which of the two it is depends on detectron2's version


def last_evaluation(path):
    """The iteration of the last evaluation in a metrics.json, -1 if there is none."""
    last = -1
    with open(path, encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:  # cut off when the run was killed
                continue
            if isinstance(line, dict) and "bbox/AP" in line and isinstance(line.get("iteration"), int):
                last = line["iteration"]
    return last


def work(args):
    """Train and evaluate, or evaluate alone, in one of the processes → the results."""
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.engine import default_setup
    from detectron2.evaluation import verify_results
    from detectron2.utils import comm

    register_extra_norm()
    config = configuration(args)
    default_setup(config, args)
    Trainer = make_trainer()
    if not args.eval_only:
        trainer = Trainer(config)
        trainer.resume_or_load(resume=args.resume)
        return trainer.train()
    model = Trainer.build_model(config)
    training = os.path.dirname(config.OUTPUT_DIR)  # whose last checkpoint --resume means
    DetectionCheckpointer(model, save_dir=training).resume_or_load(config.MODEL.WEIGHTS, resume=args.resume)
    results = Trainer.test(config, model)
    if comm.is_main_process():
        verify_results(config, results)
    return results


def register_extra_norm():
    """Make MODEL.ROI_HEADS.NAME Res5ROIHeadsExtraNorm known: C4's head with a BatchNorm after res5.

    The features of an unsupervised pretraining are distributed otherwise than those of a supervised one, whose settings
    are used here; BatchNorm that is trained makes up for it (MoCo v1, sec. 4.2).
    """
    from detectron2.layers import get_norm
    from detectron2.modeling import ROI_HEADS_REGISTRY
    from detectron2.modeling.roi_heads import Res5ROIHeads

    class Res5ROIHeadsExtraNorm(Res5ROIHeads):
        @classmethod
        def _build_res5_block(cls, cfg):
            blocks, channels = super()._build_res5_block(cfg)
            blocks.add_module("norm", get_norm(cfg.MODEL.RESNETS.NORM, channels))
            return blocks, channels

    if Res5ROIHeadsExtraNorm.__name__ not in ROI_HEADS_REGISTRY:
        ROI_HEADS_REGISTRY.register(Res5ROIHeadsExtraNorm)


def make_trainer():
    """detectron2's trainer, with the evaluator that the data set is published with."""
    from detectron2.data import MetadataCatalog
    from detectron2.engine import DefaultTrainer
    from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator

    class Trainer(DefaultTrainer):
        @classmethod
        def build_evaluator(cls, cfg, dataset_name, output_folder=None):
            if MetadataCatalog.get(dataset_name).evaluator_type == "pascal_voc":
                return PascalVOCDetectionEvaluator(dataset_name)
            return COCOEvaluator(dataset_name, output_dir=output_folder or os.path.join(cfg.OUTPUT_DIR, "inference"))

    return Trainer


if __name__ == "__main__":
    distributed.command(run, parse)

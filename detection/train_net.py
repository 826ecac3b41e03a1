#!/usr/bin/env python3
"""Fine-tune and evaluate a detector, R50-C4 with one more BatchNorm after res5, on VOC or COCO with detectron2.

  python train_net.py --config-file configs/pascal_voc_R_50_C4_24k_synco.yaml --data-dir DATA --num-gpus 8 \\
    MODEL.WEIGHTS ./output.pkl OUTPUT_DIR runs/voc/trial1
  python train_net.py --config-file configs/pascal_voc_R_50_C4_24k_synco.yaml --data-dir DATA --num-gpus 8 \\
    --eval-only MODEL.WEIGHTS runs/voc/trial1/model_final.pth OUTPUT_DIR runs/voc/trial1

DATA holds VOC2007 and VOC2012, or coco (README.md beside this file). KEY VALUE pairs change the configuration, here
MODEL.WEIGHTS, the file of convert-pretrain-to-detectron2.py, and OUTPUT_DIR; --eval-only writes to OUTPUT_DIR/eval.
"""

import importlib.util
import logging
import math
import operator
import os
import pathlib
import pickle
import sys

# the package lies one folder up: works from any folder, without an installation
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

from synco import checkpoint, files, options
from synco.errors import UserError
from synco.launch import command

CONVERT = "convert-pretrain-to-detectron2.py makes it of a pretraining's checkpoint"

# what makes a run another one, so that --resume must not change it
KEPT = (
    "MODEL.WEIGHTS", "DATASETS.TRAIN", "DATASETS.TEST", "SOLVER.BASE_LR", "SOLVER.STEPS", "SOLVER.MAX_ITER",
    "SOLVER.IMS_PER_BATCH", "SOLVER.REFERENCE_WORLD_SIZE",
)  # fmt: skip


def parse():
    # not detectron2's own parser: it takes no flag after the first KEY VALUE pair
    parser = options.Parser(__doc__)
    flag = parser.add_argument
    flag("--config-file", required=True, metavar="FILE", help="configuration, such as those in configs/")
    flag("--data-dir", metavar="DATA", help="folder of VOC2007, VOC2012, coco (unset: $DETECTRON2_DATASETS, datasets)")
    flag("--resume", action="store_true", help="go on from the last checkpoint in OUTPUT_DIR if there is one")
    flag("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS, or with --resume the last checkpoint")
    flag("--num-gpus", default=1, type=int, help="GPUs per machine; with MODEL.DEVICE cpu: 1")
    flag("--num-machines", default=1, type=int, help="machines")
    flag("--machine-rank", default=0, type=int, help="this machine's number, from 0")
    flag("--dist-url", default="auto", metavar="URL", help="where machines meet, tcp://HOST:PORT; auto: one machine")
    flag("opts", nargs="*", metavar="KEY VALUE", help="changes of the configuration")
    return parser.parse_intermixed_args()


def run(args):
    """See to it that all is there, then start the processes."""
    if importlib.util.find_spec("detectron2") is None:
        raise UserError("detectron2 is not installed; README.md beside this program has the line of pip install")
    if args.data_dir is not None:  # detectron2 reads it when its data sets are imported, here and in the processes
        os.environ["DETECTRON2_DATASETS"] = args.data_dir
    from detectron2.engine import launch

    config = configuration(args.config_file, args.opts)
    if config.MODEL.DEVICE.startswith("cuda") and args.num_gpus > (gpus := torch.cuda.device_count()):
        raise UserError(f"--num-gpus {args.num_gpus}: GPUs of this machine: {gpus}; MODEL.DEVICE cpu uses none")
    check_data(config.DATASETS.TEST if args.eval_only else config.DATASETS.TRAIN + config.DATASETS.TEST)
    if not args.eval_only:
        check_output(config, args.resume)
    check_weights(configuration(args.config_file, [*args.opts, "MODEL.DEVICE", "cpu"]))
    files.make_folders(config.OUTPUT_DIR)
    launch(work, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, (args,))


def configuration(file, changes):
    """detectron2's configuration: its defaults, a file, and [KEY, VALUE, ...] as in the command. Raises UserError."""
    from detectron2.config import get_cfg

    config = get_cfg()
    try:
        config.merge_from_file(file)
        config.merge_from_list(changes)
    except (AssertionError, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise UserError(f"{' '.join([file, *changes])}: {' '.join(str(error).split())}") from error
    return config


def check_data(names):
    """Raises UserError if a file or folder is missing that one of these data sets is read from."""
    from detectron2.data import MetadataCatalog

    for name in names:
        known = MetadataCatalog.get(name)
        voc = known.get("dirname") and os.path.join(known.dirname, "ImageSets", "Main", f"{known.split}.txt")
        for place in (voc, known.get("json_file"), known.get("image_root")):
            if place and not os.path.exists(place):
                raise UserError(f"{place}: not there, and {name} needs it; --data-dir is the folder of VOC2007 or coco")


def check_output(config, resume):
    """Raises UserError if OUTPUT_DIR holds checkpoints or evaluations of a run that is another, or not to go on."""
    folder = pathlib.Path(config.OUTPUT_DIR)
    held, metrics, settings = sorted(folder.glob("*.pth")), folder / "metrics.json", folder / "config.yaml"
    if metrics.is_file() and '"bbox/AP"' in metrics.read_text(errors="replace"):
        held.append(metrics)
    if held and not resume:
        raise UserError(f"OUTPUT_DIR {folder} holds another run ({held[0].name}): --resume goes on with it")
    if held and settings.exists():
        pairs = zip(KEPT, *map(operator.attrgetter(*KEPT), (configuration(str(settings), []), config)))
        if changes := "; ".join(f"{key} {old} → {new}" for key, old, new in pairs if old != new):
            raise UserError(f"--resume: the run in OUTPUT_DIR {folder} is another: {changes}; give another OUTPUT_DIR")


def check_weights(config):
    """Fetch MODEL.WEIGHTS, and raise UserError unless they give the whole backbone, and for the images it gets.

    detectron2 itself trains on, with random weights, where names or shapes do not fit. To see what it leaves out, the
    backbone is filled with NaN before it loads the file.
    """
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.modeling import build_model
    from detectron2.utils.file_io import PathManager

    path, nets = config.MODEL.WEIGHTS, config.MODEL.RESNETS
    given = f"MODEL.WEIGHTS {path}"
    if "://" not in path and not os.path.isfile(path):
        raise UserError(f"{given}: no such file; {CONVERT}")
    register_extra_norm()
    model = build_model(config)
    for parameter in model.backbone.parameters():
        torch.nn.init.constant_(parameter, math.nan)
    logging.disable()  # what detectron2 says of the file it says again in the processes
    try:
        facts = DetectionCheckpointer(model).load(PathManager.get_local_path(path))
    except (pickle.UnpicklingError, *checkpoint.DAMAGED) as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UserError(f"{given}: cannot be loaded ({reason})" + f"; {CONVERT}" * ("://" not in path)) from error
    finally:
        logging.disable(logging.NOTSET)
    if missing := [name for name, parameter in model.backbone.named_parameters() if parameter.isnan().any()]:
        raise UserError(f"{given}: lacks {missing[0]} in the shape that MODEL.RESNETS asks for; {CONVERT}")
    wrong = config.INPUT.FORMAT != "RGB" or nets.STRIDE_IN_1X1 or str(nets.DEPTH) not in str(facts.get("arch"))
    if (
        wrong and "checkpoint_sha256" in facts
    ):  # the converter's; of a deeper network a shallower one finds all it wants
        raise UserError(f"{given}: is a converted {facts['arch']}: take a _synco configuration and that DEPTH")


def work(args):
    """Train and evaluate, or evaluate alone, in one of the processes → the results."""
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.data import MetadataCatalog
    from detectron2.engine import DefaultTrainer, default_setup
    from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator

    class Trainer(DefaultTrainer):
        @classmethod
        def build_evaluator(cls, cfg, dataset_name, output_folder=None):
            if MetadataCatalog.get(dataset_name).evaluator_type == "pascal_voc":
                return PascalVOCDetectionEvaluator(dataset_name)
            return COCOEvaluator(dataset_name, output_dir=output_folder or os.path.join(cfg.OUTPUT_DIR, "inference"))

    register_extra_norm()
    config = configuration(args.config_file, args.opts)
    training = config.OUTPUT_DIR
    if args.eval_only:  # leaves the training's config.yaml as it is
        config.OUTPUT_DIR = os.path.join(training, "eval")
    config.freeze()
    default_setup(config, args)
    if args.eval_only:
        model = Trainer.build_model(config)
        DetectionCheckpointer(model, save_dir=training).resume_or_load(config.MODEL.WEIGHTS, resume=args.resume)
        return Trainer.test(config, model)
    trainer = Trainer(config)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def register_extra_norm():
    """Make MODEL.ROI_HEADS.NAME Res5ROIHeadsExtraNorm known: C4's head with a BatchNorm after res5.

    The features of an unsupervised pretraining are distributed otherwise than those of a supervised one, whose settings
    are used here; BatchNorm that is trained makes up for it (MoCo v1, sec. 4.2).
    """
    from detectron2.layers import get_norm
    from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads

    class Res5ROIHeadsExtraNorm(Res5ROIHeads):
        @classmethod
        def _build_res5_block(cls, cfg):
            blocks, channels = super()._build_res5_block(cfg)
            blocks.add_module("norm", get_norm(cfg.MODEL.RESNETS.NORM, channels))
            return blocks, channels

    if Res5ROIHeadsExtraNorm.__name__ not in ROI_HEADS_REGISTRY:
        ROI_HEADS_REGISTRY.register(Res5ROIHeadsExtraNorm)


if __name__ == "__main__":
    command(run, parse)

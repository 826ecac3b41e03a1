#!/usr/bin/env python3
"""Fine-tune and evaluate a detector, R50-C4 with one more BatchNorm after res5, on VOC or COCO with detectron2.

  python train_net.py --config-file configs/pascal_voc_R_50_C4_24k_synco.yaml --data-dir DATA --num-gpus 8 \\
    MODEL.WEIGHTS ./output.pkl OUTPUT_DIR runs/voc/trial1
  python train_net.py --config-file configs/pascal_voc_R_50_C4_24k_synco.yaml --data-dir DATA --num-gpus 8 \\
    --eval-only MODEL.WEIGHTS runs/voc/trial1/model_final.pth OUTPUT_DIR runs/voc/eval

DATA holds VOC2007 and VOC2012, or coco (README.md beside this file). KEY VALUE pairs at the end change the
configuration; those of a plain run are MODEL.WEIGHTS, the file of convert-pretrain-to-detectron2.py, and OUTPUT_DIR.
"""

import importlib.util
import os
import sys

# the package lies one folder up: works from any folder, without an installation
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

from synco import checkpoint, distributed, options
from synco.options import UserError, number

INSTALL = "python -m pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'"


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
    flag("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS and train nothing")
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
    check(configuration(args), args)
    from detectron2.engine import launch

    launch(work, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, (args,))


def configuration(args):
    """detectron2's configuration: its defaults, the file, the changes on the command line. Raises UserError."""
    import yaml  # which comes with detectron2
    from detectron2.config import get_cfg

    config = get_cfg()
    try:
        config.merge_from_file(args.config_file)
        config.merge_from_list(args.opts)
    except (AssertionError, AttributeError, KeyError, OSError, TypeError, ValueError, yaml.YAMLError) as error:
        given = " ".join(["--config-file", args.config_file, *args.opts])
        raise UserError(f"{given}: {' '.join(str(error).split()) or type(error).__name__}") from error
    config.freeze()
    return config


def check(config, args):
    """Raises UserError if weights, data or GPUs are missing, or if OUTPUT_DIR holds another run."""
    from detectron2.data import MetadataCatalog

    weights = config.MODEL.WEIGHTS
    if not weights:
        raise UserError(f"{args.config_file}: needs MODEL.WEIGHTS PATH, what convert-pretrain-to-detectron2.py wrote")
    if "://" not in weights and not os.path.isfile(weights):
        raise UserError(f"MODEL.WEIGHTS {weights}: no such file")

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
        place = known.get("dirname") or known.get("json_file")  # VOC's folder, COCO's annotations
        if not os.path.exists(place):
            raise UserError(f"{place}: not there, and {name} needs it; --data-dir names the folder of VOC2007 or coco")

    output = config.OUTPUT_DIR
    held = [name for name in ("last_checkpoint", "metrics.json") if os.path.exists(os.path.join(output, name))]
    if held and not (args.resume or args.eval_only):
        raise UserError(
            f"OUTPUT_DIR {output} holds another run ({held[0]}): --resume goes on with it, another leaves it alone"
        )
    checkpoint.make_folders(output)


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
    DetectionCheckpointer(model, save_dir=config.OUTPUT_DIR).resume_or_load(config.MODEL.WEIGHTS, resume=args.resume)
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

"""Weighted k-nearest-neighbour accuracy of backbone features: a probe that needs no training.

  python -m synco.knn CHECKPOINT DATA

CHECKPOINT: of SynCo, MoCo, a classifier or torchvision's own weights, or 'random' for untrained ones. DATA holds
train/CLASS/IMAGE, which vote, and val/CLASS/IMAGE, which are classified. Several processes: torchrun -m synco.knn ...
"""

import torch
import torch.nn.functional as F

from synco import checkpoint, distributed, export, loader, options
from synco.builder import features, fitting, head_name, torchvision_network, try_images
from synco.options import number


@torch.no_grad()
def extract(network, head, loader, device):
    """Unit features and labels of the loader's images: (M, D), (M,), on `device`. The network is put in eval mode."""
    was_training = network.training
    network.eval()
    rows, labels = [], []
    for images, label in loader:
        out = features(network, head, images.to(device, non_blocking=True))
        rows.append(F.normalize(out.float(), dim=1))
        labels.append(label.to(device, non_blocking=True))
    if not rows:  # more processes than images: one image's shape, no rows
        image = loader.dataset.dataset[0][0]
        rows.append(features(network, head, image[None].to(device))[:0].float())
        labels.append(torch.empty(0, dtype=torch.long, device=device))
    network.train(was_training)
    return torch.cat(rows), torch.cat(labels)


def predict(bank, bank_labels, queries, *, classes, k=200, t=0.1):
    """Weighted kNN (Wu et al., arXiv 1805.01978, sec. 3.4): neighbours vote with exp(cosine / t).

    bank (M, D), queries (Q, D): unit rows; bank_labels (M,); k is the bank's size if that is smaller.
    Returns (Q,) the class with the most votes.
    """
    k = min(k, len(bank))
    classes_of = []
    for part in queries.split(256):  # bounds the (Q, M) similarities
        similarity, neighbours = (part @ bank.T).topk(k, dim=1)  # (q, k)
        votes = torch.zeros(len(part), classes, device=bank.device)
        # of one query all votes are divided by its largest: a small t would otherwise overflow
        votes.scatter_add_(1, bank_labels[neighbours], ((similarity - similarity[:, :1]) / t).exp())
        classes_of.append(votes.argmax(dim=1))
    return torch.cat(classes_of) if classes_of else bank_labels.new_empty(0)


def accuracy(network, head, bank_loader, query_loader, device, *, classes, k=200, t=0.1):
    """Top-1 accuracy in percent of the queries' classes, voted by the bank; the work is spread over the processes.

    The loaders are `loader.eval_loader`s. Every process evaluates with rank 0's buffers and gets the same number.
    """
    distributed.share_buffers(network)
    bank, bank_labels = gather_uneven(*extract(network, head, bank_loader, device))
    queries, labels = extract(network, head, query_loader, device)
    hits = (predict(bank, bank_labels, queries, classes=classes, k=k, t=t) == labels).sum()
    hits, count = distributed.total(torch.stack([hits, torch.tensor(len(labels), device=device)])).tolist()
    return 100 * hits / count


def gather_uneven(rows, labels):
    """Rows (M, D) and labels (M,) of all processes, whose M may differ → (sum M, D), (sum M,)."""
    if distributed.world_size() == 1:
        return rows, labels
    sizes = distributed.gather(torch.tensor([len(rows)], device=rows.device)).tolist()
    most = max(sizes)
    pad = most - len(rows)
    rows = distributed.gather(F.pad(rows, (0, 0, 0, pad))).split(most)
    labels = distributed.gather(F.pad(labels, (0, pad))).split(most)
    return (
        torch.cat([part[:size] for part, size in zip(rows, sizes)]),
        torch.cat([part[:size] for part, size in zip(labels, sizes)]),
    )


def parse():
    """The command line of `python -m synco.knn`."""
    parser = options.Parser(__doc__)
    flag = parser.add_argument
    flag("checkpoint", metavar="CHECKPOINT", help="what to evaluate, or 'random'")
    options.add_data(parser)
    options.add_distributed(parser)
    flag("-k", default=200, type=number(int, 1), help="neighbours that vote; at most all")
    flag("-t", default=0.1, type=number(float, above=0), help="temperature of the votes")
    flag("-b", "--batch-size", default=256, type=number(int, 1), help="per node, shared by its processes")
    flag("--seed", default=0, type=number(int, 0, 2**32 - 1), help="of random weights")
    # what the checkpoint was trained with
    parser.set_defaults(arch=None, img_size=None)
    return parser.parse_args()


def run(process, args):
    """Load the backbone, evaluate it, say what it reaches."""
    train, val = loader.image_folder(args.data, "train"), loader.image_folder(args.data, "val")
    loader.same_classes(train, val, args.data)
    if args.checkpoint == "random":
        arch, size = args.arch or "resnet50", args.img_size or 224
        torch.manual_seed(args.seed)
        with fitting(arch, size):
            network = torchvision_network(arch, size)(num_classes=1000)
            head = head_name(network, 1000)
        source = f"random weights, seed {args.seed}"
    else:
        network, head, saved = export.load(args.checkpoint, args.arch)
        arch, size = saved["arch"], args.img_size or saved["config"].get("img_size", 224)
        source = checkpoint.summary(saved, args.checkpoint, len(export.backbone(network, head)))
    network.to(process.device)
    try_images(network, arch, size)
    distributed.say(f"{source}; {arch} at {size} pixels")

    batch = loader.batch_each(args.batch_size, process.local_size)
    workers = loader.workers_each(args.workers, process.local_size)
    train.transform = val.transform = loader.center_view(size)
    parts = [loader.eval_loader(part, batch, process=process, workers=workers) for part in (train, val)]
    top1 = accuracy(network, head, *parts, process.device, classes=len(train.classes), k=args.k, t=args.t)
    distributed.say(f"kNN (k = {min(args.k, len(train))}, {len(train)} images vote) on {len(val)} images: {top1:.2f} %")


if __name__ == "__main__":
    distributed.launch(run, parse)

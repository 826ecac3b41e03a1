"""The page of pictures: what is on it against NumPy, and that it needs nothing else."""

import html.parser
import re
import shutil

import numpy as np
import pytest
import torch
import torchvision
from conftest import ARCH, know_images, make_images
from PIL import Image, ImageOps

from synco import augment, datasets, features, look

FLAGS = "--img-size 32 -j 0 -b 16".split()


class Page(html.parser.HTMLParser):
    """The page's sections: {title: text}, the images' sources, names and marks in order, and all tags."""

    def __init__(self, path):
        super().__init__()
        self.sections, self.images, self.tags, self.title = {}, [], [], ""
        self.mark = self.heading = None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.heading = tag == "h2"
        if tag == "figure":
            self.mark = attrs.get("class")
        if tag == "img":
            self.images.append((self.title, attrs["alt"], self.mark, attrs["src"]))

    def handle_data(self, text):
        if self.heading:
            self.title, self.heading = text, False
        self.sections[self.title] = self.sections.get(self.title, "") + text

    def of(self, title):
        """[(name, mark)] of the images in a section."""
        return [(name, mark) for section, name, mark, _ in self.images if section.startswith(title)]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    make_images(folder / "train", classes=3, images=12)
    make_images(folder / "val", classes=3, images=4, seed=1)
    image = Image.open(folder / "train" / "c2" / "5.jpg")
    image.save(folder / "val" / "c0" / "copy.jpg", quality=60)
    return folder


@pytest.fixture(scope="module")
def network(many):
    """A network whose BatchNorm knows these images."""
    torch.manual_seed(7)
    net = torchvision.models.get_model(ARCH, num_classes=16)
    images = datasets.image_folder(many, "train").with_transform(augment.center_view(32))
    return know_images(net, torch.stack([x for x, _ in images]))


@pytest.fixture(scope="module")
def pretrained(many, network, tmp_path_factory):
    """A pretraining's checkpoint that knows the images of its 20 rows; the last two are of none."""
    images = datasets.image_folder(many, "train")
    index = torch.cat([torch.arange(0, 36, 2), torch.tensor([-1, -1])])
    torch.manual_seed(1)
    queue = torch.nn.functional.normalize(torch.randn(20, 16), dim=1)
    state = {f"module.encoder_q.{name}": w for name, w in network.state_dict().items()} | {"module.queue": queue}
    config = {"img_size": 32, "n_hard": 5, "train_images": 36, "train_images_crc32": images.checksum()}
    path = tmp_path_factory.mktemp("pretrained") / "checkpoint.pth.tar"
    torch.save({"epoch": 5, "arch": ARCH, "state_dict": state, "config": config, "queue_index": index}, path)
    return str(path)


def rows_of(network, images):
    """Unit features and outputs, in float64, by torchvision's network."""
    views = torch.stack([augment.center_view(32)(images.image(i)) for i in range(len(images))])
    body = torch.nn.Sequential(*list(network.children())[:-1])
    with torch.no_grad():
        both = [body(views).mean(dim=(2, 3)).double().numpy(), network(views).double().numpy()]
    return [x / np.linalg.norm(x, axis=1, keepdims=True) for x in both]


def test_the_page(programs, pretrained, network, many, tmp_path):
    words = [pretrained, many, *FLAGS, "--cache-images", "-n", 5, "-o", tmp_path / "page.html"]
    status, out, err = programs("synco.look", *words)
    assert (status, err) == (0, "") and "written: " in out and "cached images " in out
    found = Page(tmp_path / "page.html")
    train, val = (datasets.image_folder(many, split) for split in ("train", "val"))
    (bank, _), (rows, _) = rows_of(network, train), rows_of(network, val)
    similarity = rows @ bank.T
    nearest = np.argsort(-similarity, axis=1)
    right = []
    for q in range(13):
        votes = np.bincount(train.targets[nearest[q, :20]], np.exp(similarity[q, nearest[q, :20]] / 0.07), minlength=3)
        right.append(votes.argmax() == val.targets[q])

    expected = []
    for q in (0, 2, 5, 7, 10):  # evenly spread
        expected.append((val.names[q], "good" if right[q] else "bad"))
        same = train.targets[nearest[q, :8]] == val.targets[q]
        expected += [(train.names[n], "good" if s else "bad") for n, s in zip(nearest[q, :8], same)]
    assert found.of("Nearest training images") == expected
    assert f"kNN (k = 20, t = 0.07): {100 * np.mean(right):.2f} %" in found.sections[""]
    lonely = np.argsort(similarity.max(axis=1))[:5]
    assert [name for name, _ in found.of("Most alone")][::2] == [val.names[q] for q in lonely]
    assert [name for name, _ in found.of("Near-duplicates between train and val: 1")] == ["c0/copy.jpg", "c2/5.jpg"]
    shown = found.of("Most confused classes")[::2]
    assert shown and all(not right[list(val.names).index(name)] for name, _ in shown)

    # one file that asks for nothing
    assert all(source.startswith("data:image/jpeg;base64,") for *_, source in found.images)
    assert not {"script", "link", "iframe"} & set(found.tags) and "http" not in (tmp_path / "page.html").read_text()


def test_hardest_negatives(programs, pretrained, network, many, tmp_path):
    status, _, err = programs("synco.look", pretrained, many, *FLAGS, "-o", tmp_path / "page.html", "-n", 3)
    assert status == 0, err
    found, images = Page(tmp_path / "page.html"), datasets.image_folder(many, "train")
    saved = torch.load(pretrained, weights_only=True)
    similarity = rows_of(network, images)[1] @ saved["state_dict"]["module.queue"].double().numpy().T
    index = saved["queue_index"].numpy()
    similarity[(index == np.arange(36)[:, None]) | (index < 0)] = -np.inf
    hardest = index[np.argsort(-similarity, axis=1)[:, :5]]
    expected = []
    for q in (0, 12, 24):
        expected.append((images.names[q], None))
        other = images.targets[hardest[q]] != images.targets[q]
        expected += [(images.names[n], "good" if o else "bad") for n, o in zip(hardest[q], other)]
    assert found.of("Hardest negatives in the queue") == expected
    same = 100 * (images.targets[hardest] == images.targets[:, None]).mean()
    assert f"So are {same:.1f} % of the 5 hardest rows" in found.sections["Hardest negatives in the queue"]

    status, out, _ = programs("synco.look", pretrained, many, *FLAGS, "-o", tmp_path / "p.html", "--limit-images", 20)
    assert status == 0 and "queue              left out: the pretraining's images are others" in out
    assert not Page(tmp_path / "p.html").of("Hardest")


def test_near_duplicates_are_alike_in_their_pixels_mirrored_or_not():
    def picture(seed):
        coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        return Image.fromarray(coarse).resize((60, 40), Image.BICUBIC)

    train = [picture(i) for i in range(6)]
    darker = Image.fromarray((np.asarray(train[4]) * 0.7).astype(np.uint8)).resize((90, 60))
    val = [ImageOps.mirror(train[3]), picture(8), darker, ImageOps.flip(train[1]), Image.new("RGB", (9, 9), "white")]
    bank, queries = (
        datasets.Images("root", ["c"], list(map(str, range(len(x)))), [0] * len(x), x.__getitem__) for x in (train, val)
    )
    nearest = np.array([[0, 3, 5], [1, 2, 3], [4, 1, 2], [1, 2, 3], [0, 1, 2]])
    found = look.near_duplicates(look.Found(queries, bank, np.ones((5, 3)), nearest))
    assert {(q, n) for q, n, _ in found} == {(0, 3), (2, 4)} and all(alike > 0.98 for *_, alike in found)


def test_a_head_of_two_layers(network):
    torch.manual_seed(2)
    head = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4))
    state = {f"module.encoder_q.fc.{name}": w for name, w in head.state_dict().items()}
    settings = dict(arch=ARCH, stem="imagenet", img_size=32, stats="imagenet", source="", saved={"state_dict": state})
    model = features.Backbone(network, "fc", **settings)
    rows = torch.randn(5, 6)
    expected = torch.nn.functional.normalize(head(rows), dim=1)
    torch.testing.assert_close(look.project(model, rows, "x.tar"), expected)


def test_without_labels(programs, pretrained, many, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "labels_of", lambda images: None)
    status, _, err = programs("synco.look", pretrained, many, *FLAGS, "-o", tmp_path / "page.html", "-n", 3)
    found = Page(tmp_path / "page.html")
    assert status == 0 and not found.of("Most confused"), err
    assert {mark for *_, mark, _ in found.images} == {None} and len(found.of("Nearest")) == 27
    assert found.of("Near-duplicates between train and val: 1") and len(found.of("Hardest")) == 18
    assert "c0" not in "".join(found.sections.values())


def test_without_val(programs, pretrained, many, tmp_path):
    shutil.copytree(many / "train", tmp_path / "d" / "train")
    shutil.copy(many / "train" / "c2" / "5.jpg", tmp_path / "d" / "train" / "c2" / "again.jpg")
    status, out, _ = programs("synco.look", pretrained, tmp_path / "d", *FLAGS, "-o", tmp_path / "page.html")
    assert status == 0 and "training images are compared among themselves" in out
    found = Page(tmp_path / "page.html")
    assert {name for name, _ in found.of("Near-duplicates among the training images: 2")} == {
        "c2/5.jpg",
        "c2/again.jpg",
    }


def test_a_folder_without_classes(programs, pretrained, many, tmp_path):
    shutil.copytree(many / "train" / "c1", tmp_path / "train")
    for data in (tmp_path, tmp_path / "train"):  # DATA/train, and DATA itself
        status, _, err = programs("synco.look", pretrained, data, *FLAGS, "-o", tmp_path / "page.html", "-n", 2)
        found = Page(tmp_path / "page.html")
        assert status == 0 and len(found.of("Nearest")) == 18 and not found.of("Most confused"), err


def test_a_page_that_would_be_too_large(programs, pretrained, many, tmp_path, monkeypatch):
    flags = [pretrained, many, *FLAGS, "-n", 12, "-o", tmp_path / "page.html"]
    monkeypatch.setattr(look, "LARGEST_PAGE", 120_000)
    status, out, _ = programs("synco.look", *flags)
    assert status == 0 and (tmp_path / "page.html").stat().st_size <= 120_000
    count = int(re.search(r"of (\d+) images in each part in place of 12, to stay below 50 MB", out)[1])
    assert count < 12 and len(Page(tmp_path / "page.html").of("Nearest")) == 9 * count


def test_names_are_text(tmp_path):
    images = datasets.Images("root", ["<b>&"], ["<b>&/'x\udcff.jpg"], [0], lambda i: Image.new("RGB", (200, 50)))
    one = np.zeros((1, 1), dtype=int)
    found = look.Found(images, images, one * 0.5, one, wanted=one[0], labels=one[0], predicted=one[0])
    page = look.page("a <title>", found, None, 1, False).decode()
    assert "<b>&" not in page and "&lt;b&gt;&amp;/&#x27;x?.jpg" in page and "a &lt;title&gt;" in page


@pytest.mark.parametrize(
    "words, message",
    [
        ("CHECKPOINT DATA", "the following arguments are required: -o"),
        ("CHECKPOINT DATA -o page.pdf", "-o page.pdf: must end in .html"),
        ("CHECKPOINT DATA -o nowhere/page.html", "-o nowhere/page.html: there is no folder nowhere"),
        ("CHECKPOINT DATA -o page.html -n 0", "'0' is not a whole number >= 1"),
        ("CHECKPOINT DATA -o page.html --features=", "--features '': must name a folder"),
        ("nowhere.tar DATA -o page.html", "nowhere.tar: no such checkpoint file"),
    ],
)
def test_bad_input(programs, pretrained, many, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = words.replace("CHECKPOINT", pretrained).replace("DATA", str(many)).split()
    status, out, err = programs("synco.look", *words, *FLAGS)
    assert status == 2 and err.count("\n") == 1 and message in err, err
    assert not (tmp_path / "page.html").exists()

"""The label splits: the draw against its definition, SimCLR's lists, files that are wrong, and the download."""

import functools
import hashlib
import http.server
import os
import random
import threading
import time

import pytest
from PIL import Image

from synco import datasets, subsets
from synco.errors import UserError

SIZES = {"ant": 200, "bee": 25, "cow": 14, "dog": 3, "eel": 1}


def make(folder, sizes):
    """Empty files in ImageNet's layout: the split looks at names alone."""
    for group, count in sizes.items():
        (folder / "train" / group).mkdir(parents=True)
        for i in range(count):
            (folder / "train" / group / f"{group}_{i}.JPEG").touch()
    return datasets.image_folder(folder, "train")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make(tmp_path_factory.mktemp("animals"), SIZES)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A small folder with ImageNet's names."""
    return make(tmp_path_factory.mktemp("imagenet"), {"n01440764": 4, "n04235860": 5})


@pytest.mark.parametrize("percent, counts", [(1, [2, 1, 1, 1, 1]), (10, [20, 2, 1, 1, 1])])
def test_the_draw_is_class_balanced(images, percent, counts):
    part, source = subsets.subset(images, percent, 7)
    assert source == "class-balanced draw, seed 7"
    assert [part.targets.count(label) for label in range(5)] == counts  # 2.5 is rounded to 2, 0.25 and 0.3 up to one
    assert len(set(part.names)) == sum(counts) and set(part.names) <= set(images.names)
    assert part.classes == images.classes and len(images) == 243  # the folder itself stays whole
    assert all(images.classes[label] == name.split("/")[0] for name, label in zip(part.names, part.targets))


def test_the_draw_is_that_of_its_definition(images):
    """Sorted by the SHA-256 of seed/percent/class/file, so that any machine and any version finds the same."""
    part, _ = subsets.subset(images, 10, 3)
    expected = []
    for group, count in SIZES.items():
        of_class = [f"{group}/{group}_{i}.JPEG" for i in range(count)]
        of_class.sort(key=lambda name: hashlib.sha256(f"3/10/{name}".encode()).hexdigest())
        expected += of_class[: max(1, round(count / 10))]
    assert part.names == sorted(expected)


def test_neither_place_nor_order_matter_but_seed_and_percent_do(images, tmp_path):
    elsewhere = make(tmp_path / "a b", SIZES)
    elsewhere = elsewhere.subset(random.Random(0).sample(range(243), 243))
    draws = {(s, p): subsets.subset(images, p, s)[0].names for s in (0, 1) for p in (1, 10)}
    for (seed, percent), drawn in draws.items():
        assert subsets.subset(elsewhere, percent, seed)[0].names == drawn
    assert draws[0, 10] != draws[1, 10] and draws[0, 1] != draws[1, 1]
    assert subsets.subset(images, 100, 0) == (images, "all training images")


def test_a_list_in_simclrs_format(photos, tmp_path):
    listed = tmp_path / "list.txt"
    listed.write_bytes(b"\xef\xbb\xbfn04235860_3.JPEG\r\n\r\nn01440764_2.JPEG\r\nn04235860_0.JPEG\r\n")
    part, source = subsets.subset(photos, 1, 0, str(listed))
    assert part.names == ["n01440764/n01440764_2.JPEG", "n04235860/n04235860_0.JPEG", "n04235860/n04235860_3.JPEG"]
    assert part.targets == [0, 1, 1] and source == str(listed)


def test_what_is_written_is_read_again(photos, images, tmp_path):
    for given, line in ((photos, "n01440764_0.JPEG\n"), (images, "ant/ant_102.JPEG\n")):
        part, _ = subsets.subset(given, 10, 4)
        path = str(tmp_path / line[:3])
        subsets.write_list(part, path)
        subsets.write_list(part, path)  # a run that goes on writes the same again
        with open(path) as file:
            lines = file.readlines()
        assert lines == sorted(lines) and len(lines) == len(part)
        assert all(("/" in text) == ("/" in line) for text in lines)
        assert subsets.subset(given, 100, 0, path)[0].names == part.names
        with pytest.raises(UserError, match="is there and holds something else"):
            subsets.write_list(subsets.subset(given, 10, 5)[0], path)
        with open(path) as file:
            assert file.readlines() == lines
    (tmp_path / "x.jpg").write_bytes(b"\xff\xd8")
    with pytest.raises(UserError, match="is there and holds something else"):
        subsets.write_list(part, str(tmp_path / "x.jpg"))
    with pytest.raises(UserError, match="cannot be written"):
        subsets.write_list(part, str(tmp_path / "none" / "x"))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"n01440764_2.JPEG\nn01440764_9.JPEG\nn04235860_77.JPEG\n", "2 of its 3 images are not in .*n01440764_9.JPEG"),
        (b"n01440764_2.JPEG\nn01530575_1.JPEG\ncow/1.jpg\n", "of other images: 2 of its classes .* cow, n01530575"),
        (b"n01440764_2.JPEG\nn01440764/n01440764_2.JPEG\n", "1 images are listed more than once, such as n01440764/"),
        (b"n01440764_2.JPEG\nwhat is this\n", "'what is this' is neither class/file nor a name like"),
        (b"\n\n", "names no image"),
        (b"GIF89a\x00", "it is no text file"),
        (None, r"cannot be read \(No such file"),
    ],
)
def test_wrong_lists(photos, tmp_path, content, message):
    path = tmp_path / "list.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        subsets.subset(photos, 1, 0, str(path))
    assert str(error.value).startswith(str(path))


def test_what_imagenet_is():
    classes = [f"n{i:08}" for i in range(1000)]
    assert subsets.is_imagenet(classes)
    assert not subsets.is_imagenet(classes[1:])
    assert not subsets.is_imagenet([*classes[1:], "tench"])


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server in place of GitHub, an empty cache, and a list of ours in place of SimCLR's → (folder, asked)."""
    (tmp_path / "web").mkdir()
    content = b"n01440764_1.JPEG\nn04235860_2.JPEG\n"
    (tmp_path / "web" / "1percent.txt").write_bytes(content)
    web = http.server.ThreadingHTTPServer(("localhost", 0), functools.partial(Handler, directory=tmp_path / "web"))
    threading.Thread(target=web.serve_forever, daemon=True).start()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(subsets, "URL", f"http://localhost:{web.server_port}/")
    monkeypatch.setattr(subsets, "LISTS", {1: ("1percent.txt", hashlib.sha256(content).hexdigest())})
    monkeypatch.setattr(subsets, "is_imagenet", lambda classes: True)
    yield tmp_path, web
    web.shutdown()
    web.server_close()


def test_the_published_list_is_downloaded_once_and_checked(photos, server):
    folder, web = server
    part, source = subsets.subset(photos, 1, 0)
    assert part.names == ["n01440764/n01440764_1.JPEG", "n04235860/n04235860_2.JPEG"]
    assert source == "SimCLR's 1percent.txt"
    cached = folder / "cache" / "synco" / "1percent.txt"
    assert os.listdir(cached.parent) == ["1percent.txt"]
    (folder / "web" / "1percent.txt").write_text("n01440764_0.JPEG\n")
    assert subsets.subset(photos, 1, 0)[0].names == part.names  # from the cache
    cached.write_text("n01440764_0.JPEG\n")
    with pytest.raises(UserError, match="1percent.txt: not SimCLR's list .*remove it"):
        subsets.subset(photos, 1, 0)
    cached.unlink()
    with pytest.raises(UserError, match="sent is not SimCLR's list .* put http.* at .*1percent.txt, or name it with"):
        subsets.subset(photos, 1, 0)
    assert not cached.exists()


def test_without_a_network_one_line_says_where_to_put_the_list(photos, server, monkeypatch):
    folder, web = server
    web.shutdown()
    web.server_close()
    with pytest.raises(UserError, match="cannot be downloaded .*refused.*: put http://.*1percent.txt at ") as error:
        subsets.subset(photos, 1, 0)
    assert "\n" not in str(error.value) and str(folder / "cache" / "synco" / "1percent.txt") in str(error.value)


def test_a_download_has_a_time_limit(photos, server, monkeypatch):
    monkeypatch.setattr(subsets, "SECONDS", 0.2)

    def slowly(self):
        self.send_response(200)
        self.end_headers()
        for _ in range(100):
            try:
                self.wfile.write(b"x")
                self.wfile.flush()
            except OSError:  # the other side has had enough
                return
            threading.Event().wait(0.05)

    monkeypatch.setattr(Handler, "do_GET", slowly)
    began = time.monotonic()
    with pytest.raises(UserError, match="not done after 0.2 s"):
        subsets.subset(photos, 1, 0)
    assert time.monotonic() - began < 3  # the server would take five seconds


def test_an_answer_that_is_cut_short_or_no_http(photos, server, monkeypatch):
    def cut(self):
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"n01440764_1.JPEG")

    monkeypatch.setattr(Handler, "do_GET", cut)
    with pytest.raises(UserError, match="cannot be downloaded|is not SimCLR's list"):
        subsets.subset(photos, 1, 0)
    monkeypatch.setattr(Handler, "do_GET", lambda self: self.wfile.write(b"\x00\x01 garbage\r\n\r\n"))
    with pytest.raises(UserError, match="cannot be downloaded"):
        subsets.subset(photos, 1, 0)
    assert not (server[0] / "cache").exists()


def test_the_published_digests_are_those_of_the_facts():
    assert {percent: name for percent, (name, _) in subsets.LISTS.items()} == {1: "1percent.txt", 10: "10percent.txt"}
    assert [digest[:8] + digest[-8:] for _, digest in subsets.LISTS.values()] == [
        "71e82a489549cf17",
        "6d09de11b9392091",
    ]
    assert subsets.URL.startswith("https://raw.githubusercontent.com/google-research/simclr/master/")


def test_imagenets_classes_with_a_list_of_other_ones(tmp_path, server):
    (tmp_path / "x" / "train" / "n00000001").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "x" / "train" / "n00000001" / "n00000001_1.JPEG")
    with pytest.raises(UserError, match="a list of other images: 2 of its classes are not in"):
        subsets.subset(datasets.image_folder(tmp_path / "x", "train"), 1, 0)


def test_a_name_that_a_list_cannot_hold_is_refused(tmp_path):
    for name in ("c/a\nb.jpg", "c/a.jpg\r"):
        images = datasets.Images("x", ["c"], ["c/0.jpg", name], [0, 0], None)
        with pytest.raises(
            UserError, match=r"list: a list has one name a line, and c/a(\\nb)?.jpg(\\r)? holds a line break"
        ):
            subsets.write_list(images, str(tmp_path / "list"))
        assert not (tmp_path / "list").exists()

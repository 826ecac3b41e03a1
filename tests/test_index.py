import os
import pickle
import threading
import time

import numpy as np
import pytest
import torch
from torchvision.datasets import ImageFolder

from synco import index
from synco.errors import UserError

LONG_AGO = 1_500_000_000


def touch(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def settle(folder):
    """Let every folder seem to have been left alone for long."""
    for place, _, _ in os.walk(folder, followlinks=True):
        os.utime(place, (LONG_AGO, LONG_AGO))


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A folder of images of three classes with all that such a folder may hold; small ones are worth a cache here."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index, "WORTH_IT", 1)
    folder = tmp_path / "data" / "train"
    names = "b/2.jpg b/10.JPEG b/1.png b/sub/z.jpg b/sub/a.jpg b/sub-x/a.jpg b/sub/deep/q.webp a/x.jpg".split()
    for name in [*names, "c/é ü.jpg"]:
        touch(folder / name)
    for name in ("b/notes.txt", "b/sub/.hidden", "c/.jpg", "readme.txt", "a/x.jpg.tmp"):
        touch(folder / name)
    for place, link in (("elsewhere", folder / "a" / "link"), ("elsewhere too", folder / "d")):
        touch(tmp_path / place / "linked.jpg")
        link.symlink_to(tmp_path / place)
    with open(os.fsencode(folder) + b"/c/\xff.jpg", "wb"):
        pass
    settle(folder)
    return folder


def fails(*_):
    raise AssertionError("the folder was listed again")


def same(found, expected):
    return (
        list(found) == list(expected)
        and found.classes == expected.classes
        and np.array_equal(found.targets(), expected.targets())
    )


def test_it_is_torchvisions_list(tree):
    expected = ImageFolder(str(tree))
    for _ in range(2):  # listed, then from the cache
        found = index.open_index(str(tree))
        assert [os.path.join(tree, name) for name in found] == [path for path, _ in expected.samples]
        assert [found[i] for i in range(len(found))] == list(found)
        assert found.targets().tolist() == expected.targets and found.classes == expected.classes == list("abcd")
        for outside in (-1, len(found)):
            with pytest.raises(IndexError):
                found[outside]


def test_the_second_start_lists_nothing_and_maps_the_file(tree, monkeypatch):
    first = index.open_index(str(tree))
    monkeypatch.setattr(index, "scan", fails)
    second = index.open_index(str(tree))
    assert same(second, first)
    assert os.listdir(index.cache_folder()) and not [name for name in os.listdir(tree) if "index" in name]
    if os.path.exists("/proc/self/maps"):
        with open("/proc/self/maps") as maps:
            assert index._store(str(tree)) in maps.read()
    link = tree.parent / "other name"
    link.symlink_to(tree)
    assert same(index.open_index(str(link)), first)


def add(tree):
    touch(tree / "b" / "3.jpg")


def add_deep(tree):
    touch(tree / "b" / "sub" / "deep" / "r.jpg")


def remove(tree):
    os.remove(tree / "b" / "2.jpg")


def rename(tree):
    os.rename(tree / "a" / "x.jpg", tree / "a" / "y.jpg")


def add_class(tree):
    touch(tree / "e" / "1.jpg")


def add_behind_a_link(tree):
    touch(tree.parent.parent / "elsewhere" / "2.jpg")


def replace_class(tree):
    """By one of the same age, as a copy has it; the folder that holds the classes gets its age back, too."""
    os.rename(tree / "b", tree.parent / "old b")
    touch(tree / "b" / "other.jpg")
    settle(tree)


@pytest.mark.parametrize(
    "change", [add, add_deep, remove, rename, add_class, add_behind_a_link, replace_class], ids=lambda f: f.__name__
)
def test_a_changed_folder_is_listed_again(tree, change):
    before = list(index.open_index(str(tree)))
    change(tree)
    found = index.open_index(str(tree))
    assert list(found) != before
    assert [os.path.join(tree, name) for name in found] == [path for path, _ in ImageFolder(str(tree)).samples]


def test_a_folder_that_was_just_written_to_is_not_stored(tree):
    """A file that comes within the clock's tick would leave the folder's time as it is."""
    add(tree)
    assert "b/3.jpg" in index.open_index(str(tree)) and not os.path.exists(index._store(str(tree)))
    settle(tree)
    index.open_index(str(tree))
    assert os.path.exists(index._store(str(tree)))


def test_small_folders_are_not_stored(tree, monkeypatch):
    monkeypatch.setattr(index, "WORTH_IT", 1000)
    index.open_index(str(tree))
    assert not os.path.exists(index._store(str(tree)))


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trapped",)


def rewritten(change):
    def damage(path):
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)

    return damage


def truncated(path):
    os.truncate(path, os.path.getsize(path) // 2)


def hostile(path):
    with open(path, "wb") as file:
        pickle.dump(Trap(), file)


def garbage(path):
    with open(path, "wb") as file:
        file.write(b"\x80\x02garbage")


@pytest.mark.parametrize(
    "damage",
    [
        truncated,
        hostile,
        garbage,
        rewritten(lambda content: content.pop("mtimes")),
        rewritten(lambda content: content.update(format=0)),
        rewritten(lambda content: content.update(folder="/elsewhere")),
        rewritten(lambda content: content["files"][:1].add_(1)),  # a sound index, but of no such files
        rewritten(lambda content: content["classes"].__setitem__(0, "aa")),
        rewritten(lambda content: content.pop("sum")),
        rewritten(lambda content: content["offsets"][3:].fill_(10**9)),
        rewritten(lambda content: content["offsets"][3].fill_(0)),
        rewritten(lambda content: content["starts"][-1:].add_(1)),
        rewritten(lambda content: content.update(files=content["files"][:-1])),
        rewritten(lambda content: content.update(offsets=content["offsets"].float())),
        rewritten(lambda content: content.update(classes=content["classes"][:-1])),
        rewritten(lambda content: content.update(classes=[1, 2, 3, 4])),
        rewritten(lambda content: content.update(folders=None)),
    ],
)
def test_a_damaged_file_in_the_cache_is_made_anew(tree, damage, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    expected, store = index.open_index(str(tree)), index._store(str(tree))
    expected = index.Index(expected.classes, *(x.copy() for x in (expected.starts, expected.offsets, expected.files)))
    damage(store)
    assert same(index.open_index(str(tree)), expected) and not os.path.exists("trapped")
    monkeypatch.setattr(index, "scan", fails)
    assert same(index.open_index(str(tree)), expected)


def test_a_cache_that_cannot_be_written_does_no_harm(tree, monkeypatch, tmp_path):
    touch(tmp_path / "file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(index.open_index(str(tree))) == len(ImageFolder(str(tree)))


def test_of_several_that_start_at_once_one_lists_the_folder(tree, monkeypatch):
    scan, scans = index.scan, []

    def slow(folder, labelled):
        scans.append(folder)
        time.sleep(0.3)
        return scan(folder, labelled)

    monkeypatch.setattr(index, "scan", slow)
    found = []
    threads = [threading.Thread(target=lambda: found.append(list(index.open_index(str(tree))))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(scans) == 1 and len(found) == 4 and all(names == found[0] for names in found)


def test_folders_without_images_are_named(tmp_path):
    with pytest.raises(UserError, match=r"none: cannot be listed \(No such file or directory\)"):
        index.open_index(str(tmp_path / "none"))
    (tmp_path / "t").mkdir()
    touch(tmp_path / "t" / "1.txt")
    with pytest.raises(UserError, match="t: Couldn't find any class folder; it should hold CLASS/IMAGE"):
        index.open_index(str(tmp_path / "t"))
    touch(tmp_path / "t" / "full" / "1.jpg")
    for name in "abcde":
        touch(tmp_path / "t" / name / "1.txt")
    with pytest.raises(
        UserError, match="t: Found no valid file for the classes a, b, c and 2 more; it should hold CLASS/IMAGE"
    ):
        index.open_index(str(tmp_path / "t"))


def test_each_folder_counts_once_however_many_links_lead_to_it(tree):
    expected = list(index.scan(str(tree))[0])
    links = {"a/self": ".", "a/up": "..", "a/far": tree.parent.parent, "b/other": tree / "c", "b/sub/round": tree / "b"}
    links |= {"c/elsewhere": tree / "a" / "link", "b/z": "sub"}
    for name, target in links.items():
        (tree / name).symlink_to(target)
    assert list(index.scan(str(tree))[0]) == expected
    for target in (".", "..", "a"):
        (tree / "e").symlink_to(target)
        with pytest.raises(UserError, match="train: the class e|train: the classes a and e are one folder"):
            index.open_index(str(tree))
        (tree / "e").unlink()


def test_an_index_with_images_counted_twice_is_not_taken_from_the_cache(tree):
    index.open_index(str(tree))
    store = index._store(str(tree))
    rewritten(lambda content: content.update(format=1))(store)
    assert index._load(store, str(tree)) is None


@pytest.mark.parametrize("name", ["e", "b/sub/deep/more"])
def test_a_link_to_nothing_and_a_folder_that_cannot_be_listed_are_named(tree, name, monkeypatch):
    (tree / name).symlink_to("gone")
    with pytest.raises(UserError, match=rf"train/{name}: is a link that leads nowhere \(No such file or directory\)"):
        index.open_index(str(tree))
    (tree / name).unlink()
    touch(tree / name / "1.jpg")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith(name):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=rf"train/{name}: cannot be listed \(Permission denied\)"):
        index.open_index(str(tree))


def test_a_missing_image_is_named_when_it_is_read(tree):
    (tree / "a" / "gone.jpg").symlink_to("nowhere")
    assert "a/gone.jpg" in index.open_index(str(tree))

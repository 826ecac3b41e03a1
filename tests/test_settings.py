import pytest
import torch

from synco import settings
from synco.errors import UserError

SETTINGS = {"lr": 0.1, "dim": 8, "workers": 2, "train_images": 24, "train_images_crc32": 5, "classes": ["a"]}
KINDS = {"lr": "schedule", "dim": "identity", "workers": "free"}


@pytest.mark.parametrize(
    "changes, force, listed",
    [
        ({}, False, []),
        ({"workers": 3, "seed": 4, "processes": 2}, False, []),
        ({"lr": 0.2}, True, ["lr 0.1 → 0.2"]),
        ({"new": 3}, False, []),  # a setting that the checkpoint does not know
    ],
)
def test_what_may_change(changes, force, listed):
    now = SETTINGS | changes
    before = SETTINGS | {"seed": 3, "processes": 1}
    assert settings.compare(before, now, KINDS, "x.tar", force=force) == listed
    assert settings.compare({}, now, KINDS, "x.tar") == []


@pytest.mark.parametrize(
    "changes, force, message",
    [
        ({"lr": 0.2}, False, "lr 0.1 → 0.2 (--force-resume lets lr change)"),
        ({"lr": 0.2, "dim": 4}, True, "lr 0.1 → 0.2; dim 8 → 4 (--force-resume lets lr change)"),
        ({"dim": None}, True, "dim 8 → None"),
        ({"classes": ["b"]}, True, "classes ['a'] → ['b']"),  # no flag, and compared all the same
        ({"train_images_crc32": 6}, False, "other training images (by their names)"),
        ({"train_images_crc32": 6, "train_images": 25}, False, "train_images 24 → 25"),
    ],
)
def test_what_may_not_change_is_listed(changes, force, message):
    with pytest.raises(UserError) as error:
        settings.compare(SETTINGS, SETTINGS | changes, KINDS, "x.tar", force=force)
    assert str(error.value) == f"x.tar: is of a run with other settings: {message}"


def test_a_file_may_hold_anything():
    for strange in (torch.ones(2), "0.1", [0.1], None):
        with pytest.raises(UserError, match="x.tar: is of a run with other settings: lr "):
            settings.compare(SETTINGS | {"lr": strange}, SETTINGS, KINDS, "x.tar")

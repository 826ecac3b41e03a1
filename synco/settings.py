"""A run's settings beside those of the checkpoint that it goes on from."""

import os

from synco.errors import UserError

# what a run stores beside its flags and may change
FREE_FACTS = {"seed", "deterministic", "processes", "threads", "restarted", "counts", "order"}


def compare(before: dict, now: dict, kinds: dict[str, str], path: str, *, force: bool = False) -> list[str]:
    """What a run that goes on changes, as in ["lr 0.03 → 0.5", ...].

    before: the settings in the checkpoint `path`, {} in one that stores none; now: those of this start; kinds: see
    `options.Parser`; what it does not name is compared. force: whether the schedule may change.
    Raises UserError that lists all that differs and may not.
    """
    differences = {
        name: f"{name} {before[name]} → {value}"
        for name, value in now.items()
        if name in before and name not in FREE_FACTS and kinds.get(name) != "free"
        # a file may hold anything
        if not isinstance(before[name], (type(value), int, float)) or before[name] != value
    }
    if "train_images_crc32" in differences:  # numbers that say nothing
        differences["train_images_crc32"] = "other training images (by their names)"
        if "train_images" in differences:
            del differences["train_images_crc32"]
    schedule = [name for name in differences if kinds.get(name) == "schedule"]
    if differences and not (force and len(schedule) == len(differences)):
        hint = f" (--force-resume lets {', '.join(schedule)} change)" if schedule else ""
        raise UserError(f"{path}: is of a run with other settings: {'; '.join(differences.values())}{hint}")
    return list(differences.values())


def choose_seed(given: int | None, path: str | None, config: dict) -> int:
    """A run's seed: as given, as in the settings of the checkpoint it goes on from, or a new one."""
    stored = config.get("seed")
    if isinstance(stored, int) and 0 <= stored < 2**32:
        if given not in (None, stored):
            raise UserError(f"--seed {given}: {path} was run with seed {stored}; leave --seed out to go on")
        return stored
    return int.from_bytes(os.urandom(4), "little") if given is None else given

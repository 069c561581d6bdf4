"""The training protocols of the field: which lists of photos, and how many of each in an epoch.

A list is the forged or the untouched photos of a data set. The user says where the data sets lie
(`frd_model.data.sets`); they are found by their names.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from .pairing import DatasetError, Pair

if TYPE_CHECKING:
    from .dataset import PairDataset


class TrainingList(NamedTuple):
    """Photos of the set `source`: forged or untouched ones, and of those the ones that lie in `folder`, if given."""

    source: str
    forged: bool = True
    folder: str = ""

    @property
    def name(self) -> str:
        """A set of this name is the list itself."""
        return f"{self.source}-{self.folder.removesuffix('_images') or ('forged' if self.forged else 'untouched')}"

    def holds(self, pair: Pair, name: str) -> bool:
        """Whether a photo of the source belongs to the list; `name`: of the photo in its set."""
        if (pair.mask is not None) != self.forged:
            return False
        # A cache keeps the folders in the names alone, a list in the files alone.
        return not self.folder or self.folder == (_folder(name) or _folder(str(pair.image)))


def _folder(path: str) -> str:
    return os.path.basename(os.path.dirname(path)).lower()


class Protocol(NamedTuple):
    """about: one line. per_set: photos of each list in an epoch, None: all, each once."""

    about: str
    lists: tuple[TrainingList, ...]
    per_set: int | None
    replacement: bool = False


_TAMPCOCO = tuple(TrainingList("tampcoco", folder=f"{kind}_images") for kind in ("cm", "sp", "bcm", "bcmc"))
_FORGED = tuple(TrainingList(source) for source in ("casia2", "fantasticreality", "imd2020"))
_UNTOUCHED = tuple(TrainingList(source, False) for source in ("casia2", "fantasticreality", "compraise"))
_TEN = (*_FORGED, *_UNTOUCHED, *_TAMPCOCO)

PROTOCOLS: dict[str, Protocol] = {
    "cat": Protocol("CAT-Net v2: ten lists, three of them untouched photos", _TEN, 1869),
    "benco": Protocol("IMDL-BenCo: seven lists of forged photos", (*_FORGED, *_TAMPCOCO), 1840, True),
    "frdnet": Protocol("FRD-Net's code: CAT-Net's lists, IMDL-BenCo's sampling", _TEN, 1840, True),
    "mvss": Protocol("MVSS-Net: the forged photos of CASIA v2", (TrainingList("casia2"),), None),
}


def select_lists(name: str, sets: Mapping[str, PairDataset]) -> dict[str, PairDataset]:
    """The lists of a protocol by name, from data sets by name.

    Raises:
        DatasetError: sets are missing, not needed, or without photos for a list.
    """
    wanted = PROTOCOLS[name].lists
    names = {data.lower(): data for data in sets}
    missing = [part for part in wanted if part.name not in names and part.source not in names]
    if missing:
        sources = dict.fromkeys(part.source for part in missing)
        raise DatasetError(
            f"protocol {name} needs the data sets {', '.join(dict.fromkeys(part.source for part in wanted))}, got none "
            f"named {', '.join(sources)}; name each by --data NAME=LAYOUT:PATH (data.train)"
        )
    unused = names.keys() - {used for part in wanted for used in (part.name, part.source)}
    if unused:
        raise DatasetError(
            f"protocol {name} takes the data sets {', '.join(dict.fromkeys(part.source for part in wanted))} alone, "
            f"got {', '.join(sorted(unused))} too"
        )
    return {part.name: _select(name, part, sets, names) for part in wanted}


def _select(
    protocol: str, part: TrainingList, sets: Mapping[str, PairDataset], names: Mapping[str, str]
) -> PairDataset:
    if part.name in names:
        return sets[names[part.name]]
    data = sets[names[part.source]]
    indices = [i for i, pair in enumerate(data.pairs) if part.holds(pair, data.names[i])]
    if not indices:
        where = f" in a folder {part.folder}" if part.folder else ""
        kind = "forged" if part.forged else "untouched"
        raise DatasetError(
            f"data set {part.source} must hold {kind} photos{where} for protocol {protocol}, got none; "
            f"name a set {part.name} if they lie elsewhere"
        )
    return data.subset(indices)

"""Options of forging. Without OpenCV, so that the help of the commands need not import it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

KINDS = ("splicing", "copy_move", "removal", "retouch")
#: The operations of each kind.
METHODS: dict[str, tuple[str, ...]] = {
    "splicing": ("paste", "poisson"),
    "copy_move": ("paste", "poisson"),
    "removal": ("telea", "ns", "patch"),
    "retouch": ("recolour", "blur", "sharpen", "noise", "rescale", "warp", "smooth"),
}
#: Operations that are drawn on request only: no net in the package was trained on them.
UNSEEN = ("warp", "smooth")
ALL_METHODS = tuple(dict.fromkeys(name for names in METHODS.values() for name in names))
MIN_SIDE = 32
SHAPES = ("polygon", "ellipse", "rectangle", "blob")
_SHARES = (
    "follow_content",
    "hard_border",
    "transform",
    "colour",
    "match_colour",
    "filter_history",
    "jpeg_history",
    "local_trace",
    "final_filter",
    "handoff",
    "handoff_resize",
    "handoff_crop",
    "webp",
    "final_jpeg",
)
_ANY = float("inf")
# The lowest, which only the qualities may reach, and the highest value of each range.
_RANGES = {
    "area": (0, 0.9),
    "removal_area": (0, 0.9),
    "feather": (0, _ANY),
    "scale": (0, _ANY),
    "handoff_scale": (0, 1),
    "history_quality": (1, 100),
    "handoff_quality": (1, 100),
    "final_quality": (1, 100),
}


@dataclass(frozen=True)
class ForgeOptions:
    """What a `Forger` draws from. Shares are probabilities; ranges are (low, high)."""

    kinds: Mapping[str, float] = field(
        default_factory=lambda: {"splicing": 0.4, "copy_move": 0.2, "removal": 0.2, "retouch": 0.2}
    )
    # Operations to draw from, for each kind those that belong to it.
    methods: tuple[str, ...] = tuple(name for name in ALL_METHODS if name not in UNSEEN)
    shapes: tuple[str, ...] = SHAPES
    area: tuple[float, float] = (0.02, 0.30)
    removal_area: tuple[float, float] = (0.02, 0.12)
    # Regions lie anywhere and may be cut by the frame; otherwise they are inside it, and a net learns that.
    cut_by_frame: bool = True
    # Cut along the borders of the content, by GrabCut or flood filling.
    follow_content: float = 0.5
    # Standard deviation of the soft border, in pixels.
    feather: tuple[float, float] = (0.4, 2.5)
    hard_border: float = 0.25
    # Splicing and copy-move: resize, rotate or mirror the pasted part.
    transform: float = 0.6
    scale: tuple[float, float] = (0.6, 1.7)
    # In degrees, in either direction.
    rotation: float = 40.0
    # Colour jitter of the pasted part.
    colour: float = 0.5
    # Splicing: move the part's mean towards its new surroundings.
    match_colour: float = 0.4
    # A filter in a photo's history, drawn separately for host and donor.
    filter_history: float = 0.5
    # A compression in a photo's history.
    jpeg_history: float = 0.5
    # A filter on the edited region only.
    local_trace: float = 0.6
    history_quality: tuple[int, int] = (60, 98)
    # A filter over the finished image.
    final_filter: float = 0.1
    # What happens to a finished image on its way: an encoding, a resize, a crop that moves the block grid.
    handoff: float = 0.3
    handoff_quality: tuple[int, int] = (55, 95)
    handoff_resize: float = 0.2
    handoff_scale: tuple[float, float] = (0.5, 0.95)
    handoff_crop: float = 0.5
    # WebP instead of JPEG in the hand-off.
    webp: float = 0.25
    final_jpeg: float = 0.5
    final_quality: tuple[int, int] = (70, 98)

    def __post_init__(self) -> None:
        if (
            not self.kinds
            or set(self.kinds) - set(KINDS)
            or min(self.kinds.values()) < 0
            or not sum(self.kinds.values())
        ):
            raise ValueError(f"kinds must give weights to some of {', '.join(KINDS)}, got {dict(self.kinds)}")
        if not self.methods or set(self.methods) - set(ALL_METHODS):
            raise ValueError(f"methods must be some of {', '.join(ALL_METHODS)}, got {self.methods}")
        for kind, weight in self.kinds.items():
            if weight > 0 and not self.methods_of(kind):
                raise ValueError(
                    f"methods must hold one of {', '.join(METHODS[kind])} for {kind}, got {self.methods}"
                )
        if not self.shapes or set(self.shapes) - set(SHAPES):
            raise ValueError(f"shapes must be some of {', '.join(SHAPES)}, got {self.shapes}")
        for name in _SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not 0 <= self.rotation <= 180:
            raise ValueError(f"rotation must be in [0, 180], got {self.rotation}")
        for name, (lowest, highest) in _RANGES.items():
            low, high = getattr(self, name)
            if not (max(lowest, 1e-9) <= low <= high <= highest and high < _ANY):
                rule = f"{lowest} <= low" if lowest else "0 < low"
                raise ValueError(
                    f"{name} must be (low, high), {rule} <= high <= {highest}, got {(low, high)}"
                )

    def check_donors(self, photos: int) -> None:
        """ValueError where every forgery needs a donor and there are not two photos."""
        if photos < 2 and not any(weight > 0 for kind, weight in self.kinds.items() if kind != "splicing"):
            raise ValueError(f"photos must be at least two where splicing is the only kind, got {photos}")

    def methods_of(self, kind: str) -> tuple[str, ...]:
        """The operations that a kind draws from."""
        return tuple(name for name in METHODS[kind] if name in self.methods)

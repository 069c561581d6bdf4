"""Reading images, forging, sample photos and data sets."""

from .dataset import (
    DatasetError,
    FolderDataset,
    ForgeryDataset,
    JsonDataset,
    ManiDataset,
    Pair,
    PairDataset,
)
from .forge import KINDS, ForgeOptions, Forger, Forgery
from .forge_cli import forge_folder
from .images import (
    ImageError,
    find_images,
    overlay,
    read_image,
    read_mask,
    write_bytes,
    write_jpeg,
    write_json,
    write_png,
)
from .photos import SPLITS, sample_photos
from .transforms import MEAN, STD, mask_to_tensor, to_image, to_tensor

__all__ = [
    "KINDS",
    "MEAN",
    "SPLITS",
    "STD",
    "DatasetError",
    "FolderDataset",
    "ForgeOptions",
    "Forger",
    "Forgery",
    "ForgeryDataset",
    "ImageError",
    "JsonDataset",
    "ManiDataset",
    "Pair",
    "PairDataset",
    "find_images",
    "forge_folder",
    "mask_to_tensor",
    "overlay",
    "read_image",
    "read_mask",
    "sample_photos",
    "to_image",
    "to_tensor",
    "write_bytes",
    "write_jpeg",
    "write_json",
    "write_png",
]

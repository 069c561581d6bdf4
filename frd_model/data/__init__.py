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
from .files import Found, Skipped, describe_skipped, find_images, image_extensions, scan_images
from .forge import KINDS, ForgeOptions, Forger, Forgery
from .forge_cli import forge_folder
from .images import (
    ImageError,
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
    "Found",
    "ImageError",
    "JsonDataset",
    "ManiDataset",
    "Pair",
    "PairDataset",
    "Skipped",
    "describe_skipped",
    "find_images",
    "forge_folder",
    "image_extensions",
    "mask_to_tensor",
    "overlay",
    "read_image",
    "read_mask",
    "sample_photos",
    "scan_images",
    "to_image",
    "to_tensor",
    "write_bytes",
    "write_jpeg",
    "write_json",
    "write_png",
]

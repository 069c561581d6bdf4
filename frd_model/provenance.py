"""What a photo's file says of its origin: metadata, JPEG tables, thumbnail, manifest. Facts and remarks, no verdict."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError
from PIL.ExifTags import Base

from frd_model.data.files import PathLike, photo_formats
from frd_model.data.images import open_image, read_file

from . import file_end, jpeg_facts
from .output import one_line

MAX_TEXT = 1000
MAX_ENTRIES = 50
# A decoded tag can take 18 times its bytes; JPEG's own limit is 64 KiB for a segment.
MAX_EXIF_BYTES = 4 << 20
MAX_THUMBNAIL_PIXELS = 4_000_000
# Mean difference, of 255, above which a thumbnail is pointed out, and the correlation below which it is not the same
# picture in other tones.
THUMBNAIL_DIFFERENCE = 20.0
THUMBNAIL_CORRELATION = 0.8

_EXIF_TEXTS = {
    "make": Base.Make,
    "model": Base.Model,
    "lens": Base.LensModel,
    "software": Base.Software,
    "processing_software": Base.ProcessingSoftware,
    "description": Base.ImageDescription,
    "artist": Base.Artist,
    "copyright": Base.Copyright,
}
_EXIF_DATES = {
    "taken": (Base.DateTimeOriginal, Base.OffsetTimeOriginal),
    "digitized": (Base.DateTimeDigitized, Base.OffsetTimeDigitized),
    "modified": (Base.DateTime, Base.OffsetTime),
}
_XMP_TEXTS = {
    "creator_tool": "CreatorTool",
    "created": "CreateDate",
    "modified": "ModifyDate",
    "metadata_modified": "MetadataDate",
    "make": "Make",
    "model": "Model",
    "lens": "Lens",
    "document_id": "DocumentID",
    "original_document_id": "OriginalDocumentID",
    "digital_source_type": "DigitalSourceType",
    "credit": "Credit",
}
_EDITORS = re.compile(
    r"(?<![a-z])(gimp|photoshop|lightroom|affinity|paint\.net|pixelmator|snapseed|picsart|picasa|darktable|rawtherapee|"
    r"capture one|luminar|imagemagick|graphicsmagick|krita|paint ?shop|canva|facetune|fotor|pixlr|polarr|vsco|photopea|"
    r"acdsee|digikam|dxo|on1|meitu|faceapp|remini|topaz|photodirector|zoner|xnview|irfanview|photos)(?![a-z])",
    re.IGNORECASE,
)
_GENERATORS = re.compile(
    r"(?<![a-z])(midjourney|stable.?diffusion|dall.?e|adobe firefly|comfyui|automatic1111|invokeai|novelai|openai|"
    r"google ai|made with ai|ideogram)(?![a-z])",
    re.IGNORECASE,
)
# Under these keys generators store their settings in PNG texts.
_GENERATOR_KEYS = {"parameters", "prompt", "workflow", "dream", "sd-metadata", "invokeai_metadata"}


def inspect_photo(path: PathLike, *, coordinates: bool = False, data: bytes | None = None) -> dict[str, Any]:
    """Facts that a photo's file states about itself, ready for JSON, and `remarks` in words; never a verdict.

    A part that is absent is None; one that cannot be read is {"error": reason}. Texts are cut after 1000 characters.
    The pixels are decoded, a JPEG's at reduced size, so that a file that is not complete is found.

    Args:
        coordinates: add `coordinates` (degrees) where the photo has any; `gps` says whether it has in any case.
        data: the file's content where it is in memory already; `path` then only names it.

    Raises:
        ImageError: as for `frd_model.predict`, the file cannot be read or is not a complete image of at most 120
            million pixels.
    """
    data = read_file(path) if data is None else data
    with open_image(path, data=data) as image:
        record: dict[str, Any] = {
            "path": str(path),
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "format": image.format,
            "size": {"width": image.width, "height": image.height},
            "mode": image.mode,
            "several_images": _part(lambda: bool(getattr(image, "is_animated", False))),
        }
        # Metadata may stand behind the pixels of a PNG; a TIFF is closed once its pixels are read.
        if image.format == "PNG":
            image.load()
        embedded = _Exif()
        record["exif"] = _part(lambda: embedded.read(image, coordinates=coordinates))
        record["xmp"] = _part(lambda: _read_xmp(image))
        record["color_profile"] = _part(lambda: _profile_name(image))
        record["text"] = _part(lambda: _read_texts(image))
        record["jpeg"] = _part(lambda: jpeg_facts.describe(image)) if _is_jpeg(image) else None
        size = image.size
        image.draft(None, (640, 640))
        image.load()
        record["thumbnail"] = _part(lambda: _compare_thumbnail(image, size, embedded.thumbnail))
    record["trailing"] = _part(lambda: file_end.trailing_bytes(data, str(record["format"])))
    record["c2pa"] = _read_c2pa(data)
    record["remarks"] = list(_remarks(record))
    return record


def provenance(path: PathLike, data: bytes | None = None) -> dict[str, Any]:
    """`inspect_photo` for the record of a prediction: without path and table values, and without errors."""
    try:
        record = inspect_photo(path, data=data)
    # The prediction of a photo stands, whatever its metadata.
    except Exception as error:
        return {"error": one_line(error)}
    del record["path"]
    if record["jpeg"]:
        record["jpeg"].pop("quantization", None)
    return record


def _part(read: Callable[[], Any]) -> Any:
    """A part of the record. Damaged or hostile metadata raise errors of any type and must not hide the rest."""
    try:
        return read()
    except Exception as error:
        return {"error": _clean(one_line(error))}


def _is_jpeg(image: Image.Image) -> bool:
    return image.format in ("JPEG", "MPO")


def _clean(text: str) -> str:
    """Without the padding of fixed fields, valid Unicode, and cut to MAX_TEXT."""
    text = text.strip("\0 \t\r\n").encode(errors="replace").decode()
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}... ({len(text)} characters)"


def _text(value: Any) -> str | None:
    """A metadata value as text. EXIF texts are ASCII by the standard and often UTF-8; Pillow decodes Latin-1."""
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value = value.encode("latin-1")
        except UnicodeEncodeError:
            return _clean(value) or None
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            value = value.decode("latin-1")
        return _clean(value) or None
    if isinstance(value, (tuple, list, dict)):
        value = list(value)[:8]
    return _clean(str(value)) or None


class _Exif:
    """The EXIF block of an image: its fields, and the bytes of the thumbnail in it."""

    def __init__(self) -> None:
        self.thumbnail: bytes | None = None

    def read(self, image: Image.Image, *, coordinates: bool) -> dict[str, Any] | None:
        # pillow-heif sets None.
        block = image.info.get("exif") or b""
        if len(block) > MAX_EXIF_BYTES:
            raise ValueError(f"EXIF block must have at most {MAX_EXIF_BYTES} bytes, got {len(block)}")
        # Pillow adds the orientation of XMP, also where there is no EXIF.
        if not block and "Raw profile type exif" not in image.info and not hasattr(image, "tag_v2"):
            return None
        exif = image.getexif()
        photo = exif.get_ifd(ExifTags.IFD.Exif)
        tags = {**photo, **{tag: exif[tag] for tag in _wanted() if tag in exif}}
        found = {name: _text(tags.get(tag)) for name, tag in _EXIF_TEXTS.items()}
        found |= {name: _date(tags.get(tag), tags.get(offset)) for name, (tag, offset) in _EXIF_DATES.items()}
        found["comment"] = _user_comment(photo.get(Base.UserComment))
        fields: dict[str, Any] = {name: value for name, value in found.items() if value is not None}
        # pillow-heif turns the pixels and notes what the orientation was.
        orientation = image.info.get("original_orientation") or exif.get(Base.Orientation)
        fields["orientation"] = _integer(orientation)
        fields["size"] = _exif_size(photo)
        fields["maker_note"] = Base.MakerNote in photo
        gps = exif.get_ifd(ExifTags.IFD.GPSInfo)
        fields["gps"] = ExifTags.GPS.GPSLatitude in gps
        if coordinates and fields["gps"]:
            fields["coordinates"] = _coordinates(gps)
        self.thumbnail = _thumbnail_bytes(exif)
        return fields


def _wanted() -> list[int]:
    return [*_EXIF_TEXTS.values(), *(tag for pair in _EXIF_DATES.values() for tag in pair)]


def _date(value: Any, offset: Any) -> str | None:
    """ISO 8601 where the field holds a date; blank and zero dates, which mean none, are None."""
    text = _text(value)
    if text is None or not re.search(r"[1-9]", text):
        return None
    try:
        date = datetime.strptime(text, "%Y:%m:%d %H:%M:%S").isoformat()
    except ValueError:
        return text
    zone = _text(offset) or ""
    return date + (zone if re.fullmatch(r"[+-]\d\d:\d\d", zone) else "")


def _user_comment(value: Any) -> str | None:
    """EXIF's UserComment begins with eight bytes that name its encoding."""
    if not isinstance(value, bytes):
        return _text(value)
    if value.startswith(b"UNICODE\0"):
        body = value[8:]
        # The byte order is the block's or the writer's own; of text in Latin script it is the one with few high bytes.
        big = body[::2].count(0) >= body[1::2].count(0)
        return _clean(body.decode("utf-16-be" if big else "utf-16-le", "replace")) or None
    return _text(value[8:] if value[:8] in (b"ASCII\0\0\0", b"\0" * 8) else value)


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _exif_size(photo: dict[int, Any]) -> dict[str, int] | None:
    width, height = (_integer(photo.get(tag)) for tag in (Base.ExifImageWidth, Base.ExifImageHeight))
    return {"width": width, "height": height} if width and height else None


def _coordinates(gps: dict[int, Any]) -> dict[str, float] | None:
    latitude = _degrees(gps.get(ExifTags.GPS.GPSLatitude), gps.get(ExifTags.GPS.GPSLatitudeRef), "S")
    longitude = _degrees(gps.get(ExifTags.GPS.GPSLongitude), gps.get(ExifTags.GPS.GPSLongitudeRef), "W")
    if latitude is None or longitude is None:
        return None
    return {"latitude": latitude, "longitude": longitude}


def _degrees(value: Any, reference: Any, negative: str) -> float | None:
    try:
        degrees, minutes, seconds = (float(part) for part in value)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    angle = degrees + minutes / 60 + seconds / 3600
    if not math.isfinite(angle):
        return None
    return round(-angle if _text(reference) == negative else angle, 7)


def _thumbnail_bytes(exif: Image.Exif) -> bytes | None:
    entry = exif.get_ifd(ExifTags.IFD.IFD1)
    offset = _integer(entry.get(Base.JpegIFOffset))
    length = _integer(entry.get(Base.JpegIFByteCount))
    if offset is None or not length or length > MAX_EXIF_BYTES:
        return None
    exif.fp.seek(offset)
    return exif.fp.read(length)


def _read_xmp(image: Image.Image) -> dict[str, Any] | None:
    tree: dict[str, Any] = getattr(image, "getxmp", dict)()
    if not tree and any(name in image.info for name in ("xmp", "XML:com.adobe.xmp")):
        raise ValueError("XMP needs defusedxml (pip install defusedxml)")
    rdf = (tree.get("xmpmeta") or tree).get("RDF") if tree else None
    if not rdf:
        return None
    described = rdf.get("Description") or {}
    merged: dict[str, Any] = {}
    for part in described if isinstance(described, list) else [described]:
        merged |= part if isinstance(part, dict) else {}
    fields: dict[str, Any] = {}
    for name, tag in _XMP_TEXTS.items():
        if isinstance(merged.get(tag), str) and (value := _clean(merged[tag])):
            fields[name] = value
    if history := _history(merged.get("History")):
        fields["history"] = history
    return fields


def _history(value: Any) -> list[dict[str, str]]:
    """The steps that editors note: action, software, when."""
    sequence = value.get("Seq") if isinstance(value, dict) else None
    entries = sequence.get("li", []) if isinstance(sequence, dict) else []
    steps = []
    for entry in (entries if isinstance(entries, list) else [entries])[:MAX_ENTRIES]:
        # Attributes of the entry, or of a description in it.
        entry = entry.get("Description", entry) if isinstance(entry, dict) else {}
        names = {"action": "action", "software": "softwareAgent", "when": "when"}
        step = {name: _clean(entry[tag]) for name, tag in names.items() if isinstance(entry.get(tag), str)}
        if step:
            steps.append(step)
    return steps


def _profile_name(image: Image.Image) -> str | None:
    profile = image.info.get("icc_profile")
    if not profile:
        return None
    return _clean(ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile)))) or None


def _read_texts(image: Image.Image) -> dict[str, str] | None:
    """Texts beside EXIF and XMP: a PNG's chunks, the comments of a JPEG or GIF."""
    own = {"XML:com.adobe.xmp", "Raw profile type exif", "Raw profile type xmp", "Raw profile type APP1"}
    texts = dict(getattr(image, "text", {})) if image.format == "PNG" else {}
    comments = [data for name, data in getattr(image, "applist", []) if name == "COM"]
    if not comments and image.info.get("comment"):
        comments = [image.info["comment"]]
    texts |= {f"comment {n}" if n > 1 else "comment": data for n, data in enumerate(comments, 1)}
    found = {_clean(key): _text(value) for key, value in texts.items() if key not in own}
    return dict([(k, v) for k, v in found.items() if v][:MAX_ENTRIES]) or None


def _compare_thumbnail(
    image: Image.Image, size: tuple[int, int], data: bytes | None
) -> dict[str, Any] | None:
    """The embedded thumbnail against the stored (not rotated) image, at the thumbnail's size."""
    if not data:
        return None
    try:
        opened = Image.open(io.BytesIO(data), formats=photo_formats())
    except UnidentifiedImageError:
        raise ValueError(f"thumbnail must be an image Pillow can read, got {data[:8]!r}") from None
    with opened:
        width, height = opened.size
        if width * height > MAX_THUMBNAIL_PIXELS:
            raise ValueError(
                f"thumbnail must have at most {MAX_THUMBNAIL_PIXELS} pixels, got {width} x {height}"
            )
        thumbnail = opened.convert("RGB")
    reduced = _reduced(image, 2 * max(width, height))
    straight = _difference(reduced, size, thumbnail)
    found, turned = straight, False
    for turn in Image.Transpose:
        other = _difference(reduced, size, thumbnail.transpose(turn))
        # Of a picture without a clear up and down all positions fit about as well.
        if other["mean_difference"] < 0.5 * straight["mean_difference"] and _better(other, found):
            found, turned = other, True
    return {"width": width, "height": height, "turned": turned, **found}


def _better(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return bool(one["mean_difference"] < other["mean_difference"])


def _reduced(image: Image.Image, side: int) -> Image.Image:
    """RGB, at most `side` pixels wide and high; reduced first, so that no copy of a large photo is made."""
    scale = min(1.0, side / max(image.size))
    target = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    if image.mode not in ("L", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"):
        return image.convert("RGB").resize(target, Image.Resampling.BILINEAR)
    return image.resize(target, Image.Resampling.BILINEAR, reducing_gap=3.0).convert("RGB")


def _difference(image: Image.Image, size: tuple[int, int], thumbnail: Image.Image) -> dict[str, Any]:
    aspect = size[0] / size[1]
    picture = _without_bars(thumbnail, aspect)
    resized = image.resize(picture.size, Image.Resampling.BILINEAR)
    a, b = (np.asarray(i, np.float32) for i in (resized, picture))
    return {
        "aspect_ratio": round(picture.width / picture.height, 4),
        "image_aspect_ratio": round(aspect, 4),
        "same_shape": _fits(picture.size, aspect),
        "black_bars": picture.size != thumbnail.size,
        "mean_difference": round(float(np.abs(a - b).mean()), 2),
        "correlation": _correlation(a, b),
    }


def _fits(size: tuple[int, int], aspect: float) -> bool:
    """Whether a size has the aspect ratio, apart from rounding to whole pixels and to blocks."""
    width, height = size
    return (
        abs(height - width / aspect) <= 1 + 0.02 * height or abs(width - height * aspect) <= 1 + 0.02 * width
    )


def _without_bars(thumbnail: Image.Image, aspect: float) -> Image.Image:
    """Without the black bars of a camera that writes thumbnails of 4:3 whatever the shape of the image."""
    width, height = thumbnail.size
    if _fits((width, height), aspect):
        return thumbnail
    inner = (min(width, round(height * aspect)), min(height, round(width / aspect)))
    left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
    box = (left, top, left + inner[0], top + inner[1])
    outside = np.asarray(thumbnail, np.float32).max(axis=2)
    # The compressed edge of a bar is not black; two lines belong to it.
    outside[max(0, top - 2) : box[3] + 2, max(0, left - 2) : box[2] + 2] = 0
    if min(inner) < 1 or outside.max() > 40:
        return thumbnail
    return thumbnail.crop(box)


def _correlation(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float | None:
    """Of the grey values; None where one of the pictures is uniform."""
    grey = [x.mean(axis=2).ravel() for x in (a, b)]
    if min(x.std() for x in grey) < 1:
        return None
    return round(float(np.corrcoef(*grey)[0, 1]), 4)


def _read_c2pa(data: bytes) -> dict[str, Any] | None:
    """What the C2PA manifest states, and how c2pa-python judges its signature; nothing is fetched from a network."""
    try:
        import c2pa
    except ImportError:
        return {"note": "not looked for: needs c2pa-python (pip install 'frd-kernels[c2pa]')"}
    try:
        context = c2pa.Context.from_dict({"verify": {"remote_manifest_fetch": False, "ocsp_fetch": False}})
        with context:
            reader = c2pa.Reader.try_create(None, io.BytesIO(data), context=context)
            if reader is None:
                return None
            with reader:
                return _manifest(json.loads(reader.json()))
    except c2pa.C2paError.NotSupported:
        return {"note": "not looked for: c2pa-python does not read this format"}
    except Exception as error:
        text = _clean(one_line(error))
        if address := re.search(r"must fetch remote manifests from url (\S+)", text):
            return {"note": f"the manifest is kept at {address[1]} and was not fetched"}
        return {"error": text}


def _manifest(store: dict[str, Any]) -> dict[str, Any]:
    active = store.get("manifests", {}).get(store.get("active_manifest"), {})
    signature = active.get("signature_info") or {}
    generators = active.get("claim_generator_info") or []
    actions = [
        action
        for assertion in active.get("assertions", [])
        if str(assertion.get("label", "")).startswith("c2pa.actions")
        for action in assertion.get("data", {}).get("actions", [])
    ]
    return {
        "generator": [_clean(" ".join(str(g[k]) for k in ("name", "version") if k in g)) for g in generators]
        or _text(active.get("claim_generator")),
        "title": _text(active.get("title")),
        "signed_by": _text(signature.get("common_name")),
        "issuer": _text(signature.get("issuer")),
        "signed_at": _text(signature.get("time")),
        "actions": [
            {
                name: _clean(str(action[key]))
                for name, key in (("action", "action"), ("source_type", "digitalSourceType"))
                if key in action
            }
            for action in actions[:MAX_ENTRIES]
        ],
        "ingredients": len(active.get("ingredients") or []),
        "manifests": len(store.get("manifests", {})),
        "validation_state": _text(store.get("validation_state")),
        "validation_failures": [
            _clean(str(status.get("code"))) for status in (store.get("validation_status") or [])[:MAX_ENTRIES]
        ],
    }


def _remarks(record: dict[str, Any]) -> Iterator[str]:
    """What an examiner would point out, in words, only from what the record states."""
    exif, xmp, texts, jpeg = (_fields(record[name]) for name in ("exif", "xmp", "text", "jpeg"))
    yield from _format_remarks(record)
    yield from _date_remarks(exif)
    yield from _software_remarks(exif, xmp, texts)
    yield from _size_remarks(record["size"], exif.get("size"))
    yield from _thumbnail_remarks(_fields(record["thumbnail"]))
    if jpeg.get("photoshop_resources"):
        yield "the JPEG has a segment of Photoshop's image resources (other programs write it too)"
    trailing = _fields(record["trailing"])
    if trailing.get("count") and jpeg.get("images", 1) == 1:
        like = f", which start like a {trailing['looks_like']} file" if trailing["looks_like"] else ""
        yield f"{trailing['count']} bytes follow the end of the image{like}"
    yield from _manifest_remarks(_fields(record["c2pa"]))


def _manifest_remarks(manifest: dict[str, Any]) -> Iterator[str]:
    # No list of trusted signers is given, so that no signer is on it.
    broken = [
        code for code in manifest.get("validation_failures", []) if code != "signingCredential.untrusted"
    ]
    if broken:
        yield f"the C2PA manifest does not fit the file: {', '.join(broken)}"
    sources = (action.get("source_type") for action in manifest.get("actions", []))
    for source in dict.fromkeys(source for source in sources if source):
        yield f"C2PA states the digital source type {source.rsplit('/', 1)[-1]}"


def _fields(part: Any) -> dict[str, Any]:
    """A part of the record; empty where it is absent or unreadable."""
    return part if isinstance(part, dict) and "error" not in part else {}


def _format_remarks(record: dict[str, Any]) -> Iterator[str]:
    extension = Path(record["path"]).suffix.lower()
    expected = Image.registered_extensions().get(extension)
    same = {"MPO": "JPEG"}
    actual = same.get(record["format"], record["format"])
    if expected and same.get(expected, expected) != actual:
        yield f"the name ends in {extension}, the file is {record['format']}"
    # Telephones keep a smaller version or a depth map behind the photo of an MPO file.
    if record["several_images"] is True and actual != "JPEG":
        yield "the file holds several images, of which the first is examined"


def _date_remarks(exif: dict[str, Any]) -> Iterator[str]:
    dates = {name: _parsed(exif[name]) for name in _EXIF_DATES if name in exif}
    for name, date in dates.items():
        if date is None:
            yield f"the date {name} is no EXIF date: {exif[name][:100]}"
    taken, modified = dates.get("taken"), dates.get("modified")
    if taken is None or modified is None:
        return
    if (taken.tzinfo is None) != (modified.tzinfo is None):
        taken, modified = taken.replace(tzinfo=None), modified.replace(tzinfo=None)
    if modified > taken:
        yield f"modified later than taken, by {modified - taken}"
    elif modified < taken:
        yield f"modified earlier than taken, by {taken - modified}"


def _parsed(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None


def _software_remarks(exif: dict[str, Any], xmp: dict[str, Any], texts: dict[str, Any]) -> Iterator[str]:
    named = {
        "EXIF software": exif.get("software"),
        "EXIF processing software": exif.get("processing_software"),
        "XMP creator tool": xmp.get("creator_tool"),
        "text Software": texts.get("Software"),
        "comment": texts.get("comment"),
        "XMP credit": xmp.get("credit"),
    }
    history = dict.fromkeys(step.get("software") for step in xmp.get("history", []))
    named |= {f"XMP history {n}": software for n, software in enumerate(history, 1)}
    for field, value in named.items():
        if value and _GENERATORS.search(value):
            yield f"{field} names an image generator: {value[:100]}"
        elif value and _EDITORS.search(value):
            yield f"{field} names an editor: {value[:100]}"
    for key in texts:
        if key.lower() in _GENERATOR_KEYS:
            yield f"text {key}: a name under which image generators store their settings"
    source = xmp.get("digital_source_type")
    if source:
        yield f"XMP states the digital source type {source.rsplit('/', 1)[-1]}"


def _size_remarks(size: dict[str, int], stated: dict[str, int] | None) -> Iterator[str]:
    if stated is None or stated == size:
        return
    turned = (stated["width"], stated["height"]) == (size["height"], size["width"])
    how = "turned" if turned else f"{size['width']} x {size['height']}"
    yield f"EXIF states {stated['width']} x {stated['height']} pixels, the image is {how}"


def _thumbnail_remarks(thumbnail: dict[str, Any]) -> Iterator[str]:
    if not thumbnail:
        return
    if thumbnail["turned"]:
        yield "the thumbnail is turned or mirrored against the image"
    if not thumbnail["same_shape"]:
        shapes = f"{thumbnail['aspect_ratio']:.2f} against {thumbnail['image_aspect_ratio']:.2f}"
        yield f"the thumbnail has another shape than the image (width to height {shapes})"
    if thumbnail["mean_difference"] < THUMBNAIL_DIFFERENCE:
        return
    by = f"mean difference {thumbnail['mean_difference']:.0f} of 255"
    correlation = thumbnail["correlation"]
    if correlation is not None and correlation >= THUMBNAIL_CORRELATION:
        yield f"the thumbnail shows the image in other tones ({by})"
    else:
        yield f"the thumbnail shows another picture than the image ({by})"

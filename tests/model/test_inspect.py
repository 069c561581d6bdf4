"""`frd inspect` on files made here: what was put into a file is what is said of it."""

from __future__ import annotations

import datetime
import io
import json
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, ImageCms, PngImagePlugin
from PIL.ExifTags import GPS, IFD, Base
from torch import nn

from frd_model import inspect_photo
from frd_model.cli import main
from frd_model.cli.arguments import Checkpoint
from frd_model.data.files import ImageError
from frd_model.jpeg_facts import nearest_quality
from frd_model.provenance import provenance

from .test_images import fake_ghostscript

ASCII, SHORT, LONG, RATIONAL, UNDEFINED = 2, 3, 4, 5, 7


def picture(width: int = 120, height: int = 80, seed: int = 0) -> Image.Image:
    """Smooth and without symmetry, so that it survives JPEG and looks like itself only upright."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def directory(entries: list[tuple[int, int, int, bytes]], offset: int, following: int = 0) -> bytes:
    """A TIFF directory at `offset`, its values behind it: entries of tag, type, count, little-endian value."""
    data = b""
    fields = struct.pack("<H", len(entries))
    after = offset + 2 + 12 * len(entries) + 4
    for tag, kind, count, value in sorted(entries):
        if len(value) > 4:
            value, data = struct.pack("<L", after + len(data)), data + value
        fields += struct.pack("<HHL4s", tag, kind, count, value)
    return fields + struct.pack("<L", following) + data


def exif_with(thumbnail: bytes, orientation: int = 1) -> bytes:
    """An EXIF block with a thumbnail, which Pillow reads and does not write."""
    first = [(Base.Orientation, SHORT, 1, struct.pack("<H", orientation))]
    second_at = 8 + len(directory(first, 8))
    size = len(directory([(0x201, LONG, 1, b"1234"), (0x202, LONG, 1, b"1234")], 0))
    second = [
        (Base.JpegIFOffset, LONG, 1, struct.pack("<L", second_at + size)),
        (Base.JpegIFByteCount, LONG, 1, struct.pack("<L", len(thumbnail))),
    ]
    head = b"Exif\0\0II*\0" + struct.pack("<L", 8)
    return head + directory(first, 8, second_at) + directory(second, second_at) + thumbnail


def inspected(tmp_path: Path, data: bytes, name: str = "a.jpg") -> dict[str, Any]:
    path = tmp_path / name
    path.write_bytes(data)
    record = inspect_photo(path)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    return record


@pytest.mark.parametrize("quality", [1, 50, 75, 90, 100])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0", "4:2:2"])
def test_quality_and_subsampling_are_those_of_the_save(
    tmp_path: Path, quality: int, subsampling: str
) -> None:
    facts = inspected(tmp_path, jpeg(picture(), quality=quality, subsampling=subsampling))["jpeg"]
    assert (facts["quality"], facts["subsampling"]) == (quality, subsampling)
    assert facts["tables"] == f"libjpeg's for quality {quality}"
    assert [table["nearest"]["distance"] for table in facts["quantization"]] == [0, 0]
    assert all(len(table["steps"]) == 64 for table in facts["quantization"])
    assert not facts["progressive"]


def test_photoshops_and_other_tables_have_no_quality(tmp_path: Path) -> None:
    facts = inspected(tmp_path, jpeg(picture(), quality="web_high"))["jpeg"]
    assert (facts["quality"], facts["tables"]) == (None, "Photoshop's for 'web high'")
    flat = [[7] * 64, [9] * 64]
    facts = inspected(tmp_path, jpeg(picture(), qtables=flat))["jpeg"]
    assert (facts["quality"], facts["tables"]) == (None, "no standard table")
    assert [table["steps"] for table in facts["quantization"]] == flat
    assert all(table["nearest"]["distance"] > 0.02 for table in facts["quantization"])


def test_another_rounding_and_two_qualities_are_told_apart(tmp_path: Path) -> None:
    tables = [
        Image.open(io.BytesIO(jpeg(picture(), quality=q))).quantization[i] for i, q in enumerate((90, 80))
    ]
    facts = inspected(tmp_path, jpeg(picture(), qtables=tables))["jpeg"]
    assert (facts["quality"], facts["tables"]) == (None, "libjpeg's for quality 90 and 80")
    near = list(tables[0])
    near[63] += 1
    facts = inspected(tmp_path, jpeg(picture().convert("L"), qtables=[near]))["jpeg"]
    assert (facts["quality"], facts["tables"]) == (90, "nearly libjpeg's for quality 90")
    assert facts["subsampling"] is None
    assert nearest_quality([0] * 64)["distance"] > 1


def test_segments_comment_and_progressive(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[Base.Make] = "Maker"
    data = jpeg(picture(), progressive=True, comment=b"CREATOR: gd-jpeg\0", exif=exif)
    record = inspected(tmp_path, data)
    assert record["jpeg"]["progressive"] and record["jpeg"]["segments"] == {"APP0": 1, "APP1": 1}
    assert record["text"] == {"comment": "CREATOR: gd-jpeg"}
    assert record["trailing"]["count"] == 0 and record["bytes"] == len(data)


def metadata() -> Image.Exif:
    exif = Image.Exif()
    exif[Base.Make], exif[Base.Model], exif[Base.Software] = "Canon", "EOS 5D", "GIMP 2.10"
    exif[Base.DateTime], exif[Base.Orientation] = "2024:05:03 12:00:00", 6
    photo = {
        Base.DateTimeOriginal: "2024:05:01 10:00:00",
        Base.DateTimeDigitized: "0000:00:00 00:00:00",
        Base.OffsetTimeOriginal: "+02:00",
        Base.LensModel: "EF 50mm",
        Base.ExifImageWidth: 4000,
        Base.ExifImageHeight: 3000,
        Base.UserComment: b"UNICODE\0" + "größer".encode("utf-16-be"),
    }
    gps = {
        GPS.GPSLatitudeRef: "S",
        GPS.GPSLatitude: (33.0, 30.0, 36.0),
        GPS.GPSLongitudeRef: "E",
        GPS.GPSLongitude: (151.0, 12.0, 0.0),
    }
    for tag, values in ((IFD.Exif, photo), (IFD.GPSInfo, gps)):
        exif.get_ifd(tag).update(values)
        # The entry in the first directory, which Pillow writes as the offset.
        exif[tag] = 0
    return exif


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif", "a.heic", "a.avif"])
def test_exif_of_each_format(tmp_path: Path, name: str) -> None:
    if name == "a.heic":
        pytest.importorskip("pillow_heif").register_heif_opener()
    if Image.registered_extensions().get(Path(name).suffix) is None:
        pytest.skip(f"Pillow was built without {name}")
    picture().save(tmp_path / name, exif=metadata())
    record = inspect_photo(tmp_path / name)
    exif = record["exif"]
    assert (exif["make"], exif["model"], exif["lens"]) == ("Canon", "EOS 5D", "EF 50mm")
    assert exif["taken"] == "2024-05-01T10:00:00+02:00" and exif["modified"] == "2024-05-03T12:00:00"
    assert "digitized" not in exif and exif["comment"] == "größer"
    assert exif["gps"] and "coordinates" not in exif
    assert exif["orientation"] == 6
    assert "modified later than taken, by 2 days, 2:00:00" in record["remarks"]
    assert "EXIF software names an editor: GIMP 2.10" in record["remarks"]
    assert "EXIF states 4000 x 3000 pixels, the image is " in " ".join(record["remarks"])
    record = inspect_photo(tmp_path / name, coordinates=True)
    assert record["exif"]["coordinates"] == {"latitude": -33.51, "longitude": 151.2}


@pytest.mark.parametrize("ending", ["gif", "tif", "webp", "png"])
def test_further_images_of_a_file_are_named(tmp_path: Path, ending: str) -> None:
    pages = [Image.new("RGB", (40, 30), colour) for colour in ("red", "green", "blue")]
    one, many = tmp_path / f"one.{ending}", tmp_path / f"many.{ending}"
    pages[0].save(one)
    pages[0].save(many, save_all=True, append_images=pages[1:])
    remark = "the file holds several images, of which the first is examined"
    assert remark in inspect_photo(many)["remarks"] and remark not in inspect_photo(one)["remarks"]


def test_a_plain_file_has_no_remarks(tmp_path: Path) -> None:
    record = inspected(tmp_path, jpeg(picture()))
    assert record["remarks"] == []
    assert record["exif"] is record["xmp"] is record["color_profile"] is record["thumbnail"] is None
    assert record["size"] == {"width": 120, "height": 80} and record["format"] == "JPEG"


XMP = b"""<?xpacket begin='' id='W5M0MpCehiHzreSzNTczkc9d'?><x:xmpmeta xmlns:x='adobe:ns:meta/'>
<rdf:RDF xmlns:rdf='http://www.w3.org/1999/02/22-rdf-syntax-ns#'><rdf:Description rdf:about=''
 xmlns:xmp='http://ns.adobe.com/xap/1.0/' xmlns:xmpMM='http://ns.adobe.com/xap/1.0/mm/'
 xmlns:stEvt='http://ns.adobe.com/xap/1.0/sType/ResourceEvent#'
 xmlns:x4='http://iptc.org/std/Iptc4xmpExt/2008-02-29/' xmp:CreatorTool='Adobe Photoshop 25.0 (Windows)'
 x4:DigitalSourceType='http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia'>
<xmpMM:History><rdf:Seq><rdf:li stEvt:action='saved' stEvt:softwareAgent='Adobe Lightroom'
 stEvt:when='2024-05-02T10:00:00Z'/><rdf:li stEvt:action='derived'/></rdf:Seq></xmpMM:History>
</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end='w'?>"""


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
def test_xmp(tmp_path: Path, name: str) -> None:
    options: dict[str, Any] = {"xmp": XMP}
    if name == "a.png":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", XMP.decode())
        options = {"pnginfo": info}
    elif name == "a.tif":
        options = {"tiffinfo": {700: XMP}}
    picture().save(tmp_path / name, **options)
    record = inspect_photo(tmp_path / name)
    assert record["xmp"] == {
        "creator_tool": "Adobe Photoshop 25.0 (Windows)",
        "digital_source_type": "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia",
        "history": [
            {"action": "saved", "software": "Adobe Lightroom", "when": "2024-05-02T10:00:00Z"},
            {"action": "derived"},
        ],
    }
    assert record["text"] is None
    assert record["remarks"] == [
        "XMP creator tool names an editor: Adobe Photoshop 25.0 (Windows)",
        "XMP history 1 names an editor: Adobe Lightroom",
        "XMP states the digital source type trainedAlgorithmicMedia",
    ]


def test_texts_of_a_png(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("Software", "Version1 of a camera")
    info.add_text("parameters", "a cat, Steps: 20" + 2000 * "x", zip=True)
    picture().save(tmp_path / "a.png", pnginfo=info, icc_profile=srgb())
    record = inspect_photo(tmp_path / "a.png")
    assert record["text"]["Software"] == "Version1 of a camera"
    assert record["text"]["parameters"].startswith("a cat, Steps: 20xxx")
    assert record["text"]["parameters"].endswith("... (2016 characters)")
    assert record["color_profile"] == "sRGB built-in" and record["jpeg"] is None
    assert record["remarks"] == ["text parameters: a name under which image generators store their settings"]


def srgb() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def test_a_thumbnail_of_the_image_and_of_another(tmp_path: Path) -> None:
    image = picture(600, 400)
    same = jpeg(image.resize((120, 80)))
    record = inspected(tmp_path, jpeg(image, exif=exif_with(same)))
    thumbnail = record["thumbnail"]
    assert (thumbnail["width"], thumbnail["height"], thumbnail["turned"]) == (120, 80, False)
    assert thumbnail["mean_difference"] < 4 and thumbnail["correlation"] > 0.99
    assert thumbnail["same_shape"] and not record["remarks"]

    other = picture(600, 400, seed=1)
    record = inspected(tmp_path, jpeg(other, exif=exif_with(same)))
    small = other.resize((120, 80), Image.Resampling.BILINEAR)
    want = np.abs(np.asarray(small, float) - np.asarray(Image.open(io.BytesIO(same)), float)).mean()
    assert abs(record["thumbnail"]["mean_difference"] - want) < 2
    assert record["remarks"] == [
        f"the thumbnail shows another picture than the image (mean difference {want:.0f} of 255)"
    ]


def test_a_thumbnail_that_is_a_page_description_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", fake_ghostscript(tmp_path))
    page = io.BytesIO()
    picture(20, 20).save(page, "EPS")
    record = inspected(tmp_path, jpeg(picture(600, 400), exif=exif_with(page.getvalue())))
    assert "thumbnail must be an image" in record["thumbnail"]["error"] and not (tmp_path / "ran").exists()


def test_a_thumbnail_of_other_tones_turned_cropped_or_with_bars(tmp_path: Path) -> None:
    image = picture(600, 400)
    same = image.resize((120, 80))
    darker = same.point(lambda value: value // 2)
    (remark,) = inspected(tmp_path, jpeg(image, exif=exif_with(jpeg(darker))))["remarks"]
    assert remark.startswith("the thumbnail shows the image in other tones")

    turned = jpeg(image, exif=exif_with(jpeg(same.transpose(Image.Transpose.ROTATE_90))))
    record = inspected(tmp_path, turned)
    assert record["thumbnail"]["turned"] and record["thumbnail"]["mean_difference"] < 4
    assert record["remarks"] == ["the thumbnail is turned or mirrored against the image"]

    cropped = inspected(tmp_path, jpeg(image.crop((0, 0, 300, 400)), exif=exif_with(jpeg(same))))
    assert not cropped["thumbnail"]["same_shape"]
    assert any(
        "another shape than the image (width to height 1.50 against 0.75)" in r for r in cropped["remarks"]
    )

    canvas = Image.new("RGB", (160, 120))
    canvas.paste(image.resize((160, 107)), (0, 6))
    record = inspected(tmp_path, jpeg(image, exif=exif_with(jpeg(canvas))))
    assert record["thumbnail"]["black_bars"] and record["thumbnail"]["mean_difference"] < 6
    assert record["remarks"] == []


def test_orientation_does_not_turn_the_comparison(tmp_path: Path) -> None:
    # Cameras store both as the sensor sees them.
    image = picture(600, 400)
    record = inspected(tmp_path, jpeg(image, exif=exif_with(jpeg(image.resize((120, 80))), orientation=6)))
    assert record["exif"]["orientation"] == 6 and record["remarks"] == []


@pytest.mark.parametrize("progressive", [False, True])
def test_bytes_behind_a_jpeg(tmp_path: Path, progressive: bool) -> None:
    image = picture(600, 400)
    # An end marker in the thumbnail is not the end of the image.
    data = jpeg(image, progressive=progressive, exif=exif_with(jpeg(image.resize((120, 80)))))
    second = jpeg(picture(seed=1))
    record = inspected(tmp_path, data + second)
    assert record["trailing"] == {
        "count": len(second),
        "start": second[:16].hex(" "),
        "looks_like": "JPEG",
    }
    assert record["remarks"] == [
        f"{len(second)} bytes follow the end of the image, which start like a JPEG file"
    ]


@pytest.mark.parametrize("name", ["a.png", "a.webp"])
def test_bytes_behind_other_formats(tmp_path: Path, name: str) -> None:
    file = io.BytesIO()
    picture().save(file, Path(name).suffix[1:])
    assert inspected(tmp_path, file.getvalue(), name)["trailing"]["count"] == 0
    record = inspected(tmp_path, file.getvalue() + b"rest", name)
    assert record["remarks"] == ["4 bytes follow the end of the image"]


def test_images_of_an_mpo_are_no_trailing_bytes(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[picture(seed=1)])
    record = inspect_photo(tmp_path / "a.jpg")
    assert (record["format"], record["jpeg"]["images"], record["remarks"]) == ("MPO", 2, [])
    assert record["trailing"]["count"] > 0


def test_a_wrong_name_is_pointed_out(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.jpg", "PNG")
    record = inspect_photo(tmp_path / "a.jpg")
    assert record["format"] == "PNG" and record["jpeg"] is None
    assert record["remarks"] == ["the name ends in .jpg, the file is PNG"]


HOSTILE = {
    "huge count": directory(
        [(Base.Make, ASCII, 0xFFFFFFFF, b"abcdefgh"), (Base.Model, RATIONAL, 2**31, b"12345678")], 8
    ),
    "endless": struct.pack("<H", 0xFFFF) + b"\xff" * 40,
    "loop": directory([(IFD.Exif, LONG, 1, struct.pack("<L", 8))], 8, 8),
    "pointers": directory(
        [
            (IFD.Exif, LONG, 1, b"\xff\xff\xff\x7f"),
            (IFD.GPSInfo, ASCII, 3, b"abc"),
            (Base.Orientation, ASCII, 3, b"abc"),
        ],
        8,
        0x7FFFFFFF,
    ),
    "numbers for dates": directory(
        [(Base.DateTimeOriginal, SHORT, 4000, b"\3\3" * 4000), (Base.Make, LONG, 2, b"12345678")], 8
    ),
    "zero division": directory(
        [(Base.DateTime, RATIONAL, 1, bytes(8)), (Base.Make, UNDEFINED, 8, b"\0\xff\xfe\0\x1b[31")], 8
    ),
    "no header": b"",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_hostile_exif_harms_nothing_else(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    block = b"Exif\0\0" + (b"II*\0" + struct.pack("<L", 8) + HOSTILE[name] if HOSTILE[name] else b"rubbish")
    record = inspected(tmp_path, jpeg(picture(), quality=90, exif=block))
    assert record["jpeg"]["quality"] == 90 and record["sha256"]
    assert main(["inspect", str(tmp_path / "a.jpg")]) == 0
    shown = capsys.readouterr()
    assert all(c.isprintable() or c == "\n" for c in shown.out) and not shown.err


def test_texts_are_utf8_or_latin_and_print_safely(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {
        Base.Make: "Müller\0\0".encode(),
        Base.Model: "Müller".encode("latin-1"),
        Base.Software: b"a\x1b[2J\r\nb\0hidden",
        Base.Artist: b"\0\0\0\0\0",
        Base.Copyright: b"x" * 5000,
    }
    block = directory([(tag, ASCII, len(text), text) for tag, text in texts.items()], 8)
    exif = inspected(tmp_path, jpeg(picture(), exif=b"Exif\0\0II*\0\x08\0\0\0" + block))["exif"]
    assert exif["make"] == exif["model"] == "Müller"
    assert exif["software"] == "a\x1b[2J\r\nb\0hidden" and "artist" not in exif
    assert exif["copyright"] == 1000 * "x" + "... (5000 characters)"
    assert main(["inspect", str(tmp_path / "a.jpg")]) == 0
    assert "exif software: a\\x1b[2J\\r\\nb\\x00hidden\n" in capsys.readouterr().out


def test_damaged_metadata_are_errors_of_their_part(tmp_path: Path) -> None:
    bomb = b'<!DOCTYPE a [<!ENTITY b "bbbb">]><x:xmpmeta xmlns:x="adobe:ns:meta/">&b;</x:xmpmeta>'
    record = inspected(tmp_path, jpeg(picture(), xmp=bomb, icc_profile=b"no profile"))
    assert "EntitiesForbidden" in record["xmp"]["error"] and "error" in record["color_profile"]
    record = inspected(tmp_path, jpeg(picture(), exif=exif_with(b"no thumbnail")))
    assert "must be an image" in record["thumbnail"]["error"] and record["exif"]["orientation"] == 1
    with pytest.raises(ImageError, match="must be a complete image"):
        inspected(tmp_path, jpeg(picture(600, 400))[:-2000])


def test_a_folder_with_bad_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = tmp_path / "photos"
    (photos / "deep").mkdir(parents=True)
    (photos / "a.jpg").write_bytes(jpeg(picture(), quality=75))
    (photos / "b.jpg").write_bytes(jpeg(picture(600, 400))[:-2000])
    (photos / "c.png").write_bytes(b"no image")
    (photos / "deep" / "d.jpg").write_bytes(jpeg(picture(), quality=50))
    assert main(["inspect", "--json", "--recursive", str(photos), str(tmp_path / "none.jpg")]) == 1
    shown = capsys.readouterr()
    records = {Path(r["path"]).name: r for r in map(json.loads, shown.out.splitlines())}
    assert set(records) == {"a.jpg", "b.jpg", "c.png", "d.jpg", "none.jpg"}
    assert records["a.jpg"]["jpeg"]["quality"] == 75 and records["d.jpg"]["jpeg"]["quality"] == 50
    assert all("error" in records[name] for name in ("b.jpg", "c.png", "none.jpg"))
    assert shown.err.count("\n") == 3
    assert main(["inspect", str(photos / "*.jpg"), str(photos / "a.jpg")]) == 1
    shown = capsys.readouterr()
    assert shown.out.count("sha256") == 1 and "jpeg tables: libjpeg's for quality 75\n" in shown.out
    assert "Traceback" not in shown.err and shown.err.count("\n") == 1


def test_the_record_of_a_prediction(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(picture()))
    whole = inspect_photo(tmp_path / "a.jpg")
    short = provenance(tmp_path / "a.jpg")
    assert short.pop("jpeg") == {k: v for k, v in whole.pop("jpeg").items() if k != "quantization"}
    assert short == {k: v for k, v in whole.items() if k != "path"}
    assert list(provenance(tmp_path / "none.jpg")) == ["error"]


class Net(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :1]


def test_predict_writes_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "frd_model.cli.predict.open_checkpoint", lambda *_, **__: Checkpoint(Net().eval(), "net")
    )
    (tmp_path / "a.jpg").write_bytes(jpeg(picture(), quality=90, exif=metadata()))
    assert main(["predict", str(tmp_path / "a.jpg"), "--out", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / "a.json").read_text())
    assert record["provenance"] == provenance(tmp_path / "a.jpg")
    assert record["provenance"]["exif"]["make"] == "Canon" and record["provenance"]["jpeg"]["quality"] == 90


def signed(data: bytes) -> bytes:
    """`data`, a JPEG, with a manifest signed by a certificate made here."""
    c2pa = pytest.importorskip("c2pa")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    def name(common: str) -> x509.Name:
        parts = ((NameOID.COMMON_NAME, common), (NameOID.ORGANIZATION_NAME, "An Organization"))
        return x509.Name([x509.NameAttribute(*part) for part in parts])

    def certificate(subject: str, public: Any, *, authority: bool) -> bytes:
        now = datetime.datetime.now(datetime.timezone.utc)
        usage = dict.fromkeys(
            ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement"), False
        )
        usage |= {"encipher_only": False, "decipher_only": False, "digital_signature": not authority}
        usage |= {"key_cert_sign": authority, "crl_sign": authority}
        builder = (
            x509.CertificateBuilder(name("root"), name(subject), public, x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(authority, None), critical=True)
            .add_extension(x509.KeyUsage(**usage), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(root.public_key()), critical=False
            )
        )
        if not authority:
            purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
            builder = builder.add_extension(purpose, critical=False)
        return builder.sign(root, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    root, leaf = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    chain = certificate("A Signer", leaf.public_key(), authority=False)
    chain += certificate("root", root.public_key(), authority=True)
    key = leaf.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    source = "http://cv.iptc.org/newscodes/digitalsourcetype/digitalCapture"
    actions = {"actions": [{"action": "c2pa.created", "digitalSourceType": source}]}
    manifest = {
        "claim_generator_info": [{"name": "a camera", "version": "1.0"}],
        "title": "a.jpg",
        "assertions": [{"label": "c2pa.actions", "data": actions}],
    }
    info = c2pa.C2paSignerInfo(c2pa.C2paSigningAlg.ES256, chain, key, None)
    out = io.BytesIO()
    with c2pa.Signer.from_info(info) as signer, c2pa.Builder(manifest) as builder:
        builder.sign(signer, "image/jpeg", io.BytesIO(data), out)
    return out.getvalue()


def test_a_manifest_that_fits_and_one_that_does_not(tmp_path: Path) -> None:
    data = signed(jpeg(picture()))
    record = inspected(tmp_path, data)
    found = record["c2pa"]
    assert found["generator"] == ["a camera 1.0"] and found["title"] == "a.jpg"
    assert (found["signed_by"], found["issuer"]) == ("A Signer", "An Organization")
    assert [action["action"] for action in found["actions"]] == ["c2pa.created"]
    assert found["validation_state"] == "Valid"
    assert record["remarks"] == ["C2PA states the digital source type digitalCapture"]
    # Another picture under the same manifest.
    changed = bytearray(data)
    changed[-30] ^= 1
    record = inspected(tmp_path, bytes(changed))
    assert record["c2pa"]["validation_state"] == "Invalid"
    assert record["remarks"][0] == "the C2PA manifest does not fit the file: assertion.dataHash.mismatch"
    assert inspected(tmp_path, jpeg(picture()))["c2pa"] is None


def test_a_manifest_elsewhere_is_not_fetched(tmp_path: Path) -> None:
    pytest.importorskip("c2pa")
    address = b"xmlns:dcterms='http://purl.org/dc/terms/' dcterms:provenance='http://127.0.0.1:9/m.c2pa' "
    data = jpeg(picture(), xmp=XMP.replace(b"xmlns:xmp=", address + b"xmlns:xmp=", 1))
    note = "the manifest is kept at http://127.0.0.1:9/m.c2pa and was not fetched"
    assert inspected(tmp_path, data)["c2pa"] == {"note": note}


def test_what_would_take_too_much_memory_or_is_missing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture().save(tmp_path / "a.png", exif=b"Exif\0\0II*\0" + bytes(5 << 20))
    assert "EXIF block must have at most 4194304 bytes" in inspect_photo(tmp_path / "a.png")["exif"]["error"]
    monkeypatch.setitem(sys.modules, "defusedxml", None)
    # Before Pillow 13 it is imported once.
    monkeypatch.setattr(Image, "ElementTree", None, raising=False)
    with pytest.warns(UserWarning, match="defusedxml"):
        record = inspected(tmp_path, jpeg(picture(), xmp=XMP))
    assert "pip install defusedxml" in record["xmp"]["error"]


def test_without_c2pa_a_line_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "c2pa", None)
    assert "pip install 'frd-kernels[c2pa]'" in inspected(tmp_path, jpeg(picture()))["c2pa"]["note"]

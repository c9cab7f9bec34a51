"""IU-CXR as on Open-i: one XML file per report, loose or in an archive, and a folder of images."""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from xml.etree.ElementTree import Element, ParseError

from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import fromstring

from medvlm_harness.data.sources.base import (
    ImageIndex,
    RawImage,
    RawStudy,
    Reading,
    ReadLog,
    canonical_stem,
    read_views,
)
from medvlm_harness.data.sources.kaggle import PROJECTIONS, SECTIONS
from medvlm_harness.errors import UserError

__all__ = ["LOOKED_FOR", "NAME", "matches", "read"]

NAME = "openi"
REPORTS, IMAGES = "ecgen-radiology", "NLMCXR_png"
LOOKED_FOR = f"{REPORTS}/*.xml, loose or in a .tgz (Open-i)"
MAX_XML_BYTES = 1_000_000  # a real report has about 9 kB
MAX_ARCHIVE_BYTES = 1_000_000_000  # unpacked
PEEK_MEMBERS = 50  # enough to tell an archive of reports from one of images without unpacking gigabytes


def matches(folder: Path) -> bool:
    """Whether reports lie in the folder, loose or in an archive."""
    return _loose(folder) is not None or _archive(folder) is not None


def read(folder: Path, log: ReadLog) -> Reading:
    """Read every report and find its images in `NLMCXR_png`, or else anywhere below the folder.

    MeSH holds Open-i's `major` values, which is what Kaggle's MeSH column holds; `automatic` ones are not read. Open-i
    names no views: they are None unless Kaggle's `indiana_projections.csv` lies in the folder too.
    """
    archive = _archive(folder)
    loose = _loose(folder)
    if loose is not None and archive is not None:
        log.note("archive_not_read", archive.name, f"{loose.name} is there")
    views, files = _views(folder, log)
    index = ImageIndex(folder, log, below=folder / IMAGES if (folder / IMAGES).is_dir() else None)
    studies: dict[str, RawStudy] = {}
    reports = _from_folder(loose, log) if loose else _from_archive(archive, log) if archive else ()
    for name, payload in reports:
        study = _study(name, payload, index, views, log)
        if study is None:
            continue
        if study.uid in studies:
            log.drop("duplicate_uid", study.uid, name)
        else:
            studies[study.uid] = study
    index.note_unlisted()
    source = loose or archive
    return Reading(NAME, folder, tuple(studies.values()), (source, *files) if source else files)


def _loose(folder: Path) -> Path | None:
    reports = folder / REPORTS
    return reports if reports.is_dir() and any(reports.glob("*.xml")) else None


def _archive(folder: Path) -> Path | None:
    for path in sorted([*folder.glob("*.tgz"), *folder.glob("*.tar.gz")]):
        try:
            with gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
                if any(member.name.endswith(".xml") for member, _ in zip(archive, range(PEEK_MEMBERS), strict=False)):
                    return path
        except (tarfile.TarError, EOFError, OSError, zlib.error):
            continue  # not an archive that can be read, so not this layout
    return None


def _from_folder(folder: Path, log: ReadLog) -> Iterator[tuple[str, bytes]]:
    root = folder.resolve()
    for path in sorted(folder.glob("*.xml")):
        if not path.resolve().is_relative_to(root):
            log.drop("escaping_path", path.name, "a link that leaves the folder")
        elif path.stat().st_size > MAX_XML_BYTES:
            log.drop("oversized_report", path.name, f"{path.stat().st_size} bytes")
        else:
            yield path.name, path.read_bytes()


def _from_archive(path: Path, log: ReadLog) -> Iterator[tuple[str, bytes]]:
    """The reports of an archive, in memory: nothing is unpacked, so no member name becomes a path."""
    total = 0
    try:
        # tarfile's own "r|gz" takes a cut-off archive for a short one; GzipFile raises.
        with gzip.open(path) as packed, tarfile.open(fileobj=packed, mode="r|") as archive:
            for member in archive:
                total += member.size
                if total > MAX_ARCHIVE_BYTES:
                    raise UserError(
                        f"{path} unpacks to more than {MAX_ARCHIVE_BYTES:,} bytes: not the reports' archive."
                    )
                if not member.name.endswith(".xml"):
                    continue
                name = PurePosixPath(member.name).name
                stream = archive.extractfile(member) if member.isfile() else None
                if stream is None:
                    log.drop("not_a_file", member.name, "a link or device in the archive")
                elif member.size > MAX_XML_BYTES:
                    log.drop("oversized_report", name, f"{member.size} bytes")
                else:
                    yield name, stream.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}): download it again.") from error


def _views(folder: Path, log: ReadLog) -> tuple[dict[str, str | None], tuple[Path, ...]]:
    table = folder / PROJECTIONS
    if not table.is_file():
        return {}, ()
    return {canonical_stem(name): view for _, name, view in read_views(table, log)}, (table,)


def _study(name: str, payload: bytes, index: ImageIndex, views: dict[str, str | None], log: ReadLog) -> RawStudy | None:
    try:
        root: Element = fromstring(payload, forbid_dtd=True)
    except (ParseError, DefusedXmlException, ValueError) as error:
        log.drop("broken_xml", name, str(error))
        return None
    node = root.find("uId")
    uid = (node.get("id", "") if node is not None else "").removeprefix("CXR").strip()
    if not uid:
        log.drop("missing_uid", name)
        return None
    texts = {node.get("Label", "").lower(): "".join(node.itertext()).strip() for node in root.iter("AbstractText")}
    images = []
    for parent in root.iter("parentImage"):
        image = parent.get("id", "")
        if file := index.find(image, other_names=True):
            images.append(RawImage(file, views.get(canonical_stem(image))))
    return RawStudy(
        uid,
        tuple(images),
        **{section: texts.get(section, "") for section in SECTIONS},
        mesh=tuple(text for node in root.findall("MeSH/major") if (text := (node.text or "").strip())),
    )

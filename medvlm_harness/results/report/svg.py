"""A figure as SVG inside an HTML page: text as text, no id twice, nothing that reaches beyond it."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from markupsafe import Markup

from medvlm_harness.results.plots import house_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["inline_svg"]

SVG = "http://www.w3.org/2000/svg"
LINK = "{http://www.w3.org/1999/xlink}href"
REFERRED = re.compile(r"url\(#([^)]+)\)")
UNTURNED = re.compile(r"rotate\(-?0(\.0*)? [^)]*\)")
LONG = re.compile(r"(-?\d+\.\d)\d+")  # a tenth of a point is less than is seen
PLACES = frozenset({"d", "x", "y"})
USE, GROUP, DEFINITIONS = (f"{{{SVG}}}{tag}" for tag in ("use", "g", "defs"))
FONT = ("'DejaVu Sans'", "system-ui, sans-serif")  # the reader's own, which is narrower


def inline_svg(figure: Figure, name: str, prefix: str) -> Markup:
    """The figure, for a page whose elements `<name>-title` and `<name>-alt` label it.

    Args:
        figure: drawn.
        name: of letters, digits and hyphens.
        prefix: of the ids inside, likewise; short, since marks are many.
    """
    drawn = io.BytesIO()
    with house_style():
        figure.savefig(drawn, format="svg")
    root = ElementTree.fromstring(drawn.getvalue())  # noqa: S314  matplotlib wrote it just now
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style", "}title")):
                parent.remove(child)
    used = dict.fromkeys(target for one in root.iter() for target in _referred(one))
    ids = {target: f"{prefix}-{number}" for number, target in enumerate(used)}
    for one in root.iter():
        _make_plain(one, ids)
        _share_style(one)
    _unwrap(root)
    width = float(root.attrib.pop("width").removesuffix("pt"))
    del root.attrib["height"]
    root.set("style", f"width:{width * 96 / 72:.0f}px")
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-alt")
    ElementTree.register_namespace("", SVG)
    # matplotlib and ElementTree escape what stands in it.
    return Markup(ElementTree.tostring(root, encoding="unicode").replace(f' xmlns="{SVG}"', "", 1))  # noqa: S704


def _make_plain(one: ElementTree.Element, ids: Mapping[str, str]) -> None:
    """Give an element its new id, or none; shorten numbers; leave out space between elements."""
    own = one.attrib.pop("id", "")
    for key, value in list(one.attrib.items()):
        if key == LINK:
            del one.attrib[key]
            one.set("href", f"#{ids[value[1:]]}" if value[1:] in ids else value)
        elif key == "transform" and not (turned := UNTURNED.sub("", value).strip()):
            del one.attrib[key]
        else:
            value = " ".join((turned if key == "transform" else value).split())
            if key in PLACES:
                value = LONG.sub(r"\1", value)
            if key == "d" and not set("CQz") & set(value):
                value = value.replace(" L ", " ")  # points after the first are lines as they stand
            value = REFERRED.sub(lambda found: f"url(#{ids[found[1]]})", value)
            one.set(key, value.replace(*FONT).replace("; ", ";").replace(": ", ":"))
    if own in ids:
        one.set("id", ids[own])
    if not one.tag.endswith(("}text", "}tspan")):
        one.text = None
    one.tail = None


def _share_style(group: ElementTree.Element) -> None:
    """Say once, at the group, what all marks in it repeat."""
    if group.tag != GROUP or "style" in group.attrib or not all(mark.tag == USE for mark in group):
        return
    styles = {mark.get("style", "") for mark in group}
    if len(styles) == 1 and (style := styles.pop()):
        group.set("style", style.replace("; ", ";").replace(": ", ":"))
        for mark in group:
            del mark.attrib["style"]


def _unwrap(parent: ElementTree.Element) -> None:
    """Take away groups that say nothing, and definitions that define nothing."""
    for child in list(parent):
        _unwrap(child)
        bare = child.tag == GROUP and not child.attrib
        if bare or (child.tag == DEFINITIONS and not len(child)):
            place = list(parent).index(child)
            parent[place : place + 1] = list(child)


def _referred(one: ElementTree.Element) -> list[str]:
    """The ids that an element uses."""
    found = [target for value in one.attrib.values() for target in REFERRED.findall(value)]
    link = one.get(LINK, "")
    return [*found, link[1:]] if link.startswith("#") else found

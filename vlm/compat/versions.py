"""One line where a library is older or newer than those that vlm was tested with.

The tested range of each library stands in pyproject alone, from where it comes with the installed
package's own metadata. What is installed is read off the names of the folders that hold each
library's metadata, since reading these themselves takes a third of a second.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from functools import cache
from importlib import metadata

from packaging.requirements import Requirement
from packaging.version import Version

from vlm.compat.extras import ABOUT


@cache
def warn_untested() -> None:
    """Prints one line to stderr, once in a process and on the first process of a run, that names
    each library outside its tested range, the version found and the range. Never raises."""
    if os.environ.get("RANK", "0") != "0":
        return
    try:
        installed = installed_versions()
        lines = [untested(text, installed) for text in metadata.requires("vlm") or []]
    except Exception:  # what cannot be read says nothing of what works
        return
    if found := [line for line in lines if line is not None]:
        print(f"warning: vlm is not tested with {'; '.join(found)}", file=sys.stderr)


def installed_versions() -> dict[str, str]:
    """Name of each library on the path, as `same_name` writes it -> its version; of several the
    first, as imports have it. Source: PyPA specifications, "Recording installed projects"."""
    found: dict[str, str] = {}
    for folder in sys.path:
        if os.path.isdir(folder):
            for entry in os.listdir(folder):
                name, dash, version = entry.removesuffix(".dist-info").partition("-")
                if dash and entry.endswith(".dist-info"):
                    found.setdefault(same_name(name), version)
    return found


def same_name(name: str) -> str:
    """A library's name in the one of its spellings that is compared.

    >>> same_name("open_clip_torch") == same_name("Open-CLIP.torch")
    True
    """
    return re.sub(r"[-_.]+", "-", name).lower()


def untested(requirement: str, installed: Mapping[str, str]) -> str | None:
    """What to say of the library that a requirement names, as metadata has it; None where it is in
    the range, missing (which whoever needs it says, see `vlm.compat.extras`), or not required here
    (by the tests, on another system).

    >>> untested("torch>=2.14,<2.15", {"torch": "2.15.0+cpu"})
    'torch 2.15.0+cpu (newer than >=2.14,<2.15)'
    >>> untested("torch>=2.14,<2.15", {"torch": "2.14.1"})
    >>> untested("faiss-cpu>=1.11,<2; extra == 'retrieval'", {"faiss-cpu": "1.9"})
    'faiss-cpu 1.9 (older than >=1.11,<2)'
    """
    wanted = Requirement(requirement)
    found = installed.get(same_name(wanted.name))
    if found is None or not _is_wanted(wanted):
        return None
    version = Version(found)
    if wanted.specifier.contains(version, prereleases=True):
        return None
    lowest = [Version(s.version) for s in wanted.specifier if s.operator == ">="]
    way = "older" if any(version < least for least in lowest) else "newer"
    bounds = ",".join(sorted(map(str, wanted.specifier), reverse=True))
    return f"{wanted.name} {found} ({way} than {bounds})"


def _is_wanted(requirement: Requirement) -> bool:
    """Whether vlm requires this here, by itself or by one of the extras of its tasks."""
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *ABOUT))

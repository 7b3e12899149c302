"""Each workload is the same in every process, counts what it says, and can be trained; those with real weights are slow."""

import hashlib
import importlib
import itertools
import math
import subprocess
import sys
import zipfile

import pytest
import torch
from torch import Tensor, nn

import peftkit
from peftkit import plugins
from peftkit.bench.subject import Subject
from peftkit.errors import PluginError, WorkloadError
from peftkit.workloads import MODULES, assets, pitch, voices

TINY = ("tiny-mlp", "tiny-bert", "tiny-llama")
REAL = ("cnn-pitch", "lstm-voices", "minilm-sentiment", "vit-digits", "smollm2-reviews")
SHAPES = tuple(name for name in MODULES if name not in TINY + REAL)
CPU = torch.device("cpu")


def tensors(batch):
    parts = batch.values() if isinstance(batch, dict) else batch
    return [part for part in parts if isinstance(part, Tensor)]


def state(workload):
    torch.manual_seed(0)
    return workload.model().state_dict()


def check(name):
    """What must hold of any workload: its base, its batches, what it counts, and one training step."""
    workload = plugins.workload(name)
    workload.prepare()
    assert workload.name == name
    assert workload.summary

    first, second = state(workload), state(workload)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)

    one, again, other = (next(workload.batches(seed)) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(again), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))
    counted = tensors(one)[0].shape[:2] if workload.unit == "tokens" else tensors(one)[0].shape[:1]
    assert math.prod(counted) == workload.per_step
    shapes = [[t.shape for t in tensors(batch)] for batch in itertools.islice(workload.batches(0), 3)]
    assert shapes[0] == shapes[1] == shapes[2]

    subject = Subject(workload, peftkit.LoRA(), CPU)
    model = subject.wrapped()
    optimizer = subject.optimizer(model)
    losses = [subject.step(model, optimizer, one).item() for _ in range(3)]
    assert losses[2] < losses[0]
    with torch.no_grad():
        assert workload.output(model, one).isfinite().all()
    return workload, model


@pytest.mark.parametrize("name", TINY)
def test_tiny_workloads(name):
    """The workloads for tests hold what every workload promises."""
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_synthetic_workloads(name):
    """So do the larger shapes."""
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_workloads(name):
    """And those with real weights; their task is within its bounds, what they know is not forgotten by doing nothing."""
    try:
        workload, model = check(name)
    except assets.AssetError as error:
        pytest.skip(str(error))
    frozen = Subject(workload, peftkit.Frozen(), CPU).wrapped()
    frozen.eval()
    model.eval()
    with torch.no_grad():
        values = [workload.evaluate(frozen, split) for split in ("validation", "test")]
        remembered = workload.forgetting(frozen)
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
        assert workload.forgetting(model) != remembered  # what is spoilt shows
    assert all(math.isfinite(value) for value in values)
    assert values[0] != values[1]
    if workload.metric.unit == "%":
        assert all(0 <= value <= 100 for value in values)
    if workload.forgets.startswith("cosine"):
        assert remembered == pytest.approx(1, abs=1e-5)
    else:
        assert remembered == pytest.approx({"cnn-pitch": 100, "vit-digits": 96, "smollm2-reviews": 4}[name], rel=0.2)


def test_listing_workloads_imports_none():
    """The list is there without importing any workload, and one is imported alone."""
    code = (
        "import sys; from peftkit import plugins; listed = plugins.workloads();"
        "before = [m for m in sys.modules if m.startswith('peftkit.workloads.')];"
        "plugins.workload('tiny-mlp'); print(before, 'peftkit.workloads.text' in sys.modules, 'transformers' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split("\n")[0] == "[] False False"


def test_every_built_in_is_where_the_list_says():
    """The names that are listed without an import are those that the modules offer, each once."""
    offered = {
        (cls.name, module): cls.summary
        for module in set(MODULES.values())
        for cls in importlib.import_module(f"peftkit.workloads.{module}").peftkit_workloads()
    }
    assert sorted(offered) == sorted(MODULES.items())
    assert len(set(offered.values())) == len(MODULES)


def test_an_unknown_workload_is_named():
    """The error says which are installed, and what is near."""
    with pytest.raises(WorkloadError, match=r"did you mean .*'tiny-mlp'"):
        plugins.workload("tiny-mpl")


FAULTS = {
    "an object": ("[One()]", "the class itself"),
    "no workload": ("[int]", "no subclass of peftkit.Workload"),
    "an abstract class": ("[Half]", "does not define batches"),
    "another name": ("[]", "offers [], not 'one' once"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_offer_is_refused(fault, tmp_path, monkeypatch):
    """What a plugin offers instead of a workload is an error that names its package and the fault; nothing else breaks."""
    answer, words = FAULTS[fault]
    module = f"faulty_{abs(hash(fault))}"
    (tmp_path / f"{module}.py").write_text(
        "import peftkit\n"
        "class Half(peftkit.Workload):\n    name = 'one'\n    def model(self): ...\n"
        "class One(Half):\n    def batches(self, seed): ...\n"
        f"@peftkit.hookimpl\ndef peftkit_workloads():\n    return {answer}\n"
    )
    info = tmp_path / "faulty-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[peftkit.workloads]\none = {module}\ntiny-mlp = {module}\n")
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(PluginError, match=r"workload .one. from faulty 1\.0") as caught:
        plugins.workload("one")
    assert words in str(caught.value)
    assert plugins.workload("tiny-mlp").per_step == 16  # a built-in's name is the built-in's
    states = {info.name: info.state for info in plugins.plugins() if info.package == "faulty"}
    assert states == {"one": "broken", "tiny-mlp": "ambiguous"}


def test_a_model_without_a_loss_is_an_error():
    """The default loss is the model's own, and where there is none the error says what to give."""

    class Plain(peftkit.Workload):
        name, summary, per_step = "plain", "", 1

        def model(self):
            return nn.Linear(2, 2)

        def batches(self, seed):
            yield torch.ones(1, 2)

    with pytest.raises(WorkloadError, match=r"'plain'.*no loss"):
        Plain().loss(Plain().model(), torch.ones(1, 2))


# ------------------------------------------------------------------------------------------ synthetic signals


def test_tones_have_the_pitch_they_say():
    """The autocorrelation of a clean tone peaks at its period; a tone of the task is as loud as its noise."""
    frames, cents = pitch.tones(20, torch.Generator().manual_seed(0), clean=True)
    hertz = 10 * 2 ** (cents / 1200)
    for frame, expected in zip(frames, hertz, strict=True):
        spectrum = torch.fft.rfft(frame, 8192).abs() ** 2
        correlation = torch.fft.irfft(spectrum)[:400]
        period = pitch.RATE / expected.item()
        around = correlation[round(period * 0.9) : round(period * 1.1) + 2]
        found = int(around.argmax()) + round(period * 0.9)
        assert abs(found - period) <= 0.75
    noisy, _ = pitch.tones(200, torch.Generator().manual_seed(1), clean=False)
    assert noisy.var(1).mean().item() == pytest.approx(2, rel=0.05)


def test_mel_spectra_are_those_of_a_sine():
    """A pure tone's energy is in the band that holds its frequency, and all bands together cover the spectrum."""
    time = torch.arange(voices.RATE) / voices.RATE
    for hertz in (300.0, 1000.0, 4000.0):
        bands = voices.mel(torch.sin(2 * math.pi * hertz * time)[None])[0].mean(0)
        centre = torch.linspace(0, voices.RATE / 2, voices.WINDOW // 2 + 1)
        best = voices._filters()[int(bands.argmax())]
        assert best[(centre - hertz).abs().argmin()] > 0
    assert bool((voices._filters().sum(1) > 0).all())
    assert voices.mel(torch.zeros(2, voices.HOP * (voices.FRAMES - 1))).shape == (2, voices.FRAMES, voices.BANDS)


def test_utterances_are_balanced_and_differ():
    """Each voice has as many utterances as another, no two are alike, and no part shares one with another."""
    parts = {part: voices.utterances(part) for part in ("train", "others")}
    for spectra, labels in parts.values():
        assert labels.bincount().unique().numel() == 1
        assert spectra.flatten(1).unique(dim=0).shape[0] == len(spectra)
    together = torch.cat([spectra.flatten(1) for spectra, _ in parts.values()])
    assert together.unique(dim=0).shape[0] == len(together)


# ------------------------------------------------------------------------------------------------ assets


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTKIT_CACHE", str(tmp_path))
    return tmp_path


def archive(folder, name="some_asset-1.0-py3-none-any.whl", **changes):
    """A wheel of one file in the cache folder, as one who has no network would put it there."""
    with zipfile.ZipFile(folder / name, "w") as wheel:
        wheel.writestr("some/file.txt", "content")
    digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    facts = {
        "what": "some file",
        "requirement": "some-asset==1.0",
        "filename": name,
        "sha256": digest,
        "megabytes": 0.1,
    }
    return assets.Archive(**{**facts, **changes})


def test_an_archive_put_there_by_hand_is_unpacked_once(cache, monkeypatch):
    """Without a network: the archive beside the cache is used, and from then on its folder alone."""
    monkeypatch.setattr(assets, "_download", lambda *_: pytest.fail("it was downloaded"))
    found = archive(cache)
    folder = assets.unpacked(found)

    assert (folder / "some" / "file.txt").read_text() == "content"
    (cache / found.filename).unlink()
    assert assets.unpacked(found) == folder


def test_an_archive_with_other_content_is_refused(cache):
    """What has not the pinned digest is not unpacked; the error has both digests."""
    found = archive(cache, sha256="0" * 64)
    with pytest.raises(assets.AssetError, match=f"{'0' * 64}") as caught:
        assets.unpacked(found)
    assert hashlib.sha256((cache / found.filename).read_bytes()).hexdigest() in str(caught.value)
    assert [path.name for path in cache.iterdir()] == [found.filename]


def test_a_download_that_fails_says_what_to_do(cache, monkeypatch):
    """pip's own words, and both remedies: the network, and the file put there by hand."""
    found = archive(cache)
    (cache / found.filename).unlink()
    failed = subprocess.CompletedProcess([], 1, stdout="ERROR: no such host")
    monkeypatch.setattr(assets.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(assets.AssetError, match="no such host") as caught:
        assets.unpacked(found)
    assert found.filename in str(caught.value)
    assert not list(cache.iterdir())


def test_what_is_made_once_is_complete_or_absent(cache):
    """A folder that could not be filled leaves nothing behind, and the next try begins anew."""

    def fails(fresh):
        (fresh / "half.txt").write_text("half")
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        assets.kept("made", "something", fails)
    assert not list(cache.iterdir())
    folder = assets.kept("made", "something", lambda fresh: (fresh / "whole.txt").write_text("whole"))
    assert [path.name for path in folder.iterdir()] == ["whole.txt"]

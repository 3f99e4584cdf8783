import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vlm
from tests import tiny
from tests.folders import public
from tests.reference import tiny_clip, tiny_siglip
from vlm import weights
from vlm.data.example import BadRow
from vlm.lora import Lora, add_lora
from vlm.pixels import BadImage
from vlm.pixels.decode import FORMATS
from vlm.retrieval import image_files as image_files
from vlm.retrieval import index as index_file
from vlm.retrieval import nearest
from vlm.retrieval.embed_rows import Reading
from vlm.retrieval.fingerprint import Fingerprint, fingerprint_of
from vlm.retrieval.image_files import SUFFIXES, find_images
from vlm.retrieval.index import File, Index

EARLIER = Path(__file__).parent / "data" / "earlier_index"
SKIP = Reading(bad_rows="skip")
FINGERPRINT = Fingerprint(
    model="m", dtype="auto", weights="w", settings="s", preprocessing="p", dim=6
)


@pytest.fixture(scope="module")
def model():
    return public()


@pytest.fixture
def folder(tmp_path):
    """Five images at several depths, and what is none."""
    root = tmp_path / "images"
    for number, name in enumerate(["b.png", "a.JPG", "sub/c.webp", "sub/deep/d.bmp", "sub/e.tif"]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        tiny.image(number, (20 + number, 31)).save(root / name)
    (root / "text.txt").write_text("no image")
    (root / ".hidden").mkdir()
    for name in (".f.png", ".hidden/g.png"):
        tiny.image(9).save(root / name)
    return root


def unit(rows, width=6, seed=0):
    vectors = np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def made(vectors, approximate=False):
    """An index of given vectors."""
    files = [File(f"{i:05}.png", i, 1) for i in range(len(vectors))]
    engine, clusters = nearest.engine_of(vectors, approximate)
    return Index(engine, FINGERPRINT, Path("/images"), files, clusters=clusters)


@pytest.mark.parametrize("queries", [1, 40])
def test_exact_search_equals_the_whole_product(tmp_path, queries):
    vectors, queries = unit(500), unit(queries, seed=1)
    index = made(vectors)
    index.save(tmp_path / "index")
    for searched in (index, Index.load(tmp_path / "index")):
        scores, paths = searched.search(torch.from_numpy(queries), 7)
        product = queries @ vectors.T
        order = np.argsort(-product, axis=1)[:, :7]
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, np.take_along_axis(product, order, 1), atol=1e-6)
        assert [[int(path.stem) for path in row] for row in paths] == order.tolist()
    assert np.array_equal(searched.vectors(), vectors)
    scores, paths = index.search(queries * 3, 1000)
    assert scores.shape == (len(queries), 500)
    assert len(set(paths[0])) == 500


def test_equal_vectors_come_in_the_order_of_their_paths():
    _, (paths,) = made(np.repeat(unit(3), 4, axis=0)).search(unit(3)[1:2], 4)
    assert [int(path.stem) for path in paths] == [4, 5, 6, 7]


def test_opened_vectors_are_mapped_into_memory(tmp_path):
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not list what is mapped")
    made(unit(5000)).save(tmp_path / "index")
    index = Index.load(tmp_path / "index")
    assert str(tmp_path / "index") in maps.read_text()
    assert len(index) == 5000


def test_clusters_find_the_share_that_they_state(tmp_path):
    """In vectors that lie in groups, as images' do."""
    centres = unit(60, 6, seed=2)[np.arange(6000) % 60]
    vectors = centres + 0.3 * unit(6000, 6, seed=3)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    made(vectors, approximate=True).save(tmp_path / "index")
    index = Index.load(tmp_path / "index")
    told = index.clusters
    assert nearest.RECALL <= told.recall <= 1
    assert told.probes < told.clusters
    assert np.array_equal(index.vectors(), vectors)
    rows = np.arange(7, 6000, 30)
    _, found = index.search(vectors[rows], 11)
    _, true = made(vectors).search(vectors[rows], 11)
    share = np.mean([len(set(a) & set(b)) - 1 for a, b in zip(found, true)]) / 10
    assert abs(share - told.recall) < 0.05
    every, _ = index.search(vectors[:3], 6000)  # more than the probed clusters hold
    np.testing.assert_allclose(every, np.sort(vectors[:3] @ vectors.T)[:, ::-1], atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 50])
def test_few_vectors_in_clusters_are_searched_exactly(count):
    index = made(unit(count), approximate=True)
    assert index.clusters == nearest.Clusters(clusters=1, probes=1, recall=1.0)
    exact, _ = made(unit(count)).search(unit(4, seed=1), 5)
    np.testing.assert_allclose(index.search(unit(4, seed=1), 5)[0], exact, atol=1e-6)


@pytest.mark.parametrize(
    ("queries", "k", "message"),
    [
        (unit(2, 5), 3, r"expected vectors \[N, 6\], found \[2, 5\]"),
        (unit(1)[0], 3, r"expected vectors \[N, 6\], found \[6\]"),
        (unit(3) * [[1], [0], [np.nan]], 3, r"zero or not finite: \['row 1', 'row 2'\]"),
        (unit(3) * [[1], [1], [np.inf]], 3, r"zero or not finite: \['row 2'\]"),
        (unit(3), 0, "k must be at least 1, found 0"),
    ],
)
def test_queries_without_sense_are_refused(queries, k, message):
    with pytest.raises(ValueError, match=message):
        made(unit(9)).search(queries, k)


def test_suffixes_are_those_of_the_formats_that_are_opened():
    Image.init()
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
    assert set(SUFFIXES) == known - {".pfm"}  # which holds floats


def test_images_are_found_at_any_depth_each_once(folder):
    names = ["a.JPG", "b.png", "sub/c.webp", "sub/deep/d.bmp", "sub/e.tif"]
    assert find_images([folder]) == [folder / name for name in names]
    shown = find_images([folder / "b.png", folder / "text.txt", folder])
    assert shown[:2] == [folder / "b.png", folder / "text.txt"]
    assert len(shown) == 6
    (folder / "none").mkdir()
    for name in ("a.txt", ".b.png"):
        (folder / "none" / name).touch()
    for paths, message in (
        ([], "name at least one image or folder"),
        ([folder / "x.png"], r"x\.png: expected an image or a folder, found nothing"),
        ([folder / "none"], r"none: expected images \(\.png.*found none among 2 files"),
    ):
        with pytest.raises(ValueError, match=message):
            find_images(paths)


def test_built_index_holds_every_image_under_its_path(model, folder, tmp_path):
    index = Index.build(folder, model, source="runs/x", out=tmp_path / "index")
    paths = find_images([folder])
    assert [folder / file.path for file in index.files] == paths
    np.testing.assert_allclose(index.vectors(), model.embed_images(paths), atol=1e-6)
    assert index.changes == (5, 0, 0, 0, [])
    opened = Index.load(tmp_path / "index")
    assert (opened.fingerprint, opened.folder) == (fingerprint_of(model, "runs/x"), folder)
    scores, (found,) = opened.search(model.embed_images([paths[3]]), 2)
    assert found[0] == paths[3]
    assert abs(scores[0, 0] - 1) < 1e-6
    scores, (found,) = opened.search(model.embed_texts(["cat"]), 5)
    product = model.embed_texts(["cat"]) @ model.embed_images(paths).T
    np.testing.assert_allclose(scores, product.sort(descending=True).values, atol=1e-6)
    again = Index.build(folder, model, source="x", reading=Reading(batch=2, workers=2))
    np.testing.assert_allclose(again.vectors(), index.vectors(), atol=1e-6)


@pytest.mark.parametrize("approximate", [False, True])
def test_second_build_embeds_only_what_is_new_or_changed(model, folder, tmp_path, approximate):
    out = tmp_path / "index"
    options = dict(source="x", out=out, approximate=approximate)
    Index.build(folder, model, **options)
    written = os.listdir(out), (out / "index.json").stat().st_mtime_ns
    seen = []
    hook = model.module.tokenizer.register_forward_hook(lambda *args: seen.append(len(args[1][0])))
    assert Index.build(folder, model, **options).changes == (0, 0, 5, 0, [])
    assert (os.listdir(out), (out / "index.json").stat().st_mtime_ns) == written
    (folder / "b.png").unlink()
    tiny.image(7, (50, 40)).save(folder / "sub/c.webp")
    tiny.image(8).save(folder / "sub/new.png")
    index = Index.build(folder, model, **options)
    hook.remove()
    assert index.changes == (1, 1, 3, 1, [])
    assert sum(seen) == 2
    fresh = Index.build(folder, model, source="x")
    assert index.files == Index.load(out).files == fresh.files
    np.testing.assert_allclose(Index.load(out).vectors(), fresh.vectors(), atol=1e-6)
    assert sum(name.startswith("vectors-") for name in os.listdir(out)) == 1
    exact = Index.build(folder, model, source="x", out=out)
    assert exact.clusters is None


def test_stopped_build_keeps_what_it_has_and_goes_on(model, folder, tmp_path, monkeypatch):
    """An image that is cut off is seen only when it is decoded; an interrupt comes at any time."""
    out, cut = tmp_path / "index", folder / "sub/c.webp"
    whole = (folder / "b.png").read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    one = Reading(batch=1)
    with pytest.raises(BadRow, match=r"^[^ ]*c\.webp: expected a whole PNG, found a damaged"):
        Index.build(folder, model, source="x", out=out, reading=one)
    assert [file.path for file in Index.load(out).files] == ["a.JPG", "b.png"]
    assert not Index.load(out).complete
    cut.write_bytes(whole)
    embed = model.module.embed_images
    calls = []

    def interrupted(groups):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return embed(groups)

    monkeypatch.setattr(model.module, "embed_images", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Index.build(folder, model, source="x", out=out, reading=one)
    assert len(Index.load(out)) == 4
    monkeypatch.undo()
    index = Index.build(folder, model, source="x", out=out)
    assert index.changes == (1, 0, 4, 0, [])
    assert Index.load(out).complete
    with pytest.raises(ValueError, match="batch must be at least 1, found 0"):
        Index.build(folder, model, source="x", reading=Reading(batch=0))


def test_bad_images_are_named_or_skipped_and_counted(model, folder, tmp_path):
    for name in ("x.png", "y.jpg"):
        (folder / name).write_text("no image")
    with pytest.raises(BadImage, match=r"2 bad images: .*x\.png: expected .*y\.jpg: expected"):
        Index.build(folder, model, source="x", out=tmp_path / "index")
    assert not (tmp_path / "index").exists()
    index = Index.build(folder, model, source="x", out=tmp_path / "index", reading=SKIP)
    assert index.changes[:4] == (5, 0, 0, 0)
    assert [row.name for row in index.changes.skipped] == [
        str(folder / name) for name in ("x.png", "y.jpg")
    ]
    assert index.changes.skipped[0].reason.startswith("expected an image")
    assert len(Index.load(tmp_path / "index")) == 5
    written = os.listdir(tmp_path / "index")
    again = Index.build(folder, model, source="x", out=tmp_path / "index", reading=SKIP)
    assert (again.changes[:4], len(again.changes.skipped)) == ((0, 0, 5, 0), 2)
    assert os.listdir(tmp_path / "index") == written
    (folder / "a.JPG").write_text("no image")
    index = Index.build(folder, model, source="x", out=tmp_path / "index", reading=SKIP)
    assert (index.changes[:4], len(index), len(index.changes.skipped)) == ((0, 0, 4, 0), 4, 3)
    for path in find_images([folder]):
        path.write_text("no image")
    with pytest.raises(ValueError, match=r"none of 7 images can be read, .*expected an image"):
        Index.build(folder, model, source="x", out=tmp_path / "index", reading=SKIP)
    with pytest.raises(ValueError, match="nowhere: expected a folder of images, found none"):
        Index.build(tmp_path / "nowhere", model, source="x")


def test_links_that_lead_nowhere_are_named_or_skipped(model, folder, tmp_path):
    links = [folder / "sub" / "x.png", folder / "y.png"]
    for link, target in zip(links, ("gone.png", "y.png")):  # to nothing, and to itself
        link.symlink_to(target)
    with pytest.raises(BadImage, match=r"2 bad images: .*x\.png: expected .*y\.png: expected"):
        Index.build(folder, model, source="x")
    index = Index.build(folder, model, source="x", reading=SKIP)
    assert index.changes[:4] == (5, 0, 0, 0)
    assert [row.name for row in index.changes.skipped] == [str(link) for link in links]
    assert index.changes.skipped[0].reason.startswith("expected an image file, found: No such")
    lone = tmp_path / "lone"
    lone.mkdir()
    (lone / "x.png").symlink_to("gone.png")
    with pytest.raises(ValueError, match=r"none of 1 images can be read, .*: No such file"):
        Index.build(lone, model, source="x", reading=SKIP)


def test_room_on_the_disk_is_asked_for_before_images_are_embedded(
    model, folder, tmp_path, monkeypatch
):
    usage = weights.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda _: usage._replace(free=10**6))
    monkeypatch.setattr(model.module, "embed_images", lambda _: pytest.fail("embedded"))
    with pytest.raises(OSError, match=r"index: needs .* 1 MB free; name a folder on another disk"):
        Index.build(folder, model, source="x", out=tmp_path / "index")


def test_several_processes_are_refused(model, folder, monkeypatch):
    """Each would index a share of the images only."""
    several = type("Several", (), {"num_processes": 2})
    monkeypatch.setattr(image_files, "Accelerator", several)
    with pytest.raises(ValueError, match="embedded by one process, found 2"):
        Index.build(folder, model, source="x")


def test_model_without_directions_is_named_with_the_image(folder):
    given = public()
    with torch.no_grad():
        given.module.image_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"zero or not finite: \['.*a\.JPG'"):
        Index.build(folder, given, source="x")


def test_fingerprint_tells_weights_and_preprocessing_apart(model, tmp_path, monkeypatch):
    model.save(tmp_path / "run")
    fingerprint = fingerprint_of(model, tmp_path / "run")
    assert fingerprint.model == str(tmp_path / "run")
    shutil.move(tmp_path / "run", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pt").touch()
    found = fingerprint_of(model, "a.pt?model=ViT-B-32")
    assert found.model == f"{tmp_path}/a.pt?model=ViT-B-32"
    opened = vlm.load(tmp_path / "moved")
    assert fingerprint.agrees(fingerprint_of(opened, tmp_path / "moved"))
    with torch.no_grad():
        opened.module.text_head.bias[0] += 1e-6
    other = fingerprint_of(opened, "x")
    assert (other.weights != fingerprint.weights, other.preprocessing) == (
        True,
        fingerprint.preprocessing,
    )
    opened.module.text_head.bias.data[0] -= 1e-6
    opened.module.tokenizer.register_buffer("running_mean", torch.zeros(1))
    counted = fingerprint_of(opened, "x").weights
    opened.module.tokenizer.running_mean[0] = 1
    assert len({fingerprint.weights, counted, fingerprint_of(opened, "x").weights}) == 3
    for change in (dict(lower_case=True), dict(length=11), dict(end_id=5)):
        given = public()
        vars(given.processor).update(change)
        other = fingerprint_of(given, "x")
        assert (other.weights, other.preprocessing != fingerprint.preprocessing) == (
            fingerprint.weights, True,
        )  # fmt: skip
        assert not fingerprint.agrees(other)


def test_fingerprint_tells_computations_apart_that_share_their_weights(tmp_path):
    """Neither an activation nor a pool, nor LoRA's scale, is among the tensors."""
    public("class").save(tmp_path)
    fingerprint = fingerprint_of(vlm.load(tmp_path), tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    text = values["text"] | {"text_config": values["text"]["text_config"] | {"hidden_act": "relu"}}
    for change in ({"text": text}, {"pool": {"kind": "mean"}}):
        path.write_text(json.dumps(values | change))
        other = fingerprint_of(vlm.load(tmp_path), tmp_path)
        assert other.settings != fingerprint.settings
        assert (other.weights, other.preprocessing) == (
            fingerprint.weights,
            fingerprint.preprocessing,
        )
        assert not other.agrees(fingerprint)
    twins = []
    for alpha in (2, 4):
        given = public()
        add_lora(given.module, {"text": Lora(rank=2, alpha=alpha)})
        twins.append(fingerprint_of(given, "x"))
    assert twins[0].weights == twins[1].weights
    assert not twins[0].agrees(twins[1])


@pytest.mark.parametrize("write", [tiny_clip.write_folder, tiny_siglip.write_folder])
def test_fingerprint_of_a_published_model_is_that_of_its_native_folder(tmp_path, write):
    write(tmp_path / "published")
    published = vlm.load(tmp_path / "published")
    published.save(tmp_path / "native")
    native = vlm.load(tmp_path / "native")
    assert fingerprint_of(native, "x") == fingerprint_of(published, "x")


def test_second_build_with_a_moved_model_says_where_it_is(model, folder, tmp_path, monkeypatch):
    out = tmp_path / "index"
    first = Index.build(folder, model, source="one", out=out)
    written = [path.name for path in out.glob("vectors-*")]
    monkeypatch.setattr(model.module, "embed_images", lambda _: pytest.fail("embedded again"))
    index = Index.build(folder, model, source="two", out=out)
    assert index.changes == (0, 0, 5, 0, [])
    opened = Index.load(out)
    assert opened.fingerprint == index.fingerprint == fingerprint_of(model, "two")
    assert (opened.files, opened.folder) == (first.files, folder)
    assert np.array_equal(opened.vectors(), first.vectors())
    assert [path.name for path in out.glob("vectors-*")] == written


def test_index_of_another_model_is_refused_with_both_named(model, folder, tmp_path):
    Index.build(folder, model, source="one", out=tmp_path / "index")
    index = Index.load(tmp_path / "index")
    for other in (public(width=8), public(seed=1)):
        theirs = fingerprint_of(other, "two")
        with pytest.raises(ValueError, match=r"index: built with one \(width 10") as caught:
            Index.build(folder, other, source="two", out=tmp_path / "index")
        for value in (theirs.model, theirs.weights, theirs.dim, index.fingerprint.weights):
            assert str(value) in str(caught.value)
    with pytest.raises(ValueError, match=r"expected vectors \[N, 10\], found \[1, 8\]"):
        index.search(public(width=8).embed_texts(["a"]))
    with pytest.raises(ValueError, match=r"expected an index of .*sub, found one of .*images"):
        Index.build(folder / "sub", model, source="one", out=tmp_path / "index")


def test_place_with_other_things_is_left_alone(model, folder, tmp_path):
    for out, found in ((folder, r"found \['a\.JPG'"), (folder / "text.txt", "found a file")):
        before = sorted(os.listdir(folder))
        with pytest.raises(ValueError, match=found):
            Index.build(folder, model, source="x", out=out)
        assert sorted(os.listdir(folder)) == before


def test_index_of_an_earlier_version_is_read_and_written_as_today(tmp_path):
    """`data/earlier_index` holds `made(unit(5))` as version 2 wrote it."""
    folder = tmp_path / "index"
    shutil.copytree(EARLIER, folder)
    index = Index.load(folder)
    assert (index.fingerprint, index.files) == (FINGERPRINT, made(unit(5)).files)
    assert np.array_equal(index.vectors(), unit(5))
    moved = replace(FINGERPRINT, model="elsewhere")
    index_file._write_fingerprint(folder, moved)
    head = json.loads((folder / "index.json").read_text())
    assert (head["version"], "origin" in head) == (3, False)
    assert Index.load(folder).fingerprint == moved


def test_failed_write_leaves_the_old_index_whole(tmp_path, monkeypatch):
    out = tmp_path / "index"
    made(unit(5)).save(out)

    def fail(*_):
        raise OSError("disk gone")

    with monkeypatch.context() as patched:
        patched.setattr(index_file.os, "replace", fail)
        with pytest.raises(OSError, match="disk gone"):
            made(unit(9)).save(out)
    assert len(Index.load(out)) == 5
    made(unit(7)).save(out)
    assert len(Index.load(out)) == 7
    assert len(list(out.glob("vectors-*"))) == 1


def test_broken_index_is_named(tmp_path):
    out = tmp_path / "index"
    made(unit(5)).save(out)
    with pytest.raises(ValueError, match="nothing: expected an index"):
        Index.load(tmp_path / "nothing")
    file = out / "index.json"
    text = file.read_text()
    values = json.loads(text)
    for changed, message in (
        (text[:-9], r"index\.json: not JSON"),
        ("[]", r"index\.json: expected the file of an index"),
        (json.dumps(values | {"version": 9}), "expected version 3 or 2, found 9"),
        (json.dumps(values | {"surplus": 1}), r"unknown keys \['surplus'\]"),
        (json.dumps(values | {"files": [[1]]}), r"files: expected rows of path, time, size"),
        (json.dumps(values | {"files": None}), r"files: expected rows of path, time, size"),
        (
            json.dumps(values | {"files": values["files"][1:]}),
            r"faiss: expected vectors \[4, 6\], found \[5, 6\]",
        ),
        (json.dumps(values | {"vectors": "gone"}), "gone: expected a whole file of vectors"),
    ):
        file.write_text(changed)
        with pytest.raises(ValueError, match=message):
            Index.load(out)
    file.write_text(text)
    vectors = out / values["vectors"]
    whole = vectors.read_bytes()
    for cut in (whole[:-1], whole[:20], b"", b"no vectors at all"):
        vectors.write_bytes(cut)
        with pytest.raises(ValueError, match=r"vectors-.*: expected a whole file of vectors"):
            Index.load(out)


def test_images_that_changed_or_went_are_told(model, folder, tmp_path):
    index = Index.build(folder, model, source="x")
    tiny.image(7, (50, 40)).save(folder / "b.png")
    (folder / "a.JPG").unlink()
    faults = [index.fault(folder / name) for name in ("b.png", "a.JPG", "sub/c.webp")]
    assert faults == ["changed", "missing", ""]

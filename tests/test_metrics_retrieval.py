import itertools
import json
from functools import partial

import numpy as np
import pytest
import torch
from torch import distributed
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from vlm.metrics import ranking
from vlm.metrics.retrieval import retrieval, top_k

BLOCKS = [None, (1, 1), (3, 7), (64, 128), (1000, 1000)]


def pairs(images=37, texts=101, width=16, noise=1.0, seed=0):
    """Random embeddings, any number of texts for an image, some with none."""
    draw = torch.Generator().manual_seed(seed)
    owner = torch.randint(images - 5, (texts,), generator=draw)
    x = torch.randn(images, width, generator=draw)
    return x, x[owner] + noise * torch.randn(texts, width, generator=draw), owner


def near_ties(images=40, texts=90, width=32, seed=0):
    """Rows that differ in their last bits alone, so that fp32 tells few of the scores apart."""
    draw = torch.Generator().manual_seed(seed)
    x, y = (
        torch.randn(width, generator=draw) + 2.0**-20 * torch.randn(n, width, generator=draw)
        for n in (images, texts)
    )
    y[7], y[60] = y[3], y[3]
    return x, y, torch.randint(images, (texts,), generator=draw)


def exact_scores(x, y):
    """Scores of unit rows on the grid of 2^-26, as whole multiples of 2^-52: int64[N, M]."""
    grids = []
    for values in (x, y):
        values = np.asarray(values, np.float64)
        unit = (values / np.sqrt((values**2).sum(1, keepdims=True))).astype(np.float32)
        grids.append(np.rint(unit * 2.0**26).astype(np.int64))
    return grids[0] @ grids[1].T


def slow_figures(scores, owner, ks=(1, 5, 10)):
    """Recalls, median rank and mAP of both directions, query by query, from whole scores [N, M]."""
    right = np.zeros(scores.shape, bool)
    right[owner, np.arange(len(owner))] = True
    directions = []
    for rows, truth in ((scores, right), (scores.T, right.T)):
        best, precision = [], []
        for row, is_right in zip(rows, truth):
            if not is_right.any():
                continue
            order = sorted(range(len(row)), key=lambda i: (-row[i], is_right[i]))  # wrong first
            places = 1 + np.flatnonzero(is_right[order])
            best.append(places[0])
            precision.append(np.mean(np.arange(1, len(places) + 1) / places))
        found = {k: np.mean(np.array(best) <= k) for k in ks}
        directions.append((found, np.median(best), np.mean(precision), best))
    return directions


def assert_equal(found, expected):
    for ours, (recall, median, precision, ranks) in zip(
        (found.image_to_text, found.text_to_image), expected, strict=True
    ):
        assert {k: value.share for k, value in ours.recall.items()} == recall
        assert ours.median_rank == median
        assert ours.mean_average_precision == pytest.approx(precision, abs=1e-12)
        assert ours.rank.tolist() == ranks


def test_figures_equal_those_counted_by_hand():
    """Image 0 at 0 degrees has texts at 10 and 60, image 1 at 40 has one at 35, image 2 at 90 none.
    To image 0 the texts come 10, 35, 60: right ones first and third. To image 1: 35, 60, 10.
    To the text at 60 the images come 40, 90, 0: its own last; to the others their own first."""
    angles = [torch.deg2rad(torch.tensor(v)) for v in ([0.0, 40, 90], [10.0, 60, 35])]
    images, texts = (torch.stack([a.cos(), a.sin()], 1) for a in angles)
    found = retrieval(images, 5 * texts, [0, 0, 1], ks=(1, 2, 3))
    to_text, to_image = found.image_to_text, found.text_to_image
    assert (to_text.query.tolist(), to_text.rank.tolist()) == ([0, 1], [1, 1])
    assert to_text.mean_average_precision == pytest.approx((np.mean([1, 2 / 3]) + 1) / 2)
    assert to_image.rank.tolist() == [1, 3, 1]
    assert [to_image.recall[k].share for k in (1, 2, 3)] == [2 / 3, 2 / 3, 1]
    assert to_image.mean_average_precision == pytest.approx((1 + 1 / 3 + 1) / 3)
    assert (to_text.median_rank, to_image.median_rank) == (1, 1)
    assert (to_text.candidates, to_image.candidates, found.images_without_text) == (3, 3, 1)


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("noise", [0.3, 1.0, 10.0])
def test_figures_equal_those_of_the_whole_score_matrix(block, noise):
    images, texts, owner = pairs(noise=noise)
    scores = functional.normalize(images) @ functional.normalize(texts).T
    found = retrieval(images, texts, owner, block=block)
    assert_equal(found, slow_figures(scores.numpy(), owner.numpy()))
    assert found.images_without_text >= 5


def test_recalls_equal_those_by_torch_topk_to_the_last_digit():
    """CLIP_benchmark's definition: a right one among torch.topk of whole fp32 scores."""
    images, texts, owner = pairs(300, 1500, 64, noise=2.0)
    scores = functional.normalize(images) @ functional.normalize(texts).T
    found = retrieval(images, texts, owner)
    for k in (1, 5, 10):
        best = scores.T.topk(k, dim=1).indices
        hits = (best == owner[:, None]).any(1)
        assert found.text_to_image.recall[k].share == hits.double().mean()
        best = owner[scores.topk(k, dim=1).indices] == torch.arange(300)[:, None]
        hits = best.any(1)[owner.unique()]
        assert found.image_to_text.recall[k].share == hits.double().mean()


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
def test_scores_that_fp32_cannot_tell_apart_are_ranked_exactly(block):
    images, texts, owner = near_ties()
    scores = exact_scores(images, texts)
    assert len(np.unique(scores.astype(np.float32) / 2.0**52)) < scores.size / 50
    assert len(np.unique(scores)) > scores.size / 2
    assert_equal(retrieval(images, texts, owner, block=block), slow_figures(scores, owner.numpy()))


@pytest.mark.parametrize("spread", [1.0, 0.25, 0.05, 2.0**-9])
@pytest.mark.parametrize("block", [(256, 256), (50, 200)])
def test_few_and_many_unsettled_scores_are_ranked_exactly(spread, block):
    """Those that are looked up one by one, and those for which a block is computed again."""
    draw = torch.Generator().manual_seed(1)
    middle, owner = torch.randn(64, generator=draw), torch.randint(320, (384,), generator=draw)
    images, texts = (middle + spread * torch.randn(n, 64, generator=draw) for n in (320, 384))
    texts[5:9], images[5:9] = texts[100:104], images[300:304]  # equal scores, to the last digit
    expected = slow_figures(exact_scores(images, texts), owner.numpy())
    assert_equal(retrieval(images, texts, owner, block=block), expected)


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
def test_wrong_candidates_come_first_of_equal_ones(block):
    """Every second text is another image's, copied: it ties with the right one and wins."""
    images = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    texts, owner = images.repeat_interleave(2, 0), torch.arange(20).repeat_interleave(2)
    owner[1::2] = owner[1::2].roll(1)
    found = retrieval(images, texts, owner, block=block)
    assert set(found.image_to_text.rank.tolist()) == {2}
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    again = retrieval(images, texts[order], owner[order], block=block)
    assert again.metrics() == found.metrics()
    assert again.text_to_image.rank.tolist() == found.text_to_image.rank[order].tolist()


def test_a_collapsed_model_finds_nothing():
    found = retrieval(np.ones((30, 4)), np.ones((90, 4)), np.arange(90) % 30, ks=(1, 29, 30))
    assert [value.share for value in found.text_to_image.recall.values()] == [0, 0, 1]
    assert found.image_to_text.median_rank == 90 - 3 + 1


@pytest.mark.parametrize("ranks", [2, 3, 50])
@pytest.mark.parametrize("make", [pairs, near_ties])
def test_shares_of_the_images_add_up_to_the_whole(ranks, make):
    """37 or 40 images on 2, 3 and 50 processes, the last of which leave some without work."""
    images, texts, owner = make()
    x, y = ranking.unit_rows(images, "images", texts, "texts")
    bounds = [len(images) * r // ranks for r in range(ranks + 1)]
    parts = [
        ranking.count_above(x, y, owner, torch.arange(*bound), block=(8, 50))
        for bound in itertools.pairwise(bounds)
    ]
    whole = ranking.count_above(x, y, owner, torch.arange(len(images)))
    assert torch.equal(sum(parts), whole)


SHARED = (pairs, near_ties, partial(pairs, images=6, texts=1))


def share(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )

    def total(counts):
        distributed.all_reduce(counts)
        return counts

    found = [
        retrieval(*make(), rank=rank, ranks=2, total=total, block=(8, 50)).metrics()
        for make in SHARED
    ]
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(found, file)
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(tmp_path):
    """37 images on two processes, and six of which one alone has a text."""
    torch.multiprocessing.spawn(share, (str(tmp_path),), nprocs=2)
    one = [retrieval(*make()).metrics() for make in SHARED]
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == json.loads(json.dumps(one))


def test_accelerate_sums_the_counts():
    from accelerate import Accelerator  # which the processes of the test above do without

    total = partial(Accelerator(cpu=True).reduce, reduction="sum")
    assert retrieval(*pairs(), total=total).metrics() == retrieval(*pairs()).metrics()


@pytest.mark.slow
def test_intervals_are_those_of_images_drawn_one_by_one():
    """Each image with its texts; the same seed gives the same interval."""
    images, texts, owner = pairs(60, 200, noise=1.5)
    found = retrieval(images, texts, owner, draws=4000, seed=3)
    assert retrieval(images, texts, owner, draws=4000, seed=3).metrics() == found.metrics()
    to_text, to_image, owner = found.image_to_text, found.text_to_image, owner.numpy()
    draw, slow = np.random.default_rng(0), []
    for _ in range(4000):
        chosen = draw.choice(len(to_text.query), len(to_text.query))
        mine = [np.flatnonzero(owner == query) for query in to_text.query[chosen]]
        slow.append(
            ((to_text.rank[chosen] <= 5).mean(), (to_image.rank[np.concatenate(mine)] <= 5).mean())
        )
    low, high = np.percentile(slow, (2.5, 97.5), axis=0)
    for direction, bounds in zip((to_text, to_image), zip(low, high)):
        recall = direction.recall[5]
        assert recall[1:] == pytest.approx(bounds, abs=0.025)
        assert 0 < recall.low < recall.share < recall.high < 1


@pytest.mark.parametrize("right", [True, False])
def test_interval_of_all_or_no_hits_is_that_of_so_many_images(right):
    """Two texts an image: those of one image are no draws of their own."""
    images = torch.eye(20)
    texts = images.repeat_interleave(2, 0)
    owner = torch.arange(20).repeat_interleave(2)
    found = retrieval(images, texts if right else texts.roll(7, 0), owner, ks=(1,))
    for direction in (found.image_to_text, found.text_to_image):
        share, low, high = direction.recall[1]
        far = 3.8415 / 23.8415
        assert share == right
        assert (low, high) == pytest.approx((1 - far, 1) if right else (0, far), rel=1e-4)


class Largest(TorchDispatchMode):
    """How many numbers the largest result of an operation has."""

    numbers = 0

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        made = call(*args, **(kwargs or {}))
        for value in made if isinstance(made, tuple | list) else [made]:
            if isinstance(value, torch.Tensor):
                self.numbers = max(self.numbers, value.numel())
        return made


def test_scores_are_never_held_whole():
    images, texts, owner = pairs(600, 3000, width=16, noise=5.0)
    with Largest() as largest:
        retrieval(images, texts, owner, block=(128, 512))
        top_k(images, texts, 5, block=(128, 512))
    assert largest.numbers == 2 * 128 * 512 < len(images) * len(texts) / 10


@pytest.mark.parametrize("setting", ["high", "medium"])
def test_allowed_lower_precision_is_not_taken(setting, monkeypatch):
    images, texts, owner = pairs(300, 600, 256, noise=3.0)
    expected = retrieval(images, texts, owner).metrics()
    backends, used, product = (torch.backends.cuda, torch.backends.mkldnn), set(), torch.mm

    def mm(*args, **kwargs):
        used.update(backend.matmul.fp32_precision for backend in backends)
        return product(*args, **kwargs)

    monkeypatch.setattr(torch, "mm", mm)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    allowed = [backend.matmul.fp32_precision for backend in backends]
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert retrieval(images, texts, owner).metrics() == expected
        assert torch.get_float32_matmul_precision() == setting
        assert [backend.matmul.fp32_precision for backend in backends] == allowed
    finally:
        torch.set_float32_matmul_precision(before)
    assert used == {"ieee"}


def test_products_of_forced_lower_precision_are_refused(monkeypatch):
    product = torch.mm
    low = lambda x, y, out: out.copy_(product(x.bfloat16(), y.bfloat16()))  # noqa: E731
    monkeypatch.setattr(torch, "mm", low)
    with pytest.raises(RuntimeError, match="lower precision"):
        retrieval(*pairs())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_embeddings_of_any_floating_type_and_length_are_compared_by_cosine(dtype):
    images, texts, owner = (t.to(dtype) if t.is_floating_point() else t for t in pairs())
    found = retrieval(images.requires_grad_(), 8 * texts, owner.int())
    expected = slow_figures(exact_scores(images.detach().double(), texts.double()), owner.numpy())
    assert_equal(found, expected)


@pytest.mark.parametrize("block", [None, (3, 7), (64, 50)])
@pytest.mark.parametrize("make", [pairs, near_ties])
@pytest.mark.parametrize("k", [1, 10, 90])
def test_top_k_equals_sorted_exact_scores(block, make, k):
    queries, candidates, _ = make()
    exact = exact_scores(queries, candidates)
    scores, rows = top_k(queries, candidates, k, block=block)
    order = np.argsort(-exact, axis=1, kind="stable")[:, :k]
    assert rows.tolist() == order.tolist()
    expected = np.take_along_axis(exact, order, 1) / 2.0**52
    assert scores.tolist() == expected.astype(np.float32).tolist()


def test_top_k_takes_the_lower_row_of_equal_ones():
    candidates = torch.randn(5, 8).repeat(40, 1)
    scores, rows = top_k(candidates[:5], candidates, 6, block=(2, 9))
    assert rows.tolist() == [[i + 5 * n for n in range(6)] for i in range(5)]
    assert torch.allclose(scores, torch.ones(5, 6))


@pytest.mark.gpu
@pytest.mark.parametrize("make", [pairs, near_ties])
def test_a_gpu_gives_the_same_bits_as_a_cpu(make):
    images, texts, owner = make()
    found = retrieval(images.cuda(), texts.cuda(), owner.cuda())
    assert found.metrics() == retrieval(images, texts, owner).metrics()
    for there, here in zip(top_k(images.cuda(), texts.cuda(), 9), top_k(images, texts, 9)):
        assert torch.equal(there.cpu(), here)


def rows(*bad, value):
    embeddings = np.random.default_rng(0).normal(size=(9, 4))
    embeddings[list(bad)] = value
    return embeddings


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(images=rows(3, value=np.nan)), ValueError, "images: NaN or infinity in row 3"),
        (dict(texts=rows(1, 8, value=np.inf)), ValueError, "texts: NaN or infinity in rows 1, 8"),
        (dict(texts=rows(*range(7), value=0)), ValueError, "0 of rows 0, 1, 2, 3, 4 and 2 more"),
        (dict(texts=np.ones((9, 5))), ValueError, "images are 4 wide, texts 5"),
        (dict(texts=np.ones((0, 4))), ValueError, r"texts: expected .* found \[0, 4\]"),
        (dict(images=np.ones(4)), ValueError, r"images: expected .* found \[4\]"),
        (dict(images=np.ones((9, 4), int)), TypeError, "images: .* found torch.int64"),
        (dict(owner=[0] * 8 + [9]), ValueError, "expected 0 to 8, found 9 for text 8"),
        (dict(owner=[-1, 9] + [0] * 7), ValueError, "found -1 for text 0 and 1 more"),
        (dict(owner=[0, 1]), ValueError, r"expected shape \[9\], found \[2\]"),
        (dict(owner=[0.5] * 9), TypeError, "image_of_text: expected whole numbers"),
        (dict(ks=(0, 5)), ValueError, r"ks: .* found \[0, 5\]"),
        (dict(ks=()), ValueError, r"ks: .* found \[\]"),
        (dict(rank=2, ranks=2), ValueError, "found rank 2 of 2"),
        (dict(ranks=2), ValueError, "total: expected a sum over the 2 processes, found None"),
        (dict(ranks=2, total=lambda t: t), ValueError, "9 images, found 4"),
        (dict(block=(0, 5)), ValueError, "block: .* found 0 and 5"),
        (dict(draws=0), ValueError, "draws: expected 1 or more, found 0"),
    ],
)
def test_bad_input_is_named(changes, error, message):
    given = dict(images=rows(value=0), texts=rows(value=0), owner=list(range(9))) | changes
    with pytest.raises(error, match=message):
        retrieval(given.pop("images"), given.pop("texts"), given.pop("owner"), **given)


@pytest.mark.parametrize("k", [0, 10])
def test_top_k_refuses_a_k_out_of_range(k):
    with pytest.raises(ValueError, match=f"k: expected 1 to 9 candidates, found {k}"):
        top_k(rows(value=0), rows(value=0), k)

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vlm.losses.contrastive import sigmoid_loss, softmax_loss

LOSSES = {"softmax": softmax_loss, "sigmoid": sigmoid_loss}
WIDTH = 8
SPLITS = {1: [[12]], 2: [[6, 6], [9, 3]], 4: [[3, 3, 3, 3], [1, 7, 1, 3]]}
"""By the number of ranks: how 12 pairs are split over them."""
BLOCKS = [None, 5]  # 5 divides no part


def plain(name, images, texts, log_scale, bias=None):
    """The loss written out, with the whole matrix of logits."""
    logits = log_scale.exp() * images @ texts.T
    count = len(images)
    if name == "softmax":
        own = torch.arange(count)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    signs = 2 * torch.eye(count, dtype=logits.dtype) - 1
    return -F.logsigmoid(signs * (logits + bias)).sum() / count


def inputs(name, count=12, width=WIDTH, dtype=torch.float64, seed=0, gradients=True):
    """images, texts, log_scale and, for the sigmoid, bias; pairs point in like directions."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, width, generator=generator, dtype=torch.float64)
    texts = images + torch.randn(count, width, generator=generator, dtype=torch.float64)
    vectors = [F.normalize(part, dim=1).to(dtype) for part in (images, texts)]
    scalars = [torch.tensor(value, dtype=torch.float64) for value in (2.0, -3.0)]
    found = [*vectors, *scalars[: 1 + (name == "sigmoid")]]
    return [tensor.requires_grad_(gradients) for tensor in found]


def value_and_gradients(loss, tensors):
    value = loss(*tensors)
    (3 * value).backward()  # gradients follow the one that comes in
    return [value.detach(), *(tensor.grad for tensor in tensors)]


class LargestTensor(TorchFunctionMode):
    """The number of elements of the largest tensor that any call of torch gave."""

    elements = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


# On several ranks. One launch for each number of ranks computes all cases; tests look at them.


def shard(tensors, sizes, rank):
    """A rank's rows of images and texts, and the scalars, as leaves of its own."""
    start = sum(sizes[:rank])
    rows = [part.detach()[start : start + sizes[rank]] for part in tensors[:2]]
    return [t.clone().requires_grad_() for t in (*rows, *(s.detach() for s in tensors[2:]))]


def compute(rank, ranks):
    """All that one rank finds: by case, a list of tensors, a number or a message."""
    found = {}
    for name, loss in LOSSES.items():
        for split, sizes in enumerate(SPLITS[ranks]):
            mine = shard(inputs(name), sizes, rank)
            for block in BLOCKS:
                again = [tensor.detach().clone().requires_grad_() for tensor in mine]
                found[name, split, block] = value_and_gradients(
                    lambda *tensors, loss=loss, block=block: loss(*tensors, block=block), again
                )
        with torch.no_grad():  # from here on the ranks' last, unequal parts
            found[name, "value alone"] = [loss(*mine)]
        locked = [t.detach().clone().requires_grad_(i == 1) for i, t in enumerate(mine)]
        found[name, "texts alone"] = value_and_gradients(loss, locked)
        half = shard(inputs(name, dtype=torch.bfloat16), sizes, rank)
        found[name, "bf16"] = value_and_gradients(loss, half)
        many = shard(inputs(name, count=16 * ranks, width=4), [16] * ranks, rank)
        with LargestTensor() as largest:
            value_and_gradients(lambda *tensors, loss=loss: loss(*tensors, block=8), many)
        found[name, "largest"] = largest.elements
        found |= {(name, *key): said for key, said in faults(name, loss, rank, ranks).items()}
    return found


def faults(name, loss, rank, ranks):
    """What a rank says when the last one's input is wrong."""
    good = inputs(name, count=2, gradients=False)
    bad = {
        "NaN": [good[0].clone().fill_(torch.nan), *good[1:]],
        "empty": [part[:0] for part in good[:2]] + good[2:],
        "width": [F.normalize(part[:, :4], dim=1) for part in good[:2]] + good[2:],
        "dtype": [part.float() for part in good[:2]] + good[2:],
    }
    said = {}
    for kind, tensors in bad.items():
        try:
            loss(*(tensors if rank == ranks - 1 else good))
            said["fault", kind] = ""
        except ValueError as error:
            said["fault", kind] = str(error)
    return said


def run_rank(rank, ranks, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks
    )
    torch.save(compute(rank, ranks), f"{folder}/{rank}.pt")
    dist.barrier()  # leave together: gloo aborts a rank whose peer is gone
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=SPLITS, ids=lambda ranks: f"{ranks} ranks")
def by_rank(request, tmp_path_factory):
    """What each rank found, in the order of ranks."""
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    torch.multiprocessing.spawn(run_rank, (request.param, str(folder)), nprocs=request.param)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


def join(parts):
    """Value, gradients of all embeddings, and summed gradients of the scalars, from all ranks."""
    values, images, texts, *scalars = zip(*parts)
    for value in values[1:]:
        assert value == values[0]
    return [values[0], torch.cat(images), torch.cat(texts), *(sum(shares) for shares in scalars)]


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_loss_over_ranks_equals_whole_matrix(by_rank, name):
    """Value and gradients, those of scale and bias included, for equal and unequal batches and
    blocks of any size: gradients summed over ranks are those of one process, with no factor."""
    expected = value_and_gradients(lambda *tensors: plain(name, *tensors), inputs(name))
    for split in range(len(SPLITS[len(by_rank)])):
        for block in BLOCKS:
            found = join([rank[name, split, block] for rank in by_rank])
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, atol=1e-8, rtol=0)
    for rank in by_rank:
        torch.testing.assert_close(rank[name, "value alone"][0], expected[0])


@pytest.mark.parametrize("name", LOSSES)
def test_texts_alone_get_their_gradient_where_the_rest_is_locked(by_rank, name):
    """A locked image tower and a fixed scale (LiT)."""
    expected = value_and_gradients(lambda *tensors: plain(name, *tensors), inputs(name))
    parts = [rank[name, "texts alone"] for rank in by_rank]
    assert all(part[1] is None and part[3] is None for part in parts)
    found = torch.cat([part[2] for part in parts])
    torch.testing.assert_close(found, expected[2], atol=1e-8, rtol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_bf16_embeddings_over_ranks_follow_the_whole_matrix(by_rank, name):
    exact = [t.detach().double().requires_grad_() for t in inputs(name, dtype=torch.bfloat16)]
    expected = value_and_gradients(lambda *tensors: plain(name, *tensors), exact)
    found = join([rank[name, "bf16"] for rank in by_rank])
    assert found[0].dtype == torch.float32
    assert found[1].dtype == found[2].dtype == torch.bfloat16
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("name", LOSSES)
def test_largest_tensor_does_not_grow_with_ranks(by_rank, name):
    """A rank holds no tensor larger than its embeddings (16 x 4) or a block (8 x 8),
    where its share of the logits has 16 x 16 for each rank."""
    assert {rank[name, "largest"] for rank in by_rank} == {64}


@pytest.mark.parametrize("name", LOSSES)
def test_every_rank_says_what_one_has_found(by_rank, name):
    """A rank without data, or with data that cannot be used, leaves no other rank waiting."""
    ranks = len(by_rank)
    last = ranks - 1
    for number, rank in enumerate(by_rank):
        assert f"rank {last} has no pair" in rank[name, "fault", "empty"]
        nan = rank[name, "fault", "NaN"]
        if number == last:
            assert "images: rows [0, 1] of 2 hold NaN or infinity" in nan
        else:
            assert nan == f"rank {last} refused its embeddings; see its message"
        differ = {
            "width": f"embedding width must be the same on all ranks, found {[8] * last + [4]}",
            "dtype": "dtype must be the same on all ranks, found "
            f"{[torch.float64] * last + [torch.float32]}",
        }
        for kind, message in differ.items():
            assert rank[name, "fault", kind] == (message if ranks > 1 else "")


# In one process.


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("block", [2, 3, 64])
def test_gradients_equal_finite_differences(name, block):
    """Of embeddings, scale and bias."""
    tensors = inputs(name, count=5, width=3)
    assert torch.autograd.gradcheck(lambda *t: LOSSES[name](*t, block=block), tensors)


@pytest.mark.parametrize("log_scale", [-1.0, 2.0, 4.6])
@pytest.mark.parametrize("name", LOSSES)
def test_fp32_value_keeps_its_digits_at_every_scale(name, log_scale):
    """A scale of 100 overflows an exponential that is not shifted; SigLIP's bias of -10 makes terms
    whose logarithm of 1 + x would lose all digits but three."""
    exact = inputs(name, count=300, gradients=False)
    exact[2] = torch.tensor(log_scale, dtype=torch.float64)
    if name == "sigmoid":
        exact[3] = torch.tensor(-10.0, dtype=torch.float64)
    tensors = [tensor.float().requires_grad_() for tensor in exact]
    found = value_and_gradients(lambda *t: LOSSES[name](*t, block=128), tensors)
    twin = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected = value_and_gradients(lambda *t: plain(name, *t), twin)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("block", [7, None])
def test_loss_equals_open_clips(name, block):
    """open_clip takes the scale, not its logarithm."""
    from open_clip.loss import ClipLoss, SigLipLoss

    peer = {"softmax": ClipLoss(), "sigmoid": SigLipLoss()}[name]

    def theirs(images, texts, log_scale, *bias):
        return peer(images, texts, log_scale.exp(), *bias)

    found = value_and_gradients(lambda *t: LOSSES[name](*t, block=block), inputs(name))
    expected = value_and_gradients(theirs, inputs(name))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_follows_fp32(name, dtype):
    """Also that autocast takes no part, and that small gradients survive in fp16 under a scale."""
    half = inputs(name, count=200, width=64, dtype=dtype)
    whole = [tensor.detach().float().requires_grad_() for tensor in half]
    expected = LOSSES[name](*whole, block=64)
    expected.backward()
    with torch.autocast("cpu", torch.bfloat16):
        found = LOSSES[name](*half, block=64)
    (1024 * found).backward()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)
    for a, b in zip(half, whole, strict=True):
        assert a.grad.dtype == a.dtype
        scaled = a.grad.double() / 1024
        torch.testing.assert_close(
            scaled, b.grad.double(), rtol=2e-2, atol=2e-2 * float(b.grad.abs().max())
        )


@pytest.mark.parametrize("name", LOSSES)
def test_towers_of_two_dtypes_get_gradients_of_their_own(name):
    images, texts, *scalars = inputs(name, dtype=torch.float32)
    locked = texts.detach().to(torch.bfloat16).requires_grad_()
    LOSSES[name](images, locked, *scalars).backward()
    assert images.grad.dtype == torch.float32
    assert locked.grad.dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_saved_bytes_are_flat_in_blocks_and_linear_in_batch(name):
    from vlm.training.activation_checkpointing import saved_bytes

    def kept(count, block):
        with saved_bytes() as found:
            LOSSES[name](*inputs(name, count=count), block=block)
        return sum(found.values())

    whole = kept(64, 64)
    assert {kept(64, block) for block in (1, 3, 8, 32, 64)} == {whole}
    vectors = 2 * 64 * WIDTH * 8
    assert vectors <= whole <= vectors + 64
    assert kept(128, 8) - whole == vectors


@pytest.mark.parametrize("name", LOSSES)
def test_value_alone_keeps_nothing_for_gradients(name):
    from vlm.training.activation_checkpointing import saved_bytes

    tensors = inputs(name)
    with torch.no_grad(), saved_bytes() as kept:
        found = LOSSES[name](*tensors, block=5)
    assert not kept
    assert not found.requires_grad
    assert not LOSSES[name](*(t.detach() for t in tensors)).requires_grad
    torch.testing.assert_close(found, plain(name, *tensors).detach())


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_detached_embeddings_give_the_plain_step(name):
    """Gradient caching: the tower runs again in parts, each with its rows of cached gradients."""
    images, texts, *scalars = inputs(name, count=10)
    images = images.detach()
    tower = torch.nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    def embed(rows):
        return F.normalize(tower(images[rows]), dim=1)

    plain(name, embed(slice(None)), texts, *scalars).backward()
    expected = tower.weight.grad.clone()
    tower.zero_grad()
    with torch.no_grad():
        cached = embed(slice(None))
    cached.requires_grad_()
    LOSSES[name](cached, texts, *scalars).backward()
    for start in range(0, 10, 4):
        rows = slice(start, start + 4)
        embed(rows).backward(cached.grad[rows])
    torch.testing.assert_close(tower.weight.grad, expected, atol=1e-10, rtol=0)


def spoiled(kind):
    """Three good pairs, spoiled."""
    images, texts, log_scale = inputs("softmax", count=3, gradients=False)
    if kind == "NaN":
        texts[1, 0] = torch.nan
    elif kind == "infinity":
        texts[1, 0] = torch.inf
    elif kind == "zero":
        images[[0, 2]] = 0
    elif kind == "length":
        images[1] *= 2
    elif kind == "shapes":
        texts = texts[:2]
    elif kind == "one row":
        images, texts = images[0], texts[0]
    elif kind == "integers":
        images = images.long()
    elif kind == "empty":
        images, texts = images[:0], texts[:0]
    elif kind == "log_scale":
        log_scale = log_scale[None]
    return images, texts, log_scale


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("NaN", r"^texts: rows \[1\] of 3 hold NaN or infinity$"),
        ("infinity", r"^texts: rows \[1\] of 3 hold NaN or infinity$"),
        ("zero", r"^images: rows \[0, 2\] of 3 are zero, and have no direction$"),
        ("length", r"^images: rows \[1\] of 3 are not of unit norm \(norms 2\)$"),
        ("shapes", r"of one shape, .* found \[3, 8\] and \[2, 8\]$"),
        ("one row", r"found \[8\] and \[8\]$"),
        ("integers", r"^images are of a floating dtype, found torch.int64$"),
        ("empty", r"^rank 0 has no pair \(pairs of the ranks: \[0\]\)"),
        ("log_scale", r"^log_scale is a tensor without dimensions, found shape \[1\]$"),
    ],
)
def test_bad_input_is_refused_by_name(kind, message):
    images, texts, log_scale = spoiled(kind)
    with pytest.raises(ValueError, match=message):
        softmax_loss(images, texts, log_scale)
    with pytest.raises(ValueError, match=message):
        sigmoid_loss(images, texts, log_scale, torch.tensor(0.0))


def test_many_bad_rows_are_counted_and_a_bad_block_is_refused():
    images, texts, log_scale = inputs("softmax", gradients=False)
    with pytest.raises(ValueError, match=r"7\] and 4 more of 12 are zero"):
        softmax_loss(torch.zeros_like(images), texts, log_scale)
    with pytest.raises(ValueError, match="block is a number of rows, 1 or more, found 0"):
        softmax_loss(images, texts, log_scale, block=0)

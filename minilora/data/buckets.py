"""Buckets: pictures of about the same aspect ratio get the same size, so that little is cropped away.

The pictures of a batch must have one size.  All sizes have about the area of the square, and each picture goes into the
bucket that crops away the least of it.

Which pictures a step sees depends only on the seed, the step and the number of pictures per bucket:

1. Each bucket is an endless stream of its own: a permutation of its n pictures per epoch, one after
   another, divided into batches of B.  An incomplete batch waits for pictures of the next epoch.
2. Epoch e holds the batches ⌊e·n/B⌋ … ⌊(e + 1)·n/B⌋ − 1 of each bucket, all in one random order.

So after e epochs every picture of a bucket was seen e times, except for fewer than B draws that still wait.  No picture
is favoured, and a bucket of fewer than B pictures has its turn, too.

Source: NovelAI, "Aspect ratio bucketing", 2022, for the sizes.
"""

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache

from . import draws

Size = tuple[int, int]  # width and height in pixels


def bucket_sizes(resolution: int, multiple: int) -> list[Size]:
    """Return the sizes of at most the square's area whose sides are multiples between half and twice its side.

    Sizes that fit inside another one are left out.  The list is empty if `multiple` is above `resolution`.
    """
    sides = [side for side in range(multiple, 2 * resolution + 1, multiple) if 2 * side >= resolution]
    highest = {w: max((h for h in sides if w * h <= resolution**2), default=0) for w in sides}
    return [(w, h) for w, h in highest.items() if h and not any(highest[wider] >= h for wider in sides if wider > w)]


def share_kept(picture: Size, size: Size) -> float:
    """Return the share of a picture's area that stays when it is resized to fill a size and then cropped to it."""
    wider = picture[0] * size[1] / (picture[1] * size[0])  # the picture's aspect ratio over that of the size
    return min(wider, 1 / wider)


def nearest(picture: Size, sizes: Sequence[Size]) -> Size:
    """Return the size that keeps the largest share of a picture."""
    return max(sizes, key=lambda size: share_kept(picture, size))


def picture_at(seed: int, position: int, counts: tuple[int, ...], batch_size: int) -> tuple[int, int]:
    """Return the bucket at `position`, and the picture's number in it; `counts` are the sizes of the buckets."""
    step, place = divmod(position, batch_size)

    def begins(epoch: int) -> int:
        """Return the number of batches before an epoch."""
        return sum(epoch * count // batch_size for count in counts)

    # The epoch whose batches contain this step; epochs without a batch are skipped.  Each bucket loses less than one
    # batch by rounding down, which bounds the search.
    beyond = (step + len(counts) + 1) * batch_size // sum(counts) + 2
    epoch = bisect_right(range(beyond), step, key=begins) - 1
    bucket, batch = _batches(seed, epoch, counts, batch_size)[step - begins(epoch)]
    return bucket, draws.picture_at(seed, batch * batch_size + place, counts[bucket], f"order in bucket {bucket}")


@lru_cache(maxsize=4)
def _batches(seed: int, epoch: int, counts: tuple[int, ...], batch_size: int) -> list[tuple[int, int]]:
    """Return the batches of an epoch in order, each as its bucket and its number in the bucket."""
    batches = [
        (bucket, batch)
        for bucket, count in enumerate(counts)
        for batch in range(epoch * count // batch_size, (epoch + 1) * count // batch_size)
    ]
    order = draws.generator(seed, "order of batches", epoch).permutation(len(batches))
    return [batches[place] for place in order]

# SPDX-License-Identifier: Apache-2.0
"""The definition of ncut_scores in plain PyTorch: batched products, and nothing that waits for the device.

Normalised cut without a matrix of affinities. Let y_i = (1, x_i) with x_i the normalised features: the affinity of
tokens i and j is W_ij = y_i y_j = 1 + cos, the degrees are d_i = y_i T with T the sum of all y, and the matrix whose
second eigenvector is wanted, D^-1/2 W D^-1/2, is the Gram matrix of the rows y_i / sqrt(d_i). Its first eigenvector is
sqrt(d), with eigenvalue 1, and taking that out is the same as taking the direction of T out of every row:

    z_i = (y_i - (y_i T) T / |T|^2) / sqrt(d_i),    y_ncut = u_i / sqrt(d_i),  u the leading left singular vector of Z.

So the cut is a principal component of features off their total, and loses no digits where all cosines are near 1, as
they are in transformers. Principal components proper are the same with z_i = x_i - mean. Both are solved by one
iteration.

The leading left singular vector is found by Chebyshev-filtered subspace iteration (Zhou and Saad, SIAM J. Matrix Anal.
29, 2007) on a block of vectors: the polynomial of degree DEGREE of Z Z^T that is at most 1 on [0, a] and largest beyond,
a the smallest Rayleigh quotient in the block; then Gram and Schmidt; then the block's best vector (Rayleigh and Ritz).
A clip whose residual is small keeps its block as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from masktrain.kernels._float32 import full_float32
from masktrain.kernels.select_tokens.reference import compact, token_ids

# Vectors of a block, products of a round, rounds at most.
BLOCK, DEGREE, ROUNDS = 4, 6, 6
# |Z Z^T v - theta v| / theta at which a clip is done.
TOLERANCE = 1e-5
# A block's best vector is a column of H^(2^SQUARINGS), H its matrix of Rayleigh quotients.
SQUARINGS = 16
# Smallest a, as a share of the largest Rayleigh quotient: keeps the polynomial in the range of float32.
LEAST_BOUND = 0.05
# Largest entries that differ by a smaller share are equal, and entries this near to the threshold are on it.
LEAD, ON_THRESHOLD = 1e-3, 1e-5
# Rows off their total of a length under so many eps, in root mean square, are rounding alone.
NOISE = 32


def ncut_scores(
    features: Tensor,
    cu_tokens: Tensor,
    n_tokens: tuple[int, ...],
    *,
    rule: str,
    bipartition: str,
    gram: str,
) -> tuple[Tensor, Tensor]:
    """See op.py. Returns scores and foreground."""
    total = sum(n_tokens)
    dtype = score_dtype(features)
    if total == 0:
        return features.new_empty(0, dtype=dtype), features.new_empty(0, dtype=torch.bool)
    options = {"rule": rule, "bipartition": bipartition, "gram": gram}
    if features.device.type != "cpu":
        return solve_batch(features, cu_tokens, n_tokens, **options)
    # One clip's features stay in the cache, and a clip has the same bits in every batch.
    scores = features.new_empty(total, dtype=dtype)
    foreground = features.new_empty(total, dtype=torch.bool)
    start = 0
    for n in filter(None, n_tokens):
        clip = slice(start, start + n)
        own = torch.tensor([0, n], dtype=torch.int32)
        scores[clip], foreground[clip] = solve_batch(features[clip], own, (n,), **options)
        start += n
    return scores, foreground


def solve_batch(
    features: Tensor,
    cu_tokens: Tensor,
    n_tokens: tuple[int, ...],
    *,
    rule: str,
    bipartition: str,
    gram: str,
) -> tuple[Tensor, Tensor]:
    """Return scores and foreground of all clips at once, filled up to the longest."""
    total, longest = sum(n_tokens), max(n_tokens)
    ids, exists = token_ids(cu_tokens, longest)
    dtype = score_dtype(features)
    with torch.no_grad(), full_float32(features.device.type):
        if len(set(n_tokens)) == 1:
            x = features.view(len(n_tokens), longest, -1)
        else:
            x = features[ids.clamp(max=total - 1)]
        x = unit_rows(x.to(dtype), exists)
        if bipartition == "unnormalised":
            vector, threshold = unnormalised_vector(x, exists)
        else:
            vector, threshold = leading_vector(x, exists, bipartition, gram)
        side = foreground_of(vector, threshold, exists)
        score = scores_of(x, side, exists, rule)
    return compact(score, exists, total), compact(side, exists, total)


def score_dtype(features: Tensor) -> torch.dtype:
    """Return what is computed in, and what scores are in."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def unit_rows(x: Tensor, exists: Tensor) -> Tensor:
    """Return (B, L, D) rows of length 1, and 0 where a row has no direction or is past the clip's end."""
    length = torch.linalg.vector_norm(x, dim=2, keepdim=True)
    # NaN is in neither range.
    good = exists[..., None] & (length > 0) & (length < torch.inf)
    # What is not finite times 0 is NaN.
    return (x * torch.where(good, 1 / length, 0)).nan_to_num_(0, 0, 0)


def leading_vector(x: Tensor, exists: Tensor, bipartition: str, gram: str) -> tuple[Tensor, Tensor]:
    """Return (B, L) the vector that cuts and (B, 1) its threshold; 0 for clips whose rows are all equal."""
    n = exists.sum(1, keepdim=True).to(x.dtype)
    if bipartition == "pca":
        weight = exists.to(x.dtype)
        mean = x.sum(1, keepdim=True) / n.clamp(min=1)[..., None]
        z = torch.baddbmm(x, weight[..., None], mean, alpha=-1)
    else:
        y = torch.cat([exists[..., None].to(x.dtype), x], dim=2)
        total = y.sum(1, keepdim=True)
        degree = torch.bmm(y, total.transpose(1, 2))
        # A token has affinity 2 with itself, or 1 without a direction, and at least 0 with every other one.
        weight = torch.where(exists, degree[..., 0].clamp(min=1).rsqrt(), 0)
        square = total.square().sum(2, keepdim=True).clamp(min=1)
        z = torch.baddbmm(y, degree, total / square, alpha=-1).mul_(weight[..., None])
    u, largest = leading_left_singular_vector(z, gram)
    eps = torch.finfo(x.dtype).eps
    u = torch.where(largest > (NOISE * eps) ** 2 * weight.square().sum(1, keepdim=True), u, 0)
    if bipartition == "pca":
        return u, torch.zeros_like(n)
    u = u * weight
    return u, u.sum(1, keepdim=True) / n.clamp(min=1)


def leading_left_singular_vector(z: Tensor, gram: str) -> tuple[Tensor, Tensor]:
    """Return (B, L) the left singular vector of the largest singular value of each (L, D) matrix, 0 if that is 0, and
    (B, 1) its square."""
    length, width = z.shape[1:]
    explicit = gram == "explicit" or (gram == "auto" and length <= 2 * width)
    transposed = z.transpose(1, 2)
    matrix = torch.bmm(z, transposed) if explicit else z

    def times(v: Tensor) -> Tensor:
        return torch.bmm(matrix, v if explicit else torch.bmm(transposed, v))

    start = start_block(length, z)
    v = orthonormal(times(start.expand(len(z), -1, -1)))
    done = torch.zeros(len(z), 1, 1, dtype=torch.bool, device=z.device)
    for left in reversed(range(ROUNDS + 1)):
        image = times(v)
        quotients = torch.bmm(v.transpose(1, 2), image)
        mix = leading_eigenvector(quotients)
        best, best_image = torch.bmm(v, mix), torch.bmm(image, mix)
        theta = (best * best_image).sum(1, keepdim=True)
        residual = torch.linalg.vector_norm(best_image - theta * best, dim=1, keepdim=True)
        done = done | (residual <= TOLERANCE * theta)
        # Only where looking costs nothing: on a GPU the host must not wait.
        if left == 0 or (z.device.type == "cpu" and bool(done.all())):
            break
        bound = quotients.diagonal(dim1=1, dim2=2).amin(1)[:, None, None].maximum(LEAST_BOUND * theta)
        slope = 2 / bound.clamp(min=torch.finfo(z.dtype).tiny)
        before, now = v, slope * image - v
        for _ in range(DEGREE - 1):
            before, now = now, 2 * (slope * times(now) - now) - before
        v = torch.where(done, v, orthonormal(now))
    return best[..., 0], theta[..., 0]


def start_block(length: int, like: Tensor) -> Tensor:
    """Return (L, BLOCK) numbers in [-1, 1) without a pattern, a function of their place alone: a hash of 32 bits."""
    word = torch.arange(1, length * BLOCK + 1, device=like.device)
    # Finaliser of MurmurHash3 (aappleby/smhasher:src/MurmurHash3.cpp), the products cut to 31 bits.
    for factor in (0x85EBCA6B, 0xC2B2AE35):
        word = ((word ^ (word >> 15)) * factor) & 0x7FFFFFFF
    word = word ^ (word >> 16)
    return (word.to(like.dtype) / 2**30 - 1).view(length, BLOCK)


def orthonormal(v: Tensor) -> Tensor:
    """Return (B, L, BLOCK) orthonormal columns of the same span, by Gram and Schmidt, twice; what lies in the span
    of the columns before it, but for rounding, becomes 0."""
    columns: list[Tensor] = []
    tiny, eps = torch.finfo(v.dtype).tiny, torch.finfo(v.dtype).eps
    for column in v.unbind(2):
        c = column[..., None]
        size = torch.linalg.vector_norm(c, dim=1, keepdim=True)
        if columns:
            q = torch.cat(columns, dim=2)
            for _ in range(2):
                c = c - torch.bmm(q, torch.bmm(q.transpose(1, 2), c))
        left = torch.linalg.vector_norm(c, dim=1, keepdim=True)
        columns.append(torch.where(left > 16 * eps * size, c / left.clamp(min=tiny), 0))
    return torch.cat(columns, dim=2)


def leading_eigenvector(h: Tensor) -> Tensor:
    """Return (B, b, 1) the eigenvector of the largest eigenvalue of each positive (b, b) matrix; 0 for a matrix of 0.

    By squaring: of h^(2^k) a column remains. A library's `eigh` goes through such a batch one by one on a GPU, and
    makes the host wait.
    """
    power = (h + h.transpose(1, 2)) / 2
    for _ in range(SQUARINGS):
        power = power / trace(power)
        power = torch.bmm(power, power)
    largest = power.diagonal(dim1=1, dim2=2).argmax(1)
    column = power.gather(2, largest[:, None, None].expand(-1, len(h[0]), 1))
    length = torch.linalg.vector_norm(column, dim=1, keepdim=True)
    return column / length.clamp(min=torch.finfo(h.dtype).tiny)


def trace(h: Tensor) -> Tensor:
    """Return (B, 1, 1), never 0."""
    return h.diagonal(dim1=1, dim2=2).sum(1)[:, None, None].clamp(min=torch.finfo(h.dtype).tiny)


def unnormalised_vector(x: Tensor, exists: Tensor) -> tuple[Tensor, Tensor]:
    """Return (B, L) the eigenvector at index 1 of D - W, W = x x^T + 1e-12, and the threshold 0."""
    both = exists[:, :, None] & exists[:, None]
    affinity = torch.where(both, torch.bmm(x, x.transpose(1, 2)) + 1e-12, 0)
    # No eigenvalue of a clip is above its number of tokens: what is past its end comes last.
    degree = torch.where(exists, affinity.sum(2), 2 * exists.shape[1])
    vectors = torch.linalg.eigh(torch.diag_embed(degree) - affinity).eigenvectors
    vector = vectors[..., min(1, exists.shape[1] - 1)]
    return torch.where(exists, vector, 0), torch.zeros_like(vector[:, :1])


def foreground_of(vector: Tensor, threshold: Tensor, exists: Tensor) -> Tensor:
    """Return (B, L) bool: the side with the largest |entry|; of about equal ones the smaller side; of equal ones that
    without the first token. The sign of the vector does not matter."""
    size = vector.abs().amax(1, keepdim=True)
    margin = ON_THRESHOLD * size
    above, below = exists & (vector > threshold + margin), exists & (vector < threshold - margin)
    high = torch.where(above, vector.abs(), 0).amax(1, keepdim=True)
    low = torch.where(below, vector.abs(), 0).amax(1, keepdim=True)
    n_above, n_below = above.sum(1, keepdim=True), below.sum(1, keepdim=True)
    smaller = (n_above < n_below) | ((n_above == n_below) & below[:, :1])
    positive = torch.where((high - low).abs() > LEAD * size, high > low, smaller)
    found = torch.where(positive, above, below)
    # Without a direction, or on one side alone, there is nothing to cut.
    return torch.where((n_above > 0) & (n_below > 0), found, exists)


def scores_of(x: Tensor, foreground: Tensor, exists: Tensor, rule: str) -> Tensor:
    """Return (B, L) in [0, 1]."""
    sides = torch.stack([foreground, exists & ~foreground], dim=1)
    centroids = torch.bmm(sides.to(x.dtype), x)
    length = torch.linalg.vector_norm(centroids, dim=2, keepdim=True)
    centroids = torch.where(length > 0, centroids / length, 0)
    cosines = torch.bmm(x, centroids.transpose(1, 2)).clamp(-1, 1)
    if rule == "paper":
        return (1 + cosines[..., 0]) / 2
    # A side without tokens has no centroid.
    cosines = torch.where(sides.any(2)[:, None], cosines, -1)
    return (1 - cosines.amax(2)) / 2

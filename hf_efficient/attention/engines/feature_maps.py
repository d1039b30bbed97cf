"""Feature maps: phi with weights phi(q) . phi(k) in the place of exp(scaling q . k), for `linear` and `local_linear`.

    elu       elu(x) + 1                                     Katharopoulos 2020, arXiv 2006.16236, section 3.2.1
    relu      relu(x) + 0.001                                Performer 2021, arXiv 2009.14794, generalised attention
    favor     exp(w_m . y - |y|^2 / 2) / sqrt(M)             Performer 2021, FAVOR+; y = x / D**(1/4), fixed random w_m
    hedgehog  cat(softmax(W x), softmax(-W x))               Hedgehog 2024, arXiv 2402.04347; a learned W for each head

    >>> import torch
    >>> projection = draw_projection(256, 64, seed=0)
    >>> FEATURE_MAPS["favor"].phi(torch.randn(2, 4, 10, 64), projection).shape
    torch.Size([2, 4, 10, 256])

The papers' maps take q as it is, so `usual_scale` multiplies q by scaling * sqrt(D) first: the usual scaling D**-0.5
gives the papers' formulas, and a model that uses another one (T5: 1.0) keeps the ratio to it that softmax saw.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ...errors import ConfigError, unknown_name
from ..config import FEATURE_MAPS as NAMED
from ..config import AttentionConfig
from ..variant import AttentionVariant, HeadShape
from .pieces import pieces

MapWeights = tuple[Tensor, Tensor]

RELU_FLOOR = 1e-3  # Performer's: keeps all weights positive, so that a normaliser is 0 only without keys
FAVOR_LIMIT = 64.0  # exponents are kept in +-64: exp(64) times 1e10 and exp(-64) / 1e10 are still normal in float32


class FeatureMap(NamedTuple):
    """One way to make features; phi takes x [B,H,T,D] and its weight (None for maps without), gives [B,H,T,M].

    Attributes:
        phi: for queries and keys.
        of_query: phi of a query up to any positive factor for each row, where only ratios between keys count.
        mean: of phi(q) . phi(k) over standard normal q and k of D dimensions; the mean of exp(q . k / sqrt(D)), which
            softmax sums up, is close to exp(1/2).
    """

    phi: Callable[[Tensor, Any], Tensor]
    of_query: Callable[[Tensor, Any], Tensor]
    mean: Callable[[int], float]


class FeatureMapAttention(AttentionVariant):
    """A variant with the feature map of its config: a learned matrix for each head, a fixed projection, or neither."""

    needs_training = True
    projection: Tensor

    def __init__(self, config: AttentionConfig, shape: HeadShape):
        super().__init__(config, shape)
        if config.feature_map == "favor":
            self.register_buffer("projection", torch.empty(config.feature_dim or shape.dim, shape.dim))
        if config.feature_map == "hedgehog":
            self.query_map = nn.Parameter(torch.empty(shape.heads, shape.dim, shape.dim))
            self.key_map = nn.Parameter(torch.empty(shape.kv_heads, shape.dim, shape.dim))
        FeatureMapAttention.reset_parameters(self)

    def reset_parameters(self) -> None:
        if self.config.feature_map == "favor":
            init.copy_(self.projection, self._draw(self.config.seed))
        if self.config.feature_map == "hedgehog":
            for weight in (self.query_map, self.key_map):
                init.copy_(weight, torch.eye(self.shape.dim).expand_as(weight))

    def redraw(self, seed: int) -> None:
        """Another random projection, the same for every call with this seed; ConfigError for a map that has none."""
        if self.config.feature_map != "favor":
            raise ConfigError(f"feature_map={self.config.feature_map!r} has no random projection; 'favor' has one.")
        with torch.no_grad():
            self.projection.copy_(self._draw(seed))

    def _draw(self, seed: int) -> Tensor:
        features, dim = self.projection.shape
        return draw_projection(features, dim, seed)

    @property
    def map_options(self) -> dict[str, Any]:
        """The name of the map and its weights, as the attention functions take them."""
        weights: MapWeights | None = None
        if self.config.feature_map == "favor":
            weights = self.projection, self.projection
        if self.config.feature_map == "hedgehog":
            weights = self.query_map, self.key_map
        return {"feature_map": self.config.feature_map, "map_weights": weights}

    def feature_macs(self) -> tuple[int, int]:
        """Features M, and multiply-accumulates of making them for one query and one key."""
        dim = self.shape.dim
        if self.config.feature_map == "favor":
            features = self.config.feature_dim or dim
            return features, 2 * features * dim
        return (2 * dim, 2 * dim * dim) if self.config.feature_map == "hedgehog" else (dim, 0)


def draw_projection(features: int, dim: int, seed: int) -> Tensor:
    """[features, dim] standard normal rows, orthogonal within each block of `dim` rows (Performer, section 2.4)."""
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for start in range(0, features, dim):
        normal = torch.randn(dim, dim, generator=generator, dtype=torch.float64, device="cpu")
        # A random basis, whose vectors then get lengths as independent normal vectors of that dimension have.
        basis, upper = torch.linalg.qr(normal)
        basis = basis * upper.diagonal().sign()  # else its columns are not spread evenly over all directions
        lengths = torch.randn(dim, dim, generator=generator, dtype=torch.float64, device="cpu").norm(dim=1)
        blocks.append((basis.T * lengths[:, None])[: features - start])
    return torch.cat(blocks).float()


def usual_scale(query: Tensor, scaling: float | None) -> Tensor:
    """The query for which D**-0.5 would be the scaling."""
    factor = 1.0 if scaling is None else scaling * math.sqrt(query.shape[-1])
    return query if factor == 1.0 else query * factor


def check_map(feature_map: str, map_weights: MapWeights | None, query: Tensor, key: Tensor) -> None:
    """Raise ConfigError for an unknown map, or weights that do not fit it."""
    if feature_map not in FEATURE_MAPS:
        raise unknown_name("feature_map", feature_map, FEATURE_MAPS)
    expected = _WEIGHTS.get(feature_map)
    if expected is None:
        if map_weights is not None:
            raise ConfigError(f"feature_map={feature_map!r} has no weights. Leave map_weights out.")
        return
    if map_weights is None:
        raise ConfigError(f"feature_map={feature_map!r} needs map_weights: {expected}.")
    for weight, x in zip(map_weights, (query, key), strict=True):
        dim = x.shape[-1]
        fits = weight.shape[-1] == dim
        if feature_map == "hedgehog":
            fits = tuple(weight.shape) == (x.shape[1], dim, dim)
        if not fits:
            raise ConfigError(
                f"feature_map={feature_map!r}: a weight {tuple(weight.shape)} does not fit {x.shape[1]} heads of "
                f"dimension {dim}. It needs map_weights: {expected}."
            )


_WEIGHTS = {
    "favor": "(projection, projection) with projection = draw_projection(features, head_dim, seed), [M, D]",
    "hedgehog": "a matrix for each query head [H, D, D] and one for each key/value head [K, D, D]",
}


class _EluPlusOne(torch.autograd.Function):
    """elu(x) + 1 whose gradient comes from its output, min(out, 1), without a second exponential."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        out = F.elu(x).add_(1)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        return out.clamp(max=1).mul_(grad)


class _ReluPlusFloor(torch.autograd.Function):
    """relu(x) + RELU_FLOOR in one pass of memory, and one back."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.relu(x).add_(1e-3)  # RELU_FLOOR, which torch.compile cannot look up in here

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(grad, x, 0)


def _elu(x: Tensor, _: None) -> Tensor:
    return _EluPlusOne.apply(x)


def _relu(x: Tensor, _: None) -> Tensor:
    return _ReluPlusFloor.apply(x)


def _favor(x: Tensor, projection: Tensor) -> Tensor:
    """phi(q) . phi(k) is exp(q . k / sqrt(D)) in the mean over projections (Performer, lemma 1).

    The exponent is at most |w_m|^2 / 2, but falls without end as |x| grows. The limit keeps every feature a normal
    number, without a maximum over keys, which would look ahead: a feature depends on its own x alone.
    """
    projected, half_square = _project(x, projection)
    half_square = half_square + math.log(projection.shape[0]) / 2  # the division by sqrt(M), inside of the exponent
    return projected.sub(half_square).clamp(-FAVOR_LIMIT, FAVOR_LIMIT).exp()


def _favor_of_query(x: Tensor, projection: Tensor) -> Tensor:
    """As `_favor`, divided by the largest feature of the row."""
    projected, _ = _project(x, projection)
    return projected.sub(projected.detach().amax(-1, keepdim=True)).exp()


def _project(x: Tensor, projection: Tensor) -> tuple[Tensor, Tensor]:
    """w_m . y [.., M] and |y|^2 / 2 [.., 1] of y = x / D**(1/4)."""
    dim = x.shape[-1]
    projected = x @ (projection.to(x.dtype) * dim**-0.25).T
    return projected, x.square().sum(-1, keepdim=True) / (2 * math.sqrt(dim))


def _hedgehog(x: Tensor, weight: Tensor) -> Tensor:
    weight = weight.to(x.dtype)
    if torch.compiler.is_exporting():  # programs must not write into views
        products = x @ weight.mT
        return torch.cat([products.softmax(-1), products.neg().softmax(-1)], -1)
    return _TwoSoftmaxes.apply(x, weight)


class _TwoSoftmaxes(torch.autograd.Function):
    """cat(softmax(W x), softmax(-W x)) for x [B,H,T,D] and W [H,D,D], piece by piece."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        out = x.new_empty(*x.shape[:3], 2 * x.shape[3])
        for piece in pieces(x.shape[:3], x.shape[3], x):
            products = x[piece] @ weight[piece[1]].mT
            positive, negative = out[piece].chunk(2, -1)
            positive.copy_(products.softmax(-1))
            negative.copy_(products.neg_().softmax(-1))
        ctx.save_for_backward(x, weight, out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, out = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
        for piece in pieces(x.shape[:3], x.shape[3], x):
            halves = zip(grad[piece].chunk(2, -1), out[piece].chunk(2, -1), strict=True)
            positive, negative = (torch.ops.aten._softmax_backward_data(*half, -1, x.dtype) for half in halves)
            products = positive.sub_(negative)  # of W x [.., T, D], which the second softmax takes with the other sign
            torch.matmul(products, weight[piece[1]], out=grad_x[piece])
            grad_weight[piece[1]].add_((products.mT @ x[piece]).sum(0))
        return grad_x, grad_weight


ELU = FeatureMap(_elu, _elu, lambda dim: 1.1605**2 * dim)
RELU = FeatureMap(_relu, _relu, lambda dim: 0.3999**2 * dim)
FAVOR = FeatureMap(_favor, _favor_of_query, lambda dim: math.exp(0.5))
HEDGEHOG = FeatureMap(_hedgehog, _hedgehog, lambda dim: 2 / dim)
FEATURE_MAPS: dict[str, FeatureMap] = dict(NAMED)  # read once: torch.compile cannot import in the middle of a program

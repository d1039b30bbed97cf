"""Fewer key/value heads, by merging: the cache shrinks, all query heads stay (GQA, Ainslie 2023, arXiv 2305.13245).

    small = merge_kv_heads(model, 4, calibration=batches)           # 8 key/value heads become 4; a stock model

Heads that become one stand side by side, so that query heads find theirs as before. Without data they are averaged,
as the paper has it, which wants training of the whole model after it. With calibration batches nothing is averaged:

    values    v_h ~ B_h v, with v the first D principal components of the values of the merged heads, each weighted by
              what the output linear makes of it; that linear then reads B_h v
    keys      a rotary score is the sum over pairs of numbers, taken as complex ones, of Re(q conj(k)), and a complex
              factor commutes with the rotation. So k_h ~ u_h k for each pair, with k the first principal component of
              the pairs of the merged heads, weighted by the queries; the queries of head h are multiplied by conj(u_h)

(Jin 2024, arXiv 2412.20677, aligns heads before averaging them, by rotations.) Where a factor would not commute, as
under a norm of queries and keys (Qwen3, Gemma 3), which is tried on the model itself, keys are averaged.
"""

import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ...attention.dispatch import variant_of
from ...errors import ConfigError, UnsupportedModelError, shown
from ...models.anatomy import Anatomy, ConfigAnatomy
from ...models.classes import with_block
from ...models.derive.inputs import tiny_inputs
from ...models.family import HEADS, Attention
from ...models.modes import eval_mode
from ...models.rebuild import check_model, rebuild
from ...models.stacks import ConfigStack, ModelStack
from ..cut.linears import Linear, as_matrix, find_linears
from ..score.calibration import check_calibration
from ..score.finite import check_weights
from ..score.handing import Batch
from ..score.linear_inputs import collect

TINY = 1e-8  # of the largest eigenvalue: what is smaller is rounding
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # of the largest output; half precision: HALF
HALF = 5e-2


class _Place(NamedTuple):
    """One attention: its layer, and its projections, all of them linears of their own."""

    prefix: str
    layer: nn.Module
    attention: Attention
    heads: int
    kv_heads: int

    def name(self, path: str) -> str:
        return f"{self.prefix}.{path}"


def merge_kv_heads(
    model: PreTrainedModel, kv_heads: int, calibration: Iterable[Batch] | None = None
) -> PreTrainedModel:
    """A copy of `model` with `kv_heads` key/value heads in each layer, and as many query heads as before.

    Parameters:
        model: with a config field for the key/value heads (Llama, Mistral, Qwen2, Qwen3, Gemma, ...). Merge before
            anything is pruned or converted.
        kv_heads: a divisor of what it has now.
        calibration: batches of model inputs (dicts of tensors), labels not needed. None: heads are averaged.

    Returns:
        a model of the same class: a stock one stays a stock one. Distil it afterwards.

    Raises:
        ConfigError: `kv_heads` does not divide the number of key/value heads, or is no less.
        UnsupportedModelError: no config field says how many there are, the projections are fused or gated, or layers
            have been pruned or converted in a way that knows the heads.
        DataError: batches that the model cannot read; weights that are not finite.
    """
    anatomy = Anatomy.of(check_model(model))
    config = merged_config(anatomy, kv_heads)
    places = [place for stack in _stacks(anatomy) for place in _places(stack)]
    batches = check_calibration(anatomy, calibration)
    check_weights(model)
    moments = _moments(anatomy, places, batches) if batches else {}
    aligned = bool(moments) and _factors_commute(model, places)
    state = model.state_dict()
    for place in places:
        moment = moments.get(place.name(place.attention.key))
        state |= _merged(model, place, kv_heads, moment, aligned)
    return rebuild(model, config, state)


def merged_config(anatomy: ConfigAnatomy, kv_heads: int) -> PreTrainedConfig:
    """The config of the result; raises ConfigError and UnsupportedModelError as `merge_kv_heads` does."""
    if type(kv_heads) is not int or kv_heads < 1:
        raise ConfigError(f"kv_heads must be an integer of 1 or more, got {shown(kv_heads)}.")
    fields: dict = {}
    for stack in _stacks(anatomy):
        now = stack.num_kv_heads
        if kv_heads >= now or now % kv_heads:
            divisors = [n for n in range(1, now) if now % n == 0]
            advice = f"Give one of {divisors}." if divisors else "Fewer than one there cannot be."
            raise ConfigError(
                f"kv_heads={kv_heads}: the {stack.name} has {now} key/value heads, of which equally many are to "
                f"become one. {advice}"
            )
        fields = stack.changed(fields, {stack.entry.kv_heads: kv_heads})
    return with_block(anatomy.config, anatomy.block, **fields)


def _stacks(anatomy: ConfigAnatomy) -> list:
    """Those whose config says how many key/value heads they have."""
    family = anatomy.family
    found = [stack for stack in anatomy.stacks if stack.entry.kv_heads and not stack.entry.one_kv_head]
    if not found:
        raise UnsupportedModelError(
            f"The config of {family.model_type} models has no field for a number of key/value heads, so there are as "
            "many as query heads, or one. Prune heads instead: PruningConfig(granularity='head')."
        )
    for stack in found:
        _check_stack(anatomy, stack)
    return found


def _check_stack(anatomy: ConfigAnatomy, stack: ConfigStack) -> None:
    attention, entry = stack.entry.attention, anatomy.block.stack(stack.name)
    paths = (attention.query, attention.key, attention.value, attention.output)
    why = stack.entry.why_not(HEADS)
    if why is None and (not all(paths) or len(set(paths)) < len(paths)):
        why = "queries, keys and values are made by one fused linear"
    if why is None and (attention.wide or attention.gates or attention.value_size):
        why = "its heads are gated, or made of what all heads share"
    if why is None and {"heads", "kv_heads"} & entry.sizes.keys():
        why = "its layers have been pruned to different numbers of heads; merge first, then prune"
    if why:
        raise UnsupportedModelError(
            f"Key/value heads of the {stack.name} of {anatomy.family.model_type} models cannot be merged: {why}."
        )


def _places(stack: ModelStack) -> Iterator[_Place]:
    for index, layer in enumerate(stack.layers):
        if attention := stack.attentions_in(index).get("heads"):
            variant = variant_of(layer.get_submodule(attention.module))
            if variant is not None and any(True for _ in variant.parameters()):
                raise UnsupportedModelError(
                    f"The {variant.config.kind!r} attention of layer {index} has learned parts for each head. Merge "
                    "key/value heads first, then convert."
                )
            yield _Place(stack.layer_prefix(index), layer, attention, stack.num_heads, stack.num_kv_heads)


def _moments(anatomy: Anatomy, places: Sequence[_Place], batches: list[Batch]) -> dict[str, Tensor]:
    """x x^T [in+1, in+1] summed over tokens, x what the key linears read and a 1, for their bias."""
    wanted = {place.name(place.attention.key) for place in places}
    linears: list[Linear] = [linear for linear in find_linears(anatomy) if linear.name in wanted]

    def products(rows: Tensor) -> Tensor:
        rows = torch.nn.functional.pad(rows, (0, 1), value=1.0)
        return rows.T @ rows

    return {linear.name: moment for linear, moment in collect(anatomy.model, linears, batches, products).items()}


def _read(model: PreTrainedModel, name: str) -> Tensor:
    """[out, in+1] in float64: a linear with its bias, or zeros, behind its weight."""
    linear = model.get_submodule(name)
    weight = as_matrix(model, Linear(name, "", ""), linear.weight.detach()).double()
    bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach().double()
    return torch.cat([weight, bias[:, None]], 1)


def _written(model: PreTrainedModel, name: str, matrix: Tensor) -> dict[str, Tensor]:
    """The entries of a state dict for what `_read` gives."""
    linear, dtype = model.get_submodule(name), model.get_submodule(name).weight.dtype
    weight = as_matrix(model, Linear(name, "", ""), matrix[:, :-1])  # a Conv1D is turned back by the same
    entries = {f"{name}.weight": weight.to(dtype).contiguous()}
    return entries if linear.bias is None else entries | {f"{name}.bias": matrix[:, -1].to(dtype).contiguous()}


def _merged(
    model: PreTrainedModel, place: _Place, kv_heads: int, moment: Tensor | None, aligned: bool
) -> dict[str, Tensor]:
    """The projections of one attention. Heads are H query and K key/value heads; m of the latter become one."""
    attention = place.attention
    paths = (attention.query, attention.key, attention.value, attention.output)
    query, key, value, out = (_read(model, place.name(path)) for path in paths)
    parts = {"query": query, "key": key, "value": value, "output": out}
    count, shared = place.kv_heads, place.heads // place.kv_heads
    groups = (kv_heads, count // kv_heads)
    keys = key.unflatten(0, (*groups, -1))  # [K', m, D, in+1]
    values = value.unflatten(0, (*groups, -1))
    if moment is None:
        parts |= {"key": keys.mean(1).flatten(0, 1), "value": values.mean(1).flatten(0, 1)}
    else:
        moment = moment.to(value.device, torch.float64)
        reads, bias = out[:, :-1].unflatten(1, (*groups, shared, -1)), out[:, -1:]  # [hidden, K', m, H/K, D]
        merged, back = zip(*(_principal(values[g], reads[:, g], moment) for g in range(kv_heads)), strict=True)
        reads = torch.einsum("ogmrd,gmde->ogmre", reads, torch.stack(back)).flatten(1)
        parts |= {"value": torch.cat(merged), "output": torch.cat([reads, bias], 1)}
        parts["key"] = keys.mean(1).flatten(0, 1)
    if moment is not None and aligned:
        queries = query.unflatten(0, (*groups, shared, -1))  # [K', m, H/K, D, in+1]
        fitted = [_aligned(queries[g], keys[g], moment) for g in range(kv_heads)]
        parts |= {"query": torch.cat([one for one, _ in fitted]), "key": torch.cat([one for _, one in fitted])}
    entries: dict[str, Tensor] = {}
    for path, matrix in zip(paths, parts.values(), strict=True):
        entries |= _written(model, place.name(path), matrix)
    return entries


def _principal(values: Tensor, reads: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """Values [m, D, in+1] and what reads them [hidden, m, r, D] -> the merged value [D, in+1], and B [m, D, D] with
    value h ~ B_h merged. Least squares in what the output linear gives, over the tokens of `moment`."""
    heads, dim, _ = values.shape
    squares = torch.einsum("omrd,omre->mde", reads, reads)
    sizes, axes = torch.linalg.eigh(squares)
    roots = sizes.clamp(min=float(sizes.max()) * TINY).sqrt().unsqueeze(1)
    root, inverse = (axes * roots) @ axes.mT, (axes / roots) @ axes.mT
    weighted = (root @ values).flatten(0, 1)  # [m D, in+1]
    axes = torch.linalg.eigh(weighted @ moment @ weighted.T).eigenvectors[:, -dim:]
    return axes.T @ weighted, inverse @ axes.unflatten(0, (heads, dim))


def _aligned(queries: Tensor, keys: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """Queries [m, r, D, in+1] and keys [m, D, in+1] -> queries [m r D, in+1] and the merged key [D, in+1]."""
    complex_moment = moment.to(torch.complex128)
    query, key = (torch.complex(*x.chunk(2, -2)) for x in (queries, keys))  # D/2 pairs
    energy = torch.einsum("mrpi,ij,mrpj->mp", query, complex_moment, query.conj()).real
    weight = energy.clamp(min=float(energy.max()) * TINY).sqrt()
    weighted = (key * weight.unsqueeze(-1)).transpose(0, 1)  # [pairs, m, in+1]
    axes = torch.linalg.eigh(weighted @ complex_moment @ weighted.mH).eigenvectors[..., -1]  # [pairs, m]
    merged = (axes.conj().unsqueeze(1) @ weighted).squeeze(1)
    factor = axes.T / weight  # [m, pairs]: key h ~ factor_h merged
    turned = query * factor.conj()[:, None, :, None]
    return torch.cat([turned.real, turned.imag], -2).flatten(0, 2), torch.cat([merged.real, merged.imag])


@torch.no_grad()
def _factors_commute(model: PreTrainedModel, places: Sequence[_Place]) -> bool:
    """Whether the model gives the same where each pair of numbers of its keys is multiplied by a complex number, and
    the same pair of its queries divided by the conjugate: rotary positions in halves, and no norm behind them."""
    generator, changed = torch.Generator().manual_seed(0), {}
    for place in places:
        query, key = (_read(model, place.name(path)) for path in (place.attention.query, place.attention.key))
        dim = len(key) // place.kv_heads
        if dim % 2:
            return False
        factor = torch.randn(place.kv_heads, dim // 2, 1, dtype=torch.complex128, generator=generator).to(key.device)
        factor = factor / factor.abs().sqrt()  # not far from 1
        pairs = torch.complex(*key.unflatten(0, (place.kv_heads, dim)).chunk(2, 1)) * factor
        shared = torch.complex(*query.unflatten(0, (place.kv_heads, -1, dim)).chunk(2, 2)) / factor.conj()[:, None]
        for path, x in ((place.attention.key, pairs), (place.attention.query, shared)):
            changed |= _written(model, place.name(path), torch.cat([x.real, x.imag], -2).flatten(0, -2))
    with eval_mode(model):
        inputs = tiny_inputs(model)
        options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
        expected = model(**inputs, **options)[0].float()
        actual = torch.func.functional_call(model, changed, (), {**inputs, **options})[0].float()
    return bool((actual - expected).abs().max() <= TOLERANCE.get(model.dtype, HALF) * expected.abs().max())

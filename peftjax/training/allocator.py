"""AdaLoRA's rank allocator: which triplets a budget keeps, decided inside the training step."""

import bisect
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from peftjax.adapter import Adapter, site_arrays
from peftjax.methods.adalora import AdaLoraConfig, check_adalora, prune_triplets

_TRIPLET = ("lora_A", "lora_E", "lora_B")
Triplets = dict[str, dict[str, Array]]


class RankAllocatorState(NamedTuple):
    """The state of ``rank_allocator``, all of it arrays.

    Attributes:
      inner: the state of the optimizer inside.
      step: number of updates so far.
      sensitivity: for each entry of each triplet, the running average of ``|p g|``; float32.
      uncertainty: the running average of how far ``|p g|`` is from that; float32.
      kept: for each module, the triplets that the last allocation kept.
      budget: the number of triplets that the schedule allowed at the last update.
      zeroed: whether the last update set the triplets that are not kept to zero.
      intact: whether what was set to zero was still zero at the next update.
    """

    inner: Any
    step: Int[Array, ""]
    sensitivity: Triplets
    uncertainty: Triplets
    kept: dict[str, Bool[Array, "..."]]
    budget: Int[Array, ""]
    zeroed: Bool[Array, ""]
    intact: Bool[Array, ""]


def rank_allocator(
    inner: optax.GradientTransformation, adapter: Adapter, *, strict: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""An optimizer that also spends AdaLoRA's budget of ranks, step by step.

    After every update of the optimizer inside, the importance of each triplet is brought up to
    date. With :math:`p` a number after the update, :math:`g` its gradient before:

    .. math::

      \bar I \leftarrow \beta_1 \bar I + (1 - \beta_1) |p g|, \qquad
      \bar U \leftarrow \beta_2 \bar U + (1 - \beta_2) \bigl| |p g| - \bar I \bigr|, \qquad
      S_k = \bar I \bar U(E_k) + \operatorname{mean} \bar I \bar U(A_k)
          + \operatorname{mean} \bar I \bar U(B_k)

    In the steps in which the schedule of the config allocates, the :math:`E_k` of all but the
    highest scores of all modules together become zero; triplets that tie with the last to go,
    go too. From step ``total_step - tfinal`` on the choice stays. The first update is step 0. All
    of it is part of the traced step: nothing is compiled twice, no number goes to the host, and
    the statistics are float32 for any dtype. A gradient that is not finite leaves them as they are.

    It has to see the final updates: nothing may change them after it, and where something has,
    ``ranks`` and ``prune`` raise. ``optax.MultiSteps`` goes around it, and ``optax.partition``,
    which gives it the part of the params that holds the triplets. What changes gradients may come
    before it: after ``optax.chain(clip, rank_allocator(adamw, adapter))`` importance is that of
    clipped gradients, as in a PEFT loop that clips, and ``rank_allocator(optax.chain(clip, adamw),
    adapter)`` weighs all steps by the gradients as they are.

    Args:
      inner: any optimizer.
      adapter: the AdaLoRA adapter whose params, by themselves or inside a larger tree, it trains.
      strict: keep dropped triplets at zero until the next allocation. By default the optimizer
        inside may revive them in between, as in PEFT.

    Returns:
      The optimizer; its ``update`` needs ``params``.

    Raises:
      ValueError: the adapter is of another method or has no triplets, or its config has no
        ``total_step``; from
        ``init`` and ``update``: triplets of the adapter are missing or there twice.

    Example:
      >>> import jax, jax.numpy as jnp, optax, peftjax
      >>> apply_fn = lambda params, x: x @ params["dense"]["kernel"]
      >>> params = {"dense": {"kernel": jnp.ones((8, 6))}}
      >>> sites = peftjax.find_sites(apply_fn, params, jnp.ones((2, 8)))
      >>> config = peftjax.AdaLoraConfig(
      ...     init_r=4, target_r=2, total_step=10, target_modules=["dense"])
      >>> adapter = peftjax.init_adapter(jax.random.key(0), config, sites)
      >>> optimizer = peftjax.rank_allocator(optax.adam(1e-2), adapter)
      >>> state = optimizer.init(adapter.params)

    References:
      Zhang et al., AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, 2023,
      https://arxiv.org/abs/2303.10512
    """
    config = check_adalora(adapter)
    if config.total_step is None:
        raise ValueError("the budget's schedule needs `total_step` in the AdaLoraConfig")
    inner = optax.with_extra_args_support(inner)
    real = {site.name: _real(adapter, site.name) for site in adapter.sites.values()}
    first = sum(int(mask.sum()) for mask in real.values())
    padding = sum(mask.size for mask in real.values()) - first
    weights = sum(math.prod(site.stack_shape) for site in adapter.sites.values())
    if not first:
        raise ValueError("this adapter has no triplets left to allocate")
    drops = _drops(config, first, config.target_r * weights)
    freeze = config.total_step - config.tfinal

    def init(params: optax.Params) -> RankAllocatorState:
        zeros = {
            module: {name: jnp.zeros(jnp.shape(x), jnp.float32) for name, x in own.items()}
            for module, own in _triplets(params, adapter).items()
        }
        return RankAllocatorState(
            inner=inner.init(params),
            step=jnp.zeros((), jnp.int32),
            sensitivity=zeros,
            uncertainty=jax.tree.map(jnp.copy, zeros),
            kept={module: jnp.asarray(mask) for module, mask in real.items()},
            budget=jnp.asarray(first, jnp.int32),
            zeroed=jnp.asarray(False),
            intact=jnp.asarray(True),
        )

    def update(
        updates: optax.Updates,
        state: RankAllocatorState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, RankAllocatorState]:
        if params is None:
            raise ValueError("rank_allocator needs the params: update(grads, state, params)")
        gradients, before = _triplets(updates, adapter), _triplets(params, adapter)
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        changes = _triplets(updates, adapter)
        step = state.step
        sensitivity, uncertainty = _importance(config, state, before, changes, gradients, freeze)

        scores = {m: _score(sensitivity[m], uncertainty[m], adapter.sites[m]) for m in real}
        budget = first - jnp.searchsorted(jnp.asarray(drops, jnp.int32), step, side="right")
        allocates = (step > config.tinit) & (step <= freeze) & (first > budget)
        allocates &= (step % config.deltaT == 0) | (step == freeze)
        kept = _kept(scores, real, padding + first - budget)
        kept = {m: jnp.where(allocates, kept[m], state.kept[m]) for m in real}

        zeroes = allocates | (step > freeze) | strict
        cleared = {
            m: _cleared(before[m]["lora_E"], changes[m]["lora_E"], zeroes & ~kept[m]) for m in real
        }
        gone = [jnp.all(state.kept[m] | ~real[m] | (before[m]["lora_E"] == 0)) for m in real]
        return _with_values(updates, cleared, adapter), RankAllocatorState(
            inner=inner_state,
            step=optax.safe_increment(step),
            sensitivity=sensitivity,
            uncertainty=uncertainty,
            kept=kept,
            budget=budget.astype(jnp.int32),
            zeroed=zeroes,
            intact=state.intact & (~state.zeroed | jnp.all(jnp.stack(gone))),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def ranks(adapter: Adapter, opt_state: Any) -> dict[str, int | np.ndarray]:
    """The rank of each module, as the last allocation left it.

    Args:
      adapter: the adapter that trains.
      opt_state: the state of its ``rank_allocator``, or one that holds it.

    Returns:
      By module its rank; of a stacked module an array of them.

    Raises:
      ValueError: there is not exactly one such state in ``opt_state``, it is of another adapter or
        of this one before ``prune``, or updates were changed after the allocator made them.
    """
    kept = _checked(adapter, opt_state).kept
    counts = {name: np.asarray(mask).sum(axis=-1) for name, mask in kept.items()}
    return {name: count if count.ndim else int(count) for name, count in counts.items()}


def prune(adapter: Adapter, opt_state: Any) -> Adapter:
    """The adapter with the triplets alone that the last allocation kept, in smaller arrays.

    After the last allocation, at step ``total_step - tfinal``, all others are zero, and the pruned
    adapter gives the same outputs. Before it the optimizer may have revived some of them since (see
    ``strict`` of ``rank_allocator``), and without those the outputs are others. The config's
    ``rank_pattern`` says what was kept, as PEFT writes it. The optimizer's state does not fit the
    pruned adapter.

    Args:
      adapter: the trained adapter, not traced.
      opt_state: the state of its ``rank_allocator``, or one that holds it.

    Raises:
      ValueError: as ``ranks`` does.
    """
    return prune_triplets(adapter, _checked(adapter, opt_state).kept)


def _drops(config: AdaLoraConfig, first: int, last: int) -> list[int]:
    """For each triplet that goes, the step from which the budget is without it.

    PEFT's cubic schedule, in double precision as there: so the budget of any step is a search in
    this list, and exact inside a compiled step.
    """
    assert config.total_step is not None
    start, freeze = config.tinit, config.total_step - config.tfinal

    def budget(step: int) -> int:
        if step <= start:
            return first
        left = 1 - (step - start) / (freeze - start)
        return int((first - last) * left**3 + last)

    steps = range(freeze + 1)
    return [
        bisect.bisect_left(steps, -goal, key=lambda step: -budget(step))
        for goal in range(first - 1, last - 1, -1)
    ]


def _importance(
    config: AdaLoraConfig,
    state: RankAllocatorState,
    before: Triplets,
    changes: Triplets,
    gradients: Triplets,
    freeze: int,
) -> tuple[Triplets, Triplets]:
    """Sensitivity and uncertainty after this step; as they are once the ranks stay."""
    learning = state.step < freeze

    def sensitivity(average: Array, now: Array) -> Array:
        learns = learning & jnp.isfinite(now)
        return jnp.where(learns, config.beta1 * average + (1 - config.beta1) * now, average)

    def uncertainty(average: Array, now: Array, expected: Array) -> Array:
        learns, off = learning & jnp.isfinite(now), jnp.abs(now - expected)
        return jnp.where(learns, config.beta2 * average + (1 - config.beta2) * off, average)

    def product(p: Array, gradient: Array) -> Array:
        return jnp.abs(p.astype(jnp.float32) * gradient.astype(jnp.float32))

    now = jax.tree.map(product, optax.apply_updates(before, changes), gradients)
    smoothed = jax.tree.map(sensitivity, state.sensitivity, now)
    return smoothed, jax.tree.map(uncertainty, state.uncertainty, now, smoothed)


def _score(sensitivity: dict[str, Array], uncertainty: dict[str, Array], site: Any) -> Array:
    """The importance of every triplet of one site."""
    entry = {name: sensitivity[name] * uncertainty[name] for name in _TRIPLET}
    stack = len(site.stack_axes)
    ins = tuple(range(stack, entry["lora_A"].ndim - 1))
    outs = tuple(range(stack + 1, entry["lora_B"].ndim))
    vectors = jnp.mean(entry["lora_A"], axis=ins) + jnp.mean(entry["lora_B"], axis=outs)
    return entry["lora_E"] + vectors


def _kept(
    scores: dict[str, Array], real: Mapping[str, np.ndarray], gone: Int[Array, ""]
) -> dict[str, Array]:
    """Which triplets lie above the score of the last that goes; padding goes first."""
    scores = {m: jnp.where(real[m], score, -jnp.inf) for m, score in scores.items()}
    order = jnp.sort(jnp.concatenate([score.ravel() for score in scores.values()]))
    threshold = order[jnp.clip(gone - 1, 0, order.size - 1)]
    return {m: score > threshold for m, score in scores.items()}


def _cleared(value: Array, change: Array, where: Bool[Array, "..."]) -> Array:
    """The update of some numbers that makes them zero here and there, whatever its dtype was."""
    dtype = jnp.promote_types(value.dtype, change.dtype)
    return jnp.where(where, -value.astype(dtype), change.astype(dtype))


def _real(adapter: Adapter, module: str) -> np.ndarray:
    """Which triplets of a module are no padding."""
    own, frozen = site_arrays(adapter, adapter.sites[module])
    if "rank_mask" in frozen:
        return np.asarray(frozen["rank_mask"]) > 0
    return np.ones(own["lora_E"].shape, dtype=bool)


def _places(tree: Any, adapter: Adapter) -> dict[tuple[str, str], int]:
    """Where among the leaves of a tree each array of each triplet is.

    Raises:
      ValueError: one of them is missing, or there twice.
    """
    places: dict[tuple[str, str], int] = {}
    for i, (keys, _) in enumerate(jax.tree_util.tree_leaves_with_path(tree)):
        names = tuple(str(getattr(key, "key", "")) for key in keys[-2:])
        if len(names) == 2 and names[0] in adapter.sites and names[1] in _TRIPLET:
            if names in places:
                raise ValueError(f"{'.'.join(names)} is in the params twice")
            places[names[0], names[1]] = i
    for module in adapter.sites:
        for name in _TRIPLET:
            if (module, name) not in places:
                raise ValueError(
                    f"{module}.{name} is not among the params of rank_allocator: give it "
                    f"adapter.params, or in optax.partition the part that holds all triplets"
                )
    return places


def _triplets(tree: Any, adapter: Adapter) -> Triplets:
    """The arrays of the triplets in a tree."""
    leaves, places = jax.tree.leaves(tree), _places(tree, adapter)
    return {m: {name: leaves[places[m, name]] for name in _TRIPLET} for m in adapter.sites}


def _with_values(tree: Any, values: Mapping[str, Float[Array, "..."]], adapter: Adapter) -> Any:
    """The tree with other singular values."""
    leaves, structure = jax.tree.flatten(tree)
    places = _places(tree, adapter)
    for module, value in values.items():
        leaves[places[module, "lora_E"]] = value
    return jax.tree.unflatten(structure, leaves)


def _checked(adapter: Adapter, opt_state: Any) -> RankAllocatorState:
    """The one allocator state inside an optimizer's state."""
    check_adalora(adapter)
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, RankAllocatorState))
    states = [leaf for leaf in leaves if isinstance(leaf, RankAllocatorState)]
    if len(states) != 1:
        raise ValueError(
            f"expected one state of rank_allocator in the optimizer's state, found {len(states)}"
        )
    (state,) = states
    if set(state.kept) != set(adapter.sites):
        raise ValueError("this state of rank_allocator belongs to an adapter of other modules")
    for module, mask in state.kept.items():
        kept, real = np.asarray(mask), _real(adapter, module)
        # Pruning moves the triplets of a stack's layers even where its shape stays.
        if kept.shape != real.shape or (kept & ~real).any():
            raise ValueError(
                f"{module}: this state of rank_allocator is of other triplets, of shape "
                f"{kept.shape}, than those of the adapter, of shape {real.shape}: it was pruned "
                f"already, or is another one; pass the adapter that was trained with this state"
            )
    if not bool(state.intact):
        raise ValueError(
            "triplets that rank_allocator had set to zero were not zero at the next step: "
            "something around it changed its updates; put every other transformation inside it"
        )
    return state

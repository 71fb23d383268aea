"""One training step of an adapter: gradients, the optimizer, and nothing of the base in them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray

from peftjax.adapter import Adapter

Metrics = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a training run changes, and so all that a checkpoint of it holds.

    Attributes:
      adapter: the adapter.
      opt_state: the state of its optimizer.
      step: how many steps were taken.
      key: the PRNG key that the dropout of every step comes from; None trains without dropout.
    """

    adapter: Adapter
    opt_state: Any
    step: Int[Array, ""]
    key: PRNGKeyArray | None = None


def init_train_state(
    adapter: Adapter,
    optimizer: optax.GradientTransformation,
    key: PRNGKeyArray | None = None,
) -> TrainState:
    """The state of a training run before its first step; its arrays are copies.

    Args:
      adapter: the adapter to train.
      optimizer: any optax optimizer; its state is that of ``adapter.params`` alone.
      key: a PRNG key for dropout; None trains without.

    Example:
      >>> import jax, jax.numpy as jnp, optax, peftjax
      >>> apply_fn = lambda params, x: x @ params["dense"]["kernel"]
      >>> params = {"dense": {"kernel": jnp.ones((4, 3))}}
      >>> sites = peftjax.find_sites(apply_fn, params, jnp.ones((2, 4)))
      >>> config = peftjax.LoraConfig(r=2, target_modules=["dense"])
      >>> adapter = peftjax.init_adapter(jax.random.key(0), config, sites)
      >>> int(peftjax.init_train_state(adapter, optax.adam(1e-3)).step)
      0
    """
    if key is not None and not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    adapter = adapter.replace(key=None)
    state = TrainState(adapter, optimizer.init(adapter.params), jnp.zeros((), jnp.int32), key)
    # A step donates the state: no two of its arrays, and none of the caller's, may be one buffer.
    return jax.tree.map(jnp.copy, state)


def make_train_step(
    loss_fn: Callable[[Any, Adapter, Any], Any],
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    shardings: Any = None,
) -> jax.stages.Wrapped:
    """Makes the compiled step that trains an adapter.

    The state is donated: its arrays are overwritten in place, so that a step holds one copy of the
    adapter and of the optimizer's state; go on with the state it returns. The base is an argument,
    never part of the program, and is not differentiated.

    Args:
      loss_fn: ``loss_fn(params, adapter, batch)``, which calls an adapted function and gives the
        mean loss over the rows of the batch, or that and a dict of further scalars to report.
      optimizer: the optimizer that the state was made with. It is told the loss too, as
        ``optax.contrib.reduce_on_plateau`` wants it; one with a line search, which evaluates the
        loss elsewhere, cannot be used.
      accumulate: into how many equal parts, along the first axis of its arrays, a batch is cut;
        they run one after the other, and their gradients and metrics are averaged, of whole
        numbers and booleans as float32. Each has a dropout of its own.
      shardings: where the state lies, as ``adapter_shardings(state, params)`` gives it; None
        leaves it to the compiler. Under Explicit mesh axes it is not needed. What has another
        ``memory_kind`` than the chips' own, such as an ``opt_state`` in ``"pinned_host"``, is
        there between steps and on the chips during one.

    Returns:
      ``step(state, params, batch)``, which returns the next state and the metrics: ``loss``,
      ``grad_norm``, the global norm of the gradients, and those of ``loss_fn``. It has ``lower``
      and so on, as every jitted function.

    Raises:
      ValueError: ``accumulate`` is no positive integer; from the step: it does not divide the
        batch, ``loss_fn`` returns no scalar or reports what the step does, or the optimizer has a
        line search.

    Example:
      >>> import jax, jax.numpy as jnp, optax, peftjax
      >>> apply_fn = lambda params, x: x @ params["dense"]["kernel"]
      >>> params, x = {"dense": {"kernel": jnp.ones((4, 3))}}, jnp.ones((8, 4))
      >>> sites = peftjax.find_sites(apply_fn, params, x)
      >>> config = peftjax.LoraConfig(r=2, target_modules=["dense"])
      >>> adapter = peftjax.init_adapter(jax.random.key(0), config, sites)
      >>> adapted = peftjax.adapt(apply_fn)
      >>> def loss_fn(params, adapter, batch):
      ...     return jnp.square(adapted(params, adapter, batch)).mean()
      >>> optimizer = optax.sgd(1e-2)
      >>> state = peftjax.init_train_state(adapter, optimizer, key=jax.random.key(1))
      >>> step = peftjax.make_train_step(loss_fn, optimizer, accumulate=2)
      >>> state, metrics = step(state, params, x)
      >>> float(metrics["loss"]), int(state.step)
      (16.0, 1)
    """
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise ValueError(f"`accumulate` must be an integer of 1 or more, got {accumulate!r}")
    if isinstance(optimizer, optax.MultiSteps):
        # It hands on what it is told, which its own gradient_transformation() does not say.
        optimizer = optax.GradientTransformationExtraArgs(optimizer.init, optimizer.update)
    optimizer = optax.with_extra_args_support(optimizer)

    def gradients(
        state: TrainState, params: Any, batch: Any, part: Any
    ) -> tuple[Any, tuple[Array, Metrics]]:
        adapter = state.adapter
        if state.key is not None:
            key = jax.random.fold_in(state.key, state.step * accumulate + part)
            adapter = adapter.train(key)

        def total(trainable: Any) -> tuple[Array, tuple[Array, Metrics]]:
            out = loss_fn(params, adapter.replace(params=trainable), batch)
            loss, metrics = out if isinstance(out, tuple) else (out, {})
            if jnp.shape(loss) != ():
                raise ValueError(
                    f"the loss must be a scalar, the mean over the rows of the batch, and has "
                    f"shape {jnp.shape(loss)}"
                )
            if taken := sorted({"loss", "grad_norm"}.intersection(metrics)):
                raise ValueError(
                    f"loss_fn reports {' and '.join(taken)}, which the step reports itself: give "
                    f"it another name"
                )
            return loss, (loss, metrics)

        return jax.grad(total, has_aux=True)(adapter.params)

    def step(state: TrainState, params: Any, batch: Any) -> tuple[TrainState, Metrics]:
        state = _on_chips(state, shardings)
        if accumulate == 1:
            grads, (loss, metrics) = gradients(state, params, batch, 0)
        else:
            grads, (loss, metrics) = _averaged(
                lambda part, i: gradients(state, params, part, i), _parts(batch, accumulate)
            )
        trainable = state.adapter.params
        updates, opt_state = _updates(optimizer, grads, state.opt_state, trainable, loss)
        after = TrainState(
            state.adapter.replace(params=optax.apply_updates(trainable, updates)),
            opt_state,
            optax.safe_increment(state.step),
            state.key,
        )
        return after, {"loss": loss, "grad_norm": optax.tree.norm(grads), **metrics}

    out = None if shardings is None else (shardings, None)
    return jax.jit(step, donate_argnums=0, out_shardings=out)


def _updates(
    optimizer: optax.GradientTransformation, grads: Any, opt_state: Any, trainable: Any, loss: Array
) -> tuple[Any, Any]:
    """What an optimizer makes of the gradients, told the loss if it will hear of it."""
    told = {"value": loss, "grad": grads, "value_fn": jax.tree_util.Partial(_elsewhere)}
    try:
        return optimizer.update(grads, opt_state, trainable, **told)
    except TypeError as error:
        # A chain hands on all that it is told, and a part of it, as optax.contrib.sam, takes none.
        if "unexpected keyword argument" not in str(error):
            raise
        return optimizer.update(grads, opt_state, trainable)


def _elsewhere(params: Any) -> Array:
    """What a line search calls; nothing else does."""
    raise ValueError(
        "this optimizer has a line search, which needs the loss at other params than those of the "
        "step: take one without, as optax.lbfgs(learning_rate, linesearch=None)"
    )


def _on_chips(state: TrainState, shardings: Any) -> TrainState:
    """The state, of which nothing is left in the memory of the host."""

    def fetched(array: Array, where: Any) -> Array:
        if where.memory_kind in (None, "device"):
            return array
        return jax.device_put(array, where.with_memory_kind("device"))

    return state if shardings is None else jax.tree.map(fetched, state, shardings)


def _parts(batch: Any, count: int) -> Any:
    """A batch with its parts in front; row i goes into part i modulo their number.

    So each part holds rows of every device that a sharded batch lies on, and none moves.
    """

    def cut(keys: Any, array: Any) -> Array:
        rows = jnp.shape(array)[0] if jnp.ndim(array) else 0
        if rows == 0 or rows % count:
            name = jax.tree_util.keystr(keys) or "the batch"
            raise ValueError(
                f"{name} of shape {jnp.shape(array)} cannot be cut into {count} equal parts along "
                f"its first axis: change `accumulate` or the size of the batch"
            )
        return jnp.moveaxis(jnp.reshape(array, (rows // count, count, *array.shape[1:])), 1, 0)

    return jax.tree_util.tree_map_with_path(cut, batch)


def _averaged(function: Callable[[Any, Array], Any], parts: Any) -> Any:
    """The mean of what a function gives for each part, one after the other."""
    count = jax.tree.leaves(parts)[0].shape[0]

    def add(total: Array, x: Any) -> Array:
        return total + jnp.asarray(x, total.dtype)

    def body(total: Any, one: Any) -> tuple[Any, None]:
        return jax.tree.map(add, total, function(*one)), None

    def widened(like: jax.ShapeDtypeStruct) -> Array:
        exact = jnp.issubdtype(like.dtype, jnp.inexact) and like.dtype.itemsize >= 4
        # Under Explicit axes a carry has to start as split as what is added to it.
        return jnp.zeros(
            like.shape, like.dtype if exact else jnp.float32, out_sharding=like.sharding
        )

    def mean(total: Array, like: jax.ShapeDtypeStruct) -> Array:
        own = jnp.issubdtype(like.dtype, jnp.inexact)
        return (total / count).astype(like.dtype if own else total.dtype)

    first = jax.tree.map(lambda array: array[0], parts)
    shapes = jax.eval_shape(function, first, jnp.int32(0))
    total, _ = jax.lax.scan(body, jax.tree.map(widened, shapes), (parts, jnp.arange(count)))
    return jax.tree.map(mean, total, shapes)

"""From a framework's module to a pure function of its params.

Haiku's ``transform`` and Equinox's ``partition`` give such a function themselves.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from flax import nnx


def from_linen(module: nn.Module, **static: Any) -> Callable[..., Any]:
    """Makes a function of the params out of a linen module.

    Args:
      module: the module, unbound.
      **static: arguments of ``module.apply`` to fix, such as ``train=False``, ``mutable`` or
        ``method``.

    Returns:
      ``apply_fn(params, *args, variables=None, rngs=None, **kwargs)``: ``params`` is the
      ``"params"`` collection alone and ``variables`` holds the others, such as
      ``{"batch_stats": ...}``. With ``mutable`` it returns what linen returns, the output and the
      updated collections.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from peftjax import from_linen
      >>> module = nn.Dense(3)
      >>> params = module.init(jax.random.key(0), jnp.ones((2, 4)))["params"]
      >>> from_linen(module)(params, jnp.ones((2, 4))).shape
      (2, 3)
    """

    def apply_fn(
        params: Any, *args: Any, variables: Any = None, rngs: Any = None, **kwargs: Any
    ) -> Any:
        collections = {"params": params, **(variables or {})}
        return module.apply(collections, *args, rngs=rngs, **static, **kwargs)

    return apply_fn


@dataclasses.dataclass(frozen=True, eq=False)
class NnxApply:
    """An NNX model as a function of its params; what ``from_nnx`` returns.

    Attributes:
      graph: the structure of the model.
      state: everything in it that is no param: batch statistics, counters of random streams.
    """

    graph: Any
    state: Any

    def __call__(self, params: Any, *args: Any, state: Any = None, **kwargs: Any) -> Any:
        """Calls the model.

        Without ``state`` the model starts from ``self.state`` and what it changes is dropped. With
        it, the result is the output and the changed state, for the next call.
        """
        # New variables, which belong to the trace that this call is in and so may change.
        start = jax.tree.map(lambda x: x, self.state if state is None else state)
        model = nnx.merge(self.graph, nnx.State(params), start)
        out = model(*args, **kwargs)
        if state is None:
            return out
        _, _, *changed = nnx.split(model, nnx.Param, ...)
        return out, changed[0]


def from_nnx(model: nnx.Module) -> tuple[NnxApply, dict[Any, Any]]:
    """Makes a pure function and its params out of an NNX model.

    Args:
      model: the model; it is read, not changed.

    Returns:
      ``apply_fn(params, *args, state=None, **kwargs)`` and the params as nested dicts of arrays.
      For models that change themselves (BatchNorm, Dropout) pass ``state=apply_fn.state`` and
      take the new state from the result.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from peftjax import from_nnx
      >>> apply_fn, params = from_nnx(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
      >>> apply_fn(params, jnp.ones((2, 4))).shape
      (2, 3)
    """
    graph, params, *rest = nnx.split(model, nnx.Param, ...)
    return NnxApply(graph, rest[0]), nnx.to_pure_dict(params)

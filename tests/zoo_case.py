"""The words the model zoo is written in: a case, the sites it must show, its random numbers."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Axes = int | tuple[int, ...]


class Expected(NamedTuple):
    """What ``find_sites`` must say of one weight."""

    kind: str
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    stack_axes: tuple[int, ...] = ()
    bias: str | None = None
    groups: int = 1


def _axes(axes: Axes) -> tuple[int, ...]:
    return (axes,) if isinstance(axes, int) else axes


def _expected(kind: str) -> Callable[..., Expected]:
    def expected(
        in_axes: Axes, out_axes: Axes, stack: Axes = (), bias: str | None = None, groups: int = 1
    ) -> Expected:
        return Expected(kind, _axes(in_axes), _axes(out_axes), _axes(stack), bias, groups)

    return expected


dense, conv, lookup = _expected("dense"), _expected("conv"), _expected("lookup")


class Draw:
    """The numbers of one build: weights of std 0.3, inputs of std 1, all of one dtype.

    Default inits hide errors (a zero bias, an identity norm), so nothing keeps its own. NumPy
    draws: eager JAX would compile one program for every shape.
    """

    def __init__(self, key: jax.Array, dtype: Any):
        self.dtype = dtype
        # A half-precision model keeps statistics and master weights in float32.
        self.kept_dtype = jnp.float32 if dtype == jnp.bfloat16 else dtype
        self._rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))

    def input(self, *shape: int) -> jax.Array:
        return jnp.asarray(self._rng.normal(size=shape), self.dtype)

    def weight(self, *shape: int, dtype: Any = None) -> jax.Array:
        return jnp.asarray(0.3 * self._rng.normal(size=shape), dtype or self.dtype)

    def positive(self, *shape: int, dtype: Any = None) -> jax.Array:
        """Norm scales and variances: near one."""
        return jnp.asarray(np.exp(0.1 * self._rng.normal(size=shape)), dtype or self.dtype)

    def ids(self, high: int, *shape: int, low: int = 0) -> jax.Array:
        return jnp.asarray(self._rng.integers(low, high, size=shape), jnp.int32)

    def like(self, tree: Any, dtype: Any = None) -> Any:
        """A framework's own tree, abstract or not, with every array drawn again."""

        def redraw(path, leaf):
            positive = re.search(r"\b(scale|var)\b", jax.tree_util.keystr(path))
            draw = self.positive if positive else self.weight
            return draw(*leaf.shape, dtype=dtype or leaf.dtype)

        return jax.tree_util.tree_map_with_path(redraw, tree)


Model = tuple[Callable[..., Any], Any, tuple[Any, ...]]


@dataclasses.dataclass(frozen=True)
class Case:
    """One small model, and everything that must be found in it.

    Models are smooth and choose nothing by value: a kink or a hard choice would turn one rounding
    into a jump.

    Attributes:
      name: names the case in test ids.
      build: ``(key, dtype) -> (apply_fn, params, args)``; ``apply_fn(params, *args)`` is pure.
      sites: every site ``find_sites`` must list, written by hand.
      targets: ``target_modules`` of the adapters tested on it.
      fallback: the sites one of whose uses must be materialised.
      contains: primitives the jaxpr must hold, so that the case is what its name says.
      autodiff: the mode in which the model can be differentiated.
      promotion: NumPy promotion the model's own library needs.
    """

    name: str
    build: Callable[[jax.Array, Any], Model]
    sites: dict[str, Expected]
    targets: Callable[[Any], bool] | list[str] | str = lambda site: True
    fallback: frozenset[str] = frozenset()
    contains: tuple[str, ...] = ()
    autodiff: Literal["reverse", "forward"] = "reverse"
    promotion: Literal["strict", "standard"] = "strict"

    def __str__(self) -> str:
        return self.name

    @contextlib.contextmanager
    def rules(self):
        """The promotion rules this case runs under."""
        with (
            jax.numpy_dtype_promotion(self.promotion),
            jax.numpy_rank_promotion("raise" if self.promotion == "strict" else "allow"),
        ):
            yield


def case(
    sites: dict[str, Expected],
    *,
    contains: Iterable[str] = (),
    fallback: Iterable[str] = (),
    **rest,
) -> Callable[[Callable[[Draw], Model]], Case]:
    """Turns ``build(draw)`` into a case of the function's name."""

    def decorate(build: Callable[[Draw], Model]) -> Case:
        return Case(
            name=build.__name__,
            build=lambda key, dtype: build(Draw(key, dtype)),
            sites=sites,
            contains=tuple(contains),
            fallback=frozenset(fallback),
            **rest,
        )

    return decorate

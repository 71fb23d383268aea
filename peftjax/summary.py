"""How large an adapter is, next to its model."""

import dataclasses
import io
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from peftjax.adapter import Adapter
from peftjax.methods import XLoraConfig
from peftjax.trees import leaf_bytes, leaf_paths


@dataclasses.dataclass(frozen=True)
class Summary:
    """The size of an adapter next to its model; printing it gives a table.

    Attributes:
      trainable: number of trainable parameters.
      total: number of parameters of the model with the adapter; whole leaves that the adapter
        trains count once, and so do the frozen experts of X-LoRA, with the padding of their ranks.
      adapter_bytes: size of the adapter's arrays, frozen ones included.
      model_bytes: size of the model's params.
      modules: for each module, the shapes of its trainable arrays and their number of parameters.
    """

    trainable: int
    total: int
    adapter_bytes: int
    model_bytes: int
    modules: dict[str, tuple[dict[str, tuple[int, ...]], int]]

    @property
    def percent(self) -> float:
        """Trainable parameters in percent of all."""
        return 100 * self.trainable / self.total

    def __str__(self) -> str:
        table = Table(title="Trainable parameters")
        table.add_column("module", overflow="fold")
        table.add_column("arrays")
        table.add_column("parameters", justify="right")
        for name, (shapes, size) in self.modules.items():
            arrays = ", ".join(f"{n} {'x'.join(map(str, s))}" for n, s in shapes.items())
            table.add_row(name, arrays, f"{size:,}")
        # Text alone, in a notebook too, where rich would show the table itself.
        text = io.StringIO()
        Console(width=100, file=text, force_jupyter=False, color_system=None).print(table)
        return text.getvalue() + (
            f"trainable params: {self.trainable:,} || all params: {self.total:,} || "
            f"trainable%: {self.percent:.4f}\n"
            f"adapter: {self.adapter_bytes:,} bytes || model: {self.model_bytes:,} bytes"
        )


def summary(adapter: Adapter, params: Any) -> Summary:
    """Counts an adapter's parameters and bytes.

    Args:
      adapter: the adapter.
      params: the base's params, of arrays or ShapeDtypeStructs.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax
      >>> apply_fn = lambda params, x: x @ params["dense"]["kernel"]
      >>> params = {"dense": {"kernel": jnp.ones((40, 30))}}
      >>> sites = peftjax.find_sites(apply_fn, params, jnp.ones((2, 40)))
      >>> config = peftjax.LoraConfig(r=2, target_modules=["dense"])
      >>> adapter = peftjax.init_adapter(jax.random.key(0), config, sites)
      >>> print(str(peftjax.summary(adapter, params)).splitlines()[-2])
      trainable params: 140 || all params: 1,340 || trainable%: 10.4478
    """
    base = list(leaf_paths(params).values())
    arrays = jax.tree.leaves(adapter.params)
    trainable = sum(x.size for x in arrays)
    replaced = sum(adapter.params[leaf.module][leaf.leaf_name].size for leaf in adapter.saved)
    modules = {
        module: (
            {name: tuple(x.shape) for name, x in own.items()},
            sum(x.size for x in own.values()),
        )
        for module, own in adapter.params.items()
    }
    config = adapter.config
    names = config.experts[0].method.params if isinstance(config, XLoraConfig) else ()
    frozen = sum(
        x.size for own in adapter.buffers.values() for name, x in own.items() if name in names
    )
    return Summary(
        trainable=trainable,
        total=sum(x.size for x in base) + trainable + frozen - replaced,
        adapter_bytes=leaf_bytes([*arrays, *jax.tree.leaves(adapter.buffers)]),
        model_bytes=leaf_bytes(base),
        modules=modules,
    )

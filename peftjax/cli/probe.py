"""The mark to beat: a linear classifier on the frozen model's features."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

Head = dict[str, jax.Array]

PENALTIES = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1)


def best_probe(features: np.ndarray, labels: np.ndarray, classes: int, seed: int) -> Head:
    """Fits the strongest probe the features give: its penalty is chosen on a fifth of them.

    A probe that overfits would flatter every adapter measured against it.

    Args:
      features: shape (texts, width).
      labels: shape (texts,).
      classes: number of labels.
      seed: draws the fifth.

    Returns:
      ``kernel`` (width, classes) and ``bias`` (classes,).
    """
    order = np.random.default_rng(seed).permutation(len(features))
    kept, fitted = order[: len(order) // 5], order[len(order) // 5 :]

    def score(penalty: float) -> float:
        head = fit_probe(features[fitted], labels[fitted], classes, penalty)
        logits = features[kept] @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
        return float(np.mean(np.argmax(logits, axis=-1) == labels[kept]))

    # Of equally good ones the largest penalty.
    penalty = max(reversed(PENALTIES), key=score)
    return fit_probe(features, labels, classes, penalty)


def fit_probe(features: np.ndarray, labels: np.ndarray, classes: int, penalty: float) -> Head:
    """Multinomial logistic regression on standardised features, solved to its optimum.

    Args:
      features: shape (texts, width).
      labels: shape (texts,).
      classes: number of labels.
      penalty: weight of half the squared norm of the kernel, on the standardised features.

    Returns:
      ``kernel`` (width, classes) and ``bias`` (classes,), for the features as they are.
    """
    mean, deviation = features.mean(axis=0), features.std(axis=0)
    # A feature that never moves says nothing; dividing by its deviation would blow it up.
    inverse = np.where(deviation > 1e-6, 1 / np.maximum(deviation, 1e-6), 0).astype(features.dtype)
    solved = _solve(jnp.asarray((features - mean) * inverse), jnp.asarray(labels), classes, penalty)
    kernel = solved["kernel"] * inverse[:, None]
    return {"kernel": kernel, "bias": solved["bias"] - mean @ kernel}


@functools.partial(jax.jit, static_argnums=2)
def _solve(
    features: Float[Array, "texts width"],
    labels: Int[Array, " texts"],
    classes: int,
    penalty: Float[Array, ""] | float,
    tolerance: float = 1e-5,
    most_iterations: int = 1000,
) -> Head:
    """Full-batch L-BFGS until the gradient vanishes: the objective is convex."""

    def objective(head: Head) -> Float[Array, ""]:
        logits = features @ head["kernel"] + head["bias"][None]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(loss) + penalty / 2 * jnp.sum(head["kernel"] ** 2)

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)

    def step(carry: tuple[Head, optax.OptState, int]) -> tuple[Head, optax.OptState, int]:
        head, state, count = carry
        value, grad = value_and_grad(head, state=state)
        updates, state = solver.update(
            grad, state, head, value=value, grad=grad, value_fn=objective
        )
        return optax.apply_updates(head, updates), state, count + 1

    def unfinished(carry: tuple[Head, optax.OptState, int]) -> Array:
        _, state, count = carry
        norm = optax.tree.norm(optax.tree.get(state, "grad"))
        return (count == 0) | ((norm > tolerance) & (count < most_iterations))

    width = features.shape[1]
    start = {
        "kernel": jnp.zeros((width, classes), features.dtype),
        "bias": jnp.zeros(classes, features.dtype),
    }
    head, _, _ = jax.lax.while_loop(unfinished, step, (start, solver.init(start), 0))
    return head

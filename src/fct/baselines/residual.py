"""A linear map plus a small MLP on its error: what embedding-adapter packages ship."""

from __future__ import annotations

import numpy as np

from fct.artifact.transformation import Layer, Transformation
from fct.baselines.linear import fit_ridge
from fct.extras import need
from fct.fit.recipes import FitConfig
from fct.progress import step_bar
from fct.spaces import EmbeddingSpace
from fct.types import Floats, RowsLike

__all__ = ["fit_residual"]


def fit_residual(
    old: RowsLike,
    new: RowsLike,
    *,
    hidden: int = 512,
    epochs: int = 30,
    seed: int = 0,
    progress: bool = True,
    old_space: EmbeddingSpace | None = None,
    new_space: EmbeddingSpace | None = None,
) -> Transformation:
    """y = ridge(x) + MLP(x), the MLP of one hidden ReLU layer trained with AdamW on what ridge leaves.

    Args:
        old, new: (n, d_old) and (n, d_new) rows of the same items.
        hidden, epochs, seed, progress: size and training of the MLP.

    Examples:
        >>> import numpy as np
        >>> from fct.baselines import fit_residual
        >>> x = np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32)
        >>> fit_residual(x, np.abs(x), hidden=8, epochs=2, progress=False).d_new
        4
    """
    torch = need("torch", "fit_residual")
    from fct import ref
    from fct.fit.pairs import check_pairs

    config = FitConfig(inner=hidden, epochs=epochs, batch_size=256, lr=4e-3, weight_decay=1e-2)
    x, _, y = check_pairs(old, None, new).loaded()
    linear = fit_ridge(x, y)
    rest = (y - ref.transform(x, None, linear)).astype(np.float32)
    mean, scale = x.mean(axis=0), np.maximum(x.std(axis=0), 1e-6)
    unit = float(torch.from_numpy(rest).std()) or 1.0
    w1, b1, w2, b2 = _trained_mlp((x - mean) / scale, rest / unit, config, seed, progress)
    w1 = w1 / scale
    none = Layer(np.zeros((1, x.shape[1])), np.zeros(1))
    return linear.with_(
        old=(Layer(w1, b1 - w1 @ mean, relu=True),),
        side=(none,),
        mixer=(
            Layer(
                np.concatenate([w2 * unit, np.zeros((len(b2), 1))], axis=1),
                linear.mixer[-1].bias + b2 * unit,
                relu=False,
            ),
        ),
        old_space=old_space or EmbeddingSpace("old", x.shape[1]),
        new_space=new_space or EmbeddingSpace("new", y.shape[1]),
        normalise=new_space is not None and new_space.normalised,
        info={"baseline": "residual"},
    )


def _trained_mlp(
    inputs: Floats, targets: Floats, config: FitConfig, seed: int, progress: bool
) -> tuple[Floats, Floats, Floats, Floats]:
    """Weight and bias of the hidden layer and of the last, float64."""
    import torch

    x, y = torch.from_numpy(inputs), torch.from_numpy(targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(
            torch.nn.Linear(x.shape[1], config.inner), torch.nn.ReLU(), torch.nn.Linear(config.inner, y.shape[1])
        )
    optimiser = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.epochs)
    with step_bar(progress) as bar:
        for epoch in bar.track(range(config.epochs), description="fitting the residual MLP"):
            order = torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(len(x)))
            for index in order.split(config.batch_size):
                loss = torch.nn.functional.mse_loss(model(x[index]), y[index])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            schedule.step()
    w1, b1, w2, b2 = (p.detach().double().numpy() for p in model.parameters())
    return w1, b1, w2, b2

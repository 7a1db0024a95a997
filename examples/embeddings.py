"""Pictures of samples in many dimensions, side by side in two of their own."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from torch import Tensor

__all__ = ["draw", "embedded"]

COLORS = ("tab:blue", "tab:orange", "tab:green")
EXAGGERATION = 4.0  # more of it draws points without clusters together, perhaps for good


def embedded(samples: Collection[Tensor], seed: int = 0) -> Sequence[Tensor]:
    """Embeds sets of samples at once in two dimensions, by t-SNE.

    Args:
        samples: The sets, each with shape :math:`(N, D)`.
        seed: The seed of t-SNE.

    Returns:
        The places of each set, with shape :math:`(N, 2)`.

    References:
        Visualizing Data using t-SNE (van der Maaten, Hinton, JMLR 9, 2008), which exaggerates as
        much at first.
    """
    tsne = TSNE(early_exaggeration=EXAGGERATION, random_state=seed)
    places = tsne.fit_transform(torch.cat(list(samples)).numpy(force=True))
    return torch.from_numpy(places).split([len(each) for each in samples])


def draw(
    path: Path, title: str, clouds: Mapping[str, Mapping[str, Tensor]], seed: int = 0
) -> None:
    """Writes a picture with a panel for each space, where t-SNE has embedded all samples at once.

    Args:
        path: The file to write.
        title: Stands above the picture.
        clouds: By the name of a space, up to three sets of samples by their names, each with shape
            :math:`(N, D)`.
        seed: The seed of t-SNE.
    """
    figure = Figure(figsize=(4.2 * len(clouds), 4.6), layout="constrained")
    figure.suptitle(title, fontsize=11)
    panels = figure.subplots(1, len(clouds), squeeze=False)[0]
    for axes, (space, samples) in zip(panels, clouds.items(), strict=True):
        sets = embedded(samples.values(), seed)
        for name, color, each in zip(samples, COLORS, sets, strict=False):
            axes.scatter(*each.T, s=3, alpha=0.5, linewidths=0, color=color, label=name)
        axes.set_title(space, fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=150)

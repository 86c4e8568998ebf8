"""Auxiliary classifier GAN (Odena, Olah, Shlens 2017): the discriminator also says which class an image shows.

Of a row the loss is "is it real?" plus, for a real one, "which class is it?". It depends on that row alone. The class
of generated rows is not asked, other than in the paper: as long as the generator ignores its labels, they teach the
discriminator nothing but chance, at the price of the clip that they share with what patients teach.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from fedmedgan.client.gans.cdcgan import Generator
from fedmedgan.client.gans.parts.layers import downward
from fedmedgan.client.gans.recipe import Synthesis
from fedmedgan.shared.study import Gan, Images


class Discriminator(nn.Module):
    """images (N, 1, S, S) -> (N, 1 + classes): logit of being real, and logits of the classes."""

    def __init__(self, images: Images, gan: Gan) -> None:
        super().__init__()
        self.features, channels, base = downward(images, gan)
        self.heads = nn.Conv2d(channels, 1 + len(images.classes), base)

    def forward(self, images_N1SS: Tensor, labels_N: Tensor) -> Tensor:
        return self.heads(self.features(images_N1SS)).flatten(1)


SOFTENED = 0.2
"""Label smoothing of what the generator is asked: sure of the class, but not without end. A generator that is paid for
ever clearer cases draws caricatures, and a classifier that learns from them misses patients at the border."""


class ACGAN(Synthesis):
    """Binary cross-entropy and cross-entropy of the class."""

    def build(self) -> tuple[Generator, Discriminator]:
        return Generator(self.images, self.gan), Discriminator(self.images, self.gan)

    def row_losses(self, answers: Tensor, is_real_N: Tensor, labels_N: Tensor) -> Tensor:
        real = functional.binary_cross_entropy_with_logits(answers[:, 0], is_real_N, reduction="none")
        return real + (is_real_N > 0) * functional.cross_entropy(answers[:, 1:], labels_N, reduction="none")

    def fake_loss(self, answers: Tensor, labels_N: Tensor) -> Tensor:
        of_its_class = functional.cross_entropy(answers[:, 1:], labels_N, label_smoothing=SOFTENED)
        return functional.softplus(-answers[:, 0]).mean() + of_its_class


RECIPE = ACGAN

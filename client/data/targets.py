"""An image and its target: the mask of a segmentation, or the same view in another modality.

| the target of an image | what becomes of the image |
|---|---|
| not named in labels.csv, or not a file of the folder (whatever the path: nothing outside is opened) | left out |
| a file that cannot be used for itself: broken, another modality, no Patient ID, burned-in text | left out |
| of another patient | left out |
| of other rows, columns or number of frames | left out |
| of one or several frames | each frame goes with the frame of the same place, where both hold information |
| zeros alone, MONOCHROME2 | used: an empty mask |
| also named by another image of the same patient | used for both |
| with the pixels of another image of the folder | used; that other image is left out, for a target is no image |

A target goes through the same steps as an image (`grayscale`), so equal rows and columns give equal geometry. Resizing
averages: the edge of a mask holds values between -1 and 1, and whoever wants a mask back cuts it at 0. With more than
two values in a mask, averaging would invent classes: give one mask a class, in studies of their own.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedmedgan.client.data.pool import Examined


def pair(
    image: Examined, name: str | None, targets: Mapping[str, Examined]
) -> tuple[np.ndarray | None, np.ndarray | None, str]:
    """Training images of a file and their targets, float16 (N, S, S) each; or twice None and the reason.

    Args:
        image: a file that can be used as an image.
        name: path of its target, relative to the folder; None where labels.csv names none.
        targets: every file of the folder that labels.csv names as a target, by that path.
    """
    target = targets.get(name or "")
    reason = _reason(image, name, target)
    if reason or target is None or image.images is None or target.images is None:
        return None, None, reason
    in_both = np.isin(image.places, target.places)
    if not in_both.any():
        return None, None, "no frame holds information both in it and in its target"
    return image.images[in_both], target.images[np.isin(target.places, image.places)], ""


def _reason(image: Examined, name: str | None, target: Examined | None) -> str:
    """Why a target cannot be used for an image, "" where it can."""
    if name is None:
        return "labels.csv names no target for it"
    if target is None:
        return "its target is not in the folder"
    if target.code:
        return f"its target cannot be used ({target.code})"
    if target.patient != image.patient:
        return "its target is of another patient"
    return "" if target.shape == image.shape else "its target has other rows, columns or frames"

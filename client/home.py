"""What one hospital knows: everything lies in its home folder, so a message can be answered by a new process each time.

    policy.toml            its own rules                     client/policy.py
    study.json             the agreement, signed by all      shared/agreement.py
    noise.json             sigma for this site
    keys/                  identity and key epochs           shared/secure_sum/keys.py
    ledger.jsonl           what was spent, over all studies  shared/privacy/ledger.py
    initial.safetensors    weights to start from, where the study names some
    model.safetensors      the shared model, its round, and the ledger's head then
    optimizers.safetensors its own Adam states, and its discriminator where that is not shared
    update.safetensors     the update of the open round, until its sum was applied
    attempt.json           for which cohort it was sealed last
    outbox.msg             the sealed update as it was sent: sent again byte for byte
    certificates/          each round's certificate, for audit
    rejected.json, rotation-allowed.json                     client/key_epochs.py
    cache/, samples/, events.jsonl

Files are replaced as a whole, after an fsync. The state of the noise generator is never saved: a crash draws new noise.
"""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedmedgan.client import anchors, checkpoint, pretrained
from fedmedgan.client.budget_book import BudgetBook
from fedmedgan.client.data.declared import load_declared
from fedmedgan.client.data.patients import PatientImages
from fedmedgan.client.gans import recipe
from fedmedgan.client.joining import ADAM_STATES, NOISE
from fedmedgan.client.policy import Policy
from fedmedgan.client.release import pictures
from fedmedgan.client.shared_model import DISCRIMINATOR, GENERATOR, SharedModel, part
from fedmedgan.client.training.accountant import ENFORCED
from fedmedgan.client.training.randomness import InsecureRandom, RandomSource, SystemRandom
from fedmedgan.shared.agreement import Agreement
from fedmedgan.shared.errors import (
    DataError,
    ModelError,
    PrivacyError,
    RunError,
    StudyError,
)
from fedmedgan.shared.eventlog import EventLog
from fedmedgan.shared.messages import (
    Envelope,
    Header,
    RoundOpen,
)
from fedmedgan.shared.privacy.budget import Budget
from fedmedgan.shared.privacy.history import History
from fedmedgan.shared.privacy.history import read as read_ledger
from fedmedgan.shared.privacy.ledger import Ledger
from fedmedgan.shared.secure_sum import proof
from fedmedgan.shared.secure_sum.keys import HospitalKeys
from fedmedgan.shared.secure_sum.quantize import plan_for

SAMPLE_COLUMNS = 8
KEPT = "kept."
"""In the file of a hospital's own states: weights that are not shared."""


class Home:
    """One hospital's state, opened from its home folder.

    Args:
        insecure_seed: makes noise and sampling repeatable and worthless; only a simulation can pass it.
    """

    def __init__(self, home: Path, *, insecure_seed: int | None = None) -> None:
        self.home, self.insecure_seed = home, insecure_seed
        self.log = EventLog(home / "events.jsonl")
        self.policy = Policy.load(home / "policy.toml")
        self.keys = HospitalKeys.load(home / "keys")
        self.book = BudgetBook.open(home / self.policy.budget_book)
        self.agreement = Agreement.load(home / "study.json")
        self.study = self.agreement.study
        self.sigma = self._load_sigma()
        self.site = self.study.site(self.policy.site)
        self.index = self.study.index(self.site.name)
        self.recipe = recipe.load(self.study)
        self.networks = pretrained.networks(self.recipe, home)
        self.model, self.applied_round, self.model_ledger = self._load_model()
        self.plan = plan_for(self.study, self.model.size)

    def load_patients(self) -> PatientImages:
        """This hospital's images: of the patients for whom it signed the study, and of no others.

        Raises:
            DataError: DATA_*, among them DATA_CHANGED. StudyError: CONFIG_DELTA.
        """
        began = time.perf_counter()
        patients = load_declared(
            Path(self.policy.data), self.study, self.site, pseudonym_key=self.book.pseudonym_key, home=self.home
        )
        terms = self._ledger_history().terms(self.study.hash)
        if self.study.is_private and (terms is None or terms.dataset != self.book.commitment(patients.pseudonyms)):
            raise DataError("DATA_CHANGED", "the patients are not those for whom the study was signed", self.site.name)
        self.log.write("data_loaded", **patients.report.summary(), seconds=time.perf_counter() - began)
        return patients

    def draw_samples(self) -> None:
        """A picture of the same points after each round: one row a class, or an image and what is made of it."""
        columns, classes = SAMPLE_COLUMNS, len(self.study.images.classes)
        images = self.recipe.samples(self.released_generator(), classes, columns, self.study.gan.init_seed).numpy()
        path = self.home / "samples" / f"round-{self.applied_round:04d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pictures.png(pictures.grid(images, columns)))

    def released_generator(self) -> nn.Module:
        """The generator that images are made with: the moving average where the study takes one. On the CPU."""
        generator = copy.deepcopy(self.networks[0]).cpu()
        weights = self.model.released_generator()
        generator.load_state_dict({n.removeprefix(GENERATOR): torch.from_numpy(a.copy()) for n, a in weights.items()})
        return generator

    def own_discriminator(self) -> nn.Module | None:
        """The discriminator that this hospital trained with, on the CPU: the shared one, or the one that it keeps.

        None where it is not shared and this hospital keeps none, because it never trained. Trained under the budget
        like what is shared, so using it costs nothing.

        Raises:
            ModelError: MODEL_HASH, MODEL_MISMATCH, MODEL_NOT_FINITE.
        """
        discriminator = copy.deepcopy(self.networks[1]).cpu()
        if self.study.aggregation.share == "both":
            return discriminator
        path = self.home / ADAM_STATES
        if not path.exists():
            return None
        arrays, notes = checkpoint.read(path)
        if notes.get("study") != self.study.hash:
            raise ModelError("MODEL_MISMATCH", "the states belong to another study", path.name)
        kept = {name.removeprefix(KEPT): array for name, array in part(arrays, KEPT).items()}
        weights = {**part(self.model.weights, GENERATOR), **part(kept, DISCRIMINATOR)}
        checkpoint.load_networks(weights, copy.deepcopy(self.networks[0]).cpu(), discriminator)
        return discriminator

    @property
    def model_hash(self) -> str:
        return self.model.hash

    def _ledger_history(self) -> History:
        """The verified ledger, which must reach at least to where it was when the model was written."""
        path = self.home / "ledger.jsonl"
        if self.model_ledger[0] and not path.exists():
            raise PrivacyError("LEDGER_ROLLBACK", "the ledger is gone, and the model was trained under it", path.name)
        history = read_ledger(path)
        history.check_anchor(*self.model_ledger)
        self.book.check(history, path)
        return history

    def _open_ledger(self) -> Ledger:
        """The ledger, locked and open for writing. Raises PrivacyError LEDGER_*."""
        return Ledger(self.home / "ledger.jsonl", self.site.name, signing=self.keys.signing, book=self.book.id)

    def _signed(self, header: Header, payload: bytes = b"") -> Envelope:
        return Envelope.seal(header, self.keys.signing, payload)

    @property
    def _model_file(self) -> Path:
        return self.home / "model.safetensors"

    @property
    def _update_file(self) -> Path:
        return self.home / "update.safetensors"

    def _load_sigma(self) -> float:
        """Noise over clipping norm; 0 for a study without privacy, and for no other."""
        try:
            noise = json.loads((self.home / NOISE).read_text(encoding="utf-8"))
            sigma, study = float(noise["noise_multiplier"]), noise["study"]
        except (OSError, ValueError, KeyError, TypeError):
            study, sigma = "", 0.0
        if study != self.study.hash:
            hint = "`fedmedgan study sign` works it out again"
            raise StudyError("STUDY_HASH", "the noise was not worked out for this study", NOISE, hint=hint)
        return sigma

    def _load_model(self) -> tuple[SharedModel, int, anchors.Anchor]:
        """The shared model, its round, and the ledger as it was then; before round 1 the study's initial weights."""
        if not self._model_file.exists():
            return SharedModel.initial(self.study, self.networks), 0, (0, "")
        arrays, notes = checkpoint.read(self._model_file)
        if notes.get("study") != self.study.hash:
            raise ModelError("MODEL_MISMATCH", "the model belongs to another study", self._model_file.name)
        model = SharedModel.of_file(self.study, arrays)
        model.load_into(self.networks)
        return model, int(notes["round"]), (int(notes["ledger_seq"]), str(notes["ledger_head"]))

    def _budget(self, ledger: Ledger) -> Budget:
        p = self.study.privacy
        return Budget(
            ledger,
            study=self.study.hash,
            delta=p.delta,
            study_ceiling=p.epsilon,
            total_ceiling=self.book.ceiling(ledger.history, self.policy.max_epsilon),
            accountants=ENFORCED,
            elsewhere=self.book.spent_elsewhere(ledger.history.ledger_id),
        )

    def _binding(self, message: RoundOpen) -> dict[str, Any]:
        """What a ciphertext, a MAC key and a mask are good for: one attempt, and no other."""
        return {
            "study_hash": self.study.hash,
            "key_id": message.key_id,
            "round": message.round,
            "attempt": message.attempt,
        }

    def _mac_key(self, message: RoundOpen) -> bytes:
        return proof.derive_mac_key(self.keys.mac_root, **self._binding(message))

    def _random(self, round: int) -> RandomSource:
        if self.insecure_seed is None:
            return SystemRandom()
        return InsecureRandom(self.insecure_seed * 1_000_003 + self.index * 10_007 + round)

    def _rounding(self, round: int) -> np.random.Generator:
        """Stochastic rounding works on an update that is already private; numpy's generator is good enough."""
        seed = None if self.insecure_seed is None else [self.insecure_seed, self.index, round]
        return np.random.default_rng(seed)

    def _device(self) -> torch.device:
        wanted = self.policy.device
        if wanted == "cuda" and not torch.cuda.is_available():
            raise RunError("RUN_DEVICE", "no CUDA device is available", "policy.toml: device")
        return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")
